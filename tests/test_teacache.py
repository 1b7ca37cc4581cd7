"""enable_teacache() on real diffusers classes with tiny random weights."""

import itertools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
)
from torch._dynamo.testing import CompileCounterWithBackend

import rectified_spaattn as rsa
import tiny
from rectified_spaattn.pipelines.teacache.models import CACHED_MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {
    "block_size": 16,
    "neighbours": False,
    "first_frame": False,
    "dense_layers": (),
    "dense_steps": 0,
    "top_p": 0.0,
    "sparsity": 0.75,
}
HUGE = 1e9


def flux_transformer(**overrides):
    torch.manual_seed(0)
    settings = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**{**settings, **overrides}).eval()


def flux_inputs():
    torch.manual_seed(1)
    rows = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), dim=-1).reshape(-1, 2)
    return {
        "hidden_states": torch.randn(1, 36, 4),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.cat([torch.zeros(36, 1), rows], dim=1),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5]),
    }


def cogvideox_transformer(**overrides):
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "patch_size_t": 2,
        "patch_bias": False,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 12,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**{**settings, **overrides}).eval()


def cogvideox_inputs():
    torch.manual_seed(1)
    angles = torch.randn(2 * 4 * 4, 16)
    return {
        "hidden_states": torch.randn(2, 4, 4, 8, 8),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 12, 16),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def wan_ti2v_inputs():
    inputs = tiny.wan_inputs()
    timestep = torch.full((2, 3 * 8 * 8), 500)
    timestep[:, :64] = 0  # the first frame is given
    return {**inputs, "timestep": timestep}


MODELS = {
    "hunyuan": (tiny.hunyuan_transformer, tiny.hunyuan_inputs),
    "hunyuan-i2v": (lambda: tiny.hunyuan_transformer(image_condition_type="token_replace"), tiny.hunyuan_inputs),
    "wan": (tiny.wan_transformer, tiny.wan_inputs),
    "wan-ti2v": (tiny.wan_transformer, wan_ti2v_inputs),
    "cogvideox": (cogvideox_transformer, cogvideox_inputs),
    "flux": (flux_transformer, flux_inputs),
}
LISTS = {"hunyuan": 2, "hunyuan-i2v": 2, "flux": 2}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def blocks_of(model):
    return [block for name in CACHED_MODELS[type(model).__name__].blocks for block in getattr(model, name)]


class Calls:
    """Counts the forwards of blocks, a list a block."""

    def __init__(self, model):
        self.counts = [0] * len(blocks_of(model))
        self.hooks = [block.register_forward_hook(self._counter(i)) for i, block in enumerate(blocks_of(model))]

    def _counter(self, i):
        def count(*_):
            self.counts[i] += 1

        return count

    def take(self):
        counts, self.counts = self.counts, [0] * len(self.counts)
        assert len(set(counts)) == 1, counts
        return counts[0]


def at_step(inputs, step, total, pace=0.1):
    """Inputs of one denoising step: the timestep falls, and the latents drift."""
    timestep = inputs["timestep"]
    fraction = 1 - step / total
    scaled = timestep * 2 * fraction if timestep.is_floating_point() else (timestep * 2 * fraction).long()
    drift = pace * step * torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
    return {**inputs, "timestep": scaled, "hidden_states": inputs["hidden_states"] + drift}


def forward(model, inputs, branch=None):
    with torch.no_grad():
        if branch is None:
            return model(**inputs).sample
        with model.cache_context(branch):
            return model(**inputs).sample


def walk(model, inputs, handle, total=8, branch=None, pace=0.1):
    outputs = []
    for step in range(total):
        if handle is not None:
            handle.set_step(step, total)
        outputs.append(forward(model, at_step(inputs, step, total, pace), branch))
    return torch.stack(outputs)


def first_steps(kind):
    return 5 if kind.startswith("wan") else 1


def test_threshold_zero_computes_everything_bit_for_bit(kind):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    untouched = walk(model, inputs, None)
    calls = Calls(model)
    with rsa.enable_teacache(model, threshold=0) as handle:
        assert torch.equal(walk(model, inputs, handle), untouched)
        assert calls.take() == 8
        assert handle.stats().skipped == 0


def test_a_huge_threshold_computes_the_first_and_last_steps_alone(kind):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    untouched = walk(model, inputs, None)
    first = first_steps(kind)
    calls = Calls(model)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        cached = walk(model, inputs, handle)
        assert calls.take() == first + 1
        stats = handle.stats()
        assert (stats.steps, stats.computed, stats.skipped) == (8, first + 1, 7 - first)
        assert stats.branches[0].skipped_steps == tuple(range(first, 7))
        assert f"{7 - first} of them skipped" in handle.summary()
    assert torch.equal(cached[:first], untouched[:first])
    assert torch.equal(cached[-1], untouched[-1])
    for step in range(first, 7):
        assert not torch.equal(cached[step], untouched[step])
        assert not torch.equal(cached[step], cached[step - 1])  # the rest of the model runs at the step it is


