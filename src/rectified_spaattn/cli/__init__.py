"""The command `rectified-spaattn`."""

import sys
from importlib.util import find_spec

_ALWAYS = ("typer", "rich")
_DEMO = "accelerate diffusers filelock imageio imageio_ffmpeg jinja2 matplotlib numpy PIL safetensors torchmetrics yaml"
DEMO_PACKAGES = (*_ALWAYS, *_DEMO.split())
PACKAGES = {  # by command; the others need DEMO_PACKAGES
    "doctor": _ALWAYS,
    "bench": _ALWAYS,
    "advise": (*_ALWAYS, "diffusers"),
    "app": (*DEMO_PACKAGES, "gradio"),
}


def main() -> None:
    """Entry point. Exits with a message that says what to install where the demo extra is missing."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    needed = PACKAGES.get(command, DEMO_PACKAGES)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"rectified-spaattn needs packages that are not installed: {', '.join(missing)}.\n"
            f'Install them with: pip install ".[{"app" if command == "app" else "demo"}]" in a checkout of '
            "rectified-spaattn"
        )
    for stream in (sys.stdout, sys.stderr):  # prompts and paths may hold what a terminal cannot show
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    from .app import app

    app()
