"""`rectified-spaattn doctor`: the machine, what would run and why not, and a check of everything that would."""

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..backends import BACKENDS, Call
from ..config import SparseConfig
from ..lab.bench.doctor import DoctorSettings, SelfCheck, Verdict, calls_to_check, check, healthy, verdicts
from ..lab.machine import Machine, device_of, machine
from .console import markdown_table, print_wide, progress


def doctor(settings: DoctorSettings) -> None:
    """What every backend would do on this machine and why not, and a check of those that run.

    Exit code 0: at least one backend is right and none is wrong; 1 otherwise.
    """
    console, device, config = Console(), device_of(settings.device), settings.config()
    here, judged, checks = machine(device), verdicts(device, config), []
    if not settings.json:
        print_wide(console, machine_table(here))
        print_wide(console, verdict_table(judged))
        print_wide(console, "\n".join(f"({number}) {reason}" for number, reason in enumerate(_reasons(judged), 1)))
    calls = calls_to_check(judged)
    with progress(console, quiet=settings.json) as watch:
        for number, (name, call) in enumerate(calls):
            watch(f"checking {name}, {_call(call)}", number, len(calls))
            checks.append(check(name, call, config))
    if settings.json:
        print_wide(console, json.dumps(record(here, config, judged, checks), indent=2))
    else:
        print_wide(console, check_table(checks, config))
        for each in checks:
            if each.wrong:
                print_wide(console, f"WRONG: {each.backend}, {_call(each.call)}: {each.wrong}")
        print_wide(console, conclusion(checks))
    raise typer.Exit(0 if healthy(checks) else 1)


def machine_table(here: Machine) -> Table:
    memory = here.device["memory_bytes"]
    device = here.device | {"memory_bytes": memory and f"{memory / 2**30:.1f} GiB"}
    rows = [(name, version or "not installed") for name, version in here.versions.items()]
    rows += [(name.removesuffix("_bytes").replace("_", " "), f"{value or 'none'}") for name, value in device.items()]
    return markdown_table(("", "version or value"), rows, "This machine")


def verdict_table(judged: Sequence[Verdict]) -> Table:
    """One row a call, one column a backend; a number stands for a reason."""
    reasons = _reasons(judged)
    rows = []
    for each in judged:
        able = ("yes" if why is None else f"no ({reasons.index(why) + 1})" for why in each.why_not.values())
        rows.append((*map(str, _plain(each.call).values()), *able, each.auto))
    return markdown_table(("dtype", "head_dim", "block_size", *BACKENDS, '"auto" takes'), rows, "What runs")


def check_table(checks: Sequence[SelfCheck], config: SparseConfig) -> Table:
    settings = f"sparsity {config.sparsity:g}, top_p {config.top_p:g}, {config.rectify}, {config.order}"
    rows = []
    for each in checks:
        numbers = ("" if value is None else f"{value:.2g}" for value in (each.error, each.allowed))
        rows.append((each.backend, _call(each.call), *numbers, "WRONG" if each.wrong else "right"))
    columns = ("backend", "call", "error", "allowed", "result")
    return markdown_table(columns, rows, f"Self-check on small inputs, relative error: {settings}")


def conclusion(checks: Sequence[SelfCheck]) -> str:
    wrong = sorted({each.backend for each in checks if each.wrong})
    if wrong:
        return f"WRONG here: {', '.join(wrong)}. Do not use it; please report this output."
    right = list(dict.fromkeys(each.backend for each in checks))
    return f"Right here: {', '.join(right)}." if right else "No backend can run here."


def record(
    here: Machine, config: SparseConfig, judged: Sequence[Verdict], checks: Sequence[SelfCheck]
) -> dict[str, Any]:
    """The same as JSON has it."""

    def flat(each: Verdict | SelfCheck) -> dict[str, Any]:
        values = each._asdict()
        return {**_plain(values.pop("call")), **values}

    return {
        **here.to_dict(),
        "config": config.to_dict(),
        "calls": [flat(each) for each in judged],
        "checks": [flat(each) | {"wrong": each.wrong or None} for each in checks],
        "healthy": healthy(checks),
    }


def _reasons(judged: Sequence[Verdict]) -> list[str]:
    return list(dict.fromkeys(reason for each in judged for reason in each.why_not.values() if reason))


def _plain(call: Call) -> dict[str, Any]:
    dtype = str(call.dtype).removeprefix("torch.")
    return {"dtype": dtype, "head_dim": call.head_dim, "block_size": call.block_size}


def _call(call: Call) -> str:
    dtype, head_dim, block_size = _plain(call).values()
    return f"{dtype}, head_dim {head_dim}, block_size {block_size}"
