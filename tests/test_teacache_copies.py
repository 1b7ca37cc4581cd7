"""TeaCache and what people do with a model: copy it, pickle it, drop it, share it between threads, tell its steps."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import FirstBlockCacheConfig, WanPipeline

import rectified_spaattn as rsa
import tiny
from teacache_cases import HUGE, MODELS, at_step, forward, walk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_a_deep_copy_has_no_teacache(name):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    untouched = walk(model, inputs, None)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        cached = walk(model, inputs, handle)
        with model.cache_context("cond"):  # diffusers remembers the hooks it found
            copied = copy.deepcopy(model)
        assert torch.equal(walk(copied, inputs, None), untouched)
        assert [key for key, _ in copied.named_modules()] == [key for key, _ in make().named_modules()]
        assert torch.equal(walk(model, inputs, handle), cached)
        with rsa.enable_teacache(copied, threshold=HUGE) as other:
            assert torch.equal(walk(copied, inputs, other, branch="cond"), cached)
            assert [each.branch for each in handle.stats().branches] == ["call 1"]
        copied.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        copied.disable_cache()
    assert torch.equal(walk(model, inputs, None), untouched)


def test_a_deep_copy_made_in_the_middle_of_a_forward():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = walk(model, inputs, None)
    add_hook_to_module(model, CpuOffload("cpu"))  # a forward of its own on the model
    copies = []
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        hook = model.blocks[1].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
        handle.set_step(0, 8)
        forward(model, at_step(inputs, 0, 8))
        hook.remove()
    (copied,) = copies
    copied.blocks[1]._forward_hooks.clear()
    assert torch.equal(walk(copied, inputs, None), untouched)


def test_a_deep_copy_of_a_pipeline():
    pipeline = tiny.wan_pipeline()
    untouched = tiny.run_wan(pipeline, steps=8)
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        copied = copy.deepcopy(pipeline)
        assert torch.equal(tiny.run_wan(copied, steps=8), untouched)
        assert handle.stats().steps == 0
        assert not torch.equal(tiny.run_wan(pipeline, steps=8), untouched)
        with rsa.enable_teacache(copied, threshold=HUGE) as other:
            tiny.run_wan(copied, steps=8)
            assert other.stats() == handle.stats()


def test_pickling_says_what_to_do(tmp_path):
    model = tiny.wan_transformer()
    with rsa.enable_teacache(model):
        for save in (pickle.dumps, lambda each: torch.save(each, io.BytesIO())):
            with pytest.raises(TypeError, match=r"TeaCache is enabled.*disable\(\).*save_pretrained"):
                save(model)
        model.save_pretrained(tmp_path)
        assert model.state_dict().keys() == tiny.wan_transformer().state_dict().keys()
    pickle.loads(pickle.dumps(model))


def test_a_handle_that_is_off_keeps_no_model():
    pipeline, inputs = tiny.wan_pipeline(), tiny.wan_inputs()
    handle = rsa.enable_teacache(pipeline, threshold=HUGE)
    tiny.run_wan(pipeline, steps=8)
    summary, stats = handle.summary(), handle.stats()
    pipeline.transformer.compile(backend="eager")  # holds on to what it found on the model
    handle.disable()
    forward(pipeline.transformer, inputs)
    gone = weakref.ref(pipeline.transformer)
    del pipeline
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert handle.stats() == stats
    assert handle.summary() == summary.replace("enabled", "disabled")


# --- threads


def in_thread(function):
    """What the function gave in a thread of its own, or the error it raised."""
    results = []

    def work():
        try:
            results.append(function())
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    thread.join()
    return results[0]


def test_a_second_thread_inside_of_a_forward_is_refused():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    errors = []
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        expected = walk(model, inputs, handle)
        hook = model.blocks[1].register_forward_hook(
            lambda *_: errors.append(in_thread(lambda: forward(model, at_step(inputs, 0, 8))))
        )
        with model.cache_context("mine"):
            assert torch.equal(walk(model, inputs, handle), expected)  # the first is not disturbed
        hook.remove()
        assert len(errors) == 6
        for error in errors:
            assert isinstance(error, RuntimeError)
            assert "copy.deepcopy" in str(error)
    assert set(vars(model)) - set(vars(tiny.wan_transformer())) <= {"_diffusers_hook"}


def test_a_second_thread_in_the_middle_of_a_run_is_refused():
    """Two pipelines with one transformer: TeaCache follows the schedule of one."""
    pipeline = tiny.wan_pipeline()
    components = {**pipeline.components, "scheduler": type(pipeline.scheduler).from_config(pipeline.scheduler.config)}
    other = WanPipeline(**components, boundary_ratio=None)
    other.set_progress_bar_config(disable=True)
    errors = []

    def elsewhere(pipe, step, timestep, kwargs):
        if step == 2:
            errors.append(in_thread(lambda: tiny.run_wan(other, steps=8)))
        return kwargs

    with rsa.enable_teacache(pipeline, threshold=HUGE):
        expected = tiny.run_wan(pipeline, steps=8)
        assert torch.equal(tiny.run_wan(pipeline, steps=8, callback_on_step_end=elsewhere), expected)
        assert isinstance(errors[0], RuntimeError)
        assert "TeaCache" in str(errors[0])
        assert "thread" in str(errors[0])
        assert torch.equal(in_thread(lambda: tiny.run_wan(pipeline, steps=8)), expected)  # one after the other


def test_names_of_guidance_calls_belong_to_a_thread():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        handle.set_step(0, 8)
        with model.cache_context("cond"):

            def elsewhere():
                with model.cache_context("uncond"):
                    return True

            assert in_thread(elsewhere)
            with torch.no_grad():
                model(**at_step(inputs, 0, 8))
        assert [each.branch for each in handle.stats().branches] == ["cond"]


# --- told steps


def test_a_told_step_ends_with_none():
    pipeline = tiny.wan_pipeline()
    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        expected = tiny.run_wan(pipeline, steps=8)
        stats = handle.stats()
        handle.set_step(3, 8)
        handle.set_step(None)
        assert torch.equal(tiny.run_wan(pipeline, steps=8), expected)
        assert handle.stats() == stats
        with pytest.raises(ValueError, match=r"set_step\(None\) alone"):
            handle.set_step(None, 8)
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model) as handle:
        handle.set_step(0, 8)
        forward(model, inputs)
        handle.set_step(None)
        with pytest.raises(RuntimeError, match="set_step"):
            forward(model, inputs)


def test_a_pipeline_that_is_gone_is_said():
    pipeline = tiny.wan_pipeline()
    handle = rsa.enable_teacache(pipeline, threshold=HUGE)
    other = WanPipeline.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    del pipeline
    gc.collect()
    with pytest.raises(RuntimeError, match=r"gone.*enable"):
        tiny.run_wan(other, steps=8)
    handle.disable()
    with rsa.enable_teacache(other, threshold=HUGE) as handle:
        tiny.run_wan(other, steps=8)
        assert handle.stats().skipped == 4


def test_a_replaced_transformer_is_said():
    pipeline = tiny.wan_pipeline()
    with rsa.enable_teacache(pipeline) as handle:
        assert "LOST" not in handle.summary()
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        assert "LOST" not in handle.summary()
        pipeline.transformer = tiny.wan_transformer()
        assert "LOST on transformer" in handle.summary()
        pipeline.transformer = None
        assert "LOST on transformer" in handle.summary()


def test_a_lost_handle_is_no_dead_end():
    pipeline = tiny.wan_pipeline()
    untouched = tiny.run_wan(pipeline, steps=7)
    sparse = rsa.enable(pipeline, **tiny.SPARSE)
    lost = [rsa.enable_teacache(pipeline, threshold=HUGE)]
    lost.clear()
    assert rsa.disable(pipeline)
    assert not sparse.active
    assert not torch.equal(tiny.run_wan(pipeline, steps=7), untouched)  # TeaCache stays
    with pytest.raises(RuntimeError, match="disable_teacache"):
        rsa.enable_teacache(pipeline)
    assert rsa.disable_teacache(pipeline)
    assert not rsa.disable_teacache(pipeline)
    assert torch.equal(tiny.run_wan(pipeline, steps=7), untouched)


def test_another_pipeline_with_the_same_transformer_is_said():
    pipeline = tiny.wan_pipeline()
    other = WanPipeline.from_pipe(pipeline, scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config))
    other.set_progress_bar_config(disable=True)
    with rsa.enable_teacache(pipeline, threshold=HUGE):
        with pytest.raises(RuntimeError, match="does not move with these calls"):
            tiny.run_wan(other, steps=8)
        tiny.run_wan(pipeline, steps=8)
