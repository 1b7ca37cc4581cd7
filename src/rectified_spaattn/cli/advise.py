"""`rectified-spaattn advise`: what sparse attention can do for a model at a size, in a page of the terminal."""

from collections.abc import Iterator

import torch
from rich.console import Console

from ..lab.bench.advice import MEASURED, Advice, advise, measure
from ..lab.bench.rows import Row
from ..lab.bench.settings import AdviseSettings
from ..lab.bench.shapes import BenchError
from ..lab.machine import device_name, device_of
from ..presets import origin
from .console import markdown_table, plain_console, print_wide, progress, row_table

_FEW = 10_000  # tokens below which attention is a small part of a forward
_EXPECTED = {
    "backend": "{0.backend}",
    "full, ms": "{0.dense_ms:.1f}",
    "ours, ms": "{0.sparse_ms:.1f}",
    "speed-up": "{0.ratio:.1f}x",
}
_HERE = {
    "attention": "{0.label}",
    "pairs": "{0.density:.1%}",
    "ms": "{0.ms:.2f}",
    "quartiles": "{0.ms_q1:.2f} to {0.ms_q3:.2f}",
    "speed-up": "{0.ratio:.2f}x",
}


def run(settings: AdviseSettings) -> None:
    """The whole command."""
    console = plain_console()
    try:
        advice = advise(settings)
    except (TypeError, ValueError) as error:
        raise BenchError(str(error)) from error
    print_wide(console, markdown_table(("", _title(advice, settings)), list(_facts(advice))))
    print_wide(console, row_table(_EXPECTED, advice.expected, "Attention of one layer, expected on one H100"))
    print_wide(console, _basis(advice))
    device = device_of(settings.device)
    if device.type == "cuda":
        print_measured(console, advice, device)
    else:
        print_wide(console, "No GPU here, so nothing was timed. Give the same command on one.")
    print_wide(console, "\nWhat to try next:")
    for line in _next(advice, settings):
        print_wide(console, f"- {line}")


def print_measured(console: Console, advice: Advice, device: torch.device) -> None:
    """One call of this shape on the device, against full attention: a table and a sentence."""
    with progress(console) as watch:
        rows = [row for row in measure(advice, device, watch).rows if not row.not_run]
    print_wide(console, row_table(_HERE, rows, f"The same on this {device_name(device)}, checked, then timed"))
    print_wide(console, _verdict(rows))


def _title(advice: Advice, settings: AdviseSettings) -> str:
    t, h, w = advice.shape.grid
    _, down, across = advice.model.stride
    frames = f"{t} frames of tokens" if settings.frames is None else f"{settings.frames} frames"
    return f"{advice.model.name}, {h * down} x {w * across}" + (f", {frames}" if t > 1 else "")


def _facts(advice: Advice) -> Iterator[tuple[str, str]]:
    shape, config = advice.shape, advice.config
    t, h, w = shape.grid
    yield "tokens", f"{shape.tokens:,}: {t} x {h} x {w}" + (f" and {shape.text} of text" if shape.text else "")
    left = f", {advice.leftover} tokens in none" if advice.leftover else ""
    yield f"blocks of {config.block_size}", f"{advice.blocks:,}{left}"
    yield "preset", f"{advice.preset}: sparsity {config.sparsity:g}, {config.rectify}, {config.order}"
    yield "stays full", _schedule(advice)
    least = "at least " if config.top_p else ""
    yield "computed pairs", f"{least}{advice.density:.1%} of a sparse call, {advice.of_run:.1%} of a run"
    if advice.total is None:
        yield "attention", f"{advice.attention / 1e12:,.0f} TFLOP; the rest of a forward was not counted"
    else:
        yield "attention", f"{advice.share:.0%} of the {advice.total / 1e12:,.0f} TFLOP of a forward"
        yield "so a run is", f"{advice.at_best:.2f}x as fast at best: if time followed operations"


def _schedule(advice: Advice) -> str:
    steps, config = advice.model.steps, advice.config
    dense = config.dense_step_count(steps) + config.dense_last_step_count(steps)
    parts = [f"{dense} of {steps} steps"] if dense else []
    parts += [f"{len(config.dense_layers)} of {advice.model.layers} layers"] if config.dense_layers else []
    return ", ".join(parts) or "nothing"


def _basis(advice: Advice) -> str:
    """Where the expected times come from."""
    shape = advice.shape
    same = (shape.tokens, shape.heads, shape.head_dim) == (MEASURED.tokens, MEASURED.heads, MEASURED.head_dim)
    lines = [
        f"Measured: {MEASURED.shape}, {MEASURED.tokens:,} tokens, {MEASURED.heads} heads of {MEASURED.head_dim}, 90%",
        f"sparse, {MEASURED.card}, bfloat16, against cuDNN.",
    ]
    if not same or abs(advice.density - MEASURED.density) > 0.01:
        lines.append("Extrapolated to this: attention by computed pairs, the rest by tokens.")
    if shape.head_dim != MEASURED.head_dim:
        lines.append(f"Heads of {shape.head_dim} were not measured in this mode, and are slower a pair.")
    if advice.config.rectify != MEASURED.rectify:
        lines.append(f"They are of {MEASURED.rectify}; {advice.config.rectify} was asked for.")
    lines.append("Operations of attention: 4 * tokens^2 * heads * head_dim a layer; all others")
    lines.append("are counted by PyTorch's FlopCounterMode on the class without weights.")
    return "\n".join(lines)


def _verdict(rows: list[Row]) -> str:
    ours = next(row for row in rows if row.kind == "sparse")
    text = f"Measured here on random numbers: {ours.ratio:.2f}x, of {ours.ideal:.2f}x that the pairs allow."
    return text if (ours.ratio or 0) > 1 else f"{text} Slower than full attention: leave it off at this size."


def _next(advice: Advice, settings: AdviseSettings) -> Iterator[str]:
    if advice.shape.tokens < _FEW:
        yield f"Few tokens: below {_FEW:,} there is little to gain. More pixels or frames gain more."
    if origin(advice.preset) != "published" and settings.preset is None:
        yield f"The preset {advice.preset!r} is {origin(advice.preset)}: look at the result."
    yield "rsa.enable(pipe, tolerance=0.05): an error to hold, in place of a sparsity"
    folder = settings.model if settings.model == "demo" or "/" in settings.model else "FOLDER"
    yield f'rectified-spaattn generate {folder} --prompt "..." --compare: a clip both ways'
    if advice.model.name == settings.model and settings.model != "demo":
        yield f"rectified-spaattn bench model {advice.model.name}: a whole forward, on a GPU"
    elif settings.model == "demo":
        yield "rectified-spaattn demo --quick: clips and a report, on a laptop, too"
