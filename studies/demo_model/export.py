"""Write the averaged weights of a run as the package carries them: three folders that diffusers reads.

python -m studies.demo_model.export --run runs/demo --out src/rectified_spaattn/lab/demo_model/weights --shift 3
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler

from . import checkpoint
from .network import Network
from .recipe import Recipe


def main(
    run: Annotated[Path, typer.Option(help="folder of a run that fit.py wrote")],
    out: Annotated[Path, typer.Option(help="folder for transformer, caption_encoder and scheduler")],
    shift: Annotated[float, typer.Option(help="of the noise levels")] = 3.0,
) -> None:
    """Export in float16."""
    recipe = Recipe.from_dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"])
    if recipe.prediction != "velocity":
        raise RuntimeError(f"{run}: its output is {recipe.prediction!r}; the packaged pipeline takes velocities alone")
    network = Network(recipe)
    checkpoint.load(run, {"average": network})
    network.transformer.rope = network.transformer.rope.rope
    network.transformer.to(torch.float16).save_pretrained(out / "transformer")
    network.caption_encoder.to(torch.float16).save_pretrained(out / "caption_encoder")
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(out / "scheduler")


if __name__ == "__main__":
    typer.run(main)
