"""Draw the training log of the packaged weights.

python -m studies.demo_model.loss_figure --out docs/images/loss.png
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

LOG = Path(__file__).with_name("loss.csv")


def main(
    out: Annotated[Path, typer.Option(help="PNG to write")],
    log: Annotated[Path, typer.Option(help="loss.csv of a training run")] = LOG,
) -> None:
    """Plot the training loss and the held-out loss against the number of samples seen."""
    from matplotlib.figure import Figure

    with log.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([int(row["samples"]) for row in rows], [float(row["loss"]) for row in rows], label="training")
    held_out = [(int(row["samples"]), float(row["held_out"])) for row in rows if row["held_out"]]
    axis.plot(*zip(*held_out, strict=True), "o-", markersize=4, label="held out, averaged weights")
    axis.set(xlabel="samples", ylabel="velocity error (mean square)", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    typer.run(main)
