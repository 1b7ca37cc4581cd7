"""Contact sheets, one row a caption, one column a frame: drawn scenes, or the fixed captions as a run makes them.

python -m studies.demo_model.showcase --out sheet.png [--run runs/demo --guidance 2]
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor

from rectified_spaattn.lab.demo_model.prompts import PROMPTS

from . import checkpoint
from .feed import draw, sample_scenes
from .fit import attention_kernels
from .network import Network
from .recipe import Recipe
from .recognise import generated
from .table import numbers_of

MARGIN = 26  # pixels over each row, for the caption


def draw_sheet(videos: Tensor, captions: Sequence[str], path: Path, frames: int = 8, scale: int = 2) -> None:
    """Write frames, spread evenly over each video, to a picture; videos float [B, 3, T, H, W] in [-1, 1]."""
    chosen = torch.linspace(0, videos.shape[2] - 1, frames).round().long()
    levels = ((videos[:, :, chosen] / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()
    height, width = (side * scale for side in levels.shape[-2:])
    sheet = Image.new("RGB", (frames * width, len(captions) * (height + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(levels, captions, strict=True)):
        top = row * (height + MARGIN)
        pen.text((4, top + 1), "\n".join(textwrap.wrap(caption, frames * width // 6)), fill="black")
        for column, frame in enumerate(video.unbind(1)):
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * width, top + MARGIN))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main(
    out: Annotated[Path, typer.Option(help="PNG to write")],
    run: Annotated[Path | None, typer.Option(help="folder of a run; without it, drawn scenes")] = None,
    count: Annotated[int, typer.Option(help="how many captions")] = 12,
    seed: Annotated[str, typer.Option(help="of the drawn scenes")] = "sheet",
    steps: Annotated[int, typer.Option(help="denoising steps")] = 12,
    guidance: Annotated[float, typer.Option(help="guidance scale")] = 1.0,
    shift: Annotated[float, typer.Option(help="of the noise levels")] = 3.0,
) -> None:
    """Draw a sheet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if run:
        recipe = Recipe.from_dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"])
        network = Network(recipe).to(device).eval()
        checkpoint.load(run, {"average": network})
        captions = PROMPTS[:count]
        with attention_kernels(device):
            videos = generated(network, recipe, captions, device, steps=steps, guidance=guidance, shift=shift)
    else:
        scenes = sample_scenes(seed, count)
        captions = tuple(scene.caption() for scene in scenes)
        videos = torch.cat([draw(numbers_of([scene], range(16)), 64) for scene in scenes])
    draw_sheet(videos, captions, out)


if __name__ == "__main__":
    typer.run(main)
