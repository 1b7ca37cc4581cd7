"""What takes layers away from enable(), and what only looks as if: replaced processors, modules and backends."""

import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

import rectified_spaattn as rsa
import tiny
from model_cases import build
from rectified_spaattn.lab.calls.capture import capture_attention
from tiny import ALL_BLOCKS, SPARSE, forward

pytestmark = pytest.mark.usefixtures("one_thread")

PIPELINES = {"hunyuan": (tiny.hunyuan_pipeline, tiny.run_hunyuan), "wan": (tiny.wan_pipeline, tiny.run_wan)}


@pytest.fixture(params=PIPELINES)
def kind(request):
    return request.param


def test_fused_projections_stay_sparse_and_right(kind, quiet):
    make, run = PIPELINES[kind]
    pipeline = make()
    untouched = run(pipeline)
    with rsa.enable(pipeline, **SPARSE):
        sparse = run(pipeline)
    with rsa.enable(pipeline, **SPARSE) as handle:
        pipeline.transformer.fuse_qkv_projections()
        torch.testing.assert_close(run(pipeline), sparse, rtol=1e-4, atol=1e-5)
        assert handle.stats().dense_calls == 0
        assert "LOST" not in handle.summary()
        pipeline.transformer.unfuse_qkv_projections()
        assert torch.equal(run(pipeline), sparse)
        pipeline.transformer.fuse_qkv_projections()
    torch.testing.assert_close(run(pipeline), untouched, rtol=1e-4, atol=1e-5)


def test_processors_made_anew_for_the_whole_model(kind):
    # as load_ip_adapter and unload_ip_adapter do: a dict of new processors, made from the classes of those in place
    make, run = PIPELINES[kind]
    pipeline = make()
    model = pipeline.transformer
    untouched = run(pipeline)
    with rsa.enable(pipeline, **SPARSE) as handle:
        sparse = run(pipeline)
        model.set_attn_processor({name: type(processor)() for name, processor in model.attn_processors.items()})
        with pytest.warns(UserWarning, match=r"3 of 3 layers of transformer run without.*Disable and enable again"):
            assert torch.equal(run(pipeline), untouched)
        assert "LOST on transformer" in handle.summary()
        assert handle.stats().sparse_calls == 0
        handle.disable()
        assert torch.equal(run(pipeline), untouched)
        with rsa.enable(pipeline, **SPARSE) as again:
            assert torch.equal(run(pipeline), sparse)
            assert again.stats().dense_calls == 0
            assert "LOST" not in again.summary()


def test_an_ip_adapter_loaded_afterwards():
    model, inputs = build("Flux.1", 16)
    cross, inner, generator = model.config.joint_attention_dim, model.inner_dim, torch.Generator().manual_seed(0)
    shapes = {"proj.weight": (4 * cross, 8), "proj.bias": (4 * cross,), "norm.weight": (cross,), "norm.bias": (cross,)}
    weights = {
        "image_proj": {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        "ip_adapter": {
            f"{block}.to_{kind}_ip.{part}": torch.randn(shape, generator=generator)
            for block in range(len(model.transformer_blocks))
            for kind in "kv"
            for part, shape in (("weight", (inner, cross)), ("bias", (inner,)))
        },
    }
    image = torch.randn(len(inputs["hidden_states"]), 4, cross, generator=generator)
    with_image = {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [image]}}
    with rsa.enable(model, **SPARSE) as handle:
        forward(model, inputs)
        model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)  # what pipe.load_ip_adapter calls
        with pytest.warns(UserWarning, match="3 of 3 layers of transformer run without"):
            dense = forward(model, with_image)
        assert "LOST on transformer" in handle.summary()
        assert "skipped" not in handle.summary()
    assert torch.equal(forward(model, with_image), dense)
    with rsa.enable(model, **ALL_BLOCKS) as handle:
        torch.testing.assert_close(forward(model, with_image), dense, rtol=1e-4, atol=1e-5)
        assert handle.stats().sparse_calls == 3


class WithImagePrompt(type(tiny.wan_transformer().blocks[0].attn1.processor)):
    """Like an IP-Adapter's: a second attention, from the same queries to a few keys, on the same backend."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        image = dispatch_attention_fn(q, k[:, :7], v[:, :7], backend=self._attention_backend)
        return out + attn.to_out[0](image.flatten(2))


class ImagePromptFirst(WithImagePrompt):
    """The other way round: the image prompt's attention comes before the video's."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        image = dispatch_attention_fn(q, k[:, :7], v[:, :7], backend=self._attention_backend)
        return super().__call__(attn, hidden_states, *args, **kwargs) + attn.to_out[0](image.flatten(2))


