"""Videos that people can see: enlarged clips, labelled grids of clips, mp4, PNG and animated WebP files."""

import subprocess
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from ..rows import write_atomically

FPS = 8
CELL = 192  # side of one clip in a grid, in pixels
_GAP = 6
_FONT_SIZE = 15
_LINE = 20
_BACKGROUND, _INK = (255, 255, 255), (34, 34, 34)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A caption with one clip a column, each [T, 3, H, W] in [0, 1]; None leaves a cell empty."""

    caption: str
    clips: Sequence[torch.Tensor | None]


def to_uint8(clip: torch.Tensor) -> np.ndarray:
    """[T, 3, H, W] in [0, 1] -> uint8 [T, H, W, 3]."""
    return (clip.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def enlarge(clip: torch.Tensor, width: int) -> np.ndarray:
    """A clip [T, 3, H, W] in [0, 1] at `width` pixels, its shape kept: uint8 [T, h, width, 3].

    Whole factors repeat pixels, so nothing is smoothed that the model did not draw; others use Lanczos.
    """
    height = round(clip.shape[2] * width / clip.shape[3])
    whole = width % clip.shape[3] == 0 and height % clip.shape[2] == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    frames = [Image.fromarray(frame).resize((width, height), method) for frame in to_uint8(clip)]
    return np.stack([np.asarray(frame) for frame in frames])


def difference(clip: torch.Tensor, reference: torch.Tensor, gain: float) -> torch.Tensor:
    """Where two clips [T, 3, H, W] differ, in grey: white for equal, black from 1 / gain on."""
    away = ((clip - reference).abs().mean(1, keepdim=True) * gain).clamp(0, 1)
    return (1 - away).expand(-1, 3, -1, -1)


def labelled_grid(columns: Sequence[str], rows: Sequence[Row], cell: int = CELL) -> np.ndarray:
    """Clips side by side with column labels on top and every row's caption above it: uint8 [T, H, W, 3].

    columns: one label each, lines separated by "\\n". All clips have the same number of frames; clips that are not
    square keep their shape. Raises ValueError for an empty grid, a row of the wrong length or clips of unequal length.
    """
    clips = [[None if clip is None else enlarge(clip, cell) for clip in row.clips] for row in rows]
    frames = max(len(clip) for row in clips for clip in row if clip is not None)
    width = len(columns) * (cell + _GAP) + _GAP
    font = _font(_FONT_SIZE)
    captions = [_wrapped(row.caption, width - 2 * _GAP, font) for row in rows]
    heights = [max(clip.shape[1] for clip in row if clip is not None) for row in clips]

    top = _GAP + _LINE * max(label.count("\n") + 1 for label in columns)
    tops = []
    for caption, height in zip(captions, heights, strict=True):
        top += _GAP + _LINE * len(caption)
        tops.append(top)
        top += height + _GAP
    canvas = Image.new("RGB", (width + width % 2, top + top % 2), _BACKGROUND)  # video codecs want even sides
    draw = ImageDraw.Draw(canvas)
    for x, label in enumerate(columns):
        for line, text in enumerate(label.split("\n")):
            left = _GAP + x * (cell + _GAP) + cell / 2
            draw.text((left, _GAP + line * _LINE), text, _INK, _font(_FONT_SIZE, bold=line == 0), anchor="ma")
    for caption, y in zip(captions, tops, strict=True):
        for line, text in enumerate(caption):
            draw.text((_GAP, y - _LINE * (len(caption) - line)), text, _INK, font)

    grid = np.repeat(np.asarray(canvas)[None], frames, axis=0)
    for row_clips, y in zip(clips, tops, strict=True):
        for x, clip in zip(range(len(columns)), row_clips, strict=True):
            if clip is not None:
                left = _GAP + x * (cell + _GAP)
                grid[:, y : y + clip.shape[1], left : left + cell] = clip
    return grid


def even(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] with the last row and column repeated where a side is odd."""
    return np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")


def write_clip(path: Path, clip: torch.Tensor, fps: int, width: int | None = None) -> None:
    """A clip [T, 3, H, W] in [0, 1], `width` pixels wide or at its own size; see `write_frames`."""
    write_frames(path, to_uint8(clip) if width is None else enlarge(clip, width), fps)


def check_encoder() -> None:
    """Raises OSError where no mp4 can be written here, whatever its path."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _encode(Path(folder) / "check.mp4", np.zeros((1, 16, 16, 3), np.uint8), FPS, "a small one")
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"No mp4 can be written here: {error}. Install imageio-ffmpeg, whose ffmpeg can, or let "
                "IMAGEIO_FFMPEG_EXE name one with libx264."
            ) from error


def write_frames(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """A .png of the first frame, an animated .webp, or else an mp4, where an odd side gains the pixel of H.264.

    frames: uint8 [T, H, W, 3]. Raises ValueError for another array, OSError where the file cannot be written, the
    encoder fails or its file lacks frames; then `path` is as it was.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames: got {frames.dtype} {frames.shape}; allowed: uint8 [T, H, W, 3].")
    if path.suffix == ".png":
        write_atomically(path, lambda to: Image.fromarray(frames[0]).save(to, optimize=True))
    elif path.suffix == ".webp":
        first, *rest = [Image.fromarray(frame) for frame in frames]
        timing = {"save_all": True, "append_images": rest, "duration": 1000 // fps, "loop": 0}
        write_atomically(path, lambda to: first.save(to, format="WEBP", quality=80, method=2, **timing))
    else:
        write_atomically(path, lambda to: _encode(to, even(frames), fps, str(path)))


def read_mp4(path: Path) -> torch.Tensor:
    """[T, 3, H, W] in [0, 1]. Raises OSError where it is no video."""
    import imageio.v3 as iio

    try:
        frames = iio.imread(path, plugin="FFMPEG")
    except Exception as error:  # a plugin of imageio raises what it likes
        raise OSError(f"{path}: got a file that is no video: {error}. Delete it, and run the same again.") from error
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def _encode(path: Path, frames: np.ndarray, fps: int, name: str) -> None:
    from imageio_ffmpeg import count_frames_and_secs, get_ffmpeg_exe

    size = f"{frames.shape[2]}x{frames.shape[1]}"
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    encoder = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-preset", "veryfast"]
    words = [get_ffmpeg_exe(), "-y", "-v", "error", *given, *encoder, "-movflags", "+faststart", str(path.absolute())]
    process = subprocess.run(words, input=np.ascontiguousarray(frames).data, capture_output=True, check=False)
    if process.returncode:
        said = process.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise OSError(f"{name}: the video was not written: ffmpeg ended with {process.returncode}. {said}")
    try:
        count = count_frames_and_secs(str(path.absolute()))[0]
    except RuntimeError as error:
        raise OSError(f"{name}: the video was not written: ffmpeg cannot read its own file.") from error
    if count != len(frames):
        raise OSError(f"{name}: the video was not written: it has {count} frames of {len(frames)}.")


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"  # comes with matplotlib, so labels look alike everywhere
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    text = text.encode(errors="replace").decode()  # no font has halves of characters
    return textwrap.wrap(text, max(10, int(width / font.getlength("n")))) or [""]
