"""Offload, compilation and half precision as they are used on a CUDA GPU: `make gpu-test`."""

import warnings

import pytest
import torch

import rectified_spaattn as rsa
import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

SPARSE = {
    "sparsity": 0.75,
    "block_size": 16,
    "neighbours": False,
    "first_frame": False,
    "dense_layers": (),
    "dense_steps": 1,
    "top_p": 0.0,
    "backend": "torch",  # blocks of 16, as small as the models
}
PIPELINES = {"hunyuan": (tiny.hunyuan_pipeline, tiny.run_hunyuan), "wan": (tiny.wan_pipeline, tiny.run_wan)}
STEPS = 3


@pytest.fixture(params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def quiet():
    """Any warning of ours is an error, and the compiler starts afresh."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rectified_spaattn")
        yield
    torch._dynamo.reset()


def offload(pipeline, how: str) -> None:
    cuda = torch.device("cuda")
    if how == "model":
        pipeline.enable_model_cpu_offload()
    elif how == "sequential":
        pipeline.transformer.to("cpu")
        from accelerate import cpu_offload

        cpu_offload(pipeline.transformer, cuda)
        for name in ("text_encoder", "text_encoder_2", "vae"):
            if getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).to(cuda)
    else:
        streams = how.endswith("stream")
        pipeline.enable_group_offload(
            onload_device=cuda,
            offload_device=torch.device("cpu"),
            offload_type=how.removesuffix(" stream"),
            num_blocks_per_group=1,
            use_stream=streams,
        )


@pytest.mark.parametrize("how", ["model", "sequential", "block_level", "leaf_level", "leaf_level stream"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_before_or_after_enabling(kind, how, when):
    make, run = PIPELINES[kind]
    on_gpu = make().to("cuda")
    with rsa.enable(on_gpu, **SPARSE):
        sparse = run(on_gpu, steps=STEPS)
    untouched = run(on_gpu, steps=STEPS)
    pipeline = make()
    if when == "before":
        offload(pipeline, how)
    with rsa.enable(pipeline, **SPARSE) as handle:
        if when == "after":
            offload(pipeline, how)
        for _ in range(2):
            torch.testing.assert_close(run(pipeline, steps=STEPS).cuda(), sparse.cuda(), rtol=1e-3, atol=1e-3)
            stats = handle.stats()
            assert stats.steps == STEPS
            assert stats.dense_reasons == {"dense_steps": stats.sparse_calls // (STEPS - 1)}
    torch.testing.assert_close(run(pipeline, steps=STEPS).cuda(), untouched.cuda(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("when", "dtype"), [("before", torch.float32), ("after", torch.bfloat16)])
def test_compiled_blocks_before_or_after_enabling(kind, when, dtype):
    make, run = PIPELINES[kind]
    pipeline = make().to("cuda", dtype)
    untouched = run(pipeline, steps=STEPS).float()
    with rsa.enable(pipeline, **SPARSE):
        eager = run(pipeline, steps=STEPS).float()
    # bfloat16: inductor fuses, so rounds elsewhere; steps and selections carry it on
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.25}
    if when == "before":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(run(pipeline, steps=STEPS).float(), untouched, **tolerance)
    with rsa.enable(pipeline, **SPARSE) as handle:
        if when == "after":
            pipeline.transformer.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(run(pipeline, steps=STEPS).float(), eager, **tolerance)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(pipeline, steps=STEPS)
        assert handle.stats().sparse_calls > 0
    torch.testing.assert_close(run(pipeline, steps=STEPS).float(), untouched, **tolerance)


def test_compiled_blocks_with_group_offload_and_lora():
    from peft import LoraConfig

    pipeline = tiny.wan_pipeline().to("cuda")
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with rsa.enable(pipeline, **SPARSE) as handle:
        eager = tiny.run_wan(pipeline, steps=STEPS)
        pipeline.transformer.enable_group_offload(
            torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
        )
        pipeline.transformer.compile_repeated_blocks()
        torch.testing.assert_close(tiny.run_wan(pipeline, steps=STEPS), eager, rtol=1e-3, atol=1e-3)
        assert [layer.sparse_calls for layer in handle.stats().layers] == [2 * (STEPS - 1)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_untouched_model(kind, dtype):
    make, run = PIPELINES[kind]
    exact = run(make().to("cuda"), steps=STEPS)
    pipeline = make().to("cuda", dtype)
    error = (run(pipeline, steps=STEPS).float() - exact).abs().mean()
    with rsa.enable(pipeline, **{**SPARSE, "sparsity": 0.0}) as handle:
        kept = run(pipeline, steps=STEPS)
        assert handle.stats().density == pytest.approx(1.0)
    assert (kept.float() - exact).abs().mean() < 2 * error
    with rsa.enable(pipeline, **SPARSE):
        assert run(pipeline, steps=STEPS).isfinite().all()


def test_the_step_costs_no_synchronisation_after_the_first():
    pipeline = tiny.wan_pipeline().to("cuda")
    inputs = {name: value.cuda() for name, value in tiny.wan_inputs(batch=1).items()}
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4, device="cuda")
    scheduler.set_begin_index(0)
    with rsa.enable(pipeline, **SPARSE) as handle, torch.no_grad():
        clock = pipeline.transformer.blocks[0].attn1.processor.rectified_layer.owner.clock
        for index, timestep in enumerate(scheduler.timesteps):
            given = {**inputs, "timestep": timestep[None]}
            try:
                torch.cuda.set_sync_debug_mode("error" if index else "default")
                assert clock.read(given["timestep"]) == (index, 4)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            out = pipeline.transformer(**given).sample
            scheduler.step(out, timestep, inputs["hidden_states"])
        assert handle.stats().steps == 4
