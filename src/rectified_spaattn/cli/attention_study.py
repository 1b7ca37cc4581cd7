"""What the demo shows of single attention calls: output errors of every layer, and maps of one head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import RECTIFY_MODES
from ..demo.pipeline import DemoVideoPipeline
from ..lab.calls.error import attention_error, full_attention
from ..lab.calls.capture import AttentionCall, capture_calls
from ..lab.calls.maps import one_head, study_head
from ..evaluation.paired import Pair, Settings
from ..lab.pages.figures import CallName, curve_figure, error_figure, plan_figure
from .demo_options import RECTIFIED, DemoOptions


def capture_and_warm_up(pipe: DemoVideoPipeline, pair: Pair, settings: Settings) -> list[AttentionCall]:
    """The calls of all layers at the middle step of a full-attention run that ends there."""
    return capture_calls(pipe, [pair], settings, steps=[settings.steps // 2])


def study_attention(calls: Sequence[AttentionCall], options: DemoOptions) -> tuple[dict[str, Any], dict[str, Path]]:
    """Errors and figures as (what metrics.json gets, the figure files by name).

    The maps show the middle layer and the middle head, whatever they look like, at the highest sparsity.
    """
    folder = options.out / "figures"
    folder.mkdir(exist_ok=True)
    files = {name: folder / f"{name}.png" for name in ("curve", "plan", "error")}
    highest = max(options.sparsity)
    call = calls[len(calls) // 2]
    head = call.q.shape[2] // 2
    name = CallName(layer=call.layer, head=head, step=call.step)

    study = study_head(one_head(call, head), options.config(highest, RECTIFIED), [highest], ("none", RECTIFIED))
    none, rectified = (study.result(highest, mode) for mode in ("none", RECTIFIED))
    maps = {
        "full attention": (study.full, 0.0),
        "sparse, not rectified": (none.masses, none.misplaced),
        "rectified": (rectified.masses, rectified.misplaced),
    }
    found = plan_figure(
        files["plan"],
        study.full,
        rectified.probability,
        rectified.block_mask,
        rectified.compensated_mask,
        name,
        highest,
    )
    wrong = {label: misplaced for label, (_, misplaced) in maps.items()}
    errors = _errors(calls, options)
    error_figure(files["error"], errors, maps, name, highest)
    summary = {
        "step": call.step,
        "layers": [each.name for each in calls],
        "relative_error": [
            {"sparsity": sparsity, "rectify": mode, "mean": sum(values) / len(values), "by_layer": values}
            for sparsity, by_mode in errors.items()
            for mode, values in by_mode.items()
        ],
        "shown": {"layer": call.layer, "head": head, "sparsity": highest, **found, "misplaced": wrong},
        "mean_distance_in_block": curve_figure(files["curve"]),
    }
    return summary, files


def _errors(calls: Sequence[AttentionCall], options: DemoOptions) -> dict[float, dict[str, list[float]]]:
    """sparsity -> rectify mode -> relative output error of every layer."""
    exact = [full_attention(call) for call in calls]
    return {
        sparsity: {
            mode: [
                attention_error(call, options.config(sparsity, mode), full=full).relative_error
                for call, full in zip(calls, exact, strict=True)
            ]
            for mode in RECTIFY_MODES
        }
        for sparsity in options.sparsity
    }
