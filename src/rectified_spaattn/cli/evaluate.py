"""`rectified-spaattn evaluate`: full attention against a list of configurations, clip by clip, resumable."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import RECTIFY_MODES
from ..curve import ORDERS
from ..generation.request import DTYPES, OFFLOADS
from .evaluate_options import EvaluateOptions


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for everything; one of a run that was stopped is gone on with.")],
    model: Annotated[
        str, typer.Option(help="demo, or a folder or repository with a diffusers text-to-video pipeline.")
    ] = "demo",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line.", show_default="the demo's captions")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Clips a prompt, from seeds 0, 1, ...")] = 1,
    config: Annotated[
        list[Path] | None, typer.Option(help="YAML file with fields of SparseConfig; may be repeated.")
    ] = None,
    rectify: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(RECTIFY_MODES)}; this and the next three may be repeated.")
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share of blocks to drop.")] = None,
    block_size: Annotated[list[int] | None, typer.Option(help="Tokens a block.")] = None,
    order: Annotated[list[str] | None, typer.Option(help=f"{', '.join(ORDERS)}.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Least attention mass the kept blocks hold.")] = None,
    neighbours: Annotated[
        bool | None, typer.Option(help="Always keep blocks that touch in 3-D; needs an --order other than content.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="For models with guidance.")] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for a further argument of the pipeline's call; may be repeated."),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames a clip.", show_default="the pipeline's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's")] = None,
    fps: Annotated[
        int | None, typer.Option(help="Frames a second in the videos.", show_default="8 for demo, else 16")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"{', '.join(DTYPES)}; auto: float32 for demo and on a CPU, else bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    offload: Annotated[
        str, typer.Option(help=f"{', '.join(OFFLOADS)}: what waits in CPU memory while it does not run.")
    ] = "none",
    backend: Annotated[str, typer.Option(help="Attention backend of sparse calls, or auto.")] = "auto",
    dense_kernel: Annotated[
        str, typer.Option(help="SDPA kernel of every mode: default, math, efficient, flash or cudnn.")
    ] = "default",
    floor_kernel: Annotated[
        str | None,
        typer.Option(help="Another one, for the noise floor.", show_default="math for demo, else efficient"),
    ] = None,
    lpips: Annotated[
        bool | None, typer.Option("--lpips/--no-lpips", show_default="where its weights are there")
    ] = None,
) -> None:
    """Generate the same clips with full attention and every configuration, and measure how far they are apart.

    Stopped runs go on where they were when the same command is given again. Several processes share the prompts:
    accelerate launch --num_processes 4 -m rectified_spaattn evaluate ...
    """
    from ..evaluation.modes import Grid
    from ..evaluation.paired import NothingSparseError
    from .evaluation import prepare, run

    overrides = {"top_p": top_p, "neighbours": neighbours}
    try:
        options = EvaluateOptions(
            out=out,
            model=model,
            prompts=prompts,
            seeds=seeds,
            configs=tuple(config or ()),
            grid=Grid(
                rectify=rectify or (),
                sparsity=sparsity or (),
                block_size=block_size or (),
                order=order or (),
                overrides={name: value for name, value in overrides.items() if value is not None},
            ),
            negative_prompt=negative_prompt,
            argument=tuple(argument or ()),
            height=height,
            width=width,
            frames=frames,
            steps=steps,
            guidance=guidance,
            fps=fps,
            dtype=dtype,
            device=device,
            offload=offload,
            backend=backend,
            dense_kernel=dense_kernel,
            floor_kernel=floor_kernel,
            lpips=lpips,
            command=shlex.join(["rectified-spaattn", *sys.argv[1:]]),
        )
        prepared = prepare(options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except RuntimeError as error:  # no such model, no weights
        raise SystemExit(str(error)) from error
    try:
        run(prepared)
    except NothingSparseError as error:
        raise SystemExit(str(error)) from error
