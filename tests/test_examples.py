"""Every example, without running it: its imports resolve, and its calls take the arguments it gives them."""

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers.pipelines.consisid import pipeline_consisid as CONSISID  # diffusers itself hides it without opencv

from rectified_spaattn import PRESETS

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MODELS = [path for path in EXAMPLES if path.name != "demo_model.py"]
names = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


def imported(tree: ast.Module) -> dict[str, Any]:
    """The names that the imports of a script bind."""
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {each.asname or each.name: importlib.import_module(each.name) for each in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            found |= {each.asname or each.name: getattr(module, each.name) for each in node.names}
    return found | {name: CONSISID.ConsisIDPipeline for name in found if name == "ConsisIDPipeline"}


@pytest.fixture(autouse=True)
def consisid_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names alone: importing them takes opencv, insightface and others."""
    helpers = ModuleType("diffusers.pipelines.consisid.consisid_utils")
    tree = ast.parse(Path(CONSISID.__file__).with_name("consisid_utils.py").read_text())
    vars(helpers).update({node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)})
    monkeypatch.setitem(sys.modules, helpers.__name__, helpers)


def calls(tree: ast.Module, name: str) -> list[ast.Call]:
    """Calls of `name`, such as pipe or rsa.enable."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func) == name]


def pipeline_class(tree: ast.Module, found: dict[str, Any]) -> type[Any]:
    """Whose from_pretrained makes `pipe`."""
    assigned = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pipe"
    )
    loaded = next(
        node for node in ast.walk(assigned) if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    )
    return found[ast.unparse(loaded.value)]


def bind(function: Any, call: ast.Call, *before: object) -> None:
    """Raises TypeError where the function does not take what the call gives, or wants what it does not give."""
    assert all(each.arg for each in call.keywords), "no **: what is given must be visible"
    given = {each.arg: each.value for each in call.keywords if each.arg}
    inspect.signature(function).bind(*before, *call.args, **given)


def test_there_is_one_for_every_preset() -> None:
    shown = {preset for preset in PRESETS for path in MODELS if f"the preset {preset}:" in path.read_text()}
    for_models = {name for name in PRESETS if not name.endswith(("-paper", "-sol", "-svg", "-safe"))}
    assert shown == for_models
    assert len(MODELS) >= len(for_models)


@names
def test_it_is_short_and_its_pipeline_takes_what_it_gives(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 30
    tree = ast.parse(text)
    found = imported(tree)
    kind = pipeline_class(tree, found)
    [run] = calls(tree, "pipe")
    bind(kind.__call__, run, None)  # in place of self
    for node in ast.walk(tree):  # what it does to the pipeline and its parts exists
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pipe":
            assert hasattr(kind, node.attr) or node.attr in inspect.signature(kind.__init__).parameters, node.attr


@names
def test_it_enables_reports_and_imports_nothing_it_does_not_use(path: Path) -> None:
    tree = ast.parse(path.read_text())
    found = imported(tree)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(found) <= used
    [enable] = calls(tree, "rsa.enable")
    bind(found["rsa"].enable, enable)
    assert calls(tree, "handle.summary")
    for call in calls(tree, "export_to_video"):
        bind(found["export_to_video"], call)


def test_the_check_finds_a_wrong_argument() -> None:
    tree = ast.parse(MODELS[0].read_text().replace("num_inference_steps=", "steps="))
    [run] = calls(tree, "pipe")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        bind(pipeline_class(tree, imported(tree)).__call__, run, None)
