"""Fine-tune the packaged demo model on filmed shots. No more than the shots' file and this package is needed.

python -m studies.footage.tune --clips runs/footage.npz --out runs/footage --seconds 110
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from torch import Tensor

from rectified_spaattn.lab.demo_model.model import tokenize
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline

from ..demo_model import export
from ..demo_model.fit import Run, attention_kernels, mixed_precision
from ..demo_model.network import generate
from ..demo_model.recipe import Recipe, Stage
from ..demo_model.showcase import draw_sheet
from . import clips
from .clips import SHOTS, Cut, clip_of, draw_cut

RECIPE = Path(__file__).with_name("recipe.yaml")
FOREVER = 1e9
HELD_OUT_CLIPS = 32
SHEET_SEEDS = 2  # generated clips a shot on the contact sheet


@dataclass(frozen=True)
class Batch:
    """Clips of one training step: which shot and what of it, B times, and their captions as word numbers [B, 32]."""

    frames: range
    cuts: tuple[tuple[str, Cut], ...]
    ids: Tensor


class FilmRun(Run):
    """A training run on shots uint8 [T, 3, h, w] by name, which begins with the packaged weights."""

    def __init__(self, recipe: Recipe, device: torch.device, shots: dict[str, Tensor]) -> None:
        super().__init__(recipe, device)
        self.seen = {name: clips.split(shot, held_out=False).to(device) for name, shot in shots.items()}
        kept = {name: clips.split(shot, held_out=True) for name, shot in shots.items()}
        self.kept = {name: shot.to(device) for name, shot in kept.items() if len(shot)}
        packaged = load_demo_pipeline(device)
        for network in (self.network, self.average):
            network.transformer.load_state_dict(packaged.transformer.state_dict())
            network.caption_encoder.load_state_dict(packaged.caption_encoder.state_dict())

    def draw(self, key: str, shots: dict[str, Tensor], count: int, dropout: float = 0.0) -> Batch:
        """`count` random clips of shots, the same for the same key."""
        rng = random.Random(key)
        names = rng.choices(list(shots), k=count)
        captions = ["" if rng.random() < dropout else SHOTS[name].caption for name in names]
        cuts = tuple((name, draw_cut(rng, shots[name], self.recipe.frames, self.recipe.size)) for name in names)
        return Batch(range(self.recipe.frames), cuts, tokenize(captions))

    def batches(self, stage: Stage) -> Iterator[Batch]:
        step, dropout = self.step, self.recipe.caption_dropout
        while True:
            yield self.draw(f"film {self.recipe.seed} {step}", self.seen, stage.batch, dropout)
            step += 1

    def videos(self, batch: Batch) -> Tensor:
        return self.clips(self.seen, batch)

    def clips(self, shots: dict[str, Tensor], batch: Batch) -> Tensor:
        size = (self.recipe.frames, self.recipe.size)
        return torch.stack([clip_of(shots[name], cut, *size) for name, cut in batch.cuts])

    @torch.no_grad()
    def held_out(self, frames: int) -> float:
        """The averaged network's loss on frames that training leaves out, at noise levels like a sampler's."""
        batch = self.draw("held out", self.kept, HELD_OUT_CLIPS)
        videos = self.clips(self.kept, batch)
        noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        even = (torch.arange(HELD_OUT_CLIPS, device=self.device) + 0.5) / HELD_OUT_CLIPS
        sigmas = 3 * even / (1 + 2 * even)
        level = sigmas.view(-1, 1, 1, 1, 1)
        self.average.use_frames(batch.frames)
        with mixed_precision(self.device):
            velocity = self.average((1 - level) * videos + level * noise, sigmas, batch.ids.to(self.device))
        return float((velocity - (noise - videos)).square().mean())

    def sheet(self, path: Path) -> None:
        """A contact sheet: of every shot a filmed clip and generated ones."""
        rng, size = random.Random("sheet"), (self.recipe.frames, self.recipe.size)
        videos, lines = [], []
        for name, shot in self.seen.items():
            caption = SHOTS[name].caption
            noise = torch.randn(SHEET_SEEDS, 3, *size, size[1], generator=torch.Generator().manual_seed(0))
            self.average.use_frames(range(size[0]))
            made = generate(self.average, [caption] * SHEET_SEEDS, noise.to(self.device))
            videos += [clip_of(shot, draw_cut(rng, shot, *size), *size), *made]
            lines += [f"{name}, filmed", *[f"{caption}, seed {seed}" for seed in range(SHEET_SEEDS)]]
        draw_sheet(torch.stack(videos), lines, path)


def main(
    clips_file: Annotated[Path, typer.Option("--clips", help="file that studies.footage.clips wrote")],
    out: Annotated[Path, typer.Option(help="folder for the run, its weights as diffusers reads them, and sheet.png")],
    seconds: Annotated[float, typer.Option(help="training time, compilation not counted")] = 110.0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value, instead of the recipe's")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
) -> None:
    """Fine-tune, save, and draw a contact sheet."""
    changes = {name: yaml.safe_load(text) for name, text in (item.split("=", 1) for item in settings or [])}
    recipe = Recipe.from_yaml(RECIPE, {"minutes": seconds / 60, **changes})
    torch.set_float32_matmul_precision("high")
    run = FilmRun(recipe, torch.device(device), clips.load(clips_file))
    run.compile()
    with attention_kernels(run.device):
        run.train(FOREVER)
        run.save(out)
        export.main(out, out / "weights")
        run.sheet(out / "sheet.png")


if __name__ == "__main__":
    typer.run(main)
