"""Token layouts that are refused, processors that attend in their own way, and compiled blocks."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch._dynamo.testing import CompileCounterWithBackend

import rectified_spaattn as rsa
import tiny_models
from model_cases import CASES, build
from rectified_spaattn import kept_plans
from rectified_spaattn.lab.calls.capture import capture_attention
from rectified_spaattn.pipelines.state import LayerState
from rectified_spaattn.pipelines.tokens import raster_grid
from tiny_models import BATCH, IMAGE, TEXT, VIDEO, noise
from tiny_pipelines import PIPELINES, run

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {"block_size": 16, "neighbours": False, "first_frame": False, "top_p": 0.0}
PLAIN |= {"dense_layers": (), "dense_steps": 0, "backend": "torch"}


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out = model(**inputs, return_dict=False)
    while not isinstance(out, torch.Tensor):
        out = out[0]
    return out


# --- what is no raster grid


@pytest.mark.parametrize("grid", [(1, 16, 12), (3, 8, 8), (4, 1, 5), (1, 1, 7), (2, 6, 1), (1, 300, 260)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_raster_is_counted_even_where_its_numbers_are_rounded(grid: tuple[int, int, int], dtype: torch.dtype) -> None:
    sides = [torch.arange(side, dtype=torch.float32).to(dtype) for side in grid]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 2)
    assert raster_grid(places) == grid


REFUSED = {
    "Flux.2 cache": ("Flux.2", lambda x: {"kv_cache_mode": "extract", "num_ref_tokens": 96}, "kv_cache_mode"),
    "Qwen two sizes": (
        "Qwen-Image",
        lambda x: {"img_shapes": [[(1, 16, 12)], [(1, 12, 16)]]},
        "the same images in every sample",
    ),
    "LTX without a grid": ("LTX-Video", lambda x: {"height": None}, "num_frames, height and width"),
    "Z-Image, two sizes": ("Z-Image", lambda x: {"x": [x["x"][0], x["x"][1][:, :, 2:]]}, "allowed: one size"),
    "Ideogram-4, two documents": (
        "Ideogram-4",
        lambda x: {"segment_ids": torch.cat([x["segment_ids"][:, :-9], x["segment_ids"][:, -9:] + 1], dim=1)},
        "several documents in one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_layouts_are_refused(name: str) -> None:
    case, change, message = REFUSED[name]
    model, inputs = build(case, CASES[case].head_dims[0])
    with rsa.enable(model, sparsity=0.8, **PLAIN), pytest.raises(ValueError, match=message):
        forward(model, {**inputs, **change(inputs)})


def test_block_causal_video_is_refused() -> None:
    model, inputs = build("SkyReels-V2 T2V", 16)
    model._set_ar_attention(2)
    with rsa.enable(model, **PLAIN), pytest.raises(ValueError, match="causal over blocks of frames"):
        forward(model, inputs)


def test_shapes_outside_a_list_are_understood() -> None:
    """As Qwen-Image's ControlNet pipeline gives them."""
    model, inputs = build("Qwen-Image", 16)
    inputs["img_shapes"] = [IMAGE] * BATCH
    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        forward(model, inputs)
        assert handle.stats().sparse_calls == 2


# --- models with a sparse attention, or layers, of which a forward may do without


def test_kandinsky_runs_without_its_own_sparse_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "VIDEO", (3, 8, 8))  # squares of 8 x 8 are its blocks
    model, inputs = build("Kandinsky 5", 16)
    own = {"sparse_params": {"sta_mask": torch.zeros(1, 1, 3, 3, dtype=torch.bool), "P": 0.2, "to_fractal": True}}
    dense = forward(model, inputs)
    with rsa.enable(model, sparsity=0.0, **PLAIN):
        torch.testing.assert_close(forward(model, {**inputs, **own}), dense, rtol=1e-4, atol=1e-5)
    with rsa.enable(model, **{**PLAIN, "order": "gilbert"}), pytest.raises(ValueError, match="that lie in no grid"):
        forward(model, {**inputs, **own})


def test_layers_for_references_need_not_be_called() -> None:
    model, inputs = build("Flux.3", 16)
    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        for _ in range(2):  # a warning would come with the second
            forward(model, inputs)
        assert "NOT CALLED" not in handle.summary()
        assert handle.stats().sparse_calls == 2 * 2


