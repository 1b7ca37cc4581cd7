"""model_index.json of a local folder or a repository, and why it cannot be had."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...config import nearest
from .options import DEMO, ClipError, ModelOptions

INDEX = "model_index.json"


def read_index(options: ModelOptions) -> tuple[dict[str, Any], Path, str | None]:
    """What model_index.json holds, its folder, and the commit it is from, None for a local folder.

    HF_HUB_OFFLINE and HF_HOME mean what they mean to huggingface_hub. Raises ClipError where it cannot be had or read.
    """
    local, revision = Path(options.model).expanduser(), None
    if local.is_dir():
        if options.revision is not None:
            raise ClipError(f"--revision: got one for the folder {local}; allowed: for a repository alone.")
        path = local.resolve() / INDEX
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", options.model):
        from huggingface_hub import hf_hub_download

        path = Path(from_hub(options, partial(hf_hub_download, options.model, INDEX, revision=options.revision)))
        revision = path.parent.name
    else:
        raise ClipError(
            f"{options.model}: there is no such folder, and it is no name of a repository, such as "
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers.{nearest(options.model, [DEMO])}"
        )
    if not path.is_file():
        raise ClipError(
            f"{options.model}: got a folder without {INDEX}; allowed: a diffusers pipeline, as "
            "save_pretrained writes it. Single-file checkpoints and transformers alone have to be converted first."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ClipError(f"{path}: got a file that cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(index, dict):
        raise ClipError(f"{path}: got a {type(index).__name__}; allowed: one mapping. Download it again.")
    return index, path.parent, revision


def from_hub(options: ModelOptions, get: Callable[[], Any]) -> Any:
    """What `get` gives. Raises ClipError in its own words for what huggingface_hub raises."""
    from huggingface_hub import errors

    try:
        return get()
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ClipError(_why_not(options, error)) from error


def _why_not(options: ModelOptions, error: Exception) -> str:
    from huggingface_hub import errors

    model, page = options.model, f"https://huggingface.co/{options.model}"
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated: accept its terms at {page}, then run `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {options.revision}: see {page}/commits."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{model}: no such repository, or a private one. Check {page}, or run `hf auth login`."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{model}: got a repository without {INDEX}; allowed: a diffusers pipeline ({page}/tree/main)."
    why = "and the hub cannot be reached" if isinstance(error, errors.LocalEntryNotFoundError) else f"and: {error}"
    return (
        f"{model} is not in the local cache, {why}.\n"
        f"Connect to a network (and unset HF_HUB_OFFLINE), or run `hf download {model}` elsewhere and pass "
        "the folder instead."
    )
