"""enable() on real diffusers classes with tiny random weights."""

import copy
import math
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch._dynamo.testing import CompileCounterWithBackend

import rectified_spaattn as rsa
import tiny

MODELS = {
    "hunyuan": (tiny.hunyuan_transformer, tiny.hunyuan_inputs),
    "wan": (tiny.wan_transformer, tiny.wan_inputs),
}
SPARSE = {
    "block_size": 16,
    "neighbours": False,
    "first_frame": False,
    "dense_layers": (),
    "dense_steps": 0,
    "top_p": 0.0,
}


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    make, inputs = MODELS[request.param]
    return make(), inputs()


def test_all_blocks_kept_equals_the_untouched_model(model_and_inputs):
    model, inputs = model_and_inputs
    untouched = forward(model, inputs)
    with rsa.enable(model, **{**SPARSE, "sparsity": 0.0}) as handle:
        kept = forward(model, inputs)
        assert handle.stats().density == pytest.approx(1.0)
        assert handle.stats().dense_calls == 0
    torch.testing.assert_close(kept, untouched, rtol=1e-4, atol=1e-5)


def test_sparse_really_is_sparse_and_differs(model_and_inputs):
    model, inputs = model_and_inputs
    untouched = forward(model, inputs)
    with rsa.enable(model, sparsity=0.75, **SPARSE) as handle:
        sparse = forward(model, inputs)
        stats = handle.stats()
    assert stats.sparse_calls == 3
    assert 0.2 < stats.density < 0.45  # 0.25 of the blocks, and text
    assert (sparse - untouched).abs().max() > 1e-4


def test_reference_backend_agrees_with_torch_inside_a_model(model_and_inputs):
    model, inputs = model_and_inputs
    outputs = []
    for backend in ("torch", "reference"):
        with rsa.enable(model, sparsity=0.75, backend=backend, **SPARSE) as handle:
            outputs.append(forward(model, inputs))
            assert handle.stats().backend == backend
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_disable_restores_every_bit_and_object(model_and_inputs):
    model, inputs = model_and_inputs
    processors = {name: id(p) for name, p in model.attn_processors.items()}
    attributes = {name: copy.copy(vars(p)) for name, p in model.attn_processors.items()}
    active = _AttentionBackendRegistry.get_active_backend()[0]
    untouched = forward(model, inputs)
    handle = rsa.enable(model, sparsity=0.75, **SPARSE)
    forward(model, inputs)
    handle.disable()
    handle.disable()
    assert torch.equal(forward(model, inputs), untouched)
    assert {name: id(p) for name, p in model.attn_processors.items()} == processors
    assert {name: vars(p) for name, p in model.attn_processors.items()} == attributes
    assert not model._forward_pre_hooks
    assert _AttentionBackendRegistry.get_active_backend()[0] is active
    assert "disabled" in handle.summary()


def test_a_handle_says_what_it_is_when_it_ran_and_where(caplog):
    caplog.set_level("INFO", logger="rectified_spaattn")
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    handle = rsa.enable(model, sparsity=0.75, **SPARSE)
    assert repr(handle).startswith("<Handle, enabled")
    assert "WanTransformer3DModel" in repr(handle)
    assert math.isnan(handle.stats().seconds)
    assert handle.stats().devices == ()
    forward(model, inputs)
    forward(model, inputs)
    stats = handle.stats()
    assert stats.devices == ("cpu",)
    assert stats.seconds > 0
    assert f"took {stats.seconds:.1f} s from the first forward to the end of the last, on cpu" in handle.summary()
    handle.disable()
    assert repr(handle).startswith("<Handle, disabled")
    enabled, run, disabled = [record.getMessage() for record in caplog.records]
    assert "sparsity 0.75" in enabled
    assert "a run of unknown steps begins, 3*8*8 video" in run
    with rsa.enable(model, sparsity=0.75, precision="fp8", **SPARSE) as handle:
        assert "order content, precision fp8" in repr(handle)
    assert disabled == "disable transformer: its last run: 2 forwards, 6 attention calls"


