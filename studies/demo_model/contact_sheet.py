"""Draw a contact sheet of the demo model: one row a prompt, one column a frame.

python -m studies.demo_model.contact_sheet --out docs/images/contact-sheet.png
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from rectified_spaattn.lab.demo_model.pipeline import DEFAULT_STEPS, WEIGHTS, load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS


def draw_sheet(videos: Tensor, captions: list[str], path: Path, columns: int = 8) -> None:
    """Write frames, spread evenly over each video, to a PNG; videos float [B, T, 3, H, W] in [0, 1]."""
    from matplotlib.figure import Figure

    frames = torch.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().long().tolist()
    figure = Figure(figsize=(1.25 * len(frames), 1.55 * len(captions)), layout="constrained")
    for part, video, caption in zip(
        figure.subfigures(len(captions), 1, squeeze=False)[:, 0], videos, captions, strict=True
    ):
        part.suptitle("\n".join(textwrap.wrap(caption, 12 * len(frames))), fontsize=8)
        for axis, frame in zip(part.subplots(1, len(frames), squeeze=False)[0], frames, strict=True):
            axis.imshow(video[frame].permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="PNG to write")],
    weights: Annotated[Path, typer.Option(help="folder with transformer, caption_encoder and scheduler")] = WEIGHTS,
    count: Annotated[int, typer.Option(help="how many of the prompts", min=1)] = len(PROMPTS),
    size: Annotated[int, typer.Option(help="height and width")] = 64,
    frames: Annotated[int, typer.Option(help="frames of a video")] = 16,
    steps: Annotated[int, typer.Option(help="denoising steps")] = DEFAULT_STEPS,
    guidance: Annotated[float, typer.Option(help="guidance scale; above 1 costs a second forward a step")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the starting noise")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the better one if left out")] = None,
) -> None:
    """Generate the fixed prompts and draw them."""
    pipe = load_demo_pipeline(device or ("cuda" if torch.cuda.is_available() else "cpu"), weights=weights)
    captions = list(PROMPTS[:count])
    videos = []
    for index, caption in enumerate(captions):
        noise = torch.Generator().manual_seed(seed + index)
        videos.append(pipe(caption, size, size, frames, steps, guidance, noise, return_dict=False)[0][0])
    draw_sheet(torch.stack(videos).cpu(), captions, out)


if __name__ == "__main__":
    typer.run(main)
