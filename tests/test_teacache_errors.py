"""What enable_teacache() and its handle refuse, and which fit they take."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import rectified_spaattn as rsa
import tiny
from teacache_cases import cogvideox_transformer, flux_transformer, forward, walk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model", "name", "threshold"),
    [
        (tiny.hunyuan_transformer, "HunyuanVideo", 0.15),
        (flux_transformer, "FLUX.1-dev", 0.8),
        (cogvideox_transformer, "CogVideoX1.5-5B", 0.2),
        (lambda: cogvideox_transformer(in_channels=8), "CogVideoX1.5-5B-I2V", 0.2),
        (tiny.wan_transformer, "Wan2.1-T2V-14B", 0.2),
        (lambda: tiny.wan_transformer(in_channels=36), "Wan2.1-T2V-14B", 0.3),
        (lambda: tiny.wan_transformer(in_channels=48, out_channels=48), "Wan2.1-T2V-14B", 0.1),
        (
            lambda: tiny.wan_transformer(num_attention_heads=12, attention_head_dim=128, num_layers=1),
            "Wan2.1-T2V-1.3B",
            0.08,
        ),
    ],
)
def test_the_fit_is_found_from_the_model(model, name, threshold):
    summary = rsa.enable_teacache(model()).summary()
    assert f"fit of {name}, threshold {threshold}," in summary
    assert "nothing has run yet" in summary


@pytest.mark.parametrize(
    ("target", "threshold", "error", "message"),
    [
        (torch.nn.Linear(2, 2), None, TypeError, "HunyuanVideoTransformer3DModel.*FluxTransformer2DModel"),
        (FlowMatchEulerDiscreteScheduler(), None, TypeError, "without a transformer"),
        (lambda: cogvideox_transformer(patch_size_t=None), None, TypeError, "CogVideoX 1.5"),
        (tiny.wan_transformer, -0.1, ValueError, r"threshold: got -0\.1"),
        (tiny.wan_transformer, float("nan"), ValueError, "finite"),
        (tiny.wan_transformer, float("inf"), ValueError, "finite"),
        (tiny.wan_transformer, True, ValueError, "True"),
        (tiny.wan_transformer, "0.2", ValueError, "'0.2'"),
    ],
)
def test_errors_say_what_to_do(target, threshold, error, message):
    target = target() if callable(target) and not isinstance(target, torch.nn.Module) else target
    with pytest.raises(error, match=message):
        rsa.enable_teacache(target, threshold=threshold)
    assert not getattr(target, "_forward_pre_hooks", {})


def test_unknown_steps_are_refused_and_leave_the_model_whole():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model) as handle:
        with pytest.raises(RuntimeError, match="set_step"):
            forward(model, inputs)
        assert isinstance(model.blocks, torch.nn.ModuleList)
        for step, total in ((4, 4), (-1, 4), (0, 0), (True, 4), (0, None)):
            with pytest.raises(ValueError, match="allowed"):
                handle.set_step(step, total)


def test_subclasses_work_and_namesakes_are_refused():
    class Mine(WanTransformer3DModel):
        pass

    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = walk(model, inputs, None)
    model.__class__ = Mine
    with rsa.enable_teacache(model, threshold=0) as handle:
        assert torch.equal(walk(model, inputs, handle), untouched)
        assert "transformer (Mine)" in handle.summary()
    namesake = type("WanTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(TypeError, match=r"test_teacache_errors\.WanTransformer3DModel; allowed"):
        rsa.enable_teacache(namesake)


def test_enabling_twice_is_refused():
    pipeline = tiny.wan_pipeline(experts=2)
    with rsa.enable_teacache(pipeline.transformer_2), pytest.raises(RuntimeError, match="transformer_2 already"):
        rsa.enable_teacache(pipeline)
    assert not pipeline.transformer._forward_pre_hooks


def test_another_cache_is_refused_on_both_sides():
    model = tiny.wan_transformer()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RuntimeError, match=r"a cache \(FirstBlockCacheConfig\).*Disable that first"):
        rsa.enable_teacache(model)
    model.disable_cache()
    with rsa.enable_teacache(model), pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    model.disable_cache()
