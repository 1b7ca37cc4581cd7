"""Can the main object be read from clips? A small classifier, trained on rendered clips, reads shape, colour, material
and motion (and camera and floor) from rendered held-out clips and from clips that a trained run generates.

python -m studies.demo_model.recognise --run runs/demo --out runs/demo [--reader runs/demo/reader.safetensors]
"""

from __future__ import annotations

import csv
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import checkpoint
from .feed import draw, sample_scenes
from .fit import attention_kernels, mixed_precision
from .network import Network, generate
from .recipe import Recipe
from .table import Numbers, numbers_of
from .world import CAMERAS, COLOURS, FLOORS, MATERIALS, MOTIONS, SHAPES, Scene

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "material": MATERIALS,
    "motion": tuple(MOTIONS),
    "camera": (None, *CAMERAS),
    "floor": FLOORS,
}
MAIN = ("shape", "colour", "material", "motion")


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """For every attribute the index of its value in each scene, int64 [B]."""
    rows = [
        {**vars(scene.solids[0]), "motion": scene.motion, "camera": scene.camera, "floor": scene.floor}
        for scene in scenes
    ]
    return {name: torch.tensor([values.index(row[name]) for row in rows]) for name, values in ATTRIBUTES.items()}


class Reader(nn.Module):
    """Convolutions over space, then over time, by turns; one output for each attribute."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for index, after in enumerate((width, 2 * width, 3 * width, 4 * width)):
            layers += [
                nn.Conv3d(before, after, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
                nn.GroupNorm(8, after),
                nn.GELU(),
                nn.Conv3d(after, after, (1, 3, 3), 1, (0, 1, 1)),
                nn.GELU(),
                nn.Conv3d(after, after, (3, 1, 1), (2 if index == 2 else 1, 1, 1), (1, 0, 0)),
                nn.GroupNorm(8, after),
                nn.GELU(),
            ]
            before = after
        self.layers = nn.Sequential(*layers)
        self.mixed = nn.Sequential(nn.Linear(before * 8 * 4, 256), nn.GELU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, videos: Tensor) -> dict[str, Tensor]:
        """Videos [B, 3, 16, 64, 64] in [-1, 1] -> logits [B, values] for every attribute."""
        features = F.adaptive_avg_pool3d(self.layers(videos), (8, 2, 2)).flatten(1)
        hidden = self.mixed(features)
        return {name: head(hidden) for name, head in self.heads.items()}


def train_reader(reader: Reader, recipe: Recipe, device: torch.device, seconds: float, batch: int) -> None:
    """Train on rendered clips for so many seconds, with a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.02)
    begin = shown = time.perf_counter()
    clips = _rendered_clips(recipe, device, batch)
    for step in itertools.count():
        videos, wanted = next(clips)
        progress = (time.perf_counter() - begin) / seconds
        if progress >= 1:
            return
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - progress)
        videos = videos + 0.06 * torch.rand(1, device=device) * torch.randn_like(videos)
        with mixed_precision(device):
            logits = reader(videos)
            loss = sum(F.cross_entropy(logits[name].float(), wanted[name]) for name in ATTRIBUTES)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"reader step {step} clips {step * batch} loss {float(loss.detach()):.3f}", flush=True)


class _Draws(torch.utils.data.Dataset):
    """Scenes by index: numbers and labels of a batch."""

    def __init__(self, recipe: Recipe, batch: int) -> None:
        self.recipe, self.batch = recipe, batch

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scenes = sample_scenes(f"reader {index}", self.batch)
        return vars(numbers_of(scenes, range(self.recipe.frames), self.recipe.frames)), labels(scenes)


def _rendered_clips(recipe: Recipe, device: torch.device, batch: int) -> Any:
    workers = recipe.workers if device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(
        _Draws(recipe, batch),
        batch_size=None,
        sampler=range(10**6),
        num_workers=workers,  # type: ignore[arg-type]
    )
    for numbers, wanted in loader:
        videos = draw(Numbers(**numbers).to(device), recipe.size, recipe.compile_drawing)
        yield videos, {name: value.to(device) for name, value in wanted.items()}


@torch.no_grad()
def accuracy(reader: Reader, videos: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of clips in which each attribute is read right."""
    reader.eval()
    parts = [reader(part) for part in videos.split(32)]
    wanted = labels(scenes)
    return {
        name: float((torch.cat([part[name] for part in parts]).argmax(1).cpu() == wanted[name]).float().mean())
        for name in ATTRIBUTES
    }


def generated(
    network: Network, recipe: Recipe, captions: Sequence[str], device: torch.device, **options: Any
) -> Tensor:
    """Clips of captions, the noise from one generator."""
    network.use_frames(range(recipe.frames))
    random = torch.Generator().manual_seed(0)
    parts = []
    for first in range(0, len(captions), 64):
        part = captions[first : first + 64]
        noise = torch.randn(len(part), 3, recipe.frames, recipe.size, recipe.size, generator=random)
        parts.append(generate(network, part, noise.to(device), **options))
    return torch.cat(parts)


def main(
    run: Annotated[Path, typer.Option(help="folder of a run that fit.py wrote")],
    out: Annotated[Path, typer.Option(help="folder for recognised.csv and reader.safetensors")],
    reader: Annotated[Path | None, typer.Option(help="a trained reader, instead of training one")] = None,
    seconds: Annotated[float, typer.Option(help="of the reader's training")] = 75.0,
    count: Annotated[int, typer.Option(help="held-out scenes")] = 256,
    steps: Annotated[list[int] | None, typer.Option(help="denoising steps, several times")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="guidance scales, several times")] = None,
    shift: Annotated[list[float] | None, typer.Option(help="shifts of the noise levels, several times")] = None,
    batch: Annotated[int, typer.Option(help="clips a training step of the reader")] = 128,
) -> None:
    """Train or load the reader, then print and write a table: one row rendered, one for each way to generate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe.from_dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"])
    network = Network(recipe).to(device).eval()
    checkpoint.load(run, {"average": network})
    torch.manual_seed(0)
    judge = Reader().to(device)
    if reader:
        judge.load_state_dict(load_file(reader))
    else:
        train_reader(judge, recipe, device, seconds, batch)
        out.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.half() for name, tensor in judge.state_dict().items()}, out / "reader.safetensors")
    scenes = sample_scenes("recognise", count)
    captions = [scene.caption() for scene in scenes]
    numbers = numbers_of(scenes, range(recipe.frames), recipe.frames).to(device)
    rows: list[dict[str, Any]] = [
        {"clips": "rendered", **accuracy(judge, draw(numbers, recipe.size, recipe.compile_drawing), scenes)}
    ]
    show(rows[0], rows[0])
    for way in itertools.product(steps or [12], guidance or [1.0, 2.0], shift or [3.0]):
        options = dict(zip(("steps", "guidance", "shift"), way, strict=True))
        with attention_kernels(device):
            videos = generated(network, recipe, captions, device, **options)
        rows.append({"clips": " ".join(f"{k} {v}" for k, v in options.items()), **accuracy(judge, videos, scenes)})
        show(rows[-1], rows[0])
    out.mkdir(parents=True, exist_ok=True)
    with (out / "recognised.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(row: dict[str, Any], rendered: dict[str, Any]) -> None:
    """Print a row; behind each share, what it is of the rendered clips' one."""
    cells = [f"{name} {row[name]:.3f} ({row[name] / max(rendered[name], 1e-9):.0%})" for name in ATTRIBUTES]
    print(f"{row['clips']}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    typer.run(main)
