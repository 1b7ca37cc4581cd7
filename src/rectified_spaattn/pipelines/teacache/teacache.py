"""enable_teacache: leave out denoising steps that would change little."""

import math
from typing import Any

from torch import nn

from ..clock import RunClock
from ..enabling import transformers_of
from .handle import TeaCacheHandle
from .models import cached_model_for
from .progress import Progress
from .transformer import CachedTransformer, cached_transformer, obstacle


def enable_teacache(pipe_or_transformer: Any, threshold: float | None = None) -> TeaCacheHandle:
    """Skip the blocks of a diffusers transformer at steps whose predicted change stays small (arXiv 2411.19108).

    The change of a cheap signal from step to step is turned into the expected change of the output by a published
    polynomial and added up. Below the threshold the blocks are left out, and what they added at the last computed step
    is added again; at the threshold the step is computed and the sum starts over. The guidance calls of
    a step have a cache each, told apart by cache_context, as diffusers' pipelines name them, or else by their text.

    threshold: 0 computes every step, larger skips more; None takes the published one for the model. It composes with
    enable() in any order. The cache costs one more copy of the hidden states a branch, and for HunyuanVideo and Flux
    one of the first block's modulated input.

    Touches the given object alone; TeaCacheHandle.disable() restores it, also after a forward that was stopped. Raises
    TypeError for a model without known coefficients, ValueError for a threshold out of range, RuntimeError where a
    cache is enabled already. A forward raises RuntimeError where the denoising step and the number of steps are
    unknown, where a second thread is in the same run, and where its guidance calls cannot be told apart.
    """
    transformers, pipeline = transformers_of(pipe_or_transformer)
    if threshold is not None:
        _check_threshold(threshold)
    rows = [cached_model_for(model) for _, model in transformers]
    for name, model in transformers:
        _check_free(name, model)
    fits = [row.fit(model, pipeline) for row, (_, model) in zip(rows, transformers, strict=True)]
    progress = Progress(RunClock(pipeline))
    cached = [
        CachedTransformer(name, model, row, fit, fit.threshold if threshold is None else float(threshold), progress)
        for (name, model), row, fit in zip(transformers, rows, fits, strict=True)
    ]
    try:
        for each in cached:
            each.install()
        return TeaCacheHandle(cached, progress, pipeline)
    except BaseException:  # an interrupted enable_teacache leaves nothing behind
        for each in cached:
            each.remove()
        raise


def disable_teacache(pipe_or_transformer: Any) -> bool:
    """Take TeaCache off a pipeline or a transformer, also where the handle is lost; rectified attention stays.

    Returns whether any was enabled there.
    """
    found = [cached_transformer(model) for _, model in transformers_of(pipe_or_transformer)[0]]
    for each in found:
        if each is not None:
            each.remove()
    return any(each is not None for each in found)


def _check_threshold(threshold: Any) -> None:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not math.isfinite(threshold) or threshold < 0:
        raise ValueError(f"threshold: got {threshold!r}; allowed: a finite number of 0 or more, or None.")


def _check_free(name: str, model: nn.Module) -> None:
    if cached_transformer(model) is not None:
        raise RuntimeError(
            f"TeaCache is enabled on {name} already: call disable() of its handle or rsa.disable_teacache(pipe) first."
        )
    found = obstacle(model)
    if found is not None:
        raise RuntimeError(f"enable_teacache: {name} has {found}. Disable that first.")
