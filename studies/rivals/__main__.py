"""Rules of other publications and of this package on attention calls of any supported pipeline, at equal pairs.

    python -m studies.rivals --split dev --pairs 4                  # the demo model
    python -m studies.rivals --split held-out
    python -m studies.rivals --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a red fox" --layer 10 --step 20 --head 3
    python -m studies.rivals --table-of studies/data/rivals-dev.csv

Every rule gets the same share of executed query-key pairs, of the queries of video tokens, text counted, in which
pooled keys, estimates, probes and first-order products count, too. Finding the groups (sorting, k-means) does not, and
is a column of its own. `error` is |out - full| / |full| of a head, float32, the mean over heads and calls. Calls stay
on the CPU until a head of them is looked at: 12 bytes a token and channel, 4.2 GB for a call of HunyuanVideo at 720p.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import torch

from rectified_spaattn.lab.calls.capture import AttentionCall, capture_calls
from rectified_spaattn.lab.calls.maps import one_head
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.clips.evaluate import base_configs
from rectified_spaattn.lab.clips.models import Source, call_arguments, load, source_of, with_pictures
from rectified_spaattn.lab.clips.options import DEMO, ModelOptions
from rectified_spaattn.lab.option import option
from rectified_spaattn.pipelines.adapters import adapter_for

from .. import harness
from . import ours, sol, sparsepr, svg2, svg_ear
from .contract import NotPossible, Rule, head_of, relative_error
from .groups import exact

OTHERS: dict[str, Rule] = sol.RULES | svg2.RULES | svg_ear.RULES | sparsepr.RULES
NAMES = ("plain", "paper", *OTHERS, "row", "row+slope", "query+slope")
DEFAULTS = ("query+slope", "row+slope")  # the newest first; others are compared with the first that was measured


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions, harness.Sample):
    """A model, what it is asked for, and which of its calls are looked at.

    Raises ValueError where a model other than the demo's gets no prompt.
    """

    prompt: tuple[str, ...] = option("What to show, in place of a split; may be repeated.", ())
    seed: int = option("Seed of the noise, with --prompt.", 0)
    step: tuple[int, ...] = option("Denoising steps whose attention calls are taken, from 0.", (3, 6, 9))
    layer: tuple[int, ...] = option(
        "Layers whose calls are taken.", (), unset="all of the demo model, else the middle one"
    )
    head: tuple[int, ...] = option("Heads that are looked at.", (), unset="all")
    budget: tuple[float, ...] = option("Executed pairs over all pairs.", (0.115, 0.21))
    rule: tuple[str, ...] = option("Rules to compare.", NAMES, choices=NAMES)

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        harness.Sample.__post_init__(self)
        if self.model != DEMO and not self.prompt and not self.table_of:
            raise ValueError("prompt: got none; allowed: one or more for a model that is not the demo's.")

    @property
    def wanted(self) -> list[Pair]:
        asked = [Pair(prompt=prompt, seed=self.seed) for prompt in self.prompt]
        return asked[: self.pairs] if asked else super().wanted

    @cached_property
    def source(self) -> Source:
        return source_of(self)

    def load(self, device: torch.device) -> Any:
        return load(self.source, self, device)

    def layers(self, pipe: Any) -> Sequence[int] | None:
        if self.layer or self.source.is_demo:
            return self.layer or None
        return (len(adapter_for(pipe.transformer).attentions(pipe.transformer)) // 2,)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the heads and calls of one pair; all but `error` are shares of all pairs, see contract.Pairs."""

    KEYS: ClassVar[tuple[str, ...]] = ("budget", "rule")
    budget: float
    rule: str
    error: float
    pairs: float
    exact: float
    pooled: float
    estimates: float
    products: float
    grouping: float


def measured(
    calls: Sequence[AttentionCall], rules: dict[str, Rule], options: Options, device: torch.device, left_out: set[str]
) -> Iterator[dict[str, Any]]:
    for call in calls:
        for number in options.head or range(call.q.shape[2]):
            head = head_of(one_head(call, number, device))
            full = exact(head)
            for budget, name in itertools.product(options.budget, options.rule):
                try:
                    answer = rules[name](head, budget)
                except NotPossible as error:
                    left_out.add(f"{name} at {budget:g}: {error}")
                    continue
                error = relative_error(answer.out, full)
                yield {"budget": budget, "rule": name, "error": error} | answer.pairs.over(head)


def rivals(options: Options) -> None:
    """Rules of other publications beside this package's, at equal executed pairs."""
    left_out: set[str] = set()

    def measure(pipe, pairs, say):
        base = base_configs(options.source, pipe)[0]
        rules = OTHERS | ours.rules(base)
        arguments = with_pictures(call_arguments(options.source, options))
        for pair in pairs:
            say(pair.prompt[:40])
            calls = capture_calls(pipe, [pair], arguments, steps=options.step, layers=options.layers(pipe))
            yield from harness.mean_rows(Row, pair, measured(calls, rules, options, pipe._execution_device, left_out))

    def show(rows):
        print(table(rows))
        for text in sorted(left_out):
            print(f"Not measured: {text}")

    harness.run("rivals", Row, options, measure, show)


def table(rows: Sequence[Row]) -> str:
    """Markdown of at most 80 columns, one table a budget, the smallest error first."""
    settings, lines = harness.settings_of(list(rows)), []
    default = next((name for name in DEFAULTS if any(row.rule == name for row in rows)), DEFAULTS[0])
    for budget in sorted({row.budget for row in rows}):
        mine = {rule: of_pair for (each, rule), of_pair in settings.items() if each == budget}
        lines += ["", f"At most {budget:g} of all pairs", "", f"| rule | error | pairs, groups | less {default} |"]
        lines.append("|---|---|---|---|")
        for rule, of_pair in sorted(mine.items(), key=lambda item: fmean(row.error for row in item[1].values())):
            apart = harness.differences(of_pair, mine.get(default, {}), "error")
            cells = [harness.interval([row.error for row in of_pair.values()])]
            cells.append(
                ", ".join(f"{fmean(getattr(r, x) for r in of_pair.values()):.3f}" for x in ("pairs", "grouping"))
            )
            cells.append(harness.interval(apart, "+") if rule != default else "")
            lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    harness.main(Options, rivals)
