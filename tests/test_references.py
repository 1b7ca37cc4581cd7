"""Reference images, keyframes, edits and layers: more tokens that can be tiled, which lie in no grid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
import tiny_models
from model_cases import CASES, build, built
from rectified_spaattn.pipelines.state import LayerState
from tiny_models import BATCH, image_ids, noise
from tiny_pipelines import PIPELINES, picture, run

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {"block_size": 16, "neighbours": False, "first_frame": False, "top_p": 0.0}
PLAIN |= {"dense_layers": (), "dense_steps": 0, "backend": "torch"}


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def shuffled() -> torch.Tensor:
    ids = image_ids(16, 12)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


IDS = {
    "shuffled": shuffled(),
    "column by column": image_ids(16, 12)[torch.arange(192).view(16, 12).T.flatten()],
    "a reference of the same size": torch.cat([image_ids(8, 12), image_ids(8, 12, frame=1)]),
    "a smaller reference": torch.cat([image_ids(10, 12), image_ids(6, 12, frame=1)]),
    "a narrower reference": torch.cat([image_ids(12, 12), image_ids(8, 6, frame=1)]),
    "two images of one frame": torch.cat([image_ids(8, 12), image_ids(8, 12)]),
    "upside down": image_ids(16, 12).flip(0),
}


def flux(ids: torch.Tensor) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: {"img_ids": ids, "hidden_states": noise(BATCH, len(ids), 4)}


def flux2(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = torch.cat([image_ids(8, 12, columns=4), image_ids(8, 12, columns=4, frame=10)])
    return {"img_ids": ids.expand(BATCH, -1, -1)}


def flux2_layers(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["img_ids"].clone()
    ids[:, 96:, 3] = 1
    return {"img_ids": ids}


def qwen(*shapes: tuple[int, int, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    count = sum(t * h * w for t, h, w in shapes)
    return lambda inputs: {"img_shapes": [list(shapes)] * BATCH, "hidden_states": noise(BATCH, count, 16)}


def ltx_keyframe(inputs: dict[str, Any]) -> dict[str, Any]:
    coords = inputs["video_coords"]
    return {
        "video_coords": torch.cat([coords, coords[:, :, :48] + 0.1], dim=2),
        "hidden_states": noise(BATCH, 240, 4),
    }


def more_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_states": noise(BATCH, 200, 4), "video_coords": noise(BATCH, 3, 200)}


# case, what changes in its forward arguments, tokens that can be tiled
REFERENCES = {
    **{f"Flux.1, {name}": ("Flux.1", flux(ids), len(ids)) for name, ids in IDS.items()},
    "Flux.1 Kontext": ("Flux.1", flux(torch.cat([image_ids(16, 12), image_ids(16, 12, frame=1)])), 384),
    "LongCat-Image, editing": ("LongCat-Image", flux(torch.cat([image_ids(16, 12), image_ids(8, 12, frame=1)])), 288),
    "Flux.2, a reference": ("Flux.2", flux2, 192),
    "Flux.2, layers": ("Flux.2", flux2_layers, 192),
    "Qwen-Image, editing": ("Qwen-Image", qwen((1, 16, 12), (1, 10, 8)), 272),
    "Qwen-Image, layers": ("Qwen-Image", qwen((1, 8, 12), (1, 8, 12), (1, 8, 12)), 288),
    "LTX-Video, a keyframe": ("LTX-Video, conditions", ltx_keyframe, 240),
    "LTX-Video, tokens beside the grid": ("LTX-Video", more_tokens, 200),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_all_of_them_are_tiled(name: str) -> None:
    case, change, tiled = REFERENCES[name]
    model, inputs = built(case, CASES[case].head_dims[0])
    inputs = {**inputs, **change(inputs)}
    untouched = forward(model, inputs)
    with rsa.enable(model, sparsity=0.0, **PLAIN) as handle:
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)
        assert handle.stats().density == pytest.approx(1.0)
    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        assert (forward(model, inputs) - untouched).abs().max() > 1e-4 * untouched.abs().max()
        blocks, whole = tiled // 16, tiled + CASES[case].text
        dropped = (1 - int((1 - 0.8) * blocks) / blocks) * 15 / 16  # a key for each other block
        density = 1 - dropped * (16 * blocks / whole) ** 2  # all else is seen
        assert handle.stats().density == pytest.approx(density, abs=0.03)  # but for masked text
        assert handle.stats().dense_calls == 0
    assert torch.equal(forward(model, inputs), untouched)


@pytest.mark.parametrize("name", ["Flux.1, shuffled", "Flux.1 Kontext", "Qwen-Image, editing", "LTX-Video, a keyframe"])
def test_an_order_in_space_is_refused(name: str) -> None:
    case, change, _ = REFERENCES[name]
    model, inputs = built(case, CASES[case].head_dims[0])
    message = "order: got 'gilbert' for tokens that lie in no grid.*allowed: 'content'"
    with rsa.enable(model, sparsity=0.8, **PLAIN, order="gilbert"), pytest.raises(ValueError, match=message):
        forward(model, {**inputs, **change(inputs)})


@pytest.mark.parametrize(
    ("name", "made"), [("Flux.1 Kontext", slice(768, None)), ("MiniMax-H3, references", slice(-768))]
)
def test_what_a_reference_of_the_same_length_costs(name: str, made: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80%, of all pairs: at most a quarter, where exact references would cost most of them."""
    monkeypatch.setattr(tiny_models, "VIDEO", (4, 12, 16))  # long beside the sound
    longer = flux(torch.cat([image_ids(32, 24), image_ids(32, 24, frame=1)]))
    case, change = ("Flux.1", longer) if name == "Flux.1 Kontext" else (name, lambda inputs: {})
    model, inputs = build(case, CASES[case].head_dims[0])
    exact = []
    attend = LayerState.attend

    def compared(layer: LayerState, q: Any, k: Any, v: Any, *others: Any) -> torch.Tensor:
        layout = layer._layout(q.shape[1])
        alone = layout.without(layout.video_places[made].tolist())
        _, stats = rsa.rectified_attention(q, k, v, alone, layer.owner.config, return_stats=True)
        exact.append(stats.density)
        return attend(layer, q, k, v, *others)

    monkeypatch.setattr(LayerState, "attend", compared)
    with rsa.enable(model, sparsity=0.8, **{**PLAIN, "block_size": 64}) as handle:
        forward(model, {**inputs, **change(inputs)})
        assert handle.stats().density <= 0.25
    assert min(exact) >= 0.58


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' flow matching scheduler
@pytest.mark.parametrize(("frame", "tokens"), [(0, 192), (8, 240)])
def test_ltx_with_a_picture_for_one_frame(frame: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame's picture takes the place of its tokens; any other one comes as more tokens."""
    case, seen = PIPELINES["LTX-Video, conditions"], set()
    attend = LayerState.attend

    def noted(layer: LayerState, q: Any, *others: Any) -> torch.Tensor:
        seen.add((q.shape[1], layer._layout(q.shape[1]).video))
        return attend(layer, q, *others)

    monkeypatch.setattr(LayerState, "attend", noted)
    pipeline, arguments = case.make(), {**case.arguments(), "image": picture(256, 192), "frame_index": frame}
    with rsa.enable(pipeline, sparsity=0.8, **PLAIN) as handle:
        run(pipeline, arguments)
        assert handle.stats().sparse_calls == 4
    assert seen == {(tokens, tokens)}
