"""The command `rectified-spaattn`."""

import os
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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or of a process without a terminal: what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")  # prompts and paths may hold what it cannot show
    from .app import app

    app()
