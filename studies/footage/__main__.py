"""The table of modes on the demo model that was fine-tuned on filmed clips, against its own full attention.

    python -m studies.footage --dtype bfloat16 --batch 6
    python -m studies.footage --table-of studies/data/footage-held-out.csv

Pairs are the captions of all shots with seeds of their own; the split only says which seeds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
from rectified_spaattn.lab.option import option

from .. import ablation, harness
from .clips import SHOTS

SEEDS = {"dev": range(4), "held-out": range(4, 8)}


@dataclass(frozen=True, kw_only=True)
class Options(ablation.Options):
    weights: Path = option("Folder of weights that studies.footage.tune wrote.", Path("runs/footage/weights"))
    split: str = option("Which seeds.", "held-out", choices=harness.SPLITS)
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.8, 0.9))
    rectify: tuple[str, ...] = option("Modes.", ("none", "ipar+gapr", "row", "query+slope"))
    order: tuple[str, ...] = option("How tokens are put in blocks.", ("gilbert", "content"))

    @property
    def wanted(self) -> list[Pair]:
        pairs = [Pair(prompt=shot.caption, seed=seed) for seed in SEEDS[self.split] for shot in SHOTS.values()]
        return pairs[: self.pairs]

    def load(self, device: torch.device) -> Any:
        return load_demo_pipeline(device, getattr(torch, self.dtype), self.weights)


def footage(options: Options) -> None:
    """Every mode on the fine-tuned model."""
    ablation.ablation(options, "footage")


if __name__ == "__main__":
    harness.main(Options, footage)
