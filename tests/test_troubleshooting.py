"""docs/troubleshooting.md quotes messages that the code has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "rectified_spaattn").rglob("*.py"))
MESSAGES = re.sub(r'"\s*\n\s*f?"', "", TEXT)  # strings that go on in the next line
ROWS = [
    cells[1]
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) == 3 and cells[0] != "situation"
]


@pytest.mark.parametrize("cell", ROWS)
def test_a_quoted_message_is_in_the_code(cell: str) -> None:
    quotes = re.findall(r"`([^`]+)`", cell)
    assert quotes
    for quote in quotes:
        # what stands between names, numbers and values
        parts = [
            part
            for part in re.split(r"\.\.\.|\b[N\d]+\b|transformer|dense_(?:last_)?steps=|: |, ", quote)
            if part.strip()
        ]
        assert parts
        for part in parts:
            assert part in MESSAGES, (quote, part)
