"""Every supported transformer class: exact at full density, sparse where it should be, as before when disabled."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
import tiny_models
from model_cases import CASES, Case, build, built
from rectified_spaattn.pipelines.state import LayerState
from tiny_models import IMAGE, VIDEO

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {"block_size": 16, "neighbours": False, "first_frame": False, "dense_layers": (), "dense_steps": 0}
PLAIN |= {"top_p": 0.0, "backend": "torch"}
TWO_SIZES = [(name, head_dim) for name, case in CASES.items() for head_dim in case.head_dims]


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any], case: Case | None = None) -> torch.Tensor:
    """Of the video what anybody reads."""
    out = model(**inputs, return_dict=False)
    while not isinstance(out, torch.Tensor):
        out = torch.stack(out) if isinstance(out, list) and len({x.shape for x in out}) == 1 else out[0]
    return case.of_video(out) if case else out


def processors(model: Any) -> dict[str, Any]:
    """As model.attn_processors, which not every class has."""
    return {f"{name}.processor": each.processor for name, each in model.named_modules() if hasattr(each, "processor")}


@pytest.mark.parametrize(("name", "head_dim"), TWO_SIZES)
def test_full_density_sparsity_and_back(name: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built(name, head_dim)
    case = CASES[name]
    untouched = forward(model, inputs, case)
    assert untouched.std() > 1e-3  # something to compare
    before = processors(model)

    with rsa.enable(model, sparsity=0.0, **PLAIN) as handle:
        kept = forward(model, inputs, case)
        assert handle.stats().density == pytest.approx(1.0)
    torch.testing.assert_close(kept, untouched, rtol=1e-4, atol=1e-5 * float(untouched.abs().max()))

    calls = Calls(monkeypatch)
    with rsa.enable(model, sparsity=0.8, **PLAIN) as handle:
        changed = {key for key, processor in processors(model).items() if processor is not before[key]}
        sparse = forward(model, inputs, case)
        stats = handle.stats()
    assert changed == {key for key in before if re.fullmatch(case.sparse, key)}
    assert len(changed) == len(stats.layers) >= case.calls
    assert len(calls) == stats.sparse_calls == case.calls
    assert stats.dense_calls == 0
    assert stats.backend == "torch"
    for call in calls:
        call.check()
    assert (sparse - untouched).abs().max() > 1e-4 * untouched.abs().max()

    assert torch.equal(forward(model, inputs, case), untouched)
    after = processors(model)
    assert all(after[key] is before[key] for key in before)


@dataclass(kw_only=True)
class AttentionCall:
    """One call of a layer: q, k, v, out [B, S, H, D]; mask of keys, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    out: torch.Tensor
    layout: rsa.TokenLayout
    density: float

    def check(self) -> None:
        """Sparse among the tokens that can be tiled, exact for every valid token that cannot."""
        whole = self.layout.sequence
        valid = torch.ones(len(self.q), whole, dtype=torch.bool)
        if self.mask is not None:
            valid = self.mask.view(len(self.mask), whole).expand(len(self.q), -1)
        video = int(valid[:, self.layout.video_places].all(0).sum())  # hidden ones stand alone
        kept = max(1, int((1 - 0.8) * (video // 16))) / (video // 16)  # blocks of 16; what stands alone is always seen
        dropped = (1 - kept) * 15 / 16  # a key for each other block
        assert (1 - dropped) * (video / whole) ** 2 - 1e-6 <= self.density
        assert self.density <= 1 - dropped * ((video - video % 16) / whole) ** 2 + 1e-6
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        exact = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=valid[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )
        alone = self.layout.text_places
        for row in range(len(q)):
            places = alone[valid[row, alone]]
            torch.testing.assert_close(self.out[row, places], exact.transpose(1, 2)[row, places], rtol=1e-4, atol=1e-5)


class Calls(list[AttentionCall]):
    """Every call of a layer, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        attend = LayerState.attend

        def recorded(layer: LayerState, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> torch.Tensor:
            self.forward = layer.owner.forwards.current()
            assert self.forward is not None
            before = float(self.forward.density)
            out = attend(layer, q, k, v, mask, scale)
            layout, density = self.forward.layout_of(q.shape[1]), float(self.forward.density) - before
            assert layout is not None
            self.append(AttentionCall(q=q.clone(), k=k, v=v, mask=mask, out=out, layout=layout, density=density))
            return out

        monkeypatch.setattr(LayerState, "attend", recorded)

    def first(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """q of the first layer."""
        self.clear()
        forward(model, inputs)
        return self[0].q


def changed_tokens(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    return (one != other).any(dim=(0, 2, 3)).nonzero().flatten().tolist()


def poked(case: Case, sample: Any, grid: tuple[int, int, int], token: tuple[int, int, int]) -> Any:
    """The sample with the patch of one token changed."""
    if case.axes == "list":  # of [C, T, H, W] or [1, C, T, H, W], one a sample
        return [poked(replace(case, axes="bcthw"[-each.ndim :]), each, grid, token) for each in sample]
    sample = sample.clone()
    if sample.ndim == 3:
        start = sample.shape[1] - math.prod(grid) if case.axes == "tail" else 0
        sample[:, start + (token[0] * grid[1] + token[1]) * grid[2] + token[2]] += 1
        return sample
    index: list[Any] = [slice(None)] * sample.ndim
    for axis, count, i in zip("thw", grid, token, strict=True):
        if axis in case.axes:
            side = sample.shape[case.axes.index(axis)] // count
            index[case.axes.index(axis)] = slice(i * side, (i + 1) * side)
    sample[tuple(index)] += 1
    return sample


@pytest.mark.parametrize("name", CASES)
def test_tokens_stand_where_the_row_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change one patch, then the text: the first layer sees the change at that token, and at the text's tokens."""
    case = CASES[name]
    model, inputs = built(name, case.head_dims[0])
    calls = Calls(monkeypatch)
    with rsa.enable(model, sparsity=0.8, **PLAIN):
        before = calls.first(model, inputs)
        layout, joint = calls[0].layout, calls.forward.layout
        assert layout.video == case.tiled
        assert joint.text == case.text
        grid = layout.grid or (VIDEO if len(case.axes) != 3 or case.tiled != 192 else IMAGE)
        assert grid in (VIDEO, IMAGE)
        video = layout.video_places[-math.prod(grid) if case.axes == "tail" else 0 :]
        for token in [(0, 0, 1), (0, 2, 0), (grid[0] - 1, grid[1] - 1, grid[2] - 2)] if case.axes else []:
            other = {**inputs, case.sample: poked(case, inputs[case.sample], grid, token)}
            expected = int(video[(token[0] * grid[1] + token[1]) * grid[2] + token[2]])
            assert changed_tokens(before, calls.first(model, other)) == [expected]

        if case.words:
            words = inputs[case.words]
            other = {**inputs, case.words: [each + 1 for each in words] if isinstance(words, list) else words + 1}
            changed = changed_tokens(before, calls.first(model, other))
            assert set(changed) <= set(layout.text_places.tolist())
            assert bool(changed) == bool(case.text and layout.text)


@pytest.mark.parametrize("name", CASES)
def test_the_preset_is_found(name: str) -> None:
    model, _ = built(name, CASES[name].head_dims[0])
    assert CASES[name].preset in {each.transformer: each.presets for each in rsa.supported()}[type(model).__name__]
    chosen = rsa.preset(CASES[name].preset)[0]
    with rsa.enable(model, dense_layers=(), dense_steps=0) as handle:
        assert handle.configs() == {"transformer": chosen.replace(dense_layers=(), dense_steps=0)}


PUBLISHED = ["Wan 2.1 I2V", "CogVideoX 1.5 I2V", "Flux.1", "HunyuanVideo 1.5 I2V"]
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("Wan 2.2 TI2V", "HunyuanVideo T2V", "CogVideoX 1.5 T2V")
]


@pytest.mark.parametrize("name", [*PUBLISHED, *SLOW])
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