def test_context_manager_disables_after_an_exception():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = forward(model, inputs)
    with pytest.raises(KeyError), rsa.enable(model, sparsity=0.75, **SPARSE):
        raise KeyError("the user's own")
    assert torch.equal(forward(model, inputs), untouched)


def test_only_video_self_attention_is_touched():
    wan, hunyuan = tiny.wan_transformer(), tiny.hunyuan_transformer()
    for model in (wan, hunyuan):
        before = model.attn_processors
        with rsa.enable(model, **SPARSE):
            changed = {name for name, p in model.attn_processors.items() if p is not before[name]}
        if model is wan:
            assert changed == {f"blocks.{i}.attn1.processor" for i in range(3)}
        else:
            assert changed == {
                "transformer_blocks.0.attn.processor",
                "single_transformer_blocks.0.attn.processor",
                "single_transformer_blocks.1.attn.processor",
            }


def test_dense_layers_are_bit_identical():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = forward(model, inputs)
    with rsa.enable(model, **{**SPARSE, "dense_layers": (0, 1, 2)}) as handle:
        assert torch.equal(forward(model, inputs), untouched)
        assert handle.stats().dense_reasons == {"dense_layers": 3}
        assert math.isnan(handle.stats().density)


def test_a_grid_without_a_whole_block_is_dense_and_says_so():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = forward(model, inputs)
    with rsa.enable(model, **{**SPARSE, "block_size": 256}) as handle:
        with pytest.warns(UserWarning, match="192 tokens, less than one block of 256"):
            assert torch.equal(forward(model, inputs), untouched)
        assert "smaller than one block of 256" in handle.summary()


def test_text_padding_changes_nothing_for_the_video():
    model = tiny.hunyuan_transformer()
    inputs = tiny.hunyuan_inputs()
    with rsa.enable(model, sparsity=0.75, **SPARSE):
        both = forward(model, inputs)
        poisoned = inputs["encoder_hidden_states"].clone()
        poisoned[1, 5:] = 100.0
        again = forward(model, {**inputs, "encoder_hidden_states": poisoned})
    torch.testing.assert_close(again, both, rtol=1e-5, atol=1e-6)


def test_the_layer_states_do_not_leak_between_two_models():
    first, second = tiny.wan_transformer(), tiny.wan_transformer()
    inputs = tiny.wan_inputs()
    with rsa.enable(first, sparsity=0.5, **SPARSE) as a, rsa.enable(second, sparsity=0.75, **SPARSE) as b:
        forward(first, inputs)
        forward(second, inputs)
        forward(first, inputs)
        assert a.stats().sparse_calls == 6
        assert b.stats().sparse_calls == 3
        # one pooled key for each of the other blocks of 16
        assert a.stats().density == pytest.approx(0.5 + 0.5 / 16, abs=0.01)
        assert b.stats().density == pytest.approx(0.25 + 0.75 / 16, abs=0.01)


def test_compiled_blocks_are_one_graph_for_all_layers(model_and_inputs):
    model, inputs = model_and_inputs
    with rsa.enable(model, sparsity=0.75, **SPARSE) as handle:
        eager = forward(model, inputs)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        compiled = forward(model, inputs)
        graphs = counter.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = forward(model, inputs)
        assert counter.frame_count == graphs
        # one a kind of block; diffusers' single blocks see two memory layouts, and its embedders count as blocks too
        assert graphs <= (1 if "blocks.0.attn1.processor" in model.attn_processors else 5)
        assert handle.stats().sparse_calls == 9
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled, again)


@pytest.mark.parametrize("kind", ["hunyuan", "wan"])
def test_pipelines_run_end_to_end(kind):
    make, run = (tiny.hunyuan_pipeline, tiny.run_hunyuan) if kind == "hunyuan" else (tiny.wan_pipeline, tiny.run_wan)
    pipeline = make()
    untouched = run(pipeline)
    handle = rsa.enable(pipeline, sparsity=0.75, **SPARSE)
    sparse = run(pipeline)
    calls = 3 * 2 * (1 if kind == "hunyuan" else 2)  # layers x steps x guidance calls
    assert handle.stats().sparse_calls == calls
    assert handle.stats().steps == 2
    assert not torch.equal(sparse, untouched)
    assert torch.equal(run(pipeline), sparse)
    assert handle.stats().sparse_calls == calls  # the last run, not both
    video = run(pipeline, output_type="pt")
    assert video.shape[-3:] == ((3, 64, 64) if kind == "hunyuan" else (3, 128, 128))
    handle.disable()
    assert torch.equal(run(pipeline), untouched)


