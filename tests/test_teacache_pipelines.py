"""TeaCache on real diffusers pipelines with tiny random weights, with sparse attention and offloading."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    UniPCMultistepScheduler,
)

import rectified_spaattn as rsa
import tiny
from teacache_cases import HUGE, MODELS, cogvideox_transformer, first_steps, walk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["hunyuan", "wan"])
def test_pipelines_run_twice_alike_and_are_restored(name):
    make, run = (tiny.hunyuan_pipeline, tiny.run_hunyuan) if name == "hunyuan" else (tiny.wan_pipeline, tiny.run_wan)
    pipeline = make()
    untouched = run(pipeline, steps=8)
    keys = set(vars(pipeline.transformer))
    modules = [key for key, _ in pipeline.transformer.named_modules()]
    handle = rsa.enable_teacache(pipeline, threshold=HUGE)
    first = run(pipeline, steps=8)
    stats = handle.stats()
    branches = ["cond"] if name == "hunyuan" else ["cond", "uncond"]
    skipped = 6 if name == "hunyuan" else 2
    assert [(b.branch, b.steps, b.skipped) for b in stats.branches] == [(b, 8, skipped) for b in branches]
    assert not torch.equal(first, untouched)
    assert torch.equal(run(pipeline, steps=8), first)
    assert handle.stats() == stats
    handle.disable()
    handle.disable()
    assert torch.equal(run(pipeline, steps=8), untouched)
    assert set(vars(pipeline.transformer)) - {"_diffusers_hook"} == keys - {"_diffusers_hook"}
    assert [key for key, _ in pipeline.transformer.named_modules()] == modules
    assert not pipeline.transformer._forward_pre_hooks
    assert not pipeline.transformer._forward_hooks
    assert "disabled" in handle.summary()


def test_the_caches_of_a_run_are_dropped_at_its_end():
    pipeline = tiny.hunyuan_pipeline()
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        tiny.run_hunyuan(pipeline, steps=4)
        assert handle._cached[0]._guidance.branches == {}


def test_two_experts_have_a_cache_each():
    pipeline = tiny.wan_pipeline(experts=2)
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        for _ in range(2):
            tiny.run_wan(pipeline, steps=20)
            stats = handle.stats()
            assert stats.steps == 20
            by_name = {(b.transformer, b.branch): b for b in stats.branches}
            assert len(by_name) == 4
            first, second = by_name["transformer", "cond"], by_name["transformer_2", "cond"]
            assert first.steps + second.steps == 20
            assert first.computed == 5
            assert second.computed == 2  # its first, and the last of the run
    assert "transformer_2, uncond" in handle.summary()


@pytest.mark.parametrize("cache_first", [True, False], ids=["teacache first", "sparse first"])
@pytest.mark.parametrize("cache_off_first", [True, False], ids=["teacache off first", "sparse off first"])
def test_it_composes_with_sparse_attention(cache_first, cache_off_first):
    pipeline = tiny.hunyuan_pipeline()
    untouched = tiny.run_hunyuan(pipeline, steps=5)
    with rsa.enable(pipeline, **tiny.SPARSE):
        sparse_only = tiny.run_hunyuan(pipeline, steps=5)
    with rsa.enable_teacache(pipeline, threshold=HUGE):
        cached_only = tiny.run_hunyuan(pipeline, steps=5)
    if cache_first:
        cache, sparse = rsa.enable_teacache(pipeline, threshold=HUGE), rsa.enable(pipeline, **tiny.SPARSE)
    else:
        sparse, cache = rsa.enable(pipeline, **tiny.SPARSE), rsa.enable_teacache(pipeline, threshold=HUGE)
    both = tiny.run_hunyuan(pipeline, steps=5)
    stats = sparse.stats()
    assert (stats.forwards, stats.skipped, stats.steps) == (5, 3, 5)
    assert stats.sparse_calls == 3 * 2  # layers x computed steps
    assert "5 forwards (3 skipped by a cache)" in sparse.summary()
    assert cache.stats().skipped == 3
    assert not torch.equal(both, sparse_only)
    assert not torch.equal(both, cached_only)
    off = [cache, sparse] if cache_off_first else [sparse, cache]
    off[0].disable()
    assert torch.equal(tiny.run_hunyuan(pipeline, steps=5), sparse_only if cache_off_first else cached_only)
    off[1].disable()
    assert torch.equal(tiny.run_hunyuan(pipeline, steps=5), untouched)


def test_threshold_zero_changes_no_bit_of_sparse_attention():
    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, **tiny.SPARSE) as sparse:
        expected = tiny.run_wan(pipeline, steps=3)
        with rsa.enable_teacache(pipeline, threshold=0):
            assert torch.equal(tiny.run_wan(pipeline, steps=3), expected)
            assert sparse.stats().skipped == 0
            assert "skipped" not in sparse.summary()


def test_offloading_between_runs_takes_nothing_away():
    """enable_model_cpu_offload takes its forward off the model and puts it on again at the end of every run."""
    pipeline = tiny.hunyuan_pipeline()
    add_hook_to_module(pipeline.transformer, ModelHook())
    handle = rsa.enable_teacache(pipeline, threshold=HUGE)
    first = tiny.run_hunyuan(pipeline, steps=5)
    remove_hook_from_module(pipeline.transformer)
    add_hook_to_module(pipeline.transformer, ModelHook())
    assert torch.equal(tiny.run_hunyuan(pipeline, steps=5), first)
    assert handle.stats().skipped == 3
    handle.disable()
    assert hasattr(pipeline.transformer, "_hf_hook")
    assert not torch.equal(tiny.run_hunyuan(pipeline, steps=5), first)


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_group_offloading(name, offload_type, cache_first):
    """All of its hooks run on a CPU too, where nothing has to move."""
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        expected = walk(model, inputs, handle)
    offload = {"onload_device": torch.device("cpu"), "offload_type": offload_type, "num_blocks_per_group": 2}
    if not cache_first:
        model.enable_group_offload(**offload)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        if cache_first:
            model.enable_group_offload(**offload)
        if name == "flux" and offload_type == "block_level":
            with pytest.raises(RuntimeError, match="leaf_level"):
                walk(model, inputs, handle)
        else:
            assert torch.equal(walk(model, inputs, handle), expected)
            assert handle.stats().skipped == 7 - first_steps(name)


def cogvideox_pipeline(scheduler):
    torch.manual_seed(0)
    wan = tiny.wan_pipeline()
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text_encoder,
        vae=vae.eval(),
        transformer=cogvideox_transformer(),
        scheduler=scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler, UniPCMultistepScheduler])
def test_cogvideox_guides_in_one_batch(scheduler):
    pipeline = cogvideox_pipeline(scheduler)
    prompt, negative = torch.randn(2, 1, 12, 16, generator=torch.Generator().manual_seed(5))

    def run():
        return pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=64,
            width=64,
            num_frames=13,
            num_inference_steps=6,
            max_sequence_length=12,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).frames

    untouched = run()
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        first = run()
        assert [(b.branch, b.computed, b.skipped) for b in handle.stats().branches] == [("cond_uncond", 2, 4)]
        assert torch.equal(run(), first)
    assert torch.equal(run(), untouched)
    assert not torch.equal(first, untouched)
