"""Every supported transformer class: exact at full density, sparse where it should be, as before when disabled."""

import re
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import rectified_spaattn as rsa
import tiny_models
from model_cases import CASES, build
from rectified_spaattn.pipelines.state import LayerState
from tiny_models import IMAGE, VIDEO

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {"block_size": 16, "neighbours": False, "first_frame": False, "dense_layers": (), "dense_steps": 0}
PLAIN |= {"top_p": 0.0, "backend": "torch"}
TWO_SIZES = [(name, head_dim) for name, case in CASES.items() for head_dim in case.head_dims]


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


@pytest.mark.parametrize(("name", "head_dim"), TWO_SIZES)
def test_full_density_sparsity_and_back(name: str, head_dim: int) -> None:
    model, inputs = build(name, head_dim)
    case = CASES[name]
    untouched = forward(model, inputs)
    assert untouched.std() > 1e-3  # something to compare
    before = model.attn_processors

    with rsa.enable(model, sparsity=0.0, **PLAIN) as handle:
        kept = forward(model, inputs)
        assert handle.stats().density == pytest.approx(1.0)
    torch.testing.assert_close(kept, untouched, rtol=1e-4, atol=1e-5 * float(untouched.abs().max()))

    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        changed = {key for key, processor in model.attn_processors.items() if processor is not before[key]}
        sparse = forward(model, inputs)
        stats = handle.stats()
    assert changed == {key for key in before if re.fullmatch(case.sparse, key)}
    assert len(changed) == stats.sparse_calls == len(stats.layers) == case.calls
    assert stats.dense_calls == 0
    assert stats.backend == "torch"
    # 2 of 12 blocks of 16 for 192 tokens, a key for each other one, and every pair with text; padding counts nowhere
    dropped = 10 / 12 * 15 / 16
    assert 1 - dropped - 1e-6 <= stats.density <= 1 - dropped * (192 / (192 + case.text)) ** 2 + 1e-6
    assert (sparse - untouched).abs().max() > 1e-4 * untouched.abs().max()

    assert torch.equal(forward(model, inputs), untouched)
    after = model.attn_processors
    assert all(after[key] is before[key] for key in before)


class Queries(list[torch.Tensor]):
    """q of every layer in the order of the calls: [B, S, H, D]."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        attend = LayerState.attend

        def recorded(layer: LayerState, q: torch.Tensor, *others: Any) -> torch.Tensor:
            self.append(q.clone())
            self.forward, self.text_first = layer.owner.forwards.current(), layer.owner.text_first
            return attend(layer, q, *others)

        monkeypatch.setattr(LayerState, "attend", recorded)

    def first(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.clear()
        forward(model, inputs)
        return self[0]


def changed_tokens(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    return (one != other).any(dim=(0, 2, 3)).nonzero().flatten().tolist()


def poked(model: Any, sample: torch.Tensor, grid: tuple[int, int, int], token: tuple[int, int, int]) -> torch.Tensor:
    """The sample with the patch of one token changed."""
    sample = sample.clone()
    if sample.ndim == 3:
        sample[:, (token[0] * grid[1] + token[1]) * grid[2] + token[2]] += 1
        return sample
    video = sample.transpose(1, 2) if isinstance(model, CogVideoXTransformer3DModel) else sample
    patch = [length // side for length, side in zip(video.shape[2:], grid, strict=True)]
    place = [slice(i * side, (i + 1) * side) for i, side in zip(token, patch, strict=True)]
    video[:, :, *place] += 1
    return sample


@pytest.mark.parametrize("name", CASES)
def test_tokens_stand_where_the_row_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change one patch, then the text: the first layer sees the change at that token, and at the text's tokens."""
    model, inputs = build(name, CASES[name].head_dims[0])
    queries = Queries(monkeypatch)
    with rsa.enable(model, sparsity=0.8, **PLAIN):
        before = queries.first(model, inputs)
        grid, text, text_first = queries.forward.grid, queries.forward.layout.text, queries.text_first
        assert grid in (VIDEO, IMAGE)
        assert text == CASES[name].text
        start = text if text_first else 0
        for token in [(0, 0, 1), (0, 2, 0), (grid[0] - 1, grid[1] - 1, grid[2] - 2)]:
            other = {**inputs, "hidden_states": poked(model, inputs["hidden_states"], grid, token)}
            expected = start + (token[0] * grid[1] + token[1]) * grid[2] + token[2]
            assert changed_tokens(before, queries.first(model, other)) == [expected]

        other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
        changed = changed_tokens(before, queries.first(model, other))
        places = set(range(text) if text_first else range(before.shape[1] - text, before.shape[1]))
        assert set(changed) <= places
        assert bool(changed) == bool(text)


@pytest.mark.parametrize("name", CASES)
def test_the_preset_is_found_or_asked_for(name: str) -> None:
    model, _ = build(name, CASES[name].head_dims[0])
    preset = CASES[name].preset
    if preset is None:
        with pytest.raises(ValueError, match=r"no settings were published.*sparsity=.*preset="):
            rsa.enable(model)
        assert all(not hasattr(p, "rectified_layer") for p in model.attn_processors.values())
        assert "sparsity 0.7," in rsa.enable(model, sparsity=0.7).summary()
    else:
        chosen = rsa.preset(preset)[0]
        assert f"sparsity {chosen.sparsity:g}," in rsa.enable(model, dense_layers=(), dense_steps=0).summary()


PAPER = ["Wan 2.1 I2V", "Wan 2.2 TI2V", "HunyuanVideo T2V", "CogVideoX 1.5 T2V", "CogVideoX 1.5 I2V", "Flux.1"]


@pytest.mark.parametrize("name", [*PAPER, "HunyuanVideo 1.5 I2V"])
def test_at_the_published_block_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 blocks of 128 tokens, heads of the real size, bfloat16 as the checkpoints are run."""
    monkeypatch.setattr(tiny_models, "VIDEO", (4, 16, 32))
    monkeypatch.setattr(tiny_models, "IMAGE", (1, 32, 64))
    model, inputs = build(name, CASES[name].head_dims[1])
    model = model.to(torch.bfloat16)
    inputs = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    untouched = forward(model, inputs).float()
    for sparsity, density in ((0.0, 1.0), (0.8, 3 / 16)):
        with rsa.enable(model, sparsity=sparsity, **{**PLAIN, "block_size": 128}) as handle:
            out = forward(model, inputs)
            stats = handle.stats()
        assert out.dtype == torch.bfloat16
        assert stats.sparse_calls == CASES[name].calls
        assert stats.density == pytest.approx(density, abs=0.02)
        if sparsity == 0:
            assert (out.float() - untouched).norm() < 1e-2 * untouched.norm()
