"""`rectified-spaattn doctor`: the machine, what would run and why not, and a check of everything that would."""

import json
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table

from ..backends import BACKENDS
from ..lab.bench.doctor import SelfCheck, Verdict, calls_to_check, check, healthy, verdicts
from ..lab.bench.settings import DoctorSettings
from ..lab.machine import Machine, device_of, machine
from .console import markdown_table, print_wide, progress, row_table

_CALL = "{0.dtype}, head_dim {0.head_dim}, block_size {0.block_size}"
_CHECKS = {
    "backend": "{0.backend}",
    "call": "{0.dtype}, heads of {0.head_dim}",
    "error": "{0.error:.2g}",
    "allowed": "{0.allowed:.2g}",
    "result": "{0.result}",
}


def run(settings: DoctorSettings) -> None:
    """The whole command."""
    console, device, config = Console(), device_of(settings.device), settings.config()
    here, judged, checks = machine(device), verdicts(device, config), []
    calls, rows = calls_to_check(judged), list(judged.values())
    if not settings.json:
        print_wide(console, _machine_table(here))
        for part in _verdicts(rows):
            print_wide(console, part)
    with progress(console, quiet=settings.json) as watch:
        for number, (name, call) in enumerate(calls):
            watch(f"checking {name}, {_CALL.format(judged[call])}", number, len(calls))
            checks.append(check(name, call, config))
    if settings.json:
        record = {
            **here.to_dict(),
            "config": config.to_dict(),
            "calls": [each._asdict() for each in rows],
            "checks": [each._asdict() for each in checks],
            "healthy": healthy(checks),
        }
        print_wide(console, json.dumps(record, indent=2))
    else:
        used = f"sparsity {config.sparsity:g}, top_p {config.top_p:g}, {config.rectify}, {config.order}"
        print_wide(console, row_table(_CHECKS, checks, f"Self-check on small inputs, relative error: {used}"))
        for each in checks:
            if each.wrong:
                print_wide(console, f"WRONG: {each.backend}, {_CALL.format(each)}: {each.wrong}")
        print_wide(console, _conclusion(checks))
    raise typer.Exit(0 if healthy(checks) else 1)


def _machine_table(here: Machine) -> Table:
    memory = here.device["memory_bytes"]
    device = here.device | {"memory_bytes": memory and f"{memory / 2**30:.1f} GiB"}
    rows = [(name, version or "not installed") for name, version in here.versions.items()]
    rows += [(name.removesuffix("_bytes").replace("_", " "), f"{value or 'none'}") for name, value in device.items()]
    return markdown_table(("", "version or value"), rows, "This machine")


def _verdicts(judged: Sequence[Verdict]) -> tuple[Table, str]:
    """One row a call, one column a backend; and the reasons, which stand as numbers there."""
    reasons = list(dict.fromkeys(why for each in judged for why in each.why_not.values() if why))
    rows = []
    for each in judged:
        able = ("yes" if why is None else f"no ({reasons.index(why) + 1})" for why in each.why_not.values())
        rows.append((each.dtype, str(each.head_dim), *able, each.auto))
    title = f"What runs, with blocks of {judged[0].block_size} tokens"
    table = markdown_table(("dtype", "head_dim", *BACKENDS, '"auto" takes'), rows, title)
    return table, "\n".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))


def _conclusion(checks: Sequence[SelfCheck]) -> str:
    wrong = sorted({each.backend for each in checks if each.wrong})
    if wrong:
        return f"WRONG here: {', '.join(wrong)}. Do not use it; please report this output."
    right = list(dict.fromkeys(each.backend for each in checks))
    return f"Right here: {', '.join(right)}." if right else "No backend can run here."
