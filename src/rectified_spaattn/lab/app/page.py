"""The part of the page that shows a result, as HTML."""

from collections.abc import Sequence
from pathlib import Path

from ..pages.html import filled
from .studio import Column, figures, video_uri, wall

HERE = Path(__file__).parent


def result_html(columns: Sequence[Column], fps: int) -> str:
    """The clips beside each other, their differences, the wipe, and the figures."""
    shown, caption = [figures(each) for each in columns], columns[0].clip.pair.caption()
    return filled("result.html", HERE, columns=shown, uri=video_uri(wall(columns), fps), caption=caption)


def head() -> str:
    """The script that plays it."""
    return f"<script>{(HERE / 'wall.js').read_text(encoding='utf-8')}</script>"


def style() -> str:
    return (HERE / "wall.css").read_text(encoding="utf-8")
