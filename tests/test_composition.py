"""enable() together with what else people do to a diffusers pipeline: tiny random weights, real classes."""

import inspect

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import rectified_spaattn as rsa
import tiny
from rectified_spaattn.pipelines import processor as seam
from tiny import ALL_BLOCKS, SPARSE, forward
from tiny_pipelines import PIPELINES as PIPELINES_OF_MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "hunyuan": (tiny.hunyuan_transformer, tiny.hunyuan_inputs),
    "wan": (tiny.wan_transformer, tiny.wan_inputs),
}
PIPELINES = {"hunyuan": (tiny.hunyuan_pipeline, tiny.run_hunyuan), "wan": (tiny.wan_pipeline, tiny.run_wan)}


@pytest.fixture(params=PIPELINES)
def kind(request):
    return request.param


# torch.compile


@pytest.mark.parametrize(("kind", "when"), [("wan", "before"), ("wan", "after"), ("hunyuan", "before")])
def test_compiled_blocks_before_or_after_enabling(kind, when, quiet, fresh_compiler):
    make, make_inputs = MODELS[kind]
    model, inputs = make(**({"num_single_layers": 1} if kind == "hunyuan" else {})), make_inputs()
    untouched = forward(model, inputs)
    with rsa.enable(model, **SPARSE):
        eager = forward(model, inputs)
    if when == "before":
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)
    for _ in range(2):  # disabled and enabled again, the compiled code follows
        with rsa.enable(model, **SPARSE) as handle:
            if when == "after":
                model.compile_repeated_blocks(fullgraph=True, backend="eager")
            torch.testing.assert_close(forward(model, inputs), eager, rtol=1e-4, atol=1e-5)
            assert handle.stats().sparse_calls == len(handle.stats().layers)
        torch.testing.assert_close(forward(model, inputs), untouched, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_is_compiled_as_one_graph(fresh_compiler):
    """As diffusers' guides have it; our hook on the decoder must not break the graph."""
    pipeline = PIPELINES_OF_MODELS["Flux.1"].make()
    latents = torch.randn(1, pipeline.vae.config.latent_channels, 8, 8)
    with torch.no_grad(), rsa.enable(pipeline, **SPARSE):
        untouched = pipeline.vae.decode(latents).sample
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True, backend="eager")
        assert torch.equal(pipeline.vae.decode(latents).sample, untouched)


def test_the_schedule_changes_without_a_recompilation(quiet, fresh_compiler):
    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1, "dense_layers": (1,)}) as handle:
        eager = tiny.run_wan(pipeline, steps=3)
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        tiny.run_wan(pipeline, steps=3)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = tiny.run_wan(pipeline, steps=3)
        assert handle.stats().dense_reasons == {"dense_steps": 2 * 2, "dense_layers": 3 * 2}
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_transformer_compiled_as_a_whole(how, quiet, fresh_compiler):
    pipeline = tiny.wan_pipeline()
    untouched = tiny.run_wan(pipeline, steps=3)
    settings = {**SPARSE, "dense_steps": 1}
    with rsa.enable(pipeline, **settings):
        eager = tiny.run_wan(pipeline, steps=3)
    if how == "in place":
        pipeline.transformer.compile(backend="eager")
    else:
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    torch.testing.assert_close(tiny.run_wan(pipeline, steps=3), untouched, rtol=1e-4, atol=1e-5)
    with rsa.enable(pipeline, **settings) as handle:
        torch.testing.assert_close(tiny.run_wan(pipeline, steps=3), eager, rtol=1e-4, atol=1e-5)
        assert handle.stats().dense_reasons == {"dense_steps": 2 * 3}
        assert handle.stats().sparse_calls == 2 * 2 * 3
    torch.testing.assert_close(tiny.run_wan(pipeline, steps=3), untouched, rtol=1e-4, atol=1e-5)


# LoRA


