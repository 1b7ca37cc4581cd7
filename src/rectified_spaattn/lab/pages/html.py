"""report.html: one file with everything inside, from a template and the numbers of metrics.json."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MIME = {".png": "image/png", ".mp4": "video/mp4"}


@dataclass(frozen=True, kw_only=True)
class Media:
    """Files to embed; figures by the name the template knows them by: "curve", "plan", "error"."""

    video: Path
    still: Path
    figures: Mapping[str, Path]


def write_inspection(path: Path, record: Mapping[str, Any], figures: Mapping[float, Path]) -> None:
    """Render the page of one inspected head. record: see cli.inspect_run; figures: sparsity -> PNG, embedded."""
    images = {sparsity: data_uri(file) for sparsity, file in figures.items()}
    _render("inspect.html", path, r=record, figures=images, raw=json.dumps(record, indent=2))


def write_report(path: Path, metrics: Mapping[str, Any], media: Media) -> None:
    """Render the report of one run. metrics: what is written to metrics.json (see cli.demo). Nothing is linked to."""
    _render(
        "report.html",
        path,
        m=metrics,
        video=data_uri(media.video),
        still=data_uri(media.still),
        figures={name: data_uri(file) for name, file in media.figures.items()},
        raw=json.dumps(metrics, indent=2),
    )


def _render(template: str, path: Path, **values: Any) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rectified_spaattn", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decibel": decibel, "percent": percent, "literal": repr}
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8")


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


def write_evaluation(path: Path, values: Mapping[str, Any]) -> None:
    """Render the report of an evaluation. values: what report.evaluation gives."""
    _render("evaluation.html", path, **values)
