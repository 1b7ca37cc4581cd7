"""A record as a picture: density by layer and step, and the summary below it. Needs pillow and numpy."""

import math
from typing import TYPE_CHECKING

from .record import Record

if TYPE_CHECKING:
    import numpy as np

MARGIN, TEXT, WIDEST = 16, 15, 900
SPARSE, DENSE, NONE = (24, 78, 140), (232, 226, 212), (255, 255, 255)


def picture(record: Record, text: str) -> "np.ndarray":
    """uint8 [height, width, 3]: a cell a layer (down) and step (across), the darker, the sparser; `text` below."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    table = record.table()
    rows, columns = table.shape
    wide, high = max(4, min(40, WIDEST // max(columns, 1))), max(4, min(14, 600 // max(rows, 1)))
    labels = 110
    lines = text.splitlines()
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_width = max((probe.textlength(line, font) for line in lines), default=0)
    width = int(max(labels + columns * wide, text_width)) + 2 * MARGIN
    top = MARGIN + 2 * TEXT if rows else MARGIN
    below = top + rows * high + (3 * TEXT if rows else 0)
    image = Image.new("RGB", (width, below + len(lines) * (TEXT + 5) + MARGIN), NONE)
    draw = ImageDraw.Draw(image)
    if rows:
        draw.text(
            (MARGIN, MARGIN - 4),
            "density of self-attention (dark: sparse, light: full); blocks down, steps across",
            "black",
            font,
        )
    for row, layer in enumerate(record.layers):
        y = top + row * high
        if row % math.ceil(TEXT / high) == 0:
            draw.text((MARGIN, y + (high - TEXT) / 2 - 1), layer, "black", font)
        for column in range(columns):
            x = MARGIN + labels + column * wide
            draw.rectangle((x, y, x + wide - 2, y + high - 2), _colour(float(table[row, column])))
    for column, step in enumerate(record.steps if rows else []):
        if column % math.ceil(2 * TEXT / wide) == 0:
            draw.text(
                (MARGIN + labels + column * wide, top + rows * high), "?" if step is None else str(step), "black", font
            )
    for index, line in enumerate(lines):
        draw.text((MARGIN, below + index * (TEXT + 5)), line, "black", font)
    return np.asarray(image)


def _colour(density: float) -> tuple[int, ...]:
    if math.isnan(density):
        return NONE
    return tuple(round(dark + (light - dark) * density) for dark, light in zip(SPARSE, DENSE, strict=True))
