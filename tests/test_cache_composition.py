"""Sparse attention together with other people's caches: diffusers' own, and cache-dit where it is installed."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig

import rectified_spaattn as rsa
import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"block_size": 16, "neighbours": False, "first_frame": False, "dense_layers": (), "top_p": 0.0}
STEPS = 8
PIPELINES = {
    "hunyuan": (tiny.hunyuan_pipeline, tiny.run_hunyuan, 1),
    "wan": (tiny.wan_pipeline, tiny.run_wan, 2),
}

# Of 8 steps: only the first block ever runs after step 0; all blocks run at steps 0, 1, 4 and 7.
CACHES = {
    "first block": (lambda: FirstBlockCacheConfig(threshold=1e9), [8, 1, 1]),
    "mag": (
        lambda: MagCacheConfig(
            threshold=1e9,
            max_skip_steps=2,
            retention_ratio=0.25,
            num_inference_steps=STEPS,
            mag_ratios=torch.ones(STEPS),
        ),
        [4, 4, 4],
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_caches_in_either_order(cache, name):
    make, run, branches = PIPELINES[name]
    config, runs = CACHES[cache]
    pipeline = make()
    untouched = run(pipeline, steps=STEPS)
    outputs = []
    for cache_first in (True, False):
        if cache_first:
            pipeline.transformer.enable_cache(config())
        handle = rsa.enable(pipeline, sparsity=0.75, dense_steps=1, **SPARSE)
        if not cache_first:
            pipeline.transformer.enable_cache(config())
        outputs.append(run(pipeline, steps=STEPS))
        assert torch.equal(run(pipeline, steps=STEPS), outputs[-1])
        stats = handle.stats()
        assert [layer.sparse_calls + layer.dense_calls for layer in stats.layers] == [n * branches for n in runs]
        assert stats.dense_reasons == {"dense_steps": 3 * branches}  # step 0, and no layer's later steps
        assert stats.steps == STEPS
        assert stats.forwards == STEPS * branches
        assert stats.skipped == (STEPS - max(runs)) * branches
        assert ("skipped by a cache" in handle.summary()) == (cache == "mag")
        if cache_first:  # off in the order they went on
            pipeline.transformer.disable_cache()
            handle.disable()
        else:
            handle.disable()
            pipeline.transformer.disable_cache()
        assert torch.equal(run(pipeline, steps=STEPS), untouched)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)


@pytest.fixture
def cache_dit():
    return pytest.importorskip("cache_dit")


@pytest.mark.parametrize("name", PIPELINES)
def test_cache_dit_in_either_order(cache_dit, name):
    make, run, branches = PIPELINES[name]
    pipeline = make()
    untouched = run(pipeline, steps=STEPS)
    warm_up = 2
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warm_up, residual_diff_threshold=1e9
    )
    # it computes the first block of each list at every step, the others in the warm-up
    runs = [STEPS, STEPS, warm_up] if name == "hunyuan" else [STEPS, warm_up, warm_up]
    outputs = []
    for cache_first in (True, False):
        if cache_first:
            cache_dit.enable_cache(pipeline, cache_config=config)
        handle = rsa.enable(pipeline, sparsity=0.75, dense_steps=1, **SPARSE)
        if not cache_first:
            cache_dit.enable_cache(pipeline, cache_config=config)
        try:
            outputs.append(run(pipeline, steps=STEPS))
            stats = handle.stats()
            assert torch.equal(run(pipeline, steps=STEPS), outputs[-1])
        finally:
            cache_dit.disable_cache(pipeline)  # it patches the pipeline's class
        handle.disable()
        assert [layer.sparse_calls + layer.dense_calls for layer in stats.layers] == [n * branches for n in runs]
        assert stats.dense_reasons == {"dense_steps": 3 * branches}
        assert stats.steps == STEPS
        assert torch.equal(run(pipeline, steps=STEPS), untouched)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)


def test_teacache_and_cache_dit_refuse_each_other(cache_dit):
    pipeline = tiny.wan_pipeline()
    cache_dit.enable_cache(pipeline)
    try:
        with pytest.raises(RuntimeError, match="cache-dit"):
            rsa.enable_teacache(pipeline)
    finally:
        cache_dit.disable_cache(pipeline)
    with rsa.enable_teacache(pipeline):
        cache_dit.enable_cache(pipeline)
        try:
            with pytest.raises(RuntimeError, match="cache-dit"):
                tiny.run_wan(pipeline)
        finally:
            cache_dit.disable_cache(pipeline)
        tiny.run_wan(pipeline)
