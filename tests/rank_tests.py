"""What every process of a group runs in step with the others.

    torchrun --nproc-per-node 2 -m pytest --noconftest -p rank_group tests/rank_tests.py

Over gloo with tiny models on a CPU, where `test_ranks.py` starts it, or over NCCL on as many GPUs. Each forward of a
model that is cut is compared with the same forward in one process. In every test all ranks do the same, also where they
are refused: none is left waiting.
"""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig

import rectified_spaattn as rsa
import tiny_models
from model_cases import CASES
from rank_group import (
    CONTENT,
    COUNT,
    GPU,
    PAPER,
    RANK,
    REFUSED,
    UNEVEN,
    apart,
    assert_same,
    forward,
    made,
    moved,
    moved_model,
    on_all_ranks,
    sparse,
)
from rectified_spaattn.layout import TokenLayout
from rectified_spaattn.pipelines.adapters import adapter_for
from rectified_spaattn.pipelines.plans import cp_plan

SLOW = GPU or "RANK_TESTS_SLOW" in os.environ
FIRST_OF_KIND = {case.kind: name for name, case in reversed(CASES.items())}.values()
EVERY = [name for name in CASES if name != REFUSED and (SLOW or name in FIRST_OF_KIND)]


@pytest.mark.skipif(COUNT != 2, reason="these models have two heads")
@pytest.mark.parametrize("name", EVERY)
def test_every_model_and_back(name: str) -> None:
    """Both orders of tokens; enabled after it was cut, then disabled, which leaves the dense model cut. Where nobody
    says how to cut a model, it is refused.
    """
    model, inputs = made(name)
    if cp_plan(model) is None:
        on_all_ranks(RuntimeError, "nobody has a plan", lambda: rsa.parallelize(model))
        return
    dense = forward(model, inputs)
    in_grid = all(layout.grid is not None for layout in adapter_for(model).layouts(model, inputs))
    alone = {config: sparse(model, inputs, config) for config in (CONTENT, PAPER)[: 1 + in_grid]}
    assert apart(alone[CONTENT], dense) > 2e-4
    rsa.parallelize(model, uneven=name.startswith(UNEVEN))
    cut_dense = forward(model, inputs)
    noise = apart(cut_dense, dense)
    assert noise < (2e-2 if GPU else 1e-5)
    for config in alone:
        assert_same(sparse(model, inputs, config), alone[config], noise, dense)
    assert torch.equal(forward(model, inputs), cut_dense)


def four_heads(name: str) -> tuple[Any, dict[str, Any]]:
    make, inputs = {
        "wan": (tiny_models.wan, tiny_models.wan_token_timesteps),
        "hunyuan": (tiny_models.hunyuan, tiny_models.hunyuan_inputs),
        "flux": (tiny_models.flux, tiny_models.flux_inputs),
        "cogvideox": (tiny_models.cogvideox15, tiny_models.cogvideox_inputs),
    }[name]
    torch.manual_seed(0)
    width = 64 if GPU and name == "cogvideox" else 128 if GPU else 16
    model = moved_model(make(width, num_attention_heads=4).eval())
    return model, {key: moved(value) for key, value in inputs(model).items()}


def is_cut_right(model: Any, inputs: dict[str, Any], uneven: bool = False) -> None:
    dense, alone = forward(model, inputs), sparse(model, inputs, CONTENT)
    rsa.parallelize(model, uneven=uneven)
    cut_dense = forward(model, inputs)
    assert apart(cut_dense, dense) < (2e-2 if GPU else 1e-5)
    assert_same(sparse(model, inputs, CONTENT), alone, apart(cut_dense, dense), dense)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "cogvideox"])
def test_four_heads_on_two_or_four_ranks(name: str) -> None:
    is_cut_right(*four_heads(name))


@pytest.mark.parametrize(
    ("name", "text"), [("hunyuan", 11), ("flux", 9), *([("hunyuan", 9), ("flux", 11)] if SLOW else [])]
)
def test_text_of_uneven_length(name: str, text: int) -> None:
    model, inputs = four_heads(name)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :text]
    if name == "flux":
        inputs["txt_ids"] = inputs["txt_ids"][:text]
    else:
        inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"][:, :text]
    is_cut_right(model, inputs, uneven=True)


@pytest.mark.skipif(not GPU, reason="gloo gathers no parts of different lengths")
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_video_of_uneven_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "VIDEO", (3, 17, 31))
    monkeypatch.setattr(tiny_models, "IMAGE", (1, 33, 63))
    is_cut_right(*four_heads(name), uneven=True)


