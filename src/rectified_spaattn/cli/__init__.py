"""The command `rectified-spaattn`."""

from importlib.util import find_spec

DEMO_PACKAGES = ("typer", "rich", "diffusers", "imageio", "imageio_ffmpeg", "jinja2", "matplotlib", "torchmetrics")


def main() -> None:
    """Entry point. Exits with a message that says what to install where the demo extra is missing."""
    missing = [name for name in DEMO_PACKAGES if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"rectified-spaattn needs packages that are not installed: {', '.join(missing)}.\n"
            'Install them with: pip install "rectified-spaattn[demo]"'
        )
    from .app import app

    app()
