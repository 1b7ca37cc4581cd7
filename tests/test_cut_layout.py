"""Tokens that lie rank after rank, padding that takes no part, and heads that are dealt out to ranks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import MODES
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.layout import part_sizes
from rectified_spaattn.pipelines.balance import dealt_out
from rectified_spaattn.pipelines.ranks import Ranks
from rectified_spaattn.pipelines.teacache.guidance import Branch
from rectified_spaattn.pipelines.teacache.models import Fit
from tensors import video_like

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(2, 6))
def test_a_cut_layout_is_what_the_ranks_put_together(streams: list[int], ranks: int) -> None:
    layout = TokenLayout(sequence=sum(streams), spans=((0, streams[0]),))
    parts = [tokens.tensor_split(ranks) for tokens in torch.arange(sum(streams)).split(streams)]
    together = torch.cat([part for rank in zip(*parts, strict=True) for part in rank])
    cut = layout.cut(streams, ranks)
    assert torch.equal(cut.token, together)
    assert torch.equal(together[cut.place], torch.arange(sum(streams)))
    assert torch.equal(together[cut.video_places], layout.video_places)
    assert torch.equal(together[cut.text_places], layout.text_places)
    assert TokenLayout.from_key(cut.key) == cut
    assert part_sizes(streams[0], ranks) == [len(part) for part in parts[0]]
    if len(streams) == 1:
        assert cut == layout  # the order of the ranks is the model's


def test_a_cut_has_to_fit() -> None:
    layout = TokenLayout.build((2, 2, 2), 5)
    with pytest.raises(ValueError, match="lengths that add up to 13"):
        layout.cut((8, 6), 2)
    with pytest.raises(ValueError, match="each of the 13 places in one of them"):
        replace(layout, pieces=((0, 8), (7, 13)))
    with pytest.raises(ValueError, match="within places"):
        replace(layout, padding=6)


@pytest.mark.parametrize("order", ["content", "gilbert"])
@pytest.mark.parametrize("rectify", MODES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_where_tokens_lie_changes_no_bit(backend: str, rectify: str, order: str) -> None:
    check_places(backend, SparseConfig(block_size=16, sparsity=0.6, order=order, rectify=rectify), head_dim=8)


@pytest.mark.parametrize("backend", ["triton"])
def test_where_tokens_lie_changes_no_bit_of_the_kernels(backend: str) -> None:
    check_places(backend, SparseConfig(block_size=64, sparsity=0.5, order="gilbert"), head_dim=64, heads=1)


def check_places(backend: str, config: SparseConfig, head_dim: int, heads: int = 2) -> None:
    """Text in front, then video, then text of which some is padding; the same call with the tokens of three ranks."""
    grid = (4, 6, 8) if config.block_size == 16 else (3, 8, 8)
    layout = replace(TokenLayout.build(grid, 11), padding=3)
    q, k, v = video_like(0, heads, layout.sequence, heads, head_dim)
    mask = torch.rand(heads, layout.text, generator=torch.Generator().manual_seed(1)) < 0.7
    options = {"text_mask": mask, "backend": backend, "return_stats": True}
    want, stats = rectified_attention(q, k, v, layout, config, **options)
    assert not want[:, -3:].any()

    shorter = TokenLayout.build(grid, 8)
    without, of_shorter = rectified_attention(*(x[:, :-3] for x in (q, k, v)), shorter, config, **options)
    assert torch.equal(want[:, :-3], without)
    assert stats.density == of_shorter.density

    cut = layout.cut((layout.sequence - 11, 11), 3)
    lie = cut.token
    got, of_cut = rectified_attention(*(x[:, lie] for x in (q, k, v)), cut, config, **options)
    assert torch.equal(got, want[:, lie])
    assert of_cut.density == stats.density
    wrong = rectified_attention(*(x[:, lie] for x in (q, k, v)), layout, config, **{**options, "return_stats": False})
    assert not torch.allclose(wrong, want[:, lie], rtol=1e-2, atol=1e-2)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_heads_are_dealt_out_evenly(layers: int, heads_a_rank: int, seed: int) -> None:
    ranks = 4
    work = torch.rand(layers, heads_a_rank * ranks, generator=torch.Generator().manual_seed(seed)) ** 3
    heads, places = dealt_out(work, ranks).unbind(1)
    assert torch.equal(heads.sort(dim=1).values, torch.arange(work.shape[1]).expand_as(heads))
    assert torch.equal(heads.gather(1, places), torch.arange(work.shape[1]).expand_as(heads))
    of_rank = work.gather(1, heads).unflatten(1, (ranks, -1)).sum(2)
    largest = work.amax(1)
    assert bool((of_rank.amax(1) - of_rank.amin(1) <= largest + 1e-6).all())  # there and back: by one head at most


class TwoRanks(Ranks):
    """Of which the other one has a part that changed by another amount."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x.new_tensor([0.0, 6.0])])


def test_teacache_decides_by_the_signal_of_all_ranks() -> None:
    """Of this rank alone the change is 50%, of both together 10%."""
    fit = Fit(name="itself", coefficients=(1.0, 0.0), threshold=0.2)
    both = TwoRanks(group=None, count=2, rank=0, uneven=False)
    for ranks, computes in ((None, True), (both, False)):
        branch = Branch(signal=torch.full((3,), 0.5))
        assert branch.must_compute(torch.full((3,), 0.75), fit, 0.2, ranks) is computes
    assert branch.accumulated == pytest.approx(0.1)
