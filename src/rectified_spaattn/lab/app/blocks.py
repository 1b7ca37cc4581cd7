"""The page: controls, and what happens when they are used. The one file that knows gradio."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from ..clips.options import ClipError
from ..demo_model.words import CAMERAS, COLOURS, FLOORS, MATERIALS, MOTIONS, SHAPES, Solid
from .choice import MODES, NOTHING, OURS, Choice, python_lines, scene
from .options import AppOptions
from .page import head, result_html, style
from .studio import Studio

_SPARSITY, _TOLERANCE = "sparsity", "tolerance"
_FONTS = ("system-ui", "sans-serif")
_TITLE = """## Rectified SpaAttn
The same clip three times: with **full** attention, with **plain sparse** attention and with **ours**. The closer to
full, the better."""
_EMPTY = "<p>Choose a scene and press <b>Generate</b>. Full attention comes first; it is kept for the next ones.</p>"


def serve(studio: Studio, options: AppOptions) -> None:
    """Until Ctrl-C, on 127.0.0.1 alone."""
    page = build(studio, options.prompt)
    page.queue(default_concurrency_limit=1)
    page.launch(
        server_name="127.0.0.1",
        server_port=options.port,
        inbrowser=options.open,
        quiet=True,
        footer_links=[],
        css=style(),
        head=head(),
        theme=gr.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace")),
    )


def build(studio: Studio, prompt: str | None = None) -> gr.Blocks:
    """The page of a model; that of the demo model has its words to choose from."""
    with gr.Blocks(title="Rectified SpaAttn", analytics_enabled=False) as page:
        gr.Markdown(_TITLE)
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                words, spoken = _scene() if studio.source.is_demo else _text(prompt)
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
                with gr.Row():
                    measure = gr.Radio([_SPARSITY, _TOLERANCE], value=_SPARSITY, label="choose by")
                    mode = gr.Radio(list(MODES), value=OURS, label="third column")
                sparsity = gr.Slider(0.5, 0.95, 0.8, step=0.05, label="sparsity: share of blocks to drop")
                tolerance = gr.Slider(
                    0.02, 0.3, 0.1, step=0.01, label="tolerance: error of a call to hold", visible=False
                )
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=5, min_width=340):
                shown = gr.HTML(_EMPTY)
                lines = python_lines(Choice(prompt=_TITLE), studio.base, not studio.source.is_demo)
                code = gr.Code(
                    lines, label="the same in Python", language="python", interactive=False, lines=3, wrap_lines=True
                )
        controls: list[Any] = [seed, measure, sparsity, tolerance, mode, *words]
        run = _runner(studio, spoken)
        options: dict[str, Any] = {"inputs": controls, "outputs": [shown, code], "show_progress_on": shown}
        options["trigger_mode"] = "always_last"
        button.click(run, **options)
        for slider in (sparsity, tolerance):
            slider.release(run, **options)
        mode.input(run, **options)
        measure.input(_controls_of, inputs=[measure], outputs=[sparsity, tolerance, mode])
    return page


def _controls_of(measure: str) -> tuple[Any, Any, Any]:
    """The slider that is chosen by, and the third column: only ours holds a tolerance."""
    by_error = measure == _TOLERANCE
    third = gr.update(visible=False, value=OURS) if by_error else gr.update(visible=True)
    return gr.update(visible=not by_error), gr.update(visible=by_error), third


def _runner(studio: Studio, spoken: Callable[..., str]) -> Callable[..., Iterator[tuple[str, str]]]:
    """What a click does: clips as they are made, then all of them, and the lines of Python."""

    def run(
        seed: float,
        measure: str,
        sparsity: float,
        tolerance: float,
        mode: str,
        *words: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio's way to ask for one
    ) -> Iterator[tuple[str, str]]:
        by_error = measure == _TOLERANCE
        try:
            choice = Choice(
                prompt=spoken(*words),
                seed=int(seed),
                mode=mode,
                sparsity=None if by_error else sparsity,
                tolerance=tolerance if by_error else None,
            )
            lines = python_lines(choice, studio.base, not studio.source.is_demo)
            for columns in studio.columns(choice, lambda name, done, total: progress((done, total), desc=name)):
                yield result_html(columns, studio.fps), lines
        except (ClipError, TypeError, ValueError) as error:
            raise gr.Error(str(error), duration=None) from error

    return run


def _text(prompt: str | None) -> tuple[list[Any], Callable[..., str]]:
    return [gr.Textbox(prompt or "", label="prompt", lines=3)], lambda text: text


def _words(label: str, words: Sequence[str], value: str) -> gr.Dropdown:
    return gr.Dropdown(list(words), value=value, label=label, min_width=120)


def _scene() -> tuple[list[Any], Callable[..., str]]:
    """Dropdowns of the demo model's words, and what makes a caption of their values."""
    motions = [(text.format(go="moves", other="the second object"), key) for key, text in MOTIONS.items()]
    with gr.Row():
        main = [
            _words("colour", COLOURS, "red"),
            _words("material", MATERIALS, "metal"),
            _words("shape", SHAPES, "sphere"),
        ]
    motion = gr.Dropdown(motions, value="right", label="what it does")
    with gr.Row():
        other = [
            _words("second object", (NOTHING, *COLOURS), "blue"),
            _words("its material", MATERIALS, "striped"),
            _words("its shape", SHAPES, "cube"),
        ]
    with gr.Row():
        ground = [_words("floor", FLOORS, "checkered"), _words("camera", (NOTHING, *CAMERAS), NOTHING)]
    evening = gr.Checkbox(False, label="at sunset")

    def spoken(*values: Any) -> str:
        colour, material, shape, moves, second, its_material, its_shape, floor, camera, sunset = values
        there = None if second == NOTHING else Solid(second, its_material, its_shape)
        return scene(Solid(colour, material, shape), moves, floor, camera, there, sunset)

    return [*main, motion, *other, *ground, evening], spoken
