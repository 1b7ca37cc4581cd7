"""A processor of ours never outlives its handle: backends set meanwhile, saved processors, copies, lost handles."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import rectified_spaattn as rsa
import tiny
from model_cases import build
from tiny import SPARSE, forward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return tiny.wan_transformer()


@pytest.fixture(autouse=True)
def same_process_wide_backend():
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def sparse_calls(model, inputs):
    with rsa.enable(model, **SPARSE) as handle:
        forward(model, inputs)
        return handle.stats().sparse_calls


def ours(model):
    return [name for name, p in model.attn_processors.items() if hasattr(p, "rectified_layer")]


# what the user set while it was enabled


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_a_backend_set_while_enabled_stays_and_blocks_nothing(model, backend):
    inputs = tiny.wan_inputs()
    handle = rsa.enable(model, **SPARSE)
    model.set_attention_backend(backend)
    with pytest.warns(UserWarning, match="3 of 3 layers"):
        dense = forward(model, inputs)
    handle.disable()
    assert not ours(model)
    chosen = {p._attention_backend for p in model.attn_processors.values()}
    assert chosen == {AttentionBackendName(backend)}
    assert torch.equal(forward(model, inputs), dense)
    assert sparse_calls(model, inputs) == 3


def test_a_backend_reset_while_enabled_is_reset_afterwards(model):
    model.set_attention_backend("_native_math")
    handle = rsa.enable(model, **SPARSE)
    model.reset_attention_backend()
    handle.disable()
    assert {p._attention_backend for p in model.attn_processors.values()} == {None}


def test_a_parallel_config_set_while_enabled_stays(model):
    config = object()
    handle = rsa.enable(model, **SPARSE)
    for block in model.blocks:  # as enable_parallelism does
        block.attn1.processor._parallel_config = config
    handle.disable()
    assert all(block.attn1.processor._parallel_config is config for block in model.blocks)


# saved and put back


@pytest.mark.parametrize("case", ["Wan 2.1 T2V", "CogVideoX 1.5 T2V", "HunyuanVideo 1.5 T2V", "Flux.1"])
def test_processors_saved_while_enabled_and_put_back_after_it_are_the_original_ones(case):
    model, inputs = build(case, 16)
    untouched = forward(model, inputs)
    handle = rsa.enable(model, **SPARSE)
    saved = model.attn_processors
    handle.disable()
    model.set_attn_processor(saved)
    assert torch.equal(forward(model, inputs), untouched)
    assert handle.stats().sparse_calls == 0
    with rsa.enable(model, **SPARSE) as again:
        assert (forward(model, inputs) - untouched).abs().max() > 1e-4
        assert again.stats().sparse_calls > 0
    assert not ours(model)
    assert torch.equal(forward(model, inputs), untouched)


def test_fuse_disable_unfuse_on_cogvideox():
    model, inputs = build("CogVideoX 1.5 T2V", 16)
    untouched = forward(model, inputs)
    handle = rsa.enable(model, **SPARSE)
    model.fuse_qkv_projections()
    handle.disable()
    model.unfuse_qkv_projections()
    assert torch.equal(forward(model, inputs), untouched)
    assert sparse_calls(model, inputs) == 2
    assert torch.equal(forward(model, inputs), untouched)


def test_a_backend_set_on_saved_processors_reaches_the_original_ones(model):
    handle = rsa.enable(model, **SPARSE)
    saved = model.attn_processors
    handle.disable()
    originals = [block.attn1.processor for block in model.blocks]
    model.set_attn_processor(dict(saved))
    model.set_attention_backend("_native_math")
    forward(model, tiny.wan_inputs())
    assert {p._attention_backend for p in originals} == {AttentionBackendName("_native_math")}


@pytest.mark.parametrize("case", ["Wan 2.1 T2V", "CogVideoX 1.5 T2V"])
def test_processors_on_another_model_are_the_original_ones(case):
    model, inputs = build(case, 16)
    other, _ = build(case, 16)
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    untouched = forward(other, inputs)
    with rsa.enable(model, **SPARSE) as handle:
        other.set_attn_processor(model.attn_processors)
        assert torch.equal(forward(other, inputs), untouched)
        assert handle.stats().sparse_calls == 0
        assert sparse_calls(other, inputs) > 0


def test_one_processor_for_all_modules_is_ours_in_its_own_alone(model):
    inputs = tiny.wan_inputs()
    with rsa.enable(model, **SPARSE) as handle:
        model.set_attn_processor(model.blocks[0].attn1.processor)
        with pytest.warns(UserWarning, match="2 of 3 layers"):
            forward(model, inputs)
        assert [layer.sparse_calls for layer in handle.stats().layers] == [1, 0, 0]


# copies


@pytest.mark.parametrize("whole", [True, False])
def test_a_deep_copy_comes_out_disabled(whole, quiet):
    pipeline = tiny.wan_pipeline()
    untouched = tiny.run_wan(pipeline)
    with rsa.enable(pipeline, **SPARSE) as handle:
        sparse = tiny.run_wan(pipeline)
        count = handle.stats().sparse_calls
        if whole:
            other = copy.deepcopy(pipeline)
        else:
            other = tiny.wan_pipeline()
            other.transformer = copy.deepcopy(pipeline.transformer)
        assert not ours(other.transformer)
        assert torch.equal(tiny.run_wan(other), untouched)
        assert handle.stats().sparse_calls == count
        assert rsa.disable(other) is False
        with rsa.enable(other, **SPARSE) as second:
            assert torch.equal(tiny.run_wan(other), sparse)
            assert second.stats().sparse_calls == count
        pickle.dumps(copy.deepcopy(pipeline.transformer))
        assert torch.equal(tiny.run_wan(pipeline), sparse)
    assert torch.equal(tiny.run_wan(other), untouched)


def test_a_handle_that_a_pipeline_carries_is_one_of_nothing_in_its_copy():
    pipeline = tiny.wan_pipeline()
    pipeline.handles = rsa.enable(pipeline, **SPARSE), rsa.enable_teacache(pipeline)
    for handle in copy.deepcopy(pipeline).handles:
        handle.disable()
        assert not handle.active
        assert "disabled\n  nothing has run yet" in handle.summary()
        assert handle.stats().steps == 0
    assert all(handle.active for handle in pipeline.handles)


def test_a_copy_of_one_processor_is_the_original(model):
    stock = type(model.blocks[0].attn1.processor)
    with rsa.enable(model, **SPARSE):
        wrapped = model.blocks[0].attn1.processor
        assert type(copy.copy(wrapped)) is stock
        assert type(copy.deepcopy(wrapped)) is stock
        assert type(copy.deepcopy(type(wrapped)())) is stock


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling_says_what_to_do(model, save):
    with rsa.enable(model, **SPARSE):
        saved = model.attn_processors
        with pytest.raises(TypeError, match=r"rectified attention is enabled.*rsa\.disable\(pipe\).*save_pretrained"):
            save(model)
        with pytest.raises(TypeError, match="rectified attention is enabled"):
            save(model.blocks[0].attn1)
    save(model)
    model.set_attn_processor(saved)
    again = pickle.loads(pickle.dumps(model))
    assert not ours(again)


# the handle is lost


def test_disable_finds_what_is_enabled_without_its_handle():
    pipeline = tiny.wan_pipeline(experts=2)
    untouched = tiny.run_wan(pipeline)
    assert rsa.disable(pipeline) is False
    rsa.enable(pipeline, **SPARSE)
    gc.collect()
    assert not torch.equal(tiny.run_wan(pipeline), untouched)
    with pytest.raises(RuntimeError, match=r"enabled already: call rsa\.disable\(pipe\)"):
        rsa.enable(pipeline, **SPARSE)
    assert rsa.disable(pipeline) is True
    assert rsa.disable(pipeline) is False
    assert torch.equal(tiny.run_wan(pipeline), untouched)
    for module in (pipeline.transformer, pipeline.transformer_2, pipeline.text_encoder):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_disable_one_transformer_and_a_compiled_one(model):
    pipeline = tiny.wan_pipeline(experts=2)
    handle = rsa.enable(pipeline, **SPARSE)
    assert rsa.disable(pipeline.transformer) is True
    assert handle.active
    assert not ours(pipeline.transformer)
    assert ours(pipeline.transformer_2)
    assert rsa.disable(pipeline) is True
    assert not handle.active
    rsa.enable(model, **SPARSE)
    assert rsa.disable(torch.compile(model, backend="eager")) is True


def test_disable_reaches_the_one_that_was_replaced(model):
    pipeline = tiny.wan_pipeline()
    old = pipeline.transformer
    rsa.enable(pipeline, **SPARSE)
    pipeline.transformer = model
    assert rsa.disable(pipeline) is True
    assert not ours(old)


def test_disable_says_so_where_nothing_can_be_enabled():
    assert rsa.disable(torch.nn.Linear(2, 2)) is False
    assert rsa.disable(object()) is False


# memory


@pytest.mark.parametrize("end", ["disable", "lose", "stop", "nothing"])
def test_no_handle_keeps_a_model(end):
    pipeline = tiny.wan_pipeline()
    handle = rsa.enable(pipeline, **SPARSE)
    tiny.run_wan(pipeline)
    if end == "stop":
        hook = pipeline.transformer.blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.run_wan(pipeline)
        hook.remove()
    if end in ("disable", "stop"):
        handle.disable()
    gone = [weakref.ref(part) for part in (pipeline, pipeline.transformer, pipeline.text_encoder)]
    gone += [weakref.ref(parameter) for parameter in pipeline.transformer.parameters()]
    del pipeline
    if end == "stop":
        del hook
    gc.collect()
    assert all(part() is None for part in gone)
    if end != "lose":
        assert "12 calls" in handle.summary() or end == "stop"
        handle.disable()


def stop(*_):
    raise KeyboardInterrupt


def test_figures_stay_after_disabling(model):
    handle = rsa.enable(model, **SPARSE)
    forward(model, tiny.wan_inputs())
    handle.disable()
    del model
    gc.collect()
    assert handle.stats().sparse_calls == 3
    assert "WanTransformer3DModel" in handle.summary()
