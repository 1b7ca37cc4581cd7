"""MiniMax-H3 in its modular pipeline: text, keyframes or references, sound and video in one sequence."""

from typing import Any

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference

import rectified_spaattn as rsa
from model_cases import built
from rectified_spaattn.pipelines.state import LayerState
from tiny_models import TEXT, noise
from tiny_video_models import minimax_h3

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {"block_size": 16, "top_p": 0.0, "dense_layers": (), "dense_steps": 0, "backend": "torch"}
FRAMES, ROWS = 37, 6  # of the shortest video, five seconds, of 96 x 64
PICTURE = noise(1, 24, 1, 6, 4)
# the block of the pipeline that denoises, the slot of its transformer, conditions, how many tokens they are
TASKS: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    "text": (blocks.MiniMaxH3CoreDenoiseStep, "transformer", {}, 0),
    "first and last frame": (
        blocks.MiniMaxH3FL2VACoreDenoiseStep,
        "transformer",
        {"keyframe_anchors": ("first", "last"), "condition_latents": [PICTURE, -PICTURE]},
        2 * ROWS,
    ),
    "a reference": (
        blocks.MiniMaxH3Ref2VACoreDenoiseStep,
        "transformer_ref",
        {
            "normalized_references": [MiniMaxH3ImageReference(image=torch.zeros(0))],
            "condition_latents": [PICTURE],
            "audio_condition_latents": [],
        },
        ROWS,
    ),
}


def pipeline(task: str) -> tuple[Any, dict[str, Any]]:
    """The task's part of the modular pipeline, with a transformer of random weights, and what a call takes."""
    block, slot, conditions, _ = TASKS[task]
    pipe = block().init_pipeline()
    torch.manual_seed(0)
    pipe.update_components(
        **{slot: minimax_h3(16, in_channels=24, audio_in_channels=32).eval()},
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    arguments = {
        "prompt_embeds": noise(1, TEXT, 16),
        "text_token_tags": torch.ones(TEXT, dtype=torch.long),
        "height": 96,
        "width": 64,
        "num_frames": 124,
        "num_inference_steps": 4,  # points in time: three forwards
        **conditions,
    }
    return pipe, arguments


def run(pipe: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of video and sound."""
    pipe.set_progress_bar_config(disable=True)
    state = pipe(**arguments, generator=torch.Generator().manual_seed(3))
    return state.get("latents"), state.get("audio_latents")


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_runs_sparse_and_comes_back(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = pipeline(task)
    conditions = TASKS[task][3]
    untouched = run(pipe, arguments)
    assert all(each.isfinite().all() for each in untouched)

    with rsa.enable(pipe, sparsity=0.0, **PLAIN):
        for kept, before in zip(run(pipe, arguments), untouched, strict=True):
            torch.testing.assert_close(kept, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))

    layouts = set()
    attend = LayerState.attend

    def noted(layer: LayerState, q: torch.Tensor, *others: Any) -> torch.Tensor:
        layouts.add(layer._layout(q.shape[1]))
        return attend(layer, q, *others)

    monkeypatch.setattr(LayerState, "attend", noted)
    with rsa.enable(pipe, sparsity=0.8, **{**PLAIN, "dense_steps": 1}) as handle:
        run(pipe, arguments)
        stats = handle.stats()
    assert (stats.steps, stats.sparse_calls, stats.dense_reasons) == (3, 2 * 2, {"dense_steps": 2})
    (layout,) = layouts
    assert layout.video == FRAMES * ROWS + conditions
    assert layout.grid == (None if conditions else (FRAMES, 3, 2))
    assert stats.density < 0.95  # there are more tokens of sound than of so small a video
    assert all(torch.equal(again, before) for again, before in zip(run(pipe, arguments), untouched, strict=True))


def test_its_preset_is_found() -> None:
    pipe, _ = pipeline("text")
    handle = rsa.enable(pipe)
    assert tuple(handle.configs().values()) == rsa.preset("video")


def test_an_order_in_space_works_without_conditions_only() -> None:
    """Text, video and sound lie in a grid."""
    for task, fits in (("text", True), ("first and last frame", False)):
        pipe, arguments = pipeline(task)
        with rsa.enable(pipe, rsa.SparseConfig.paper(), **PLAIN) as handle:
            if fits:
                run(pipe, arguments)
                assert handle.stats().dense_calls == 0
            else:
                with pytest.raises(ValueError, match="for tokens that lie in no grid"):
                    run(pipe, arguments)


SOUND = {
    "MiniMax-H3": ("audio_indices", "text_indices"),
    "MiniMax-H3, references": ("audio_indices", "text_indices"),
    "Cosmos 3": ("sound_sequence_indexes", "text_indexes"),
}


@pytest.mark.parametrize("name", SOUND)
@torch.no_grad()
def test_sound_and_text_attend_in_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However sparse the video is: as queries they give what full attention gives, from the same keys."""
    model, inputs = built(name, 16)
    places = torch.cat([inputs[each] for each in SOUND[name]])
    compared = []
    attend = LayerState.attend

    def both(layer: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        sparse, full = attend(layer, q, k, v, *rest), layer._dense(q, k, v, None, None)
        torch.testing.assert_close(sparse[:, places], full[:, places], rtol=1e-4, atol=1e-5)
        others = torch.ones(q.shape[1], dtype=torch.bool)
        others[places] = False
        assert (sparse - full)[:, others].norm() > 0.1 * full[:, others].norm()
        compared.append(layer.name)
        return sparse

    monkeypatch.setattr(LayerState, "attend", both)
    with rsa.enable(model, sparsity=0.95, **{**PLAIN, "rectify": "none"}):
        model(**inputs, return_dict=False)
    assert len(compared) == 2
