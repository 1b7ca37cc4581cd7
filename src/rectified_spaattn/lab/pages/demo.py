"""The demo's page: the clips beside each other, single attention calls, and report.html."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..calls.capture import AttentionCall
from ..calls.error import attention_error, full_attention
from ..calls.maps import one_head, study_head
from ..clips.clip import Pair
from ..clips.folder import Folder
from ..clips.options import DemoOptions
from ..clips.summary import ClipRecord, ModeSummary, plain, wins
from ..rows import write_atomically, write_json
from .clips import column_label, ours_first, score_text, strip
from .figures import error_figure
from .html import data_uri, percent, render
from .maps import maps_figure
from .styles import is_ours
from .video import FPS, Row, difference, labelled_grid, read_mp4, write_frames

_FIGURES = ("error", "maps")
_METRICS, _REPORT, _VIDEO, _ANIMATION = "metrics.json", "report.html", "side-by-side.mp4", "side-by-side.webp"
FILES = (_METRICS, _REPORT, _VIDEO, _ANIMATION, *(f"figures/{name}.png" for name in _FIGURES))
_ROWS = 3  # pairs in the side-by-side video
_GAIN = 4.0  # of differences


def write_side_by_side(folder: Folder, summaries: Sequence[ModeSummary], pairs: Sequence[Pair]) -> None:
    """A video and an animated picture: every pair, and below it the difference from full attention."""
    rows = []
    for pair in pairs[:_ROWS]:
        videos = [_clip(folder, each, pair) for each in summaries]
        away: list[torch.Tensor | None] = [difference(video, videos[0], _GAIN) for video in videos[1:]]
        rows.append(Row(caption=pair.caption(), clips=videos))
        rows.append(Row(caption=f"difference from full, × {_GAIN:g} (white: none)", clips=[None, *away]))
    grid = labelled_grid([column_label(each) for each in summaries], rows)
    for name in (_VIDEO, _ANIMATION):
        write_frames(folder.root / name, grid, FPS)


def write_report(folder: Folder, metrics: dict[str, Any], players: dict[str, Any]) -> Path:
    """metrics.json, and report.html with everything inside. players: what `players_of` gave."""
    root = folder.root
    write_json(root / _METRICS, metrics)
    figures = {name: data_uri(root / "figures" / f"{name}.png") for name in _FIGURES}
    ours = max((each for each in metrics["modes"] if each["ours"]), key=lambda each: each["configs"][0]["sparsity"])
    shown = {"raw": json.dumps(metrics, indent=2), "figures": figures, "ours": ours, "gain": _GAIN, "fps": FPS}
    render("demo.html", root / _REPORT, m=metrics, **shown, **players)
    return root / _REPORT


def players_of(
    folder: Folder,
    summaries: Sequence[ModeSummary],
    pairs: Sequence[Pair],
    slider: Sequence[ModeSummary],
    call: dict[str, Any],
) -> dict[str, Any]:
    """What the page plays. rows: every pair with its clips, ours first, and their differences from full attention;
    slider: ours on the first pair, by rising sparsity. call: of the pipeline."""
    side = (call["height"], call["width"])

    def cell(each: ModeSummary, pair: Pair, full: torch.Tensor) -> dict[str, Any]:
        clip = _clip(folder, each, pair)
        away = None if each.mode.config is None else strip(difference(clip, full, _GAIN), *side)
        return {"label": each.mode.label, "ours": is_ours(each.mode.config), "clip": strip(clip, *side), "away": away}

    rows = []
    for pair in pairs[:_ROWS]:
        full = _clip(folder, summaries[0], pair)
        cells = [cell(each, pair, full) for each in ours_first(summaries)]
        rows.append({"caption": pair.caption(), "cells": cells})
    full = _clip(folder, summaries[0], pairs[0])
    levels = [{**each.row(), **cell(each, pairs[0], full)} for each in slider]
    return {"rows": rows, "levels": levels}


def results(summaries: Sequence[ModeSummary], records: Sequence[ClipRecord]) -> dict[str, Any]:
    """What metrics.json says about the clips. psnr null stands for infinity: a clip identical to full attention's."""
    modes = [each.mode for each in summaries]
    return plain(
        {
            "verdict": verdict(summaries),
            "modes": [{"label": mode.label, "ours": is_ours(mode.config), **mode.settings()} for mode in modes],
            "means": [each.row() for each in summaries],
            "comparisons": comparisons(summaries, records),
            "clips": records,
        }
    )