# --- processors


class OwnAttention:
    """Somebody's processor that never asks the dispatcher."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("name", ["Wan 2.1 T2V", "CogVideoX 1.5 T2V", "Flux.1"])
def test_a_processor_that_attends_by_itself_is_refused(name: str) -> None:
    model, _ = build(name, 16)
    blocks = [block for blocks in ("blocks", "transformer_blocks") for block in getattr(model, blocks, [])]
    attention = getattr(blocks[-1], "attn1", None) or blocks[-1].attn
    attention.set_processor(OwnAttention())
    before = model.attn_processors
    with pytest.raises(TypeError, match="OwnAttention, which calls its attention itself"):
        rsa.enable(model)
    assert all(model.attn_processors[key] is before[key] for key in before)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["CogVideoX 1.0", "CogVideoX 1.5 T2V"])
def test_cogvideox_with_fused_projections(name: str) -> None:
    model, inputs = build(name, 16)
    model.fuse_qkv_projections()
    untouched = forward(model, inputs)
    with rsa.enable(model, sparsity=0.0, **PLAIN) as handle:
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)
        assert handle.stats().sparse_calls == 2
    assert all(type(p) is FusedCogVideoXAttnProcessor2_0 for p in model.attn_processors.values())
    model.unfuse_qkv_projections()
    with rsa.enable(model, sparsity=0.0, **PLAIN):
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)
    assert all(type(p) is CogVideoXAttnProcessor2_0 for p in model.attn_processors.values())


def test_cogvideox_unfused_again_uses_its_weights_of_now() -> None:
    model, inputs = build("CogVideoX 1.5 T2V", 16)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    with torch.no_grad():  # as a LoRA that is loaded now
        model.transformer_blocks[0].attn1.to_k.weight.mul_(-1)
    untouched = forward(model, inputs)
    with rsa.enable(model, sparsity=0.0, **PLAIN):
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["CogVideoX 1.0", "CogVideoX 1.5 I2V", "HunyuanVideo 1.5 T2V", "HunyuanVideo 1.5 I2V"])
def test_dense_calls_of_our_own_processors_equal_the_stock_ones(name: str) -> None:
    model, inputs = build(name, 16)
    untouched = forward(model, inputs)
    with rsa.enable(model, **{**PLAIN, "dense_layers": (0, 1)}) as handle:
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-5, atol=1e-6)
        assert handle.stats().dense_reasons == {"dense_layers": 2}


def test_hunyuan_15_never_sees_a_square_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("HunyuanVideo 1.5 I2V", 16)
    masks = []
    attend = LayerState.attend

    def recorded(layer: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: Any) -> Any:
        masks.append(mask)
        return attend(layer, q, k, v, mask, scale)

    monkeypatch.setattr(LayerState, "attend", recorded)
    with rsa.enable(model, sparsity=0.8, **PLAIN):
        forward(model, inputs)
    video, text = VIDEO[0] * VIDEO[1] * VIDEO[2], 15
    for mask in masks:
        assert mask.shape == (BATCH, 1, 1, video + text)
        # an image of 3 and 7 words; an image of 3, 2 words and 4 glyphs
        assert mask[:, 0, 0, video:].sum(1).tolist() == [3 + 7, 3 + 2 + 4]


@pytest.mark.parametrize(("name", "longest"), [("HunyuanVideo 1.5 T2V", 7), ("HunyuanVideo 1.5 I2V", 10)])
def test_hunyuan_15_leaves_out_what_is_padding_in_every_row(
    name: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(name, 16)
    lengths = []

    def recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: rsa.TokenLayout, *rest: Any, **more: Any):
        lengths.append(layout.text)
        return rsa.rectified_attention(q, k, v, layout, *rest, **more)

    monkeypatch.setattr(kept_plans, "rectified_attention", recorded)
    with rsa.enable(model, sparsity=0.8, **PLAIN):
        both = forward(model, inputs)
        first, second = ({key: value[row : row + 1] for key, value in inputs.items()} for row in range(BATCH))
        alone = torch.cat([forward(model, first), forward(model, second)])
    assert lengths == [longest] * 4 + [longest - 1] * 2  # two layers: both rows, the first, the second
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


@pytest.fixture
def flux_with_ip_adapter() -> tuple[Any, dict[str, Any]]:
    model, inputs = build("Flux.1", 16)
    torch.manual_seed(4)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 20, num_tokens=(4,), scale=0.7))
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [noise(BATCH, 4, 20)]}
    return model, inputs


def test_an_ip_adapter_keeps_its_cross_attention(flux_with_ip_adapter: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = flux_with_ip_adapter
    adapter = model.transformer_blocks[0].attn.processor
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    untouched = forward(model, inputs)
    with rsa.enable(model, sparsity=0.0, **PLAIN):
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)
    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        assert isinstance(model.transformer_blocks[0].attn.processor, FluxIPAdapterAttnProcessor)
        assert model.state_dict().keys() == weights.keys()
        sparse = forward(model, inputs)
        without = forward(model, {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [noise(BATCH, 4, 20) * 0]}})
        assert not torch.equal(sparse, without)  # the image prompt still counts
        assert handle.stats().sparse_calls == 6
        assert handle.stats().dense_calls == 0
    assert model.transformer_blocks[0].attn.processor is adapter
    assert torch.equal(forward(model, inputs), untouched)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_ip_adapter_in_compiled_blocks(flux_with_ip_adapter: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = flux_with_ip_adapter
    compiled_equals_eager(model, inputs, 3)


# --- torch.compile


def compiled_equals_eager(model: Any, inputs: dict[str, Any], calls: int) -> None:
    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        eager = forward(model, inputs)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        for module in model.modules():
            if type(module).__name__ in {type(block).__name__ for block in blocks_of(model)}:
                module.compile(fullgraph=True, backend=counter)
        compiled = forward(model, inputs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(forward(model, inputs), compiled)
        assert handle.stats().sparse_calls == 3 * calls
        assert counter.frame_count
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def blocks_of(model: Any) -> list[torch.nn.Module]:
    names = ("blocks", "vace_blocks", "transformer_blocks", "single_transformer_blocks", "layers", "double_blocks")
    names += ("visual_transformer_blocks", "noise_refiner")
    return [block for name in names for block in getattr(model, name, [])]


# with processors of ours, or attention over several sequences
LATER = ["Cosmos Predict 1, 2", "Cosmos 3", "Flux.3 with a reference", "Ideogram-4", "Kandinsky 5", "Kandinsky 6 SR"]
LATER += ["MiniMax-H3", "Mochi", "Motif-Video", "SD3.5", "Z-Image"]


@pytest.mark.parametrize(
    "name",
    [
        "Wan VACE",
        "SkyReels-V2 T2V",
        "HunyuanVideo 1.5 I2V",
        "HunyuanVideo I2V, token replaced",
        "CogVideoX 1.5 T2V",
        "Flux.1",
        "Flux.2",
        "Qwen-Image",
        "LTX-Video",
        "LTX-2",
        "Allegro",
        *(pytest.param(name, marks=pytest.mark.slow) for name in LATER),
    ],
)
def test_compiled_blocks(name: str) -> None:
    model, inputs = build(name, CASES[name].head_dims[0])
    compiled_equals_eager(model, inputs, CASES[name].calls)


# --- what else looks through the seam


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler scheduler
@torch.no_grad()
def test_capture_sees_cogvideox_as_it_is() -> None:

    case = PIPELINES["CogVideoX 1.5 T2V"]
    pipeline, arguments = case.make(), case.arguments()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()  # one that tells its step
    before = pipeline.transformer.attn_processors
    with capture_attention(pipeline, steps=[1]) as calls:
        captured = run(pipeline, arguments)
    torch.testing.assert_close(captured, run(pipeline, arguments), rtol=1e-4, atol=1e-5)
    assert [(call.layer, call.layout.grid, call.layout.grid_start) for call in calls] == [
        (0, VIDEO, TEXT),
        (1, VIDEO, TEXT),
    ]
    assert calls[0].q.shape == (2, 192 + TEXT, 2, 16)
    assert all(pipeline.transformer.attn_processors[name] is before[name] for name in before)
