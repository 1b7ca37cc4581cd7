"""`rectified-spaattn generate`: load, run, write, and say what happened."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import TextColumn, TimeRemainingColumn

from ..lab.clips import single
from ..lab.clips.clip import OnStep, Pair, full_mode, generate
from ..lab.clips.models import call_arguments, dtype_of, load, source_of, with_pictures
from ..lab.clips.options import GenerateOptions
from ..lab.clips.summary import plain
from ..lab.machine import device_name, device_of
from ..lab.pages.clips import side_by_side
from ..lab.pages.video import write_clip
from ..lab.rows import write_json
from .console import plain_console, print_wide, progress_bars
from .evaluate import summary_tables

_WIDEST = 640  # pixels of one clip in the side-by-side picture


def run(options: GenerateOptions) -> None:
    """The whole command."""
    console, device = plain_console(), device_of(options.device)
    source = source_of(options)
    outputs = single.outputs_of(options, source)
    arguments = call_arguments(source, options)
    call = with_pictures(arguments)
    dtype = dtype_of(source, options.dtype, device)
    console.print(f"Loading {source.model} ({source.pipeline.__name__}, {dtype})")
    pipe = load(source, options, device)
    mode, pair = single.mode_of(options, pipe), Pair(prompt=options.prompt, seed=options.seed)
    if options.compile:
        for name in source.transformers:
            getattr(pipe, name).compile_repeated_blocks(fullgraph=True)

    with _bar("rectified attention") as on_step:
        [sparse] = generate(pipe, mode, [pair], call, backend=options.backend, on_step=on_step)
    for summary in sparse.summary:
        print_wide(console, summary)
    fps = options.fps if source.makes_video else None
    left = single.stale(outputs)
    write_clip(outputs.clip, sparse.video, options.fps)
    record: dict[str, Any] = {
        **single.describe(options, source, pipe, arguments, device),
        **single.sparse_result(sparse, source.transformers),
        "output": single.result(sparse, outputs.clip, fps),
    }
    write_json(outputs.json, plain(record))  # before full attention, which takes longest and may need more memory
    for path in left:  # of another clip of this name
        path.unlink()
    console.print(f"Written: {outputs.clip} and {outputs.json}")
    if sparse.stats is None or not sparse.stats.sparse_calls:
        console.print("Note: no attention call ran sparse; the lines above say why.")
    if not options.compare:
        return
    with _bar("full attention") as on_step:
        [full] = generate(pipe, full_mode(), [pair], call, on_step=on_step)
    rows = single.compare(full, sparse)
    write_clip(outputs.full, full.video, options.fps)
    frames, _, height, width = full.video.shape
    cell = min(max(width, 256), _WIDEST)
    side_by_side(outputs.side_by_side, rows, {pair: [full.video, sparse.video]}, options.fps, cell)
    record["compare"] = {
        "full": single.result(full, outputs.full, fps),
        "side_by_side": outputs.side_by_side.name,
        "scores": [row.row() for row in rows],
    }
    write_json(outputs.json, plain(record))
    where = f"{height} x {width} x {frames}, {len(full.steps)} steps, {device_name(device)}"
    for table in summary_tables(rows, where):
        print_wide(console, table)
    console.print(f"Side by side: {outputs.side_by_side}")


@contextmanager
def _bar(what: str) -> Iterator[OnStep]:
    """A bar of the denoising steps with the density of the last one."""
    more = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[density]}"))
    with progress_bars(plain_console(), *more) as progress:
        task = progress.add_task(what, total=None, density="")

        def on_step(count: int, total: int, density: float | None) -> None:
            text = "skipped" if density is None else f"density {density:.1%}"
            progress.update(task, completed=count, total=total, density=text)

        yield on_step
