"""Transformer classes that somebody may well try, and why they have no row."""

REFUSED: dict[str, str] = {
    "WanAnimate2Transformer3DModel": "it attends through a key-value cache, frame block by frame block",
    "QwenImage21Transformer2DModel": "its text and image tokens are packed into one masked sequence",
}
