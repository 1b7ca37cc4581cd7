"""The options of `rectified-spaattn generate`."""

from pathlib import Path
from typing import Annotated

import typer

from ..backends import BACKENDS
from ..config import PRESET_NAMES
from ..device import device_of
from ..generation.request import DTYPES, OFFLOADS, GenerationError, Request


def generate(
    model: Annotated[str, typer.Argument(help="Repository or local folder of a diffusers pipeline.")],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    image: Annotated[str | None, typer.Option(help="File or address of the picture to start from.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, .mp4 or .png.", show_default="generated.mp4 or .png")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of blocks to drop.", show_default="the preset's")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"{PRESET_NAMES}, for all as published.", show_default="the one that fits the model"),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML file with fields of SparseConfig, instead of a preset; may be repeated, one each."),
    ] = None,
    teacache: Annotated[bool, typer.Option("--teacache", help="Skip steps that change little, too.")] = False,
    teacache_threshold: Annotated[
        float | None, typer.Option(help="Change up to which steps are skipped.", show_default="the model's")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run full attention from the same seed as well, and write both.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the pipeline's")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.", show_default="the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale.", show_default="the pipeline's")] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the pipeline's call, the value in YAML; may be repeated."),
    ] = None,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the scheduler's configuration, such as flow_shift=5.0; may be repeated."),
    ] = None,
    fps: Annotated[int, typer.Option(help="Frames a second in the file.")] = 16,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; auto: bfloat16 on a GPU, else float32.")] = "auto",
    offload: Annotated[
        str, typer.Option(help=f"{', '.join(OFFLOADS)}: what stays on the CPU until it is needed.")
    ] = "none",
    backend: Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """One video or picture with any supported model, and a JSON beside it with everything needed to repeat it."""
    try:
        request = Request(
            model=model,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            out=out,
            revision=revision,
            sparsity=sparsity,
            preset=preset,
            config=tuple(config or ()),
            teacache=teacache,
            teacache_threshold=teacache_threshold,
            compile=compile,
            compare=compare,
            steps=steps,
            seed=seed,
            height=height,
            width=width,
            frames=frames,
            guidance=guidance,
            argument=tuple(argument or ()),
            scheduler=tuple(scheduler or ()),
            fps=fps,
            dtype=dtype,
            offload=offload,
            backend=backend,
            device=device,
        )
        chosen = device_of(device)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    from .generate_run import generate as run

    try:
        run(request, chosen)
    except GenerationError as error:
        raise SystemExit(str(error)) from error
