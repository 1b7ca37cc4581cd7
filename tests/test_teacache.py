"""TeaCache on real diffusers transformers with tiny random weights: which steps are skipped, and what is added."""

import itertools

import pytest
import torch

import rectified_spaattn as rsa
import tiny
from rectified_spaattn.pipelines.teacache.models import CACHED_MODELS
from teacache_cases import (
    HUGE,
    MODELS,
    Calls,
    at_step,
    blocks_of,
    first_steps,
    flux_inputs,
    flux_transformer,
    forward,
    walk,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def test_threshold_zero_computes_everything_bit_for_bit(kind):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    untouched = walk(model, inputs, None)
    calls = Calls(model)
    with rsa.enable_teacache(model, threshold=0) as handle:
        assert torch.equal(walk(model, inputs, handle), untouched)
        assert calls.take() == 8
        assert handle.stats().skipped == 0


def test_a_huge_threshold_computes_the_first_and_last_steps_alone(kind):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    untouched = walk(model, inputs, None)
    first = first_steps(kind)
    calls = Calls(model)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        cached = walk(model, inputs, handle)
        assert calls.take() == first + 1
        stats = handle.stats()
        assert (stats.steps, stats.computed, stats.skipped) == (8, first + 1, 7 - first)
        assert stats.branches[0].skipped_steps == tuple(range(first, 7))
        assert f"{7 - first} of them skipped" in handle.summary()
    assert torch.equal(cached[:first], untouched[:first])
    assert torch.equal(cached[-1], untouched[-1])
    for step in range(first, 7):
        assert not torch.equal(cached[step], untouched[step])
        assert not torch.equal(cached[step], cached[step - 1])  # the rest of the model runs at the step it is


def test_a_skipped_step_adds_what_the_blocks_added_last(kind):
    """The input of the layer after the blocks, caught by a hook: first block's input + residual of the step before."""
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    after = {"wan": "norm_out", "cogvideox": "norm_final"}.get(kind.partition("-")[0], "norm_out")
    ends, starts = [], []
    getattr(model, after).register_forward_pre_hook(lambda _, args: ends.append(args[0]))
    embedder = {"wan": "patch_embedding", "cogvideox": "patch_embed"}.get(kind.partition("-")[0], "x_embedder")

    def embedded(_, args, output):
        if kind.startswith("wan"):
            output = output.flatten(2).transpose(1, 2)
        starts.append(output[:, 12:] if kind == "cogvideox" else output)

    getattr(model, embedder).register_forward_hook(embedded)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        walk(model, inputs, handle)
    last_computed = first_steps(kind) - 1
    residual = ends[last_computed] - starts[last_computed]
    for step in range(last_computed + 1, 7):
        torch.testing.assert_close(ends[step], starts[step] + residual, rtol=1e-6, atol=1e-6)


def modulated(model, inputs):
    """The first block's input to its attention, caught inside of the untouched model."""
    seen = []
    block = blocks_of(model)[0]
    if hasattr(model, "condition_embedder"):
        hook = model.condition_embedder.time_proj.register_forward_hook(lambda m, a, output: seen.append(output))
    elif hasattr(model, "time_embedding"):
        hook = model.time_embedding.register_forward_hook(lambda m, a, output: seen.append(output))
    else:
        hook = block.norm1.register_forward_hook(lambda m, a, output: seen.append(output[0]))
    forward(model, inputs)
    hook.remove()
    return seen[0][:, -1] if seen[0].ndim == 3 and hasattr(model, "condition_embedder") else seen[0]


def test_the_pattern_is_the_accumulated_distance(kind):
    """Which steps are skipped, against a few lines that know the published rule and nothing of the code."""
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    total, pace = 16, 0.03
    if kind.startswith("wan"):  # changes of a few percent, as in the real model and where its fit is above zero
        torch.nn.init.constant_(model.condition_embedder.time_proj.bias, 0.5)
    signals = [modulated(model, at_step(inputs, step, total, pace)).double() for step in range(total)]
    fit = CACHED_MODELS[type(model).__name__].fit(model, None)
    changes = [float((new - old).abs().mean() / old.abs().mean()) for old, new in itertools.pairwise(signals)]
    powers = range(len(fit.coefficients) - 1, -1, -1)
    distances = [sum(c * x**p for c, p in zip(fit.coefficients, powers, strict=True)) for x in changes]
    patterns = set()
    usual = sorted(distances[fit.first_steps - 1 :])[len(distances) // 3]
    for threshold in [usual * factor for factor in (0.5, 1.1, 1.6, 2.1, 2.4, 2.8, 3.1, 3.4, 4.3, 5.7, 7.9, 20.0)]:
        expected, accumulated = [], 0.0
        for step in range(total):
            if step < fit.first_steps or step == total - 1:
                accumulated = 0.0
                continue
            accumulated += distances[step - 1]
            if accumulated < threshold:
                expected.append(step)
            else:
                accumulated = 0.0
        with rsa.enable_teacache(model, threshold=threshold) as handle:
            walk(model, inputs, handle, total, pace=pace)
            assert handle.stats().branches[0].skipped_steps == tuple(expected)
        patterns.add(tuple(expected))
    assert len(patterns) > 6


def test_each_branch_has_its_own_state():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1) * 2}
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        alone = walk(model, inputs, handle, branch="cond")
        alone_other = walk(model, other, handle, branch="uncond")
        together = []
        for step in range(8):
            handle.set_step(step, 8)
            together.append(
                (
                    forward(model, at_step(inputs, step, 8), "cond"),
                    forward(model, at_step(other, step, 8), "uncond"),
                )
            )
        assert torch.equal(torch.stack([a for a, _ in together]), alone)
        assert torch.equal(torch.stack([b for _, b in together]), alone_other)
        assert [(b.branch, b.computed, b.skipped) for b in handle.stats().branches] == [
            ("cond", 6, 2),
            ("uncond", 6, 2),
        ]
        assert handle.stats().steps == 8