def test_presets_are_found_from_the_model():
    assert "sparsity 0.8," in rsa.enable(tiny.hunyuan_pipeline(), dense_layers=()).summary()
    two = rsa.enable(tiny.wan_pipeline(experts=2))
    assert two.summary().count("sparsity 0.85") == 2
    one = rsa.enable(tiny.wan_pipeline())
    assert "sparsity 0.75" in one.summary()


def config_of(handle):
    (item,) = handle._enabled
    return item.state.config


@pytest.mark.parametrize(("kind", "name"), [("hunyuan", "hunyuan-video-t2v"), ("wan", "wan2.1-t2v")])
def test_a_model_gets_our_defaults_and_the_papers_by_name(kind, name):
    pipeline = tiny.hunyuan_pipeline() if kind == "hunyuan" else tiny.wan_pipeline()
    (ours,), (paper,) = rsa.preset(name), rsa.preset(f"{name}-paper")
    with rsa.enable(pipeline) as handle:
        assert config_of(handle) == ours
        assert (ours.rectify, ours.order, ours.neighbours) == ("query+slope", "content", False)
    with rsa.enable(pipeline, preset=f"{name}-paper") as handle:
        assert config_of(handle) == paper
        assert (paper.rectify, paper.order, paper.neighbours) == ("ipar+gapr", "gilbert", True)
    with rsa.enable(pipeline, order="gilbert", neighbours=True) as handle:
        assert config_of(handle) == ours.replace(order="gilbert", neighbours=True)
    with pytest.raises(ValueError, match=r"neighbours: got True with order='content'.*an order in space"):
        rsa.enable(pipeline, neighbours=True)


def test_schedule_of_a_pipeline_and_its_reset():
    pipeline = tiny.wan_pipeline()
    settings = {**SPARSE, "dense_steps": 0.5, "dense_layers": (1,)}
    with rsa.enable(pipeline, sparsity=0.75, **settings) as handle:
        for _ in range(2):
            tiny.run_wan(pipeline, steps=4)
            stats = handle.stats()
            assert stats.dense_reasons == {"dense_layers": 4 * 2, "dense_steps": 2 * 2 * 2}
            assert stats.sparse_calls == 2 * 2 * 2
            assert [layer.sparse_calls for layer in stats.layers] == [4, 0, 4]


def test_schedule_counts_from_the_first_step_of_each_expert():
    pipeline = tiny.wan_pipeline(experts=2)
    configs = [rsa.SparseConfig(**{**SPARSE, "dense_steps": n}) for n in (2, 1)]
    with rsa.enable(pipeline, configs) as handle:
        for _ in range(2):
            tiny.run_wan(pipeline, steps=8)
            steps = {}
            for layer in handle.stats().layers:
                dense, sparse = steps.get(layer.transformer, (0, 0))
                steps[layer.transformer] = (dense + layer.dense_calls / 6, sparse + layer.sparse_calls / 6)
            (dense, sparse), (dense_2, sparse_2) = steps["transformer"], steps["transformer_2"]
            assert (dense, dense_2) == (2, 1)
            assert dense + sparse + dense_2 + sparse_2 == 8
            assert sparse_2 > 0


def test_an_interrupted_run_does_not_shift_the_schedule():
    pipeline = tiny.wan_pipeline()

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with rsa.enable(pipeline, sparsity=0.75, **{**SPARSE, "dense_steps": 1}) as handle:
        with pytest.raises(KeyboardInterrupt):
            tiny.run_wan(pipeline, steps=4, callback_on_step_end=stop)
        tiny.run_wan(pipeline, steps=3)
        assert handle.stats().dense_reasons == {"dense_steps": 3 * 2}
        assert handle.stats().sparse_calls == 3 * 2 * 2