def test_a_skipped_step_adds_what_the_blocks_added_last(kind):
    """The input of the layer after the blocks, caught by a hook: first block's input + residual of the step before."""
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    after = {"wan": "norm_out", "cogvideox": "norm_final"}.get(kind.partition("-")[0], "norm_out")
    ends, starts = [], []
    getattr(model, after).register_forward_pre_hook(lambda _, args: ends.append(args[0]))
    embedder = {"wan": "patch_embedding", "cogvideox": "patch_embed"}.get(kind.partition("-")[0], "x_embedder")

    def embedded(_, args, output):
        if kind.startswith("wan"):
            output = output.flatten(2).transpose(1, 2)
        starts.append(output[:, 12:] if kind == "cogvideox" else output)

    getattr(model, embedder).register_forward_hook(embedded)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        walk(model, inputs, handle)
    last_computed = first_steps(kind) - 1
    residual = ends[last_computed] - starts[last_computed]
    for step in range(last_computed + 1, 7):
        torch.testing.assert_close(ends[step], starts[step] + residual, rtol=1e-6, atol=1e-6)


def modulated(model, inputs):
    """The first block's input to its attention, caught inside of the untouched model."""
    seen = []
    block = blocks_of(model)[0]
    if hasattr(model, "condition_embedder"):
        hook = model.condition_embedder.time_proj.register_forward_hook(lambda m, a, output: seen.append(output))
    elif hasattr(model, "time_embedding"):
        hook = model.time_embedding.register_forward_hook(lambda m, a, output: seen.append(output))
    else:
        hook = block.norm1.register_forward_hook(lambda m, a, output: seen.append(output[0]))
    forward(model, inputs)
    hook.remove()
    return seen[0][:, -1] if seen[0].ndim == 3 and hasattr(model, "condition_embedder") else seen[0]


def test_the_pattern_is_the_accumulated_distance(kind):
    """Which steps are skipped, against a few lines that know the published rule and nothing of the code."""
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    total, pace = 16, 0.03
    if kind.startswith("wan"):  # changes of a few percent, as in the real model and where its fit is above zero
        torch.nn.init.constant_(model.condition_embedder.time_proj.bias, 0.5)
    signals = [modulated(model, at_step(inputs, step, total, pace)).double() for step in range(total)]
    fit = CACHED_MODELS[type(model).__name__].fit(model, None)
    changes = [float((new - old).abs().mean() / old.abs().mean()) for old, new in itertools.pairwise(signals)]
    powers = range(len(fit.coefficients) - 1, -1, -1)
    distances = [sum(c * x**p for c, p in zip(fit.coefficients, powers, strict=True)) for x in changes]
    patterns = set()
    usual = sorted(distances[fit.first_steps - 1 :])[len(distances) // 3]
    for threshold in [usual * factor for factor in (0.5, 1.1, 1.6, 2.1, 2.4, 2.8, 3.1, 3.4, 4.3, 5.7, 7.9, 20.0)]:
        expected, accumulated = [], 0.0
        for step in range(total):
            if step < fit.first_steps or step == total - 1:
                accumulated = 0.0
                continue
            accumulated += distances[step - 1]
            if accumulated < threshold:
                expected.append(step)
            else:
                accumulated = 0.0
        with rsa.enable_teacache(model, threshold=threshold) as handle:
            walk(model, inputs, handle, total, pace=pace)
            assert handle.stats().branches[0].skipped_steps == tuple(expected)
        patterns.add(tuple(expected))
    assert len(patterns) > 6


def test_each_branch_has_its_own_state():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1) * 2}
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        alone = walk(model, inputs, handle, branch="cond")
        alone_other = walk(model, other, handle, branch="uncond")
        together = []
        for step in range(8):
            handle.set_step(step, 8)
            together.append(
                (
                    forward(model, at_step(inputs, step, 8), "cond"),
                    forward(model, at_step(other, step, 8), "uncond"),
                )
            )
        assert torch.equal(torch.stack([a for a, _ in together]), alone)
        assert torch.equal(torch.stack([b for _, b in together]), alone_other)
        assert [(b.branch, b.computed, b.skipped) for b in handle.stats().branches] == [
            ("cond", 6, 2),
            ("uncond", 6, 2),
        ]
        assert handle.stats().steps == 8


def test_two_guidance_calls_in_one_branch_are_refused():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        handle.set_step(0, 8)
        forward(model, at_step(inputs, 0, 8))
        forward(model, at_step(inputs, 0, 8))
        handle.set_step(1, 8)
        forward(model, at_step(inputs, 1, 8))
        with pytest.raises(RuntimeError, match="cache_context"):
            forward(model, at_step(inputs, 1, 8))
    assert "blocks" not in vars(model)


def test_a_branch_with_a_gap_starts_anew():
    """Guidance only in part of the steps: no residual older than a step is used."""
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step in (0, 1, 2, 5, 6):
            handle.set_step(step, 10)
            forward(model, at_step(inputs, step, 10), "uncond")
        assert handle.stats().branches[0].skipped_steps == (1, 2, 6)


