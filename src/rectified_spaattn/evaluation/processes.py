"""Several processes on one job: who does what."""

from datetime import timedelta
from typing import Any

# A process that is done waits for the others, which may have hours of work left.
_PATIENCE = timedelta(days=14)


def processes() -> Any:
    """accelerate's PartialState: alone, or one of those that `accelerate launch` or `torchrun` started.

    They only exchange files and a few small objects, over gloo; so more of them than GPUs may be started.
    """
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=_PATIENCE)