def verdict(summaries: Sequence[ModeSummary]) -> str:
    """Ours at the highest sparsity in one sentence, with plain sparse beside it."""
    configs = [(each, each.mode.config) for each in summaries if each.mode.config is not None]
    sparsity, ours = max(((c.sparsity, each) for each, c in configs if is_ours(c)), key=lambda pair: pair[0])
    other = next(each for each, config in configs if config.rectify == "none" and config.sparsity == sparsity)
    near, far = (score_text(each.scores["psnr"], "psnr").split(" [")[0] for each in (ours, other))
    if ours.speedup >= 1:
        speed = f"{ours.speedup:.2f} times as fast a step"
    else:
        speed = f"a step {1 / ours.speedup:.2f} times as long, as this model is too small to gain"
    return (
        f"{ours.mode.label}: PSNR to full attention {near} dB where plain sparse has {far} dB; "
        f"{percent(ours.computed)} of the query-key pairs, {speed}."
    )


def comparisons(summaries: Sequence[ModeSummary], records: Sequence[ClipRecord]) -> list[dict[str, Any]]:
    """Every mode that rectifies against plain sparse at the same sparsity.

    psnr_gain: difference of the mean PSNRs in dB, infinite or NaN where one is infinite; ssim_gain: of the mean SSIMs;
    psnr_won, ssim_won: pairs in which it has the higher value.
    """
    configs = [(each, each.mode.config) for each in summaries if each.mode.config is not None]
    plain_sparse = {config.sparsity: each for each, config in configs if config.rectify == "none"}
    rows = []
    for each, config in configs:
        if config.rectify == "none":
            continue
        other = plain_sparse[config.sparsity]
        row: dict[str, Any] = {"sparsity": config.sparsity, "mode": each.mode.name, "against": other.mode.name}
        for score in ("psnr", "ssim"):
            row[f"{score}_gain"] = each.scores[score].mean - other.scores[score].mean
            row[f"{score}_won"], row["pairs"] = wins(records, each.mode.name, other.mode.name, score)
        rows.append(row)
    return rows


def study_attention(calls: Sequence[AttentionCall], options: DemoOptions) -> dict[str, Any]:
    """Draws the figures, and gives what metrics.json says about single calls: the output errors of every layer.

    The maps show the middle layer and the middle head, whatever they look like, at the highest sparsity.
    """
    call, sparsity, errors = calls[len(calls) // 2], max(options.sparsity), _errors(calls, options)
    head, ours = call.q.shape[2] // 2, options.ours(sparsity)
    study = study_head(one_head(call, head), ours, [sparsity], ("none", ours.rectify))
    none, rectified = study.results.values()
    folder = options.out / "figures"
    write_atomically(folder / "maps.png", lambda to: maps_figure(to, study, sparsity, ours.rectify))
    write_atomically(folder / "error.png", lambda to: error_figure(to, errors))
    shown = {"layer": call.layer, "head": head, "sparsity": sparsity, **study.shares(rectified)}
    return {
        "step": call.step,
        "layers": [each.name for each in calls],
        "relative_error": errors,
        "shown": shown | {"misplaced": {"plain": none.misplaced, "ours": rectified.misplaced}},
    }


def _errors(calls: Sequence[AttentionCall], options: DemoOptions) -> list[dict[str, Any]]:
    """One row a sparsity and mode: the relative output error of every layer, and the mean."""
    exact, rows = [full_attention(call) for call in calls], []
    for sparsity, kind in itertools.product(options.sparsity, (options.plain, options.paper, options.ours)):
        config = kind(sparsity)
        by_layer = [
            attention_error(call, config, full=full).relative_error for call, full in zip(calls, exact, strict=True)
        ]
        mode = {"sparsity": sparsity, "rectify": config.rectify, "order": config.order}
        rows.append({**mode, "mean": fmean(by_layer), "by_layer": by_layer})
    return rows


def _clip(folder: Folder, summary: ModeSummary, pair: Pair) -> torch.Tensor:
    return read_mp4(folder.video(summary.mode.name, pair))
