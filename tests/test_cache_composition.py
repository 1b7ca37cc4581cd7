"""Sparse attention together with other people's caches: diffusers' own, and cache-dit where it is installed."""

import diffusers
import pytest
import torch
from diffusers.models.cache_utils import CacheMixin

import rectified_spaattn as rsa
import tiny
from cache_cases import CACHES, STEPS, cache_of
from model_cases import CASES, build
from test_models import forward

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"block_size": 16, "neighbours": False, "first_frame": False, "dense_layers": (), "top_p": 0.0}
PIPELINES = {
    "hunyuan": (tiny.hunyuan_pipeline, tiny.run_hunyuan, 1),
    "wan": (tiny.wan_pipeline, tiny.run_wan, 2),
}

# How often each block runs in 4 steps: all of them at step 0, and at the last one that is not left out.
RUNS = {
    ("hunyuan", "FirstBlockCache"): [4, 1, 1],
    ("hunyuan", "TaylorSeer"): [3, 3, 3],
    ("wan", "MagCache"): [2, 2, 2],
    ("wan", "SeaCache"): [2, 2, 2],
}


@pytest.mark.parametrize(("name", "cache"), RUNS)
def test_diffusers_caches_in_either_order(name, cache):
    make, run, branches = PIPELINES[name]
    config, runs = CACHES[cache], RUNS[name, cache]
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
        assert ("skipped by a cache" in handle.summary()) == (max(runs) < STEPS)
        if cache_first:  # off in the order they went on
            pipeline.transformer.disable_cache()
            handle.disable()
        else:
            handle.disable()
            pipeline.transformer.disable_cache()
        assert torch.equal(run(pipeline, steps=STEPS), untouched)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)


OF_KIND = {case.kind: name for name, case in reversed(CASES.items())}  # the first case of each class


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("kind", [kind for kind in OF_KIND if cache_of(kind)])
def test_the_cache_of_a_model_in_either_order(kind):
    """The same comes out, something is left out, and the model is as it was, whichever is taken off first."""
    case = CASES[OF_KIND[kind]]
    model, inputs = build(OF_KIND[kind], case.head_dims[0])

    def run():
        outputs = []
        for step in range(STEPS):
            place = {"step_index": step, "sigma": 1 - step / STEPS, "num_inference_steps": STEPS}
            with torch.no_grad(), model.cache_context("cond", **place):
                outputs.append(forward(model, inputs))
        return torch.stack(outputs)

    untouched = run()
    outputs, calls = [], []
    for cache_first in (True, False):
        if cache_first:
            model.enable_cache(CACHES[cache_of(kind)]())
        handle = rsa.enable(model, sparsity=0.75, dense_steps=0, **SPARSE)
        if not cache_first:
            model.enable_cache(CACHES[cache_of(kind)]())
        outputs.append(run())
        calls.append(handle.stats().sparse_calls)
        assert handle.stats().dense_calls == 0
        if cache_first:
            model.disable_cache()
        handle.disable()
        if not cache_first:
            model.disable_cache()
        with torch.no_grad():
            assert torch.equal(forward(model, inputs), untouched[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)
    assert 0 < calls[0] == calls[1] < STEPS * case.calls


def test_there_is_a_cache_for_every_class_that_diffusers_can_cache():
    assert {kind for kind in OF_KIND if cache_of(kind)} == {
        kind for kind in OF_KIND if issubclass(getattr(diffusers, kind), CacheMixin)
    }


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
