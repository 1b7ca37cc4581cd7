"""What can be told of a path before anything else is imported: whether it is ours, and whether it can be written."""

import os
import tempfile
from pathlib import Path

from .options import ClipError

MARK, LOCK = ".rectified-spaattn", ".rectified-spaattn.lock"
SAYS = "Made by `rectified-spaattn {kind}`, which replaces and removes its own files here, and no others.\n"


def check_ours(root: Path, kind: str) -> None:
    """Raises ClipError where there is something that the command of that kind did not make."""
    if root.exists() and not root.is_dir():
        raise ClipError(f"{root}: got a file; allowed: a folder.")
    there = {path.name for path in root.iterdir()} - {LOCK} if root.is_dir() else set()
    if there and MARK not in there:
        raise ClipError(
            f"{root}: got a folder with files that are not of this command (it has no {MARK}); allowed: an empty or a "
            "new folder, or one that this command made."
        )
    if there and (root / MARK).read_text(errors="replace") != SAYS.format(kind=kind):
        raise ClipError(f"{root}: got a folder of another command; allowed: one of `{kind}`. Use another --out.")


def check_folder(folder: Path) -> None:
    """Raises ClipError unless the folder of --out can be written, or made."""
    try:
        check_writable(folder)
    except OSError as error:
        raise ClipError(f"--out: {folder} cannot be written: {error}. Use another one.") from error


def check_writable(folder: Path) -> None:
    """Raises OSError unless a file can be made in the folder, or in the one it will be made in."""
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} may not be written to")
    with tempfile.TemporaryFile(dir=folder):
        pass
