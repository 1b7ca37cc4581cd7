"""`rectified-spaattn doctor`: facts, what would run and why not, and a check of everything that would."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..backends import BACKENDS, Call
from ..diagnosis import (
    Check,
    Facts,
    Verdict,
    calls_to_check,
    check_all,
    facts,
    healthy,
    typical_calls,
    verdict,
)
from .console import print_wide, progress


def run(device: torch.device, as_json: bool, console: Console | None = None) -> bool:
    """Prints the diagnosis. Returns whether at least one backend is right and none is wrong."""
    console = Console() if console is None else console
    found = facts(device)
    verdicts = [verdict(call) for call in typical_calls(device)]
    chosen = calls_to_check(verdicts)
    if as_json:
        checks = check_all(chosen)
        print_wide(console, json.dumps(_record(found, verdicts, checks), indent=2))
        return healthy(checks)
    print_wide(console, facts_table(found))
    table, notes = verdict_table(verdicts)
    print_wide(console, table)
    for note in notes:
        print_wide(console, note)
    with progress(console) as watch:
        checks = check_all(chosen, watch)
    print_wide(console, check_table(checks))
    for each in checks:
        if each.wrong:
            print_wide(console, f"WRONG: {_call(each.call)}: {each.wrong}")
    print_wide(console, conclusion(checks))
    return healthy(checks)


def facts_table(found: Facts) -> Table:
    table = Table("", "version or value", title="This machine", box=box.MARKDOWN)
    table.add_row("python", f"{found.python}, {found.system}")
    for name, version in found.versions.items():
        table.add_row(name, version or "not installed")
    table.add_row("device", found.device)
    if found.memory is not None:
        table.add_row("compute capability", found.compute_capability)
        table.add_row("GPU memory", f"{found.memory / 2**30:.1f} GiB")
    table.add_row("CUDA or ROCm of torch", found.cuda or "none: a CPU build")
    table.add_row("NVIDIA driver", found.driver or "not found")
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[Table, list[str]]:
    """One row a call, one column a backend; the reasons are numbered in the table and told in the lines after it."""
    reasons = list(dict.fromkeys(reason for each in verdicts for reason in each.why_not.values() if reason))
    table = Table(title="What runs", box=box.MARKDOWN)
    for name in ("dtype", "head_dim", "block_size", *BACKENDS, '"auto" takes'):
        table.add_column(name, no_wrap=True)
    for each in verdicts:
        told = ["yes" if why is None else f"no ({reasons.index(why) + 1})" for why in each.why_not.values()]
        head_dim, block_size = str(each.call.head_dim), str(each.call.block_size)
        table.add_row(_dtype(each.call), head_dim, block_size, *told, each.auto or "nothing")
    return table, [f"({number}) {reason}" for number, reason in enumerate(reasons, start=1)]


def check_table(checks: Sequence[Check]) -> Table:
    table = Table(title="Self-check on small inputs, relative error", box=box.MARKDOWN)
    for name in ("backend", "call", "error", "allowed", "result"):
        table.add_column(name, justify="right" if name in ("error", "allowed") else "left", no_wrap=True)
    for each in checks:
        numbers = ["" if value is None else f"{value:.2g}" for value in (each.error, each.allowed)]
        table.add_row(each.backend, _call(each.call), *numbers, "WRONG" if each.wrong else "right")
    return table


def conclusion(checks: Sequence[Check]) -> str:
    wrong = sorted({each.backend for each in checks if each.wrong})
    if wrong:
        return f"WRONG here: {', '.join(wrong)}. Do not use it; please report this output."
    right = list(dict.fromkeys(each.backend for each in checks))
    return f"Right here: {', '.join(right)}." if right else "No backend can run here."


def _record(found: Facts, verdicts: Sequence[Verdict], checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "facts": dataclasses.asdict(found),
        "calls": [{**_plain(each.call), "why_not": each.why_not, "auto": each.auto} for each in verdicts],
        "checks": [
            {
                "backend": each.backend,
                **_plain(each.call),
                "error": each.error,
                "allowed": each.allowed,
                "wrong": each.wrong or None,
            }
            for each in checks
        ],
        "healthy": healthy(checks),
    }


def _plain(call: Call) -> dict[str, Any]:
    return {"dtype": _dtype(call), "head_dim": call.head_dim, "block_size": call.block_size}


def _call(call: Call) -> str:
    return f"{_dtype(call)}, head_dim {call.head_dim}, block_size {call.block_size}"


def _dtype(call: Call) -> str:
    return str(call.dtype).removeprefix("torch.")
