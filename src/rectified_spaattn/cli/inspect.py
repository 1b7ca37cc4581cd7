"""`rectified-spaattn inspect`: one attention head of a running model, under every rectify mode and in pictures."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..config import RECTIFY_MODES, SparseConfig
from ..demo.prompts import PROMPTS
from .options import device_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEMO_BLOCK_SIZE = 64  # its grid is small


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """One run; None leaves the choice to the model, its pipeline or the docs of the option.

    Raises ValueError or TypeError for values out of range.
    """

    model: Path | None = None
    layer: int | None = None
    head: int | None = None
    step: int | None = None
    prompt: str = PROMPTS[0]
    seed: int = 0
    sparsity: tuple[float, ...] = (0.8, 0.9)
    rectify: str = SparseConfig().rectify
    block_size: int | None = None
    order: str = "gilbert"
    top_p: float = 0.0
    neighbours: bool = False
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    selection: bool = False
    out: Path = Path("inspect-output")
    command: str = "rectified-spaattn inspect"

    def __post_init__(self) -> None:
        if self.rectify == "none":
            raise ValueError(f"rectify: got 'none'; allowed: a mode to show beside it, {list(RECTIFY_MODES[1:])}.")
        for name, least in (("layer", 0), ("head", 0), ("step", 0), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}; allowed: {least} or more.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}; allowed: one of {list(DTYPES)}.")
        device_of(self.device)
        for sparsity in self.sparsity:
            self.config().replace(sparsity=sparsity)

    def config(self) -> SparseConfig:
        """What all modes and sparsities have in common."""
        size = self.block_size
        if size is None:
            size = DEMO_BLOCK_SIZE if self.model is None else SparseConfig().block_size
        return SparseConfig.from_dict(
            {
                "rectify": self.rectify,
                "block_size": size,
                "order": self.order,
                "top_p": self.top_p,
                "neighbours": self.neighbours,
            }
        )


DEFAULT = InspectOptions()


def inspect(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a diffusers pipeline.", show_default="the demo model")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Self-attention layer, from 0.", show_default="the middle one")
    ] = None,
    head: Annotated[int | None, typer.Option(help="Head, from 0.", show_default="the middle one")] = None,
    step: Annotated[int | None, typer.Option(help="Denoising step, from 0.", show_default="the middle one")] = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked for.")] = DEFAULT.prompt,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = DEFAULT.seed,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Share of blocks to drop; may be repeated.", show_default="0.8 and 0.9"),
    ] = None,
    rectify: Annotated[str, typer.Option(help="The mode that the pictures show beside none.")] = DEFAULT.rectify,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens a block.", show_default="128; 64 for the demo model")
    ] = None,
    order: Annotated[str, typer.Option(help="gilbert, tile or raster.")] = DEFAULT.order,
    top_p: Annotated[float, typer.Option(help="Least attention mass the kept blocks hold.")] = DEFAULT.top_p,
    neighbours: Annotated[bool, typer.Option(help="Always keep blocks that touch in 3-D.")] = DEFAULT.neighbours,
    selection: Annotated[bool, typer.Option("--selection", help="Also judge other ways to choose the blocks.")] = False,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.", show_default="the pipeline's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[
        str,
        typer.Option(help=f"{', '.join(DTYPES)}; auto: float32 for the demo model and on a CPU, else bfloat16."),
    ] = DEFAULT.dtype,
    out: Annotated[Path, typer.Option(help="Folder for the page, pictures and tables.")] = DEFAULT.out,
) -> None:
    """Look into one attention head: its error under every rectify mode, and where its attention goes."""
    try:
        options = InspectOptions(
            model=model,
            layer=layer,
            head=head,
            step=step,
            prompt=prompt,
            seed=seed,
            sparsity=tuple(sorted(set(sparsity))) if sparsity else DEFAULT.sparsity,
            rectify=rectify,
            block_size=block_size,
            order=order,
            top_p=top_p,
            neighbours=neighbours,
            height=height,
            width=width,
            frames=frames,
            steps=steps,
            guidance=guidance,
            device=device,
            dtype=dtype,
            selection=selection,
            out=out,
            command=shlex.join(["rectified-spaattn", *sys.argv[1:]]),
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    from .inspect_run import InspectError, run

    try:
        run(options)
    except InspectError as error:
        raise SystemExit(str(error)) from error
