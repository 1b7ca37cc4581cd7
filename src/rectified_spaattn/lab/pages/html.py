"""Pages: one file with everything inside, from a template and numbers."""

import base64
from pathlib import Path
from typing import Any

from ..rows import write_atomically

_MIME = {".png": "image/png", ".mp4": "video/mp4"}


def render(template: str, path: Path, **values: Any) -> None:
    """Write the page of a template of this folder."""
    page = filled(template, Path(__file__).parent, **values)
    write_atomically(path, lambda to: to.write_text(page, encoding="utf-8"))


def filled(template: str, folder: Path, **values: Any) -> str:
    """A template of a folder with its values."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(folder)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"decibel": decibel, "percent": percent, "literal": repr}
    return environment.get_template(template).render(**values)


def data_uri(path: Path) -> str:
    """The file as a data: URI. Raises ValueError for anything but .png and .mp4."""
    if path.suffix not in _MIME:
        raise ValueError(f"{path}: got a {path.suffix or 'nameless'} file; allowed: {', '.join(_MIME)}.")
    return f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def decibel(value: float | None) -> str:
    """A PSNR with two decimals; None, which stands for infinity, as "identical"."""
    return "identical" if value is None else f"{value:.2f}"


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{100 * value:.1f}%"
