"""`rectified-spaattn inspect`: one attention head of a running model, under every rectify mode and in pictures."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import RECTIFY_MODES, SparseConfig, check_choice
from ..curve import ORDERS
from ..demo.prompts import PROMPTS
from ..device import device_of
from ..generation.request import DTYPES, OFFLOADS


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """One run; None leaves the choice to the model, its preset or its pipeline.

    Raises ValueError or TypeError for values out of range.
    """

    model: str = "demo"
    layer: int | None = None
    head: int | None = None
    step: int | None = None
    prompt: str = PROMPTS[0]
    seed: int = 0
    sparsity: tuple[float, ...] = (0.8, 0.9)
    rectify: str = SparseConfig().rectify
    block_size: int | None = None
    order: str | None = None
    top_p: float | None = None
    neighbours: bool | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
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
        for name, allowed in (("dtype", DTYPES), ("offload", OFFLOADS)):
            check_choice(name, getattr(self, name), allowed)
        device_of(self.device)
        for sparsity in self.sparsity:
            self.config(SparseConfig()).replace(sparsity=sparsity)

    def config(self, base: SparseConfig) -> SparseConfig:
        """What all modes and sparsities have in common: `base`, changed where an option was given."""
        given: dict[str, Any] = {name: getattr(self, name) for name in ("block_size", "order", "top_p", "neighbours")}
        return base.replace(rectify=self.rectify, **{name: value for name, value in given.items() if value is not None})


DEFAULT = InspectOptions()


def inspect(
    model: Annotated[
        str, typer.Option(help="demo, or the folder or repository of a diffusers pipeline.")
    ] = DEFAULT.model,
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
        int | None, typer.Option(help="Tokens a block.", show_default="the preset's; 64 for the demo model")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(ORDERS)}.", show_default=f"the preset's; {SparseConfig().order} for the demo model"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Least mass the kept blocks hold.", show_default="the preset's; 0 for the demo model"),
    ] = None,
    neighbours: Annotated[
        bool | None,
        typer.Option(
            "--neighbours/--no-neighbours",
            help="Always keep blocks that touch in 3-D; needs an --order other than content.",
            show_default="the preset's; no for the demo model",
        ),
    ] = None,
    selection: Annotated[bool, typer.Option("--selection", help="Also judge other ways to choose the blocks.")] = False,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.", show_default="the pipeline's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[
        str, typer.Option(help=f"{', '.join(DTYPES)}; auto: float32 for demo and on a CPU, else bfloat16.")
    ] = DEFAULT.dtype,
    offload: Annotated[
        str, typer.Option(help=f"{', '.join(OFFLOADS)}: what waits in CPU memory while it does not run.")
    ] = DEFAULT.offload,
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
            offload=offload,
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
