"""The folder of one evaluation: what was asked for, one file a finished clip, videos; safe against being killed.

    .rectified-spaattn          the mark: the folder is ours; without it nothing here is touched
    manifest.json               settings, which may not change once a clip is finished, and where the run was made
    clips/MODE/KEY.json         one finished clip with everything measured on it; with its video there it is done
    videos/MODE/PROMPT-SEED.mp4
    references/KEY.safetensors  the frames of full attention, while other modes of the pair are still to come

Every file appears under its name complete or not at all. What is missing, damaged or of other settings is made again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..rows import write_atomically, write_json
from .clip import Pair
from .options import ClipError
from .paths import LOCK, MARK, SAYS, check_ours
from .summary import ClipRecord, plain

MANIFEST = "manifest.json"
_NAME_BYTES = 200  # of a prompt in a file name; file systems allow 255 in all
# what reading a damaged file raises
_FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError)
T = TypeVar("T")


class Folder:
    """root: the folder, made where it is missing. prompts: all of the evaluation, in their order.

    settings: everything that has an influence on a clip. say: told what is made again, and why.
    """

    def __init__(
        self,
        root: Path,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.root = root
        self._place = {prompt: place for place, prompt in enumerate(prompts)}
        self.settings = plain(settings)
        self._digest = _digest(self.settings)
        self._say = say

    @contextmanager
    def claim(self, kind: str, facts: Mapping[str, Any], clear: Sequence[str] | None = None) -> Iterator[None]:
        """Inside, the folder is this process's and those it works with; its manifest is there.

        kind: of command. facts: what else is worth knowing about the run. clear: start anew, and remove clips of
        earlier runs and these other names. Raises ClipError where the folder holds something else or clips of other
        settings, and where another run is at work in it.
        """
        check_ours(self.root, kind)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise ClipError(
                f"{self.root}: another run is at work in this folder. Wait for it, or use another --out."
            ) from error
        except OSError as error:
            raise ClipError(f"{self.root}: this folder cannot be written: {error}. Use another --out.") from error
        with lock:
            write_atomically(self.root / MARK, lambda to: to.write_text(SAYS.format(kind=kind)))
            for left in self.root.rglob(".partial-[0-9]*-*"):  # of a run that was killed
                left.unlink()
            manifest = self._content(self.root / MANIFEST, _manifest) or {}
            if clear is None:
                self._check_settings(manifest)
            else:
                self._clear(clear)
            if clear is not None or manifest.get("settings") != self.settings:
                write_json(self.root / MANIFEST, plain({"settings": self.settings, **facts}))
            yield

    def record(self, mode: str, pair: Pair) -> ClipRecord | None:
        """What was measured on a clip, None where it is not finished, cannot be read or has no video."""
        path, video = self._record_path(mode, pair), self.video(mode, pair)
        content = self._content(path, _record)
        if content is None:
            return None
        record, settings, size = content
        if (record.mode, record.pair, settings) != (mode, pair, self._digest):
            self._again(path, "is of other settings")
            return None
        if not video.is_file() or video.stat().st_size != size:
            self._again(video, "is missing" if not video.is_file() else "has another size than when it was made")
            return None
        return record

    def write_record(self, record: ClipRecord) -> None:
        """The clip's video is there already."""
        size = self.video(record.mode, record.pair).stat().st_size
        values = plain({**asdict(record), "video_bytes": size, "settings": self._digest})
        write_json(self._record_path(record.mode, record.pair), {**values, "digest": _digest(values)})

    def video(self, mode: str, pair: Pair) -> Path:
        """Named as VBench looks for it: the prompt, "-", and which of the prompt's clips it is."""
        return self.root / "videos" / mode / f"{file_name(pair.prompt)}-{pair.seed}.mp4"

    def read_reference(self, pair: Pair) -> torch.Tensor | None:
        """The frames of full attention, float32 [T, 3, H, W], None where they are not kept or cannot be read."""
        return self._content(self._reference_path(pair), lambda path: load_file(path)[self._digest])

    def write_reference(self, pair: Pair, video: torch.Tensor) -> None:
        data = save({self._digest: video.contiguous()})  # save_file would leave a file of its own where it is killed
        write_atomically(self._reference_path(pair), lambda to: to.write_bytes(data))

    def drop_reference(self, pair: Pair) -> None:
        self._reference_path(pair).unlink(missing_ok=True)

    def _content(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """What `read` makes of a file, None where it is missing or, which is said, cannot be read."""
        try:
            return read(path) if path.is_file() else None
        except _FAULTS as error:
            self._again(path, f"cannot be read ({type(error).__name__}: {error})")
            return None

    def _check_settings(self, manifest: dict[str, Any]) -> None:
        """Other settings are an error once a clip is finished; before, the new ones take their place."""
        changes = list(_differences("", manifest.get("settings", self.settings), self.settings))
        finished = len(list(self.root.glob("clips/*/*.json")))
        if changes and finished:
            raise ClipError(
                f"{self.root}: got settings that differ from those of the {finished} clips in this folder: "
                f"{'; '.join(changes)}. allowed: the same ones, to go on (`{manifest.get('command')}`). Use another "
                "--out for new ones, or remove the folder."
            )

    def _clear(self, names: Sequence[str]) -> None:
        """Remove the files of earlier runs one by one, and folders that are empty then."""
        ours = [self.root / name for name in names] + list(self.root.glob("references/[0-9]*-seed*.safetensors"))
        for path in self.root.glob("clips/*/[0-9]*-seed*.json"):
            ours.append(path)
            with suppress(*_FAULTS):  # then its video is not known
                ours.append(self.video(path.parent.name, _record(path)[0].pair))
        for path in ours:
            path.unlink(missing_ok=True)
        for folder in sorted(
            {each for path in ours for each in path.parents if self.root in each.parents}, reverse=True
        ):
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()

    def _again(self, path: Path, why: str) -> None:
        self._say(f"{path} {why}: it is made again.")

    def _record_path(self, mode: str, pair: Pair) -> Path:
        return self.root / "clips" / mode / f"{self._key(pair)}.json"

    def _reference_path(self, pair: Pair) -> Path:
        return self.root / "references" / f"{self._key(pair)}.safetensors"

    def _key(self, pair: Pair) -> str:
        return f"{self._place[pair.prompt]:04d}-seed{pair.seed}"


def _record(path: Path) -> tuple[ClipRecord, str, int]:
    """What was measured on a clip, the digest of its settings, and the bytes of its video."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("digest") != _digest(values):
        raise ValueError("changed since it was written")
    settings, size = values.pop("settings"), values.pop("video_bytes")
    for name in ("psnr", "psnr_frame"):
        values[name] = math.inf if values[name] is None else values[name]
    return ClipRecord(**{**values, "step_seconds": tuple(values["step_seconds"])}), settings, size


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest["settings"], dict):
        raise ValueError("no settings")
    return manifest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_name(prompt: str) -> str:
    """The prompt itself, or where that is no file name its beginning and a digest."""
    if len(prompt.encode()) <= _NAME_BYTES and not set("/\0") & set(prompt):
        return prompt
    start = prompt.replace("/", " ").replace("\0", " ").encode()[: _NAME_BYTES - 20].decode(errors="ignore")
    return f"{start}~{_digest(prompt)}"


def _differences(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{name}[{place}]", before, after)
    elif old != new:
        was, now = (f"a list of {len(each)}" if isinstance(each, list) else repr(each) for each in (old, new))
        yield f"{name} was {was}, now {now}"
