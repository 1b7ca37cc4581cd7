"""Which steps and layers run sparse: real diffusers pipelines and schedulers, tiny random weights."""

import warnings

import pytest
import torch
from diffusers import WanImageToVideoPipeline

import rectified_spaattn as rsa
import tiny
from rectified_spaattn.orders import blocks_of
from schedule_runs import EMBEDS, FRAME, fail, forwards_of, interrupt, steps_of, stop_after
from tiny import SPARSE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline():
    return tiny.wan_pipeline()


@pytest.mark.parametrize(
    ("dense_steps", "steps", "pattern"),
    [(0, 3, "sss"), (2, 4, "ddss"), (0.5, 4, "ddss"), (0.1, 4, "ssss"), (0.1, 8, "dsssssss"), (0.3, 5, "ddsss")],
)
def test_the_first_steps_are_dense(pipeline, quiet, dense_steps, steps, pattern):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": dense_steps}) as handle:
        log = forwards_of(pipeline.transformer)
        tiny.run_wan(pipeline, steps=steps)
        assert steps_of(log) == pattern
        assert handle.stats().steps == steps
        assert handle.stats().dense_reasons == ({"dense_steps": 6 * pattern.count("d")} if "d" in pattern else {})
        tiny.run_wan(pipeline, steps=steps, guidance_scale=1.0)  # without guidance: one call a step
        assert steps_of(log, forwards=1) == pattern


def test_guidance_in_one_batch_is_the_same_as_in_two_calls():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(batch=2)
    inputs["hidden_states"] = inputs["hidden_states"][:1].repeat(2, 1, 1, 1, 1)
    single = [{name: value[i : i + 1] for name, value in inputs.items()} for i in (0, 1)]
    with torch.no_grad(), pytest.warns(UserWarning, match="set_step"):
        handle = rsa.enable(model, **{**SPARSE, "dense_steps": 1})
    for step in range(3):
        handle.set_step(step, 3)
        with torch.no_grad():
            together = model(**inputs).sample
    batched = handle.stats()
    assert (batched.sparse_calls, batched.dense_calls) == (2 * 3, 3)
    for step in range(3):
        handle.set_step(step, 3)
        with torch.no_grad():
            apart = torch.cat([model(**each).sample for each in single])
    calls = handle.stats()
    assert (calls.sparse_calls, calls.dense_calls) == (4 * 3, 6)
    assert calls.density == pytest.approx(batched.density)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dense_steps", "dense"), [(4, 4), (5, 5), (0.9, 4)])
def test_a_schedule_that_leaves_nothing_sparse_is_reported_once(pipeline, dense_steps, dense):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": dense_steps}) as handle:
        log = forwards_of(pipeline.transformer)
        with pytest.warns(
            UserWarning, match=f"nothing runs sparse in transformer: .* is {dense} dense.* Allowed: 3 or fewer"
        ) as told:
            tiny.run_wan(pipeline, steps=4)
        assert len([each for each in told if "rectified_spaattn" in str(each.message)]) == 1
        assert steps_of(log) == "dddd"
        assert "sparse: none" in handle.summary()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="rectified_spaattn")
            tiny.run_wan(pipeline, steps=4)
            log.clear()
            tiny.run_wan(pipeline, steps=10)
        assert steps_of(log) == "d" * (dense_steps if dense_steps > 1 else 9) + "s" * (
            10 - (dense_steps if dense_steps > 1 else 9)
        )


@pytest.mark.parametrize("steps", [4, 8])
def test_the_published_warm_up_leaves_a_distilled_sampler_sparse(pipeline, quiet, steps):
    with rsa.enable(pipeline, preset="wan2.1-t2v", block_size=16):
        log = forwards_of(pipeline.transformer)
        tiny.run_wan(pipeline, steps=steps, guidance_scale=1.0)
        assert steps_of(log, forwards=1) == ("ssss" if steps == 4 else "dsssssss")


def test_each_expert_is_told_when_its_share_is_all_dense():
    pipeline = tiny.wan_pipeline(experts=2)
    configs = [rsa.SparseConfig(**{**SPARSE, "dense_steps": n}) for n in (3, 1)]
    with rsa.enable(pipeline, configs) as handle:
        logs = [forwards_of(model) for model in (pipeline.transformer, pipeline.transformer_2)]
        with pytest.warns(UserWarning, match="rectified_spaattn") as told:
            tiny.run_wan(pipeline, steps=4)
        messages = [str(each.message) for each in told if "rectified_spaattn" in str(each.message)]
        first, second = (steps_of(log) for log in logs)
        assert len(messages) == 1
        assert (
            f"sparse in transformer: dense_steps=3 is 3 dense step(s), and it has {len(first)} of the 4" in messages[0]
        )
        assert set(first) == {"d"}
        assert second == "d" + "s" * (3 - len(first))
        assert handle.stats().steps == 4


def test_a_preset_for_two_experts_can_be_thinned_for_a_distilled_sampler(quiet):
    pipeline = tiny.wan_pipeline(experts=2)
    with rsa.enable(pipeline, block_size=16, dense_steps=0):
        logs = [forwards_of(model) for model in (pipeline.transformer, pipeline.transformer_2)]
        tiny.run_wan(pipeline, steps=4)
        assert "".join(steps_of(log) for log in logs) == "ssss"