def test_a_new_run_forgets_branches_it_has_not_reached_yet():
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step in range(3):  # interrupted
            handle.set_step(step, 10)
            forward(model, at_step(inputs, step, 10), "uncond")
        handle.set_step(0, 10)
        forward(model, at_step(inputs, 0, 10), "cond")
        handle.set_step(3, 10)
        forward(model, at_step(inputs, 3, 10), "uncond")
        assert [(b.branch, b.computed, b.skipped) for b in handle.stats().branches] == [
            ("cond", 1, 0),
            ("uncond", 1, 0),
        ]


def test_second_order_steps_share_a_branch():
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for position in range(8):  # two timesteps a step, as Heun's method
            handle.set_step(position // 2, 4)
            forward(model, at_step(inputs, position, 8))
        stats = handle.stats()
    assert (stats.steps, stats.computed, stats.skipped) == (4, 4, 4)
    assert stats.branches[0].skipped_steps == (1, 1, 2, 2)


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
        assert handle._cached[0]._branches.branches._state_cache == {}


@pytest.mark.parametrize("stopped_at", [0, 2, 6])
def test_an_interrupted_run_leaves_nothing_behind(stopped_at):
    pipeline = tiny.wan_pipeline()

    def stop(pipe, step, timestep, kwargs):
        if step == stopped_at:
            raise KeyboardInterrupt
        return kwargs

    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        whole = tiny.run_wan(pipeline, steps=8)
        stats = handle.stats()
        with pytest.raises(KeyboardInterrupt):
            tiny.run_wan(pipeline, steps=8, callback_on_step_end=stop)
        assert torch.equal(tiny.run_wan(pipeline, steps=8), whole)
        assert handle.stats() == stats


def test_a_forward_that_fails_leaves_the_model_whole():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    untouched = forward(model, at_step(inputs, 0, 8))
    blocks = model.blocks

    def fail(*_):
        raise MemoryError("the user's own")

    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        handle.set_step(0, 8)
        hook = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(MemoryError):
            forward(model, at_step(inputs, 0, 8))
        hook.remove()
        assert model.blocks is blocks
        assert torch.equal(forward(model, at_step(inputs, 0, 8)), untouched)
        assert handle.stats().computed == 1
        handle.set_step(1, 8)
        hook = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(MemoryError):
            forward(model, at_step(inputs, 1, 8))
        hook.remove()
        forward(model, at_step(inputs, 1, 8))  # tried again: no second guidance call
        assert handle.stats().computed == 2


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
    with rsa.enable(pipeline, **SPARSE):
        sparse_only = tiny.run_hunyuan(pipeline, steps=5)
    with rsa.enable_teacache(pipeline, threshold=HUGE):
        cached_only = tiny.run_hunyuan(pipeline, steps=5)
    if cache_first:
        cache, sparse = rsa.enable_teacache(pipeline, threshold=HUGE), rsa.enable(pipeline, **SPARSE)
    else:
        sparse, cache = rsa.enable(pipeline, **SPARSE), rsa.enable_teacache(pipeline, threshold=HUGE)
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
    with rsa.enable(pipeline, **SPARSE) as sparse:
        expected = tiny.run_wan(pipeline, steps=3)
        with rsa.enable_teacache(pipeline, threshold=0):
            assert torch.equal(tiny.run_wan(pipeline, steps=3), expected)
            assert sparse.stats().skipped == 0
            assert "skipped" not in sparse.summary()


@pytest.mark.parametrize("name", ["hunyuan", "wan", "flux"])
@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_blocks_stay_one_graph(name, compile_first):
    """Skipping goes on outside of the compiled blocks: no graph break, and no compilation a step or a layer."""
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        eager = walk(model, inputs, handle)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    if compile_first:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    handle = rsa.enable_teacache(model, threshold=HUGE)
    if not compile_first:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    compiled = walk(model, inputs, handle)
    graphs = counter.frame_count
    assert 0 < graphs <= (1 if name == "wan" else 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = walk(model, inputs, handle)
    assert counter.frame_count == graphs
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert torch.equal(compiled, again)
    assert handle.stats().skipped == 7 - first_steps(name)


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


def test_a_controlnet_is_added_once():
    """What is added between blocks is in the residual; what is added after the last one is not."""
    model, inputs = flux_transformer(), flux_inputs()
    inputs["controlnet_block_samples"] = [torch.ones(1, 36, 32)]
    inputs["controlnet_single_block_samples"] = [torch.full((1, 36, 32), 0.5), torch.full((1, 36, 32), 0.25)]
    starts, ends = [], []
    model.x_embedder.register_forward_hook(lambda m, a, output: starts.append(output))
    model.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        walk(model, inputs, handle, total=3)
        assert handle.stats().branches[0].skipped_steps == (1,)
    torch.testing.assert_close(ends[1] - starts[1], ends[0] - starts[0], rtol=1e-5, atol=1e-5)


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


# --- which fit


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


# --- errors


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


def test_context_parallelism_is_refused_not_wrong():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable_teacache(model) as handle:
        handle.set_step(0, 4)
        model._parallel_config = object()
        with pytest.raises(RuntimeError, match="context parallelism"):
            forward(model, inputs)
    with pytest.raises(RuntimeError, match="context parallelism"):
        rsa.enable_teacache(model)