def test_a_branch_with_a_gap_starts_anew():
    """Guidance only in part of the steps: no residual older than a step is used."""
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step in (0, 1, 2, 5, 6):
            handle.set_step(step, 10)
            forward(model, at_step(inputs, step, 10), "uncond")
        assert handle.stats().branches[0].skipped_steps == (1, 2, 6)


def test_a_new_run_forgets_branches_it_has_not_reached_yet():
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step in range(3):  # interrupted
            handle.set_step(step, 10)
            forward(model, at_step(inputs, step, 10), "uncond")
        handle.set_step(0, 10)
        forward(model, at_step(inputs, 0, 10), "cond")
        handle.set_step(3, 10)
        forward(model, at_step(inputs, 3, 10), "uncond")
        assert [(b.branch, b.computed, b.skipped) for b in handle.stats().branches] == [
            ("cond", 1, 0),
            ("uncond", 1, 0),
        ]


def test_second_order_steps_share_a_branch():
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for position in range(8):  # two timesteps a step, as Heun's method
            handle.set_step(position // 2, 4)
            forward(model, at_step(inputs, position, 8))
        stats = handle.stats()
    assert (stats.steps, stats.computed, stats.skipped) == (4, 4, 4)
    assert stats.branches[0].skipped_steps == (1, 1, 2, 2)


def test_a_controlnet_is_added_once():
    """What is added between blocks is in the residual; what is added after the last one is not."""
    model, inputs = flux_transformer(), flux_inputs()
    inputs["controlnet_block_samples"] = [torch.ones(1, 36, 32)]
    inputs["controlnet_single_block_samples"] = [torch.full((1, 36, 32), 0.5), torch.full((1, 36, 32), 0.25)]
    starts, ends = [], []
    model.x_embedder.register_forward_hook(lambda m, a, output: starts.append(output))
    model.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        walk(model, inputs, handle, total=3)
        assert handle.stats().branches[0].skipped_steps == (1,)
    torch.testing.assert_close(ends[1] - starts[1], ends[0] - starts[0], rtol=1e-5, atol=1e-5)
