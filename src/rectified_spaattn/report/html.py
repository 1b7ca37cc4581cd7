"""report.html: one file with everything inside, from a template and the numbers of metrics.json."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.intervals import Interval

_MIME = {".png": "image/png", ".mp4": "video/mp4"}


@dataclass(frozen=True, kw_only=True)
class Media:
    """Files to embed; figures by the name the template knows them by: "curve", "plan", "error"."""

    video: Path
    still: Path
    figures: Mapping[str, Path]


def write_report(path: Path, metrics: Mapping[str, Any], media: Media) -> None:
    """Render the report of one run. metrics: what is written to metrics.json (see cli.demo). Nothing is linked to."""
    path.write_text(
        environment()
        .get_template("report.html")
        .render(
            m=metrics,
            video=data_uri(media.video),
            still=data_uri(media.still),
            figures={name: data_uri(file) for name, file in media.figures.items()},
            raw=json.dumps(metrics, indent=2),
        ),
        encoding="utf-8",
    )


def environment() -> Any:
    """jinja2's environment for the templates of this folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("rectified_spaattn", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"decibel": decibel, "percent": percent, "literal": repr, "interval": interval}
    made.globals["infinity"] = math.inf
    return made


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


def interval(value: Interval, score: str) -> str:
    """A mean and its interval, with the digits that the score deserves; an infinite PSNR as "identical"."""
    if math.isinf(value.mean):
        return "identical"
    digits = 2 if score == "psnr" else 4
    ends = "" if math.isnan(value.low) else f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value.mean:.{digits}f}{ends}"
