"""enable() on the pipelines of the paper's models: found presets, sparse calls in every step, nothing left behind."""

import warnings
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
import tiny_later_pipelines  # noqa: F401, its pipelines
from tiny_pipelines import PIPELINES, run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"),  # diffusers' own ControlNet
]

PLAIN: dict[str, Any] = {"block_size": 16, "neighbours": False, "first_frame": False, "top_p": 0.0}
PLAIN |= {"dense_layers": (), "dense_steps": 0, "backend": "torch"}


def grids_of(handle: rsa.Handle) -> list[tuple[int, int, int] | None]:
    """A list that gets the grid of every forward of the enabled transformers."""
    grids: list[tuple[int, int, int] | None] = []
    for item in handle._enabled:
        model = item.state.model()
        assert model is not None

        def note(*_: Any, state: Any = item.state) -> None:
            forward = state.forwards.current()
            if forward is not None:  # not once it is disabled
                grids.append(forward.layout.grid)

        model.register_forward_pre_hook(note)
    return grids


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_sparse_and_comes_back(name: str) -> None:
    case = PIPELINES[name]
    pipeline, arguments = case.make(), case.arguments()
    untouched = run(pipeline, arguments)
    assert untouched.isfinite().all()

    with rsa.enable(pipeline, sparsity=0.0, **PLAIN) as handle:
        kept = run(pipeline, arguments)
        assert handle.stats().density == pytest.approx(1.0)
    torch.testing.assert_close(kept, untouched, rtol=1e-3, atol=1e-4 * float(untouched.abs().max()))

    with rsa.enable(pipeline, sparsity=0.8, **PLAIN) as handle:
        grids = grids_of(handle)
        sparse = run(pipeline, arguments)
        stats = handle.stats()
    assert stats.sparse_calls == 2 * case.calls
    assert stats.dense_calls == 0
    assert stats.density < 0.4
    assert set(grids) == {case.grid}
    assert not torch.equal(sparse, untouched)
    assert torch.equal(run(pipeline, arguments), untouched)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_finds_its_preset(name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*step_index")  # CogVideoX's schedulers have none
        handle = rsa.enable(PIPELINES[name].make())
    assert tuple(handle.configs().values()) == rsa.preset(PIPELINES[name].preset)


def test_a_controlnet_stays_as_it_is() -> None:
    pipeline = PIPELINES["Flux.1 with a ControlNet"].make()
    before = pipeline.controlnet.attn_processors
    with rsa.enable(pipeline, **PLAIN):
        after = pipeline.controlnet.attn_processors
        assert not pipeline.controlnet._forward_pre_hooks
    assert all(after[name] is before[name] for name in before)
