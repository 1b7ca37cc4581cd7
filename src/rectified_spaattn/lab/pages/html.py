"""Pages: one file with everything inside, from a template and numbers."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..rows import write_atomically

_MIME = {".png": "image/png", ".mp4": "video/mp4"}


def write_inspection(path: Path, record: Mapping[str, Any], figures: Mapping[float, Path]) -> None:
    """Render the page of one inspected head. record: see cli.inspect_run; figures: sparsity -> PNG, embedded."""
    images = {sparsity: data_uri(file) for sparsity, file in figures.items()}
    render("inspect.html", path, r=record, figures=images, raw=json.dumps(record, indent=2))


def render(template: str, path: Path, **values: Any) -> None:
    """Write the page of a template of this folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rectified_spaattn", "lab/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decibel": decibel, "percent": percent, "literal": repr}
    page = environment.get_template(template).render(**values)
    write_atomically(path, lambda to: to.write_text(page, encoding="utf-8"))


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