def lora(model, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of the self-attention and the feed-forward of every block of a Wan transformer."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("attn1.to_" in name or "ffn" in name):
            for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                weights[f"transformer.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    return weights


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_before_or_after_enabling(when, quiet):
    pipeline = tiny.wan_pipeline()
    weights = lora(pipeline.transformer)
    untouched = tiny.run_wan(pipeline)
    with rsa.enable(pipeline, **SPARSE):
        without = tiny.run_wan(pipeline)
    pipeline.load_lora_weights(weights, adapter_name="style")
    dense = tiny.run_wan(pipeline)
    if when == "after":
        pipeline.unload_lora_weights()
    with rsa.enable(pipeline, **ALL_BLOCKS) as handle:
        if when == "after":
            pipeline.load_lora_weights(weights, adapter_name="style")
        torch.testing.assert_close(tiny.run_wan(pipeline), dense, rtol=1e-3, atol=1e-4)
        pipeline.set_adapters("style", 0.5)
        half = tiny.run_wan(pipeline)
        assert (half - dense).abs().max() > 1e-2
        pipeline.set_adapters("style", 1.0)
        pipeline.fuse_lora()
        torch.testing.assert_close(tiny.run_wan(pipeline), dense, rtol=1e-3, atol=1e-4)
        pipeline.unfuse_lora()
        assert handle.stats().dense_calls == 0
    torch.testing.assert_close(tiny.run_wan(pipeline), dense, rtol=1e-4, atol=1e-5)
    with rsa.enable(pipeline, **SPARSE) as handle:
        assert (tiny.run_wan(pipeline) - without).abs().max() > 1e-2
        pipeline.unload_lora_weights()
        torch.testing.assert_close(tiny.run_wan(pipeline), without, rtol=1e-4, atol=1e-5)
        assert handle.stats().sparse_calls == 12
    torch.testing.assert_close(tiny.run_wan(pipeline), untouched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_compiled_blocks_with_lora_and_group_offload(how, quiet, fresh_compiler):
    # the hooks of group offloading break the graph inside the processor: each layer must still be told apart
    pipeline = tiny.wan_pipeline()
    pipeline.transformer = tiny.wan_transformer(num_layers=2)
    pipeline.load_lora_weights(lora(pipeline.transformer))
    model, inputs = pipeline.transformer, tiny.wan_inputs()
    with rsa.enable(model, **{**SPARSE, "dense_layers": (1,)}) as handle:
        eager = forward(model, inputs)
        model.enable_group_offload(torch.device("cpu"), offload_type=how, num_blocks_per_group=1)
        model.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(forward(model, inputs), eager, rtol=1e-4, atol=1e-5)
        assert [(layer.sparse_calls, layer.dense_calls) for layer in handle.stats().layers] == [(2, 0), (0, 2)]


# offload


def offload(pipeline, how: str) -> None:
    cpu = torch.device("cpu")
    if how == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        cpu_offload(pipeline.transformer, cpu)
    elif how == "pipeline groups":
        pipeline.enable_group_offload(onload_device=cpu, offload_type="leaf_level")
    else:
        pipeline.transformer.enable_group_offload(cpu, offload_type=how, num_blocks_per_group=1)


@pytest.mark.parametrize("how", ["model", "sequential", "block_level", "leaf_level", "pipeline groups"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_before_or_after_enabling(when, how, quiet):
    pipeline = tiny.wan_pipeline()
    untouched = tiny.run_wan(pipeline)
    settings = {**SPARSE, "dense_steps": 1}
    with rsa.enable(pipeline, **settings):
        sparse = tiny.run_wan(pipeline, steps=3)
    if when == "before":
        offload(pipeline, how)
    with rsa.enable(pipeline, **settings) as handle:
        if when == "after":
            offload(pipeline, how)
        for _ in range(2):
            assert torch.equal(tiny.run_wan(pipeline, steps=3), sparse)
            assert handle.stats().dense_reasons == {"dense_steps": 2 * 3}
            assert handle.stats().steps == 3
    assert torch.equal(tiny.run_wan(pipeline), untouched)


# VAE, dtypes, batches

TILES = {
    "tile_sample_min_height": 48,
    "tile_sample_min_width": 48,
    "tile_sample_stride_height": 32,
    "tile_sample_stride_width": 32,
}


def test_vae_tiling(kind, quiet):
    make, run = PIPELINES[kind]
    pipeline = make()
    with rsa.enable(pipeline, **SPARSE) as handle:
        latents, video = run(pipeline), run(pipeline, output_type="pt")
        pipeline.vae.enable_tiling(**TILES)
        tiled = run(pipeline, output_type="pt")
        assert tiled.shape == video.shape
        assert not torch.equal(tiled, video)
        assert torch.equal(run(pipeline), latents)
        assert handle.stats().dense_calls == 0
    decoded = make()
    decoded.vae.enable_tiling(**TILES)
    with rsa.enable(decoded, **SPARSE):
        assert torch.equal(run(decoded, output_type="pt"), tiled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype, quiet):
    make, run = PIPELINES[kind]
    exact = run(make())
    pipeline = make().to(dtype)
    dense = run(pipeline)
    error = (dense.float() - exact).abs().mean()
    with rsa.enable(pipeline, **ALL_BLOCKS) as handle:
        kept = run(pipeline)
        assert kept.dtype == dense.dtype
        assert handle.stats().density == pytest.approx(1.0)
    # as far from the exact result as the untouched model in this dtype is, not further
    assert (kept.float() - exact).abs().mean() < 1.5 * error
    with rsa.enable(pipeline, **SPARSE):
        assert run(pipeline).isfinite().all()
    assert torch.equal(run(pipeline), dense)


def test_prompts_of_different_lengths_in_a_batch_are_as_alone(kind, quiet):
    make, run = PIPELINES[kind]
    pipeline = make()
    prompts, shape = ["a", "a b c d e f g h"], (1, 4, 3, 8, 8) if kind == "hunyuan" else (1, 16, 3, 16, 16)
    negative = {} if kind == "hunyuan" else {"negative_prompt": ["d e", ""]}
    latents = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1))
    with rsa.enable(pipeline, **SPARSE) as handle:
        together = run(pipeline, prompt=prompts, latents=latents, **negative)
        assert handle.stats().dense_calls == 0
        for i, prompt in enumerate(prompts):
            own = {name: values[i] for name, values in negative.items()}
            alone = run(pipeline, prompt=prompt, latents=latents[i : i + 1], **own)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_several_videos_a_prompt(kind, quiet):
    make, run = PIPELINES[kind]
    pipeline = make()
    shape = (2, 4, 3, 8, 8) if kind == "hunyuan" else (2, 16, 3, 16, 16)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with rsa.enable(pipeline, **SPARSE):
        both = run(pipeline, latents=latents, num_videos_per_prompt=2)
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], run(pipeline, latents=latents[i : i + 1]), rtol=1e-3, atol=1e-4)


# diffusers' own hooks


def test_a_block_cache_raises_no_alarm(quiet):
    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 2}) as handle:
        tiny.run_wan(pipeline, steps=6)
        without = handle.stats()
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        for _ in range(2):
            tiny.run_wan(pipeline, steps=6)
            cached = handle.stats()
            assert cached.steps == 6
            assert cached.dense_reasons["dense_steps"] <= without.dense_reasons["dense_steps"]
            assert 0 < cached.sparse_calls < without.sparse_calls
            # the first block runs in every step, and its warm-up is not stretched by steps that others skip
            assert (cached.layers[0].dense_calls, cached.layers[0].sparse_calls) == (2 * 2, 4 * 2)
        with pytest.raises(ZeroDivisionError):
            tiny.run_wan(pipeline, steps=6, callback_on_step_end=lambda *_: 1 / 0)
        tiny.run_wan(pipeline, steps=6)
        assert "NOT CALLED" not in handle.summary()
        pipeline.transformer.disable_cache()
        tiny.run_wan(pipeline, steps=6)
        assert handle.stats().sparse_calls == without.sparse_calls