def test_a_transformer_alone_needs_to_be_told_the_step():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with pytest.warns(UserWarning, match="set_step"):
        handle = rsa.enable(model, **{**SPARSE, "dense_steps": 0.25})
    for step in range(8):
        handle.set_step(step, 8)
        forward(model, inputs)
    assert handle.stats().dense_reasons == {"dense_steps": 2 * 3}
    with pytest.raises(ValueError, match="total"):
        handle.set_step(4, 4)


def test_replaced_processors_are_reported_not_silently_dense():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, sparsity=0.75, **SPARSE) as handle:
        mine = type(model.blocks[1].attn2.processor)()
        model.blocks[1].attn1.set_processor(mine)
        with pytest.warns(UserWarning, match=r"transformer\.blocks\.1\.attn1"):
            forward(model, inputs)
        assert "LOST" in handle.summary()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forward(model, inputs)  # told once
    assert model.blocks[1].attn1.processor is mine


def test_a_backend_set_afterwards_is_reported():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, sparsity=0.75, **SPARSE):
        model.set_attention_backend("native")
        with pytest.warns(UserWarning, match="3 of 3 layers"):
            forward(model, inputs)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_dense_calls_keep_the_backend_the_user_chose(monkeypatch):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    chosen = AttentionBackendName._NATIVE_MATH
    for block in model.blocks:
        block.attn1.processor._attention_backend = chosen
    calls = []
    stock = _AttentionBackendRegistry._backends[chosen]

    def counted(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, chosen, counted)
    with rsa.enable(model, **{**SPARSE, "dense_layers": (1,)}):
        forward(model, inputs)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("target", "arguments", "error", "message"),
    [
        (torch.nn.Linear(2, 2), {}, TypeError, "HunyuanVideoTransformer3DModel.*WanTransformer3DModel"),
        (FlowMatchEulerDiscreteScheduler(), {}, TypeError, "without a transformer"),
        ("wan", {"sparsitty": 0.5}, TypeError, "sparsitty"),
        ("wan", {"sparsity": 1.0}, ValueError, "sparsity"),
        ("wan", {"preset": "wan9"}, ValueError, "wan2.1-t2v"),
        ("wan", {"config": rsa.SparseConfig(), "preset": "wan2.1-t2v"}, ValueError, "both"),
        ("wan", {"config": {"sparsity": 0.8}}, TypeError, "from_dict"),
        ("wan", {"config": [rsa.SparseConfig()] * 2}, ValueError, "2 configs for 1 transformer"),
        ("wan", {"dense_layers": (7,)}, ValueError, r"\[7\]"),
        ("wan", {"backend": "cuda"}, ValueError, "torch"),
    ],
)
def test_errors_say_what_to_do(target, arguments, error, message):
    target = tiny.wan_transformer() if target == "wan" else target
    with pytest.raises(error, match=message):
        rsa.enable(target, **arguments)


def test_a_failed_enable_leaves_nothing_behind():
    pipeline = tiny.wan_pipeline(experts=2)
    pipeline.transformer_2 = tiny.wan_transformer(num_layers=2)
    before = {name: id(p) for name, p in pipeline.transformer.attn_processors.items()}
    with pytest.raises(ValueError, match="dense_layers"):
        rsa.enable(pipeline, dense_layers=(2,))
    assert {name: id(p) for name, p in pipeline.transformer.attn_processors.items()} == before
    assert not pipeline.transformer._forward_pre_hooks


def test_enabling_twice_is_refused():
    model = tiny.wan_transformer()
    with rsa.enable(model, **SPARSE), pytest.raises(RuntimeError, match="enabled already"):
        rsa.enable(model, **SPARSE)


def test_the_backend_by_name_alone_is_refused():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, **SPARSE):
        pass
    for block in model.blocks:
        block.attn1.processor._attention_backend = AttentionBackendName("rectified_spaattn")
    with pytest.raises(RuntimeError, match=r"rectified_spaattn\.enable"):
        forward(model, inputs)


def test_enabling_needs_no_handle_to_be_kept():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = forward(model, inputs)
    rsa.enable(model, sparsity=0.75, **SPARSE)
    assert not torch.equal(forward(model, inputs), untouched)