def test_runs_of_different_kinds_follow_each_other(pipeline, quiet):
    settings = {**SPARSE, "dense_steps": 0.4}
    runs = [
        {"steps": 4},
        {"steps": 2, "prompt": ["a b", "c d e f"], "negative_prompt": ["a", "a b c"]},
        {"steps": 1, "height": 64},
        {"steps": 1, "height": 64},
        {"steps": 6, "num_frames": 5, "width": 160, "num_videos_per_prompt": 2},
    ]
    fresh = []
    for run in runs:
        with rsa.enable(pipeline, **settings):
            fresh.append(tiny.run_wan(pipeline, **run))
    with rsa.enable(pipeline, **settings) as handle:
        for run, want in zip(runs, fresh, strict=True):
            assert torch.equal(tiny.run_wan(pipeline, **run), want)
            assert handle.stats().forwards == 2 * run["steps"]
            assert handle.stats().steps == run["steps"]


@pytest.mark.parametrize("how", [interrupt, fail])
@pytest.mark.parametrize("step", [0, 2])
def test_a_run_after_a_stopped_one_starts_anew(pipeline, quiet, how, step):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 2}) as handle:
        log = forwards_of(pipeline.transformer)
        for _ in range(2):
            try:
                tiny.run_wan(pipeline, steps=4, callback_on_step_end=stop_after(step, how))
            except KeyboardInterrupt:
                assert how is fail
            assert steps_of(log) == "dds"[: step + 1]
            assert handle.stats().steps == step + 1
        tiny.run_wan(pipeline, steps=4)
        assert steps_of(log) == "ddss"
        assert handle.stats().forwards == 8


def test_a_run_that_failed_in_its_first_forward_is_not_counted_in_the_next(pipeline):
    with rsa.enable(pipeline, **SPARSE) as handle:
        hook = pipeline.transformer.proj_out.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.run_wan(pipeline, steps=2)
        hook.remove()
        tiny.run_wan(pipeline, steps=2)
        assert handle.stats().forwards == 4


def test_an_expert_that_did_not_run_has_no_figures_of_the_run_before():
    pipeline = tiny.wan_pipeline(experts=2)
    with rsa.enable(pipeline, rsa.SparseConfig(**SPARSE)) as handle:
        tiny.run_wan(pipeline, steps=8)
        assert any(layer.sparse_calls for layer in handle.stats().layers if layer.transformer == "transformer_2")
        tiny.run_wan(pipeline, steps=8, callback_on_step_end=stop_after(0, interrupt))
        assert handle.stats().forwards == 2
        assert all(not layer.sparse_calls for layer in handle.stats().layers if layer.transformer == "transformer_2")


def test_a_grid_below_one_block_is_reported_once_a_grid(pipeline):
    with rsa.enable(pipeline, **{**SPARSE, "block_size": 128}) as handle:
        with pytest.warns(UserWarning, match=r"\(2, 4, 8\) holds 64 tokens.*smaller block_size") as told:
            tiny.run_wan(pipeline, steps=2, height=64, num_frames=5)
        assert len([each for each in told if "rectified_spaattn" in str(each.message)]) == 1
        assert handle.stats().sparse_calls == 0
        with pytest.warns(UserWarning, match=r"grid \(3, 8, 8\): every block is kept.*nothing is saved") as told:
            tiny.run_wan(pipeline, steps=2)  # one block, and 64 tokens beside it
        assert len([each for each in told if "rectified_spaattn" in str(each.message)]) == 1
        assert handle.stats().dense_calls == 0
        assert "NOTHING SAVED" in handle.summary()


@pytest.mark.parametrize("kind", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b"])
def test_image_to_video_keeps_its_first_frame(quiet, kind):
    parts = tiny.wan_pipeline().components
    expand = kind == "wan2.2-ti2v-5b"
    channels = 16 if expand else 36
    experts = [tiny.wan_transformer(in_channels=channels, out_channels=16) for _ in range(1 if expand else 2)]
    pipeline = WanImageToVideoPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=parts["scheduler"],
        transformer=experts[0],
        transformer_2=None if expand else experts[1],
        boundary_ratio=None if expand else 0.875,
        expand_timesteps=expand,
    )
    pipeline.set_progress_bar_config(disable=True)

    def run():
        return tiny.run_wan(pipeline, steps=4, image=FRAME, prompt=None, negative_prompt=None, **EMBEDS)

    untouched = run()
    with rsa.enable(pipeline, preset=f"{kind}-paper", **{**SPARSE, "sparsity": 0.0}):
        torch.testing.assert_close(run(), untouched, rtol=1e-3, atol=1e-4)
    settings = {"block_size": 16, "top_p": 0.0, "neighbours": False, "sparsity": 0.9}
    density = {}
    for first_frame in (True, False):
        with rsa.enable(pipeline, preset=f"{kind}-paper", **settings, first_frame=first_frame) as handle:
            run()
            density[first_frame] = handle.stats().density
            assert set(handle.stats().dense_reasons) == {"dense_layers"}
            assert [layer.sparse_calls > 0 for layer in handle.stats().layers] == [False, False, True] * len(experts)
    blocks = blocks_of(rsa.TokenLayout.build((3, 8, 8)), rsa.SparseConfig.paper(block_size=16))
    first, count = int(blocks.first_frame.sum()), blocks.num_blocks
    kept = {True: first * first + (count - first), False: count}
    assert first < count
    for first_frame, pairs in kept.items():
        # blocks of the first frame see each other and, at most, the one block that all blocks keep
        assert pairs - 0.001 < density[first_frame] * count**2 < pairs + first_frame * first + 0.001
