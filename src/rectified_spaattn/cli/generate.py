"""`rectified-spaattn generate`: load, run, write, and say what happened."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import TextColumn

from ..lab.clips import single
from ..lab.clips.clip import Clip, OnStep, Pair, full_mode, generate
from ..lab.clips.evaluate import processes
from ..lab.clips.folder import Folder
from ..lab.clips.models import Source, call_arguments, dtype_of, load, source_of, with_pictures
from ..lab.clips.options import GenerateOptions
from ..lab.clips.summary import plain
from ..lab.machine import device_name, device_of
from ..lab.pages.clips import side_by_side
from ..lab.pages.video import check_encoder, write_clip
from ..lab.rows import write_json
from .console import plain_console, print_wide, progress_bars
from .evaluate import summary_tables, usage_errors

_WIDEST = 640  # pixels of one clip in the side-by-side picture


def run(options: GenerateOptions) -> None:
    """The whole command; with a file of prompts one of several processes, where accelerate or torchrun started them."""
    source = source_of(options)
    if source.makes_video:
        check_encoder()
    if options.prompts is None:
        device = device_of(options.device)
        outputs = single.outputs_of(options, source)
        _make(_loaded(options, source, device), source, device, options, outputs)
        return
    state = processes()
    device = device_of(options.device, state.local_process_index)
    with usage_errors():
        wanted = single.each_prompt(options, source)
    assert options.out is not None
    folder = Folder(options.out, [], {"model": source.model})
    with folder.claim("generate", {}) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        with state.split_between_processes(wanted) as mine:
            _make_missing(mine, source, device)
        state.wait_for_everyone()


def _make_missing(wanted: Sequence[GenerateOptions], source: Source, device: torch.device) -> None:
    """The clips of this process that are not there yet; what a run that was stopped left of one is replaced."""
    finished = [single.is_finished(each, source) for each in wanted]
    plain_console().print(f"{finished.count(True)} of {len(wanted)} clips of this process are there already")
    todo = [
        replace(each, overwrite=each.overwrite or state is False)
        for each, state in zip(wanted, finished, strict=True)
        if not state
    ]
    outputs = [single.outputs_of(each, source) for each in todo]
    if todo:
        pipe = _loaded(todo[0], source, device)
        for each, files in zip(todo, outputs, strict=True):
            _make(pipe, source, device, each, files)


def _loaded(options: GenerateOptions, source: Source, device: torch.device) -> Any:
    """The pipeline, after what can be wrong with the call was told."""
    with_pictures(call_arguments(source, options))
    dtype = dtype_of(source, options.dtype, device)
    plain_console().print(f"Loading {source.model} ({source.pipeline.__name__}, {dtype})")
    pipe = load(source, options, device)
    single.mode_of(options, pipe)
    if options.compile:
        for name in source.transformers:
            getattr(pipe, name).compile_repeated_blocks(fullgraph=True)
    return pipe


def _make(pipe: Any, source: Source, device: torch.device, options: GenerateOptions, outputs: single.Outputs) -> None:
    """One clip, its JSON, and where it is asked for the comparison.

    Files come first, words behind them: who reads these may be gone.
    """
    console, arguments = plain_console(), call_arguments(source, options)
    assert options.prompt is not None
    call, mode = with_pictures(arguments), single.mode_of(options, pipe)
    pair = Pair(prompt=options.prompt, seed=options.seed)

    with _bar(mode.label) as on_step:
        [sparse] = generate(pipe, mode, [pair], call, backend=options.backend, on_step=on_step)
    fps = options.fps if source.makes_video else None
    wanted, outputs = outputs, single.still_free(outputs, options)
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
    _took(console, sparse)
    for summary in sparse.summary:
        print_wide(console, summary)
    if outputs != wanted:
        console.print(f"Note: somebody else made {wanted.clip} or its JSON meanwhile, which stays as it is.")
    console.print(f"Written: {outputs.clip} and {outputs.json}")
    if sparse.stats is None or not sparse.stats.sparse_calls:
        console.print("Note: no attention call ran sparse; the lines above say why.")
    if not options.compare:
        return
    with _bar(full_mode().label) as on_step:
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
    _took(console, full)
    where = f"{height} x {width} x {frames}, {len(full.steps)} steps, {device_name(device)}"
    for table in summary_tables(rows, where):
        print_wide(console, table)
    console.print(f"Side by side: {outputs.side_by_side}")


@contextmanager
def _bar(what: str) -> Iterator[OnStep]:
    """A bar of the denoising steps with the computed pairs of the last one; nothing without a terminal."""
    with progress_bars(plain_console(), TextColumn("{task.fields[density]}")) as progress:
        task = progress.add_task(what, total=None, density="")

        def on_step(count: int, total: int, density: float | None) -> None:
            text = "skipped" if density is None else f"{density:.1%} of pairs"
            progress.update(task, completed=count, total=total, density=text)

        yield on_step


def _took(console: Console, clip: Clip) -> None:
    """A line in place of the bar, where there was no terminal for it."""
    if not console.is_terminal:
        console.print(f"{clip.mode.label}: {clip.seconds:.1f} s")