@pytest.mark.skipif(GPU, reason="attention changes these models by less than bfloat16 does; see the layer below")
@pytest.mark.parametrize("name", ["hunyuan", "flux", *(["cogvideox"] if SLOW else [])])
def test_without_the_places_it_is_another_video(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: tokens lie in the order of the ranks, and blocks cut in the model's order are wrong."""
    model, inputs = four_heads(name)
    dense, alone = forward(model, inputs), sparse(model, inputs, CONTENT)
    rsa.parallelize(model)
    monkeypatch.setattr(TokenLayout, "cut", lambda layout, streams, ranks: layout)
    cut = sparse(model, inputs, CONTENT)
    assert apart(cut, alone) > max(1e-3, 0.5 * apart(alone, dense))
    with pytest.raises(AssertionError):
        assert_same(cut, alone, apart(forward(model, inputs), dense), dense)


def test_a_forward_reads_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are compiled before their first forward cannot: some versions of torch refuse it."""
    model, inputs = four_heads("wan")
    rsa.parallelize(model)
    monkeypatch.setattr("inspect.signature", lambda *_: pytest.fail("read a signature"))
    forward(model, inputs)


ORDERS = [("cogvideox", order) for order in ("enable first", "parallelize first", "by diffusers")]


@pytest.mark.parametrize(("name", "order"), [("wan", "by diffusers"), *ORDERS])
def test_enable_and_parallelize_in_any_order(name: str, order: str) -> None:
    """CogVideoX's own processor cannot be cut: after disabling one that can is there."""
    model, inputs = four_heads(name)
    dense, alone = forward(model, inputs), sparse(model, inputs, CONTENT)
    if order == "by diffusers":
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=COUNT), cp_plan=cp_plan(model))
    if order == "parallelize first":
        rsa.parallelize(model)
    handle = rsa.enable(model, CONTENT)
    if order == "enable first":
        rsa.parallelize(model)
    cut = forward(model, inputs)
    assert handle.stats().dense_calls == 0
    handle.disable()
    cut_dense = forward(model, inputs)
    assert_same(cut, alone, apart(cut_dense, dense), dense)
    assert apart(cut_dense, dense) < (2e-2 if GPU else 1e-5)
    assert apart(cut, cut_dense) > 1e-3


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_guidance_as_two_calls_is_guidance_as_one_batch(name: str) -> None:
    model, inputs = four_heads(name)
    rows = [
        {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        for row in range(2)
    ]
    rsa.parallelize(model)
    with rsa.enable(model, CONTENT):
        together = forward(model, inputs)
        alone = torch.cat([forward(model, row) for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-2 if GPU else 1e-5)


def test_a_mask_of_the_video_and_dense_layers() -> None:
    """Flux takes any key mask: hidden tokens stand alone, and a dense layer gets the mask in the ranks' order."""
    model, inputs = four_heads("flux")
    tokens = inputs["hidden_states"].shape[1] + inputs["encoder_hidden_states"].shape[1]
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool, device=inputs["hidden_states"].device)
    mask[0, ..., 5:9], mask[1, ..., 40:77] = False, False
    masked = {**inputs, "joint_attention_kwargs": {"attention_mask": mask}}
    config = CONTENT.replace(dense_layers=(1,))
    open_dense, dense, alone = forward(model, inputs), forward(model, masked), sparse(model, masked, config)
    rsa.parallelize(model)
    cut = sparse(model, masked, config)
    if GPU:
        assert_same(cut, alone, apart(forward(model, inputs), open_dense), dense)
    else:
        torch.testing.assert_close(cut, alone, rtol=1e-4, atol=1e-5)


def test_statistics_are_of_all_ranks_and_on_every_one() -> None:
    """With top_p heads differ; the mean is that of one process, and the spread is that between its halves."""
    model, inputs = four_heads("hunyuan")
    config = PAPER.replace(top_p=0.9, sparsity=0.9, neighbours=False)
    with rsa.enable(model, config) as handle:
        forward(model, inputs)
        alone = handle.stats()
        assert alone.rank_densities == ()
        assert "ranks" not in handle.summary()
    rsa.parallelize(model)
    with rsa.enable(model, config) as handle:
        forward(model, inputs)
        if RANK == 0:  # no other rank has to ask with it
            assert f"{COUNT} ranks: densities" in handle.summary()
        stats = handle.stats()
    assert stats.density == pytest.approx(alone.density, rel=2e-2 if GPU else 1e-6)
    assert [layer.sparse_calls for layer in stats.layers] == [layer.sparse_calls for layer in alone.layers]
    assert len(set(stats.rank_densities)) > 1
    assert len(stats.rank_densities) == COUNT
    assert sum(stats.rank_densities) / COUNT == pytest.approx(stats.density, rel=1e-5)
    assert max(stats.rank_densities) / stats.density - 1 <= stats.imbalance + 1e-6
    told: list[Any] = [None] * COUNT
    dist.all_gather_object(told, stats)
    assert {repr(each) for each in told} == {repr(stats)}  # NaN is what was not measured


# TeaCache: every rank leaves out the same steps, those that one process does


def denoise(model: Any, inputs: dict[str, Any], threshold: float) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Eight steps, the last four of smaller and smaller changes; the last output, and the skipped steps."""
    latents = inputs["hidden_states"]
    with rsa.enable_teacache(model, threshold=threshold) as cache, rsa.enable(model, CONTENT) as handle:
        for step in range(8):
            for each in (cache, handle):
                each.set_step(step, 8)
            level = 1 - 0.1 * min(step, 4) - 0.002 * step
            given = {**inputs, "hidden_states": latents * level}
            given["timestep"] = (inputs["timestep"] * level).to(inputs["timestep"].dtype)
            out = forward(model, given)
        [branch] = cache.stats().branches
    return out, branch.skipped_steps


@pytest.mark.parametrize(  # by default one model a signal
    ("name", "threshold"), [("wan", 0.4), ("hunyuan", 0.15), *([("flux", 0.6), ("cogvideox", 1.0)] if SLOW else [])]
)
def test_teacache_decides_alike(name: str, threshold: float) -> None:
    model, inputs = four_heads(name)
    if name == "wan":
        inputs["timestep"] = inputs["timestep"][:, 0] + 500  # every token's, and the first frame's is 0
    dense = forward(model, inputs)
    alone, skipped = denoise(model, inputs, threshold)
    assert 0 < len(skipped) < 7, skipped
    rsa.parallelize(model)
    cut, cut_skipped = denoise(model, inputs, threshold)
    assert cut_skipped == skipped
    assert_same(cut, alone, apart(forward(model, inputs), dense), dense)


# what cannot work


def test_what_cannot_be_cut_is_refused_on_every_rank() -> None:
    model, inputs = four_heads("wan")
    rsa.enable(model, CONTENT)
    ring = ContextParallelConfig(ring_degree=COUNT)
    model.enable_parallelism(config=ring)
    on_all_ranks(RuntimeError, "ring_degree.*Use ContextParallelConfig", lambda: forward(model, inputs))
    on_all_ranks(RuntimeError, "cut over processes already", lambda: rsa.parallelize(model))

    torch.manual_seed(0)
    odd = moved_model(tiny_models.wan(128 if GPU else 16, num_attention_heads=5).eval())
    on_all_ranks(RuntimeError, r"got 5 heads.*Start \[5\] processes", lambda: rsa.parallelize(odd))
    rsa.enable(odd, CONTENT)
    odd.enable_parallelism(config=ContextParallelConfig(ulysses_degree=COUNT))
    on_all_ranks(RuntimeError, "got 5 heads", lambda: forward(odd, inputs))

    on_all_ranks(ValueError, "ulysses_degree", lambda: rsa.parallelize(four_heads("wan")[0], COUNT + 1))


@pytest.mark.skipif(COUNT != 2, reason="this model has two heads")
def test_token_replace_is_refused() -> None:
    model, _ = made(REFUSED)
    on_all_ranks(RuntimeError, "token_replace.*in one process", lambda: rsa.parallelize(model))


def test_a_length_that_is_not_divided_is_refused_with_the_remedy() -> None:
    model, inputs = four_heads("flux")
    inputs["encoder_hidden_states"], inputs["txt_ids"] = inputs["encoder_hidden_states"][:, :11], inputs["txt_ids"][:11]
    rsa.parallelize(model)
    with rsa.enable(model, CONTENT):
        on_all_ranks(RuntimeError, r"11 and \d+ tokens.*uneven=True", lambda: forward(model, inputs))


def test_other_noise_on_another_rank_is_refused() -> None:
    model, inputs = four_heads("wan")
    rsa.parallelize(model)
    inputs["hidden_states"] = inputs["hidden_states"] + RANK
    with rsa.enable(model, CONTENT):
        on_all_ranks(RuntimeError, "different latents.*manual_seed", lambda: forward(model, inputs))


def test_first_block_cache_is_refused() -> None:
    model, inputs = four_heads("flux")
    rsa.parallelize(model)
    with rsa.enable(model, CONTENT):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        on_all_ranks(RuntimeError, "FirstBlockCache.*enable_teacache", lambda: forward(model, inputs))


# compiled


COMPILERS = ["inductor"] if GPU else ["aot_eager"]


@pytest.mark.skipif(not SLOW, reason="slow")
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_compiled_blocks(name: str, compiler: str) -> None:
    model, inputs = four_heads(name)
    torch._dynamo.reset()
    dense = forward(model, inputs)
    rsa.parallelize(model)
    with rsa.enable(model, CONTENT):
        eager = forward(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend=compiler)
        assert_same(forward(model, inputs), eager, 1e-2, dense)
        heads = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]], device=inputs["hidden_states"].device)
        for each in model.attn_processors.values():  # as where heads are dealt out
            if getattr(each, "rectified_layer", None) is not None:
                each.rectified_layer.heads = heads
        assert_same(forward(model, inputs), eager, 1e-2, dense)


@pytest.mark.skipif(not GPU, reason="kernels of a GPU")
@pytest.mark.parametrize("backend", ["triton", "fa4"])
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_every_backend(name: str, backend: str) -> None:
    model, inputs = four_heads(name)
    dense, alone = forward(model, inputs), sparse(model, inputs, CONTENT, backend)
    rsa.parallelize(model)
    assert_same(sparse(model, inputs, CONTENT, backend), alone, apart(forward(model, inputs), dense), dense)
