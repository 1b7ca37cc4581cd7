"""TeaCache where no cache_context names the guidance calls: they are told by their text and their place in the step."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LayerSkipConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)
from diffusers.modular_pipelines import WanBlocks

import rectified_spaattn as rsa
import tiny
from schedule_runs import EMBEDS, run_video, video_to_video
from teacache_cases import HUGE, at_step, flux_inputs, flux_transformer, forward

pytestmark = pytest.mark.usefixtures("one_thread")


def branches(handle):
    return [(each.branch, each.computed, each.skipped_steps) for each in handle.stats().branches]


def test_video_to_video():
    pipeline = video_to_video(tiny.wan_pipeline().components)
    untouched = run_video(pipeline, 10, 0.8)
    with rsa.enable_teacache(pipeline, threshold=0):
        assert torch.equal(run_video(pipeline, 10, 0.8), untouched)
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        first = run_video(pipeline, 10, 0.8)
        assert branches(handle) == [("call 1", 6, (5, 6)), ("call 2", 6, (5, 6))]
        assert torch.equal(run_video(pipeline, 10, 0.8), first)
    assert not torch.equal(first, untouched)
    assert torch.equal(run_video(pipeline, 10, 0.8), untouched)


def test_it_skips_what_named_calls_skip(monkeypatch):
    """WanPipeline with its cache_context and without: the same bits."""
    pipeline = tiny.wan_pipeline()
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        named = tiny.run_wan(pipeline, steps=9)
        monkeypatch.setattr(type(handle._cached[0]._hook.context), "set_context", lambda self, context: None)
        assert torch.equal(tiny.run_wan(pipeline, steps=9), named)
        assert [name for name, *_ in branches(handle)] == ["call 1", "call 2"]


SKIP = LayerSkipConfig(indices=[1], fqn="blocks", skip_attention=True, skip_ff=True)
# calls of ten steps by branch; the first 5 and the last are computed, and each branch's own first
GUIDERS = {
    "cfg": (lambda: ClassifierFreeGuidance(5.0), [10, 10]),
    "cfg in part": (lambda: ClassifierFreeGuidance(5.0, start=0.2, stop=0.7), [10, 5]),
    "cfg late": (lambda: ClassifierFreeGuidance(5.0, start=0.6), [10, 4]),
    "zero star": (lambda: ClassifierFreeZeroStarGuidance(5.0), [10, 10]),
    "apg": (lambda: AdaptiveProjectedGuidance(5.0), [10, 10]),
    "slg": (
        lambda: SkipLayerGuidance(
            5.0, skip_layer_guidance_start=0.3, skip_layer_guidance_stop=0.8, skip_layer_config=SKIP
        ),
        [10, 10, 4],
    ),
    "none": (lambda: ClassifierFreeGuidance(1.0), [10]),
}


@pytest.fixture(scope="module")
def modular():
    blocks = WanBlocks()
    blocks.sub_blocks.pop("text_encoder")
    blocks.sub_blocks.pop("decode")
    pipeline = blocks.init_pipeline()
    pipeline.update_components(transformer=tiny.wan_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", GUIDERS)
def test_modular_guiders(modular, name):
    guider, calls = GUIDERS[name]

    def run():
        modular.update_components(guider=guider())
        generator = torch.Generator().manual_seed(3)
        settings = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 10}
        return modular(**EMBEDS, **settings, generator=generator, output="latents")

    untouched = run()
    with rsa.enable_teacache(modular, threshold=0) as handle:
        assert torch.equal(run(), untouched)
        assert [computed for _, computed, _ in branches(handle)] == calls
    with rsa.enable_teacache(modular, threshold=HUGE) as handle:
        first = run()
        assert [computed + len(skipped) for _, computed, skipped in branches(handle)] == calls
        assert branches(handle)[0] == ("call 1", 6, (5, 6, 7, 8))
        assert torch.equal(run(), first)
        # what the last step, computed whole, leaves behind is nothing
        assert all(
            branch.step != 9 or branch.residual is None for branch in handle._cached[0]._guidance.branches.values()
        )
    assert not torch.equal(first, untouched)
    assert torch.equal(run(), untouched)


def test_calls_may_come_in_another_order_and_one_may_stay_out():
    model, inputs = flux_transformer(), flux_inputs()
    texts = {name: {**inputs, "encoder_hidden_states": torch.randn(1, 7, 16)} for name in "ab"}

    def alone(name, steps):
        with rsa.enable_teacache(model, threshold=HUGE) as handle:
            return {step: told(handle, name, step) for step in steps}

    def told(handle, name, step):
        handle.set_step(step, 9)
        return forward(model, at_step(texts[name], step, 9))

    expected = {"a": alone("a", range(6)), "b": alone("b", (0, 1, 2, 4, 5))}
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step, order in enumerate(["ab", "ba", "ab", "a", "ba", "ba"]):
            for name in order:
                assert torch.equal(told(handle, name, step), expected[name][step]), (step, name)
        assert handle.stats().skipped == 5 + 3  # b starts anew after the step without it


def test_one_text_twice_is_two_branches_by_order():
    """As layer-skipping guidance calls: the second differs by what a hook does."""
    model, inputs = flux_transformer(), flux_inputs()
    hooked = []

    def second(*_):
        return tuple(x * 0.5 for x in _[2]) if hooked else None

    model.single_transformer_blocks[1].register_forward_hook(second)

    def run(both):
        outputs = []
        with rsa.enable_teacache(model, threshold=HUGE) as handle:
            for step in range(6):
                handle.set_step(step, 6)
                for hook in both:
                    hooked[:] = [1] if hook else []
                    outputs.append(forward(model, at_step(inputs, step, 6)))
        return outputs

    together = run([False, True])
    assert all(torch.equal(a, b) for a, b in zip(together[::2], run([False]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together[1::2], run([True]), strict=True))


def test_tiles_are_refused_not_mixed():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        handle.set_step(0, 8)
        forward(model, at_step(inputs, 0, 8))
        tile = {**at_step(inputs, 0, 8), "hidden_states": inputs["hidden_states"].flip(3)}
        with pytest.raises(RuntimeError, match=r"step 0 .* with one text and several latents.*cache_context"):
            forward(model, tile)
        forward(model, tile, "tile 2")  # named, it has a cache of its own


def test_one_name_for_two_calls_is_refused():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step in range(2):
            handle.set_step(step, 8)
            forward(model, at_step(inputs, step, 8), "cond")
        with pytest.raises(RuntimeError, match=r"twice in cache_context\('cond'\)"):
            forward(model, at_step(inputs, 1, 8), "cond")
        handle.set_step(1, 8)  # said again: the step is made again
        forward(model, at_step(inputs, 1, 8), "cond")
        assert handle.stats().computed == 2


def test_latents_of_another_size_are_computed():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    larger = tiny.wan_inputs(grid=(3, 8, 10))
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step, given in enumerate([inputs] * 7 + [larger, inputs]):
            handle.set_step(step, 12)
            forward(model, at_step(given, step, 12), "cond")
        assert handle.stats().branches[0].skipped_steps == (5, 6)
