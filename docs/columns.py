"""For `make docs`: paragraphs of docstrings that are laid out in two columns, name and meaning, become lists."""

import re
from typing import Any

import griffe

ROW = re.compile(r"^(\S.*?) {2,}(\S.*)$")


def listed(paragraph: str) -> str:
    """The paragraph as a list in Markdown; as it is where its first line has no two columns."""
    lines = paragraph.split("\n")
    if not ROW.match(lines[0]):
        return paragraph
    rows = (ROW.match(line) for line in lines)
    return "\n".join(
        f"- `{row[1]}`: {row[2]}" if row else f"    {line.strip()}" for row, line in zip(rows, lines, strict=True)
    )


class Columns(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(listed, obj.docstring.value.split("\n\n")))
