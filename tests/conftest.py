import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before anything imports the kernels: they are interpreted, as this machine can
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples everywhere and no time limit an example: CI machines are slow and shared.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Any warning of ours is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rectified_spaattn")
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