def test_enabled_and_disabled_inside_a_run(quiet):
    pipeline, handles = tiny.wan_pipeline(), []

    def switch(pipe, step, timestep, kwargs):
        if step == 0:
            handles.append(rsa.enable(pipe, **{**SPARSE, "dense_steps": 1}))
        if step == 3:
            handles[0].disable()
        return kwargs

    untouched = tiny.run_wan(pipeline, steps=6)
    switched = tiny.run_wan(pipeline, steps=6, callback_on_step_end=switch)
    stats = handles[0].stats()
    assert (stats.steps, stats.dense_calls, stats.sparse_calls) == (3, 2 * 3, 2 * 2 * 3)
    assert not torch.equal(switched, untouched)
    assert torch.equal(tiny.run_wan(pipeline, steps=6), untouched)


def test_skipped_attention_scores_are_skipped_in_sparse_layers_too(quiet):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    plain = forward(model, inputs)
    with AttentionScoreSkipFunctionMode():
        perturbed = forward(model, inputs)
    assert (perturbed - plain).abs().max() > 1e-3
    with rsa.enable(model, **SPARSE), AttentionScoreSkipFunctionMode():
        torch.testing.assert_close(forward(model, inputs), perturbed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stock", [FluxAttnProcessor, AttnProcessor2_0])
def test_layer_skip_finds_wrapped_processors(stock, monkeypatch):
    # in a process where nothing has asked diffusers' registry before
    monkeypatch.setattr(AttentionProcessorRegistry, "_is_registered", False)
    monkeypatch.setattr(AttentionProcessorRegistry, "_registry", {})
    wrapped = seam._wrapped_class.__wrapped__(stock)
    assert AttentionProcessorRegistry.get(wrapped) is AttentionProcessorRegistry.get(stock)
    assert inspect.signature(wrapped.__call__) == inspect.signature(stock.__call__)
