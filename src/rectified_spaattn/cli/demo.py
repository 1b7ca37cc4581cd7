"""`rectified-spaattn demo`: an evaluation of the demo model, and a page that explains it."""

import time
from dataclasses import replace

from ..lab.calls.capture import capture_calls
from ..lab.clips.demo import evaluation_of, ours_of, time_steps, with_slider
from ..lab.clips.evaluate import records_of
from ..lab.clips.folder import Folder
from ..lab.clips.models import load
from ..lab.clips.options import DemoOptions
from ..lab.clips.summary import summarise
from ..lab.machine import device_of, load_average, machine
from ..lab.pages.demo import FILES, players_of, results, study_attention, write_report, write_side_by_side
from ..lab.pages.video import check_encoder
from .console import plain_console, print_wide
from .evaluate import fill, summary_tables, usage_errors
from .options import command_line, loading


def run(options: DemoOptions) -> None:
    """The whole command."""
    console, start, device = plain_console(), time.perf_counter(), device_of(options.device)
    check_encoder()
    with usage_errors():
        evaluation = evaluation_of(options, device)
        slider = with_slider(evaluation, options)
    with loading():
        pipe = load(evaluation.source, evaluation.options, device)
    where = machine(device).to_dict()
    everything = replace(evaluation, modes=slider.modes)
    folder = Folder(options.out, list(evaluation.prompts), everything.settings(), console.print)
    [first], call = slider.pairs, evaluation.call()
    with folder.claim("demo", evaluation.facts(command_line()), clear=FILES):
        console.print("Reading the attention calls of one step.")
        calls = capture_calls(pipe, [first], evaluation.arguments, steps=[call["num_inference_steps"] // 2])
        fill(pipe, slider, folder, [first], console)
        if len(evaluation.pairs) > 1:
            fill(pipe, evaluation, folder, evaluation.pairs, console)
        console.print("Studying the attention calls, and writing the report.")
        attention = study_attention(calls, options)
        speed = [] if options.quick else time_steps(pipe, evaluation, first)
        records = records_of(evaluation, folder)
        summaries = summarise(evaluation.modes, records)
        by_sparsity = {each.mode.name: each for each in summarise(slider.modes, records_of(slider, folder))}
        levels = [by_sparsity[mode.name] for mode in ours_of(slider.modes)]
        write_side_by_side(folder, summaries, evaluation.pairs)
        metrics = {
            "command": command_line(),
            **where,
            "load_average_after": load_average(),
            "settings": folder.settings,
            **results(summaries, records),
            "slider": [each.row() for each in levels],
            "attention": attention,
            "speed": speed,
            "seconds_total": time.perf_counter() - start,
        }
        report = write_report(folder, metrics, players_of(folder, summaries, evaluation.pairs, levels, call))
    if not options.quick:
        pairs = f"{len(evaluation.pairs)} prompt-seed pair{'s' * (len(evaluation.pairs) != 1)}"
        size = f"{call['height']} x {call['width']} x {call['num_frames']}, {call['num_inference_steps']} steps"
        for table in summary_tables(summaries, f"{pairs}, {size}, {where['device']['name']}"):
            print_wide(console, table)
    console.print(metrics["verdict"], soft_wrap=True)
    console.print(f"Report: {report.resolve().as_uri()}", soft_wrap=True)
