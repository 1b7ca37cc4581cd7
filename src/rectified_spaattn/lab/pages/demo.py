"""The demo's page: the clips beside each other, single attention calls, and report.html."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...config import RECTIFY
from ..calls.capture import AttentionCall
from ..calls.error import attention_error, full_attention
from ..calls.maps import one_head, study_head
from ..clips.clip import Pair
from ..clips.folder import Folder
from ..clips.options import DemoOptions
from ..clips.summary import ClipRecord, ModeSummary, plain, wins
from ..rows import write_atomically, write_json
from .clips import column_label, side_by_side
from .figures import CallName, curve_figure, error_figure, plan_figure
from .html import data_uri, render
from .video import FPS, Row, difference, labelled_grid, read_mp4, write_png

_FIGURES = ("curve", "plan", "error")
_METRICS, _REPORT, _VIDEO, _STILL = "metrics.json", "report.html", "side-by-side.mp4", "side-by-side.png"
FILES = (_METRICS, _REPORT, _VIDEO, _STILL, *(f"figures/{name}.png" for name in _FIGURES))
_ROWS = 3  # pairs in the side-by-side video
_GAIN = 4.0  # of differences


def write_side_by_side(folder: Folder, summaries: Sequence[ModeSummary], pairs: Sequence[Pair]) -> None:
    """The video, and a still with the difference from full attention."""
    clips = {pair: [read_mp4(folder.video(each.mode.name, pair)) for each in summaries] for pair in pairs[:_ROWS]}
    side_by_side(folder.root / _VIDEO, summaries, clips, FPS)
    rows = []
    for pair, videos in clips.items():
        middle = [video[len(video) // 2 : len(video) // 2 + 1] for video in videos]
        rows.append(Row(caption=f"{pair.caption()}, frame {len(videos[0]) // 2}", clips=middle))
        away: list[torch.Tensor | None] = [difference(frame, middle[0], _GAIN) for frame in middle[1:]]
        rows.append(Row(caption=f"difference from full attention, × {_GAIN:g} (white: none)", clips=[None, *away]))
    write_png(folder.root / _STILL, labelled_grid([column_label(each) for each in summaries], rows)[0])


def write_report(folder: Folder, metrics: dict[str, Any]) -> Path:
    """metrics.json, and report.html with everything inside."""
    root = folder.root
    write_json(root / _METRICS, metrics)
    figures = {name: data_uri(root / "figures" / f"{name}.png") for name in _FIGURES}
    media = {"video": data_uri(root / _VIDEO), "still": data_uri(root / _STILL), "figures": figures}
    render("demo.html", root / _REPORT, m=metrics, raw=json.dumps(metrics, indent=2), **media)
    return root / _REPORT


def results(summaries: Sequence[ModeSummary], records: Sequence[ClipRecord]) -> dict[str, Any]:
    """What metrics.json says about the clips. psnr null stands for infinity: a clip identical to full attention's."""
    return plain(
        {
            "modes": [{"label": each.mode.label, **each.mode.settings()} for each in summaries],
            "means": [each.row() for each in summaries],
            "comparisons": comparisons(summaries, records),
            "clips": records,
        }
    )


def comparisons(summaries: Sequence[ModeSummary], records: Sequence[ClipRecord]) -> list[dict[str, Any]]:
    """Rectified against not rectified at every sparsity.

    psnr_gain: difference of the mean PSNRs in dB, infinite or NaN where one is infinite; ssim_gain: of the mean SSIMs;
    psnr_won, ssim_won: pairs in which the rectified clip has the higher value.
    """
    configs = [(each, each.mode.config) for each in summaries if each.mode.config is not None]
    plain_sparse = {config.sparsity: each for each, config in configs if config.rectify == "none"}
    rows = []
    for each, config in configs:
        if config.rectify == "none":
            continue
        other = plain_sparse[config.sparsity]
        psnr_won, pairs = wins(records, each.mode.name, other.mode.name, "psnr")
        rows.append(
            {
                "sparsity": config.sparsity,
                "sparse": other.mode.name,
                "rectified": each.mode.name,
                "psnr_gain": each.scores["psnr"].mean - other.scores["psnr"].mean,
                "ssim_gain": each.scores["ssim"].mean - other.scores["ssim"].mean,
                "psnr_won": psnr_won,
                "ssim_won": wins(records, each.mode.name, other.mode.name, "ssim")[0],
                "pairs": pairs,
            }
        )
    return rows


def study_attention(calls: Sequence[AttentionCall], options: DemoOptions) -> dict[str, Any]:
    """Draws the figures, and gives what metrics.json says about single calls: the output errors of every layer.

    The maps show the middle layer and the middle head, whatever they look like, at the highest sparsity.
    """
    highest = max(options.sparsity)
    call = calls[len(calls) // 2]
    head = call.q.shape[2] // 2
    name = CallName(layer=call.layer, head=head, step=call.step)
    paper = options.paper(highest)

    study = study_head(one_head(call, head), paper, [highest], ("none", paper.rectify))
    none, rectified = (study.result(highest, mode) for mode in ("none", paper.rectify))
    maps = {
        "full attention": (study.full, 0.0),
        "sparse, not rectified": (none.masses, none.misplaced),
        "rectified": (rectified.masses, rectified.misplaced),
    }
    shown, errors = {}, _errors(calls, options)

    def plan(to: Path) -> None:
        masks = (rectified.probability, rectified.block_mask, rectified.compensated_mask)
        shown.update(plan_figure(to, study.full, *masks, name, highest))

    distances: dict[str, float] = {}
    folder = options.out / "figures"
    write_atomically(folder / "plan.png", plan)
    write_atomically(folder / "error.png", lambda to: error_figure(to, errors, maps, name, highest))
    write_atomically(folder / "curve.png", lambda to: distances.update(curve_figure(to)))
    misplaced = {label: share for label, (_, share) in maps.items()}
    return {
        "step": call.step,
        "layers": [each.name for each in calls],
        "relative_error": [
            {"sparsity": sparsity, "rectify": mode, "mean": sum(values) / len(values), "by_layer": values}
            for sparsity, by_mode in errors.items()
            for mode, values in by_mode.items()
        ],
        "shown": {"layer": call.layer, "head": head, "sparsity": highest, **shown, "misplaced": misplaced},
        "mean_distance_in_block": distances,
    }


def _errors(calls: Sequence[AttentionCall], options: DemoOptions) -> dict[float, dict[str, list[float]]]:
    """sparsity -> rectify mode -> relative output error of every layer."""
    exact = [full_attention(call) for call in calls]
    return {
        sparsity: {
            mode: [
                attention_error(call, options.paper(sparsity).replace(rectify=mode), full=full).relative_error
                for call, full in zip(calls, exact, strict=True)
            ]
            for mode in RECTIFY
        }
        for sparsity in options.sparsity
    }
