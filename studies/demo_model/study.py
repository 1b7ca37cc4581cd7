"""Short runs that differ in a few settings, to choose by: `--variant` names the settings of one, after the recipe's.

python -m studies.demo_model.study --seconds 40 --variant "" --variant prediction=velocity --variant optimizer=adamw
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from .fit import RECIPE, Run, attention_kernels
from .recipe import Recipe

ENDLESS = 1e9


def main(
    variant: Annotated[list[str], typer.Option(help='settings as "name=value name=value", several times')],
    config: Annotated[Path, typer.Option(help="YAML settings")] = RECIPE,
    seconds: Annotated[float, typer.Option(help="training time of each")] = 40.0,
    stage: Annotated[int, typer.Option(help="which of the recipe's stages they train in")] = 0,
) -> None:
    """Train every variant from scratch and print its held-out loss; the learning rate falls to zero in each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    lines = []
    for text in variant:
        changes = {name: yaml.safe_load(value) for name, value in (item.split("=", 1) for item in text.split())}
        recipe = Recipe.from_yaml(config, {"minutes": seconds / 60, **changes})
        run = Run(replace(recipe, stages=(replace(recipe.stages[stage], until=1.0),)), device)
        run.compile()
        print(f"variant: {text or 'the recipe'}", flush=True)
        with attention_kernels(device):
            run.train(ENDLESS)
        lines.append(f"{text or 'the recipe'}: held_out {run.rows[-1]['held_out']} after {run.samples} clips")
        del run
        gc.collect()
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    typer.run(main)