def test_an_image_prompt_in_the_processor_stays_dense(quiet):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    for block in model.blocks:
        block.attn1.set_processor(WithImagePrompt())
    untouched = forward(model, inputs)
    with rsa.enable(model, **ALL_BLOCKS) as handle:
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)
        assert (handle.stats().sparse_calls, handle.stats().dense_calls) == (3, 0)
    assert torch.equal(forward(model, inputs), untouched)


def test_an_image_prompt_in_the_processor_is_no_call_to_capture(quiet):

    pipeline = tiny.wan_pipeline()
    tiny_run = {"steps": 2, "guidance_scale": 1.0}
    with capture_attention(pipeline, steps=[1]) as plain:
        tiny.run_wan(pipeline, **tiny_run)
    for block in pipeline.transformer.blocks:
        block.attn1.set_processor(ImagePromptFirst())
    with capture_attention(pipeline, steps=[1]) as calls:
        tiny.run_wan(pipeline, **tiny_run)
    assert [call.k.shape for call in calls] == [call.k.shape for call in plain]


def test_each_loss_is_told_and_told_once():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    stock = type(model.blocks[0].attn2.processor)
    with rsa.enable(model, **SPARSE):
        for lost in (0, 1):
            model.blocks[lost].attn1.set_processor(stock())
            with pytest.warns(UserWarning, match=f"{lost + 1} of 3 layers"):
                forward(model, inputs)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                forward(model, inputs)


def test_a_replaced_module_is_reported():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    other = tiny.wan_transformer()
    with rsa.enable(model, **SPARSE) as handle:
        model.blocks[1] = other.blocks[1]
        with pytest.warns(UserWarning, match=r"1 of 3 layers.*transformer\.blocks\.1\.attn1"):
            forward(model, inputs)
        assert "LOST on transformer: transformer.blocks.1.attn1" in handle.summary()
        assert handle.stats().sparse_calls == 2


def test_modules_that_are_only_hidden_or_compiled_are_not_lost(quiet, fresh_compiler):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()

    def hide(module, args, kwargs):
        vars(module)["blocks"] = list(module._modules["blocks"])

    model.register_forward_pre_hook(hide, with_kwargs=True)  # as TeaCache does for the length of a forward
    model.register_forward_hook(lambda module, args, output: vars(module).pop("blocks") and None)
    with rsa.enable(model, **SPARSE) as handle:
        sparse = forward(model, inputs)
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
        torch.testing.assert_close(forward(model, inputs), sparse, rtol=1e-4, atol=1e-5)
        assert handle.stats().sparse_calls == 6
        assert "LOST" not in handle.summary()


def test_a_backend_reset_afterwards_is_reported():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = forward(model, inputs)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    with rsa.enable(model, **SPARSE) as handle:
        model.reset_attention_backend()
        with pytest.warns(UserWarning, match="3 of 3 layers"):
            assert torch.equal(forward(model, inputs), untouched)
        assert "LOST" in handle.summary()
    assert torch.equal(forward(model, inputs), untouched)
    _AttentionBackendRegistry.set_active_backend(active)


def test_a_process_wide_backend_takes_nothing_away(quiet):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    active = _AttentionBackendRegistry.get_active_backend()[0]
    with rsa.enable(model, **SPARSE) as handle:
        sparse = forward(model, inputs)
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH)
        try:
            torch.testing.assert_close(forward(model, inputs), sparse, rtol=1e-4, atol=1e-5)
        finally:
            _AttentionBackendRegistry.set_active_backend(active)
        assert handle.stats().sparse_calls == 6


class OwnAttention(type(tiny.wan_transformer().blocks[0].attn1.processor)):
    """A processor that computes attention itself."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_a_processor_that_goes_around_the_dispatcher_is_reported():
    pipeline = tiny.wan_pipeline()
    pipeline.transformer.blocks[2].attn1.set_processor(OwnAttention())
    with rsa.enable(pipeline, **SPARSE) as handle:
        with pytest.warns(
            UserWarning, match=r"1 of 3 layers.*blocks\.2\.attn1.*dispatch_attention_fn.*before enable"
        ) as told:
            tiny.run_wan(pipeline, steps=3)
        assert len(told) == 1
        assert "NOT CALLED on transformer: transformer.blocks.2.attn1" in handle.summary()
        assert handle.stats().sparse_calls == 2 * 3 * 2
