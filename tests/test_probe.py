"""Probe rows: what they measure against the float64 oracle, where they lie, and what they cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import MODES, video_like
from oracle import dense
from rectified_spaattn import SparseConfig, TokenLayout, ops, rectified_attention
from rectified_spaattn.method.probe import probe, probe_places
from rectified_spaattn.orders import blocks_of

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = TokenLayout.build((3, 6, 7), 9)  # 126 video tokens: 7 blocks of 16 and 14 tokens more
MASK = torch.tensor([[True] * 4 + [False] * 5, [False, True, True] * 3])
CONFIG = SparseConfig(block_size=16, sparsity=0.7, top_p=0.0, rectify="row", probes=12)
QKV = video_like(3, 2, LAYOUT.sequence, 2, 8)
VALID = torch.ones(2, LAYOUT.sequence, dtype=torch.bool).index_copy(1, LAYOUT.text_places, MASK)


def true_errors(out: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, H] in float64; places: [B, H, R]."""
    full = dense(*QKV, sees=VALID[:, None, None])
    of = [(x.transpose(1, 2).gather(2, places[..., None].expand(-1, -1, -1, 8))) for x in (out.double() - full, full)]
    return of[0].norm(dim=(2, 3)) / of[1].norm(dim=(2, 3))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_the_error_of_probe_rows_is_that_of_the_oracle(backend: str, mode: str) -> None:
    for order in ("content", "tile"):
        config = CONFIG.replace(rectify=mode, order=order)
        out, stats = rectified_attention(*QKV, LAYOUT, config, text_mask=MASK, backend=backend, return_stats=True)
        tiled = blocks_of(LAYOUT, config).tiled.expand(2, 2, -1) if stats.token_order is None else stats.token_order
        want = true_errors(out, probe_places(tiled, 12))
        assert stats.probe is not None
        assert stats.probe.error.dtype == torch.float32
        torch.testing.assert_close(stats.probe.error.double(), want, rtol=1e-4, atol=1e-5)
        squares = (stats.probe.wrong.double().square().sum(1) / stats.probe.full.double().square().sum(1)).sqrt()
        torch.testing.assert_close(stats.probe.call_error.double(), squares, rtol=1e-5, atol=0)


def test_as_many_rows_as_tokens_measure_the_error_of_all() -> None:
    config = CONFIG.replace(probes=10_000)
    out, stats = rectified_attention(*QKV, LAYOUT, config, text_mask=MASK, return_stats=True)
    want = true_errors(out, stats.token_order)
    torch.testing.assert_close(stats.probe.error.double(), want, rtol=1e-4, atol=1e-6)


def test_nothing_dropped_is_nothing_wrong_and_plain_sparsity_is_worst() -> None:
    def measured(**settings: object) -> torch.Tensor:
        config = CONFIG.replace(**settings)
        return rectified_attention(*QKV, LAYOUT, config, text_mask=MASK, return_stats=True)[1].probe.error

    assert (measured(sparsity=0.0) < 1e-5).all()
    assert (measured(rectify="none") > 1.5 * measured()).all()
    assert (measured() > 0.01).all()


def test_the_same_output_with_probe_rows_and_without() -> None:
    probed = rectified_attention(*QKV, LAYOUT, CONFIG, text_mask=MASK, return_stats=True)
    plain = rectified_attention(*QKV, LAYOUT, CONFIG.replace(probes=0), text_mask=MASK, return_stats=True)
    assert torch.equal(probed[0], plain[0])
    assert plain[1].probe is None
    assert probed[1].density - plain[1].density == pytest.approx(12 / LAYOUT.sequence)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_layout_without_a_block_has_no_row_to_probe(backend: str) -> None:
    layout = TokenLayout.build((1, 2, 3), 4)
    qkv = video_like(0, 1, layout.sequence, 2, 8)
    stats = rectified_attention(*qkv, layout, CONFIG, backend=backend, return_stats=True)[1]
    assert stats.density == 1
    assert stats.probe.error.tolist() == [[0, 0]]


@given(blocks=st.integers(1, 40), block_size=st.sampled_from((16, 32)), rows=st.integers(1, 700))
def test_one_row_in_each_of_equal_spans(blocks: int, block_size: int, rows: int) -> None:
    count = blocks * block_size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(blocks)) + 5
    places = probe_places(order, rows)
    rows = min(rows, count)
    assert places.shape == (rows,)
    at = order.argsort()[places - 5].double()  # where in the order
    j = torch.arange(rows)
    assert ((at >= (j * count / rows).floor()) & (at < (j + 1) * count / rows)).all()
    if rows == count:
        assert torch.equal(places, order)
    elif rows == blocks == 40:
        assert len((at % block_size).unique()) > 0.9 * block_size  # at no fixed place of a block


def test_fewer_heads_of_keys_are_shared_by_heads_of_queries() -> None:
    q, k, v = QKV
    out, places = q * 0, probe_places(torch.arange(64).expand(2, 2, -1), 5)
    shared = probe(q, k[:, :, :1], v[:, :, :1], out, places, valid=VALID, scale=0.3)
    alone = probe(q, *(x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v)), out, places, valid=VALID, scale=0.3)
    torch.testing.assert_close(shared, alone)
    assert (shared.error == 1).all()  # a zero output is wrong by all there is


def test_nothing_is_read_by_the_host() -> None:
    """Tensors without values: reading one raises."""
    q, k, v = (torch.empty_like(x, device="meta") for x in QKV)
    order = torch.empty(2, 2, 112, dtype=torch.int64, device="meta")
    got = probe(q, k, v, q, probe_places(order, 12), valid=VALID.to("meta"), scale=0.3)
    assert got.error.shape == (2, 2)


@pytest.mark.parametrize("mask", [None, MASK])
def test_opcheck(mask: torch.Tensor | None) -> None:
    config = CONFIG.replace(order="tile")
    torch.library.opcheck(ops.probe, (*QKV, QKV[0] + 1, mask, None, LAYOUT.key, config.key, 0.3, 7))


@torch.no_grad()
def test_probe_rows_in_one_compiled_graph(fresh_compiler: None) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, stats = rectified_attention(q, k, v, LAYOUT, CONFIG, text_mask=MASK, return_stats=True)
        return out, stats.probe.error

    for got, want in zip(torch.compile(run, backend="aot_eager", fullgraph=True)(*QKV), run(*QKV), strict=True):
        assert torch.equal(got, want)


def test_probe_rows_of_heads_that_share_keys() -> None:
    q, k, v = QKV[0], QKV[1][:, :, :1], QKV[2][:, :, :1]
    out, stats = rectified_attention(q, k, v, LAYOUT, CONFIG, text_mask=MASK, return_stats=True)
    order = stats.token_order.expand(-1, 2, -1)
    full = dense(q, k.expand_as(q), v.expand_as(q), sees=VALID[:, None, None])
    at = probe_places(order, 12)[..., None].expand(-1, -1, -1, 8)
    wrong, exact = (x.transpose(1, 2).gather(2, at).norm(dim=(2, 3)) for x in (out.double() - full, full))
    torch.testing.assert_close(stats.probe.error.double(), wrong / exact, rtol=1e-4, atol=1e-5)
