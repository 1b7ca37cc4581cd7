"""Every transformer class of diffusers has a row in the table of adapters, or a reason why it has none."""

import importlib
import inspect
import pkgutil
import re
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import transformers

import rectified_spaattn as rsa
from model_cases import CASES
from model_tables import PAGE, page
from rectified_spaattn.pipelines.adapters import ADAPTERS
from rectified_spaattn.pipelines.refused import REFUSED


def classes() -> dict[str, Any]:
    """Every ModelMixin that a module of diffusers.models.transformers defines."""
    found = {}
    for each in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{each.name}")
        own = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
        found |= {kind.__name__: kind for kind in own if issubclass(kind, ModelMixin)}
    return found


def test_every_class_is_in_one_of_the_two_tables() -> None:
    assert not set(ADAPTERS) & set(REFUSED)
    missing = set(classes()) - set(ADAPTERS) - set(REFUSED)
    assert not missing, "add a row to ADAPTERS, or to REFUSED why there is none"


def test_no_row_is_of_a_class_that_is_not_there() -> None:
    gone = {*ADAPTERS, *REFUSED} - set(classes())
    assert not gone
    assert all(getattr(diffusers, name) is kind for name, kind in classes().items())


def test_every_row_is_proven() -> None:
    assert {case.kind for case in CASES.values()} == set(ADAPTERS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_without_a_row_is_refused_with_the_reason(name: str) -> None:
    model: Any = object.__new__(classes()[name])
    torch.nn.Module.__init__(model)
    with pytest.raises(TypeError, match=re.escape(f"got a {name} ({REFUSED[name]}); allowed: ")):
        rsa.enable(model)


def test_the_tables_of_the_documentation_are_those_of_now() -> None:
    assert PAGE.read_text() == page(), "python tests/model_tables.py"
