import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from rectified_spaattn.lab.demo_model.pipeline import DemoVideoPipeline

if not torch.cuda.is_available():  # before anything imports the kernels: they are interpreted, as this machine can
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels of one case on a GPU compile in one worker. Where they are compiled, a CPU has none."""
    for item in items:
        params: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
        if item.get_closest_marker("gpu") is not None:
            if isinstance(params.get("case"), str):
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {params['case']}"))
        elif any(isinstance(x, str) and x == "triton" for x in params.values()) and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="kernels are compiled here; TRITON_INTERPRET=1 interprets them"))


pytest_plugins = ["clip_runs"]

# The same examples everywhere and no time limit an example: CI machines are slow and shared.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def lean_interpreter() -> Iterator[None]:
    """Triton's interpreter without what it does for nothing, which is half its time. It patches its language at every
    call inside a kernel: once a launch and module is enough, as nothing is undone before a launch ends. And it computes
    whether integers overflow, which it then looks at in no case, as `debug` is off.
    """
    if not INTERPRETED or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def patch_once(function: FunctionType) -> object:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_anew(grid: object, *args: object, **options: object) -> None:
        patched.clear()
        launch(grid, *args, **options)

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", patch_once)
        patches.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patches.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


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


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a demo model of random weights, one head and one layer of each kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rectified_spaattn.lab.demo_model.pipeline import DemoVideoPipeline
    from studies.demo_model.network import build_caption_encoder, build_transformer
    from studies.demo_model.recipe import Recipe

    torch.manual_seed(0)
    recipe = Recipe(heads=1, dual_blocks=1, single_blocks=1, refiner_blocks=1)
    transformer = build_transformer(recipe)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("weights")
    parts = (transformer, build_caption_encoder(recipe), FlowMatchEulerDiscreteScheduler())
    DemoVideoPipeline(*parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe() -> "DemoVideoPipeline":
    """The demo model with random weights, two heads and one layer of each kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rectified_spaattn.lab.demo_model.pipeline import DemoVideoPipeline
    from studies.demo_model.network import build_caption_encoder, build_transformer
    from studies.demo_model.recipe import Recipe

    torch.manual_seed(0)
    recipe = Recipe(heads=2, dual_blocks=1, single_blocks=1, refiner_blocks=1)
    transformer = build_transformer(recipe).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return DemoVideoPipeline(transformer, build_caption_encoder(recipe).eval(), FlowMatchEulerDiscreteScheduler())
