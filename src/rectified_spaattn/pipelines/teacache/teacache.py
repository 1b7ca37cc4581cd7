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
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: got {threshold!r}; allowed: a finite number of 0 or more, or None.")
    progress, cached = Progress(RunClock(pipeline)), []
    for name, model in transformers:
        row = cached_model_for(model)
        _check_free(name, model)
        cached.append(CachedTransformer(name, model, row, row.fit(model, pipeline), threshold, progress))
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
    owners = [cached_transformer(model) for _, model in transformers_of(pipe_or_transformer)[0]]
    cached = [each for each in owners if each is not None]
    for each in cached:
        each.remove()
    return bool(cached)


def _check_free(name: str, model: nn.Module) -> None:
    if cached_transformer(model) is not None:
        raise RuntimeError(
            f"TeaCache is enabled on {name} already: call disable() of its handle or rsa.disable_teacache(pipe) first."
        )
    found = obstacle(model)
    if found is not None:
        raise RuntimeError(f"enable_teacache: {name} has {found}. Disable that first.")
