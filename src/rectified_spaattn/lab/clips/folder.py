"""The folder of one evaluation: what was asked for, one file a finished clip, videos; safe against being killed.

    manifest.json               settings, which may not change afterwards, and where the run was made
    clips/MODE/KEY.json         one finished clip with everything measured on it; its presence means: done
    videos/MODE/PROMPT-SEED.mp4
    references/KEY.safetensors  the frames of full attention, while other modes of the pair are still to come

Every file appears under its name complete or not at all.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .metrics import finite_or_none
from .paired import Pair

MANIFEST = "manifest.json"
_NAME_BYTES = 200  # of a prompt in a file name; file systems allow 255 in all


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One clip against the clip of the same prompt and seed with full attention.

    video         its file in the folder
    psnr          dB, inf for identical clips (so for full attention itself)
    ssim          1 for identical clips
    lpips         0 for identical clips; None where it was not asked for
    flicker       as metrics.flicker
    density       computed query-key pairs over all pairs, mean over the sparse calls, isolated tokens counted
    computed      the same over all calls, full ones in dense steps and layers counted as 1
    backend       what ran the sparse calls; "" for full attention
    seconds       wall clock of the whole pipeline call
    step_seconds  of every denoising step
    """

    mode: str
    prompt: str
    seed: int
    video: str
    psnr: float
    ssim: float
    lpips: float | None
    flicker: float
    density: float
    computed: float
    backend: str
    seconds: float
    step_seconds: tuple[float, ...]


class Folder:
    """root: the folder, made where it is missing. prompts: all of the evaluation, in their order."""

    def __init__(self, root: Path, prompts: Sequence[str]) -> None:
        self.root = root
        self._place = {prompt: place for place, prompt in enumerate(prompts)}

    def start(self, settings: Mapping[str, Any], facts: Mapping[str, Any], write: bool) -> None:
        """Claim the folder: write the manifest (where `write` is set), or go on with what one says that is there.

        settings: everything that has an influence on a clip; facts: what else is worth knowing about the run.
        Raises ValueError where the folder belongs to other settings, saying what differs, or to something else.
        """
        path = self.root / MANIFEST
        if path.is_file():
            there = json.loads(path.read_text())["settings"]
            found = list(_differences("", there, _plain(settings)))
            if found:
                raise ValueError(
                    f"{self.root}: got settings that differ from those this folder was started with: "
                    f"{'; '.join(found)}. allowed: the same ones, to go on. Use another --out for new ones."
                )
        elif self.root.is_dir() and any(self.root.iterdir()):
            raise ValueError(
                f"{self.root}: got a folder with files but no {MANIFEST}; allowed: an empty or a new one, "
                "or one that an evaluation was started in."
            )
        elif write:
            self.root.mkdir(parents=True, exist_ok=True)
            manifest = {"settings": _plain(settings), **facts}
            write_atomically(path, lambda to: to.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n"))

    def clear_partial(self) -> None:
        """Remove half-written files of a run that was killed; while no other process writes here."""
        for path in self.root.rglob(".partial-*"):
            path.unlink()

    def record(self, mode: str, pair: Pair) -> ClipRecord | None:
        """What was measured on a clip, None where it is not finished."""
        path = self._record_path(mode, pair)
        if not path.is_file():
            return None
        values = json.loads(path.read_text())
        values |= {
            "psnr": math.inf if values["psnr"] is None else values["psnr"],
            "step_seconds": tuple(values["step_seconds"]),
        }
        return ClipRecord(**values)

    def write_record(self, pair: Pair, record: ClipRecord) -> None:
        values = {**dataclasses.asdict(record), "psnr": finite_or_none(record.psnr)}
        text = json.dumps(values, indent=1, allow_nan=False) + "\n"
        write_atomically(self._record_path(record.mode, pair), lambda to: to.write_text(text))

    def video(self, mode: str, pair: Pair) -> Path:
        """Named as VBench looks for it: the prompt, "-", and which of the prompt's clips it is."""
        return self.root / "videos" / mode / f"{_file_name(pair.prompt)}-{pair.seed}.mp4"

    def read_reference(self, pair: Pair) -> torch.Tensor | None:
        """The frames of full attention, float32 [T, 3, H, W], None where they are not kept (any more)."""
        from safetensors.torch import load_file

        path = self._reference_path(pair)
        return load_file(path)["video"] if path.is_file() else None

    def write_reference(self, pair: Pair, video: torch.Tensor) -> None:
        from safetensors.torch import save_file

        write_atomically(self._reference_path(pair), lambda to: save_file({"video": video.contiguous()}, to))

    def drop_reference(self, pair: Pair) -> None:
        self._reference_path(pair).unlink(missing_ok=True)

    def _record_path(self, mode: str, pair: Pair) -> Path:
        return self.root / "clips" / mode / f"{self._key(pair)}.json"

    def _reference_path(self, pair: Pair) -> Path:
        return self.root / "references" / f"{self._key(pair)}.safetensors"

    def _key(self, pair: Pair) -> str:
        return f"{self._place[pair.prompt]:04d}-seed{pair.seed}"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(a file beside `path`) and move that file to `path`, which is complete or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a short name, as `path` may use up what is allowed
    partial = path.with_name(f".partial-{os.getpid()}-{digest}{path.suffix}")
    write(partial)
    os.replace(partial, path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; None is an empty cell."""

    def write(to: Path) -> None:
        with to.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def _file_name(prompt: str) -> str:
    """The prompt itself, or where that is no file name its beginning and a digest."""
    if len(prompt.encode()) <= _NAME_BYTES and "/" not in prompt and "\0" not in prompt:
        return prompt
    start = prompt.replace("/", " ").replace("\0", " ").encode()[: _NAME_BYTES - 20].decode(errors="ignore")
    return f"{start}~{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values, allow_nan=False))


def _differences(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{name}[{place}]", before, after)
    elif old != new:
        yield f"{name} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value)
