"""The command `rectified-spaattn`."""

import sys
from importlib.util import find_spec

DOCTOR_PACKAGES = ("typer", "rich")  # it tells what else is missing
DEMO_PACKAGES = (
    *DOCTOR_PACKAGES,
    "accelerate",
    "diffusers",
    "imageio",
    "imageio_ffmpeg",
    "jinja2",
    "matplotlib",
    "numpy",
    "PIL",
    "safetensors",
    "torchmetrics",
    "yaml",
)


def main() -> None:
    """Entry point. Exits with a message that says what to install where the demo extra is missing."""
    needed = DOCTOR_PACKAGES if sys.argv[1:2] == ["doctor"] else DEMO_PACKAGES
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"rectified-spaattn needs packages that are not installed: {', '.join(missing)}.\n"
            'Install them with: pip install "rectified-spaattn[demo]"'
        )
    from .app import app

    app()
