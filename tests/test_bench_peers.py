"""Peers of the operator benchmark: the ones that are not installed are played by fakes."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.bench import peers
from rectified_spaattn.lab.bench.baselines import sdpa
from rectified_spaattn.lab.bench.op import OpSettings, measure
from rectified_spaattn.lab.bench.peers import PEERS, flex_mask, relative_error
from rectified_spaattn.lab.bench.shapes import SHAPES, BenchError, Case, Shape, Variant
from test_bench import OPTIONS, invoke

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = SparseConfig(block_size=32, top_p=0.0, sparsity=0.5)
TINY = Case(SHAPES["tiny"], CONFIG, torch.float32, CPU)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All peers' modules, as if there were a GPU; gives what each was called with."""
    seen: dict[str, Any] = {}

    def attend(name: str, heads_first: bool) -> Any:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            seen[name] = (q.shape, options)
            q, k, v = (x if heads_first else x.transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(q, k, v)
            return out if heads_first else out.transpose(1, 2)

        return call

    for module, function in (
        ("sageattention", "sageattn"),
        ("fastvideo_kernel", "video_sparse_attn"),
        ("sol_attn",) * 2,
    ):
        fake = ModuleType(module)
        fake.__spec__ = SimpleNamespace(name=module)  # type: ignore[assignment]
        setattr(fake, function, attend(module, module == "fastvideo_kernel"))
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(peers, "no_gpu_for", lambda *_: None)
    monkeypatch.setattr(peers, "_compiled", lambda: by_blocks)
    return seen


def by_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_mask: Any, enable_gqa: bool) -> torch.Tensor:
    """What compiled FlexAttention does with a BlockMask; without the compiler it would look at all blocks."""
    seen, places, size = block_mask.to_dense().bool(), torch.arange(q.shape[2]), block_mask.BLOCK_SIZE[0]
    tokens = seen.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, : len(places), : len(places)]
    partial = block_mask.kv_num_blocks.amax() == 1
    assert partial == bool(len(places) % size)
    assert block_mask.mask_mod(0, 0, places, places).all()
    assert not block_mask.mask_mod(0, 0, places, places + len(places)).any()
    return scaled_dot_product_attention(q, k, v, attn_mask=tokens, enable_gqa=enable_gqa)


@pytest.mark.parametrize("heads", [(2, None), (4, 2)])
@pytest.mark.parametrize("text_first", [False, True])
def test_flex_attends_to_the_blocks_of_ours(installed: dict[str, Any], heads: Any, text_first: bool) -> None:
    shape = Shape(
        name="odd", grid=(3, 8, 7), text=10, text_first=text_first, heads=heads[0], kv_heads=heads[1], head_dim=8
    )
    case, variant = TINY._replace(shape=shape), Variant("peer", "flex", 0.6)
    qkv = case.smooth_inputs(0)
    ready = PEERS["flex"].prepare(case, variant, qkv)
    q, k, v = (peers._moved(x, ready.order).transpose(1, 2) for x in qkv)
    _, stats = peers.rectified_attention(*qkv, case.layout(), case.config_of(variant), return_stats=True)
    tokens = torch.ones(1, heads[0], 178, 178, dtype=torch.bool)
    tokens[:, :, :160, :160] = stats.block_mask.repeat_interleave(32, 2).repeat_interleave(32, 3)
    assert ready.density == pytest.approx(tokens.float().mean().item())
    want = scaled_dot_product_attention(q, k, v, attn_mask=tokens, enable_gqa=True).transpose(1, 2)
    got = ready.run(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(got, want)
    full = sdpa(*qkv)
    assert ready.error(qkv, full) == pytest.approx(relative_error("", want, peers._moved(full, ready.order)), abs=1e-5)
    everything = flex_mask(torch.ones_like(stats.block_mask), 178, 32)
    assert torch.equal(everything.full_kv_num_blocks, torch.full_like(everything.full_kv_num_blocks, 5))


def test_each_is_called_as_it_wants_to_be(installed: dict[str, Any]) -> None:
    shape = Shape(name="even", grid=(4, 8, 8), text=64, text_first=True, heads=2, head_dim=128)
    case = TINY._replace(shape=shape, dtype=torch.bfloat16)
    qkv = case.smooth_inputs(0)
    full = sdpa(*qkv)
    for name, peer in PEERS.items():
        assert peer.why_not(case) is None
        for variant in peer.variants(name, (0.8, 0.6)):
            ready = peer.prepare(case, variant, qkv)
            assert ready.run(*qkv).shape == qkv[0].shape
            assert (ready.error(qkv, full) is None) == (name == "sol-attn")
    assert [each.sparsity for each in PEERS["vsa"].variants("vsa", (0.8, 0.6))] == [0.6, 0.8]
    assert [each.sparsity for each in PEERS["sage"].variants("sage", (0.8, 0.6))] == [None]
    assert installed["sageattention"] == ((1, 320, 2, 128), {"tensor_layout": "NHD", "is_causal": False})
    size, options = installed["fastvideo_kernel"]
    assert (size, options["topk"], options["variable_block_sizes"].tolist()) == ((1, 2, 320, 128), 1, [64] * 5)
    assert not options["compress_attn_weight"].any()
    size, options = installed["sol_attn"]
    assert size == (1, 320, 2, 128)
    assert options == {"tau": pytest.approx(0.8416, abs=1e-3), "sink_tokens": 64, "sink_start": 0}


def test_what_none_of_them_can_run_has_its_reason(installed: dict[str, Any]) -> None:
    odd = TINY._replace(shape=Shape(name="odd", grid=(3, 5, 7), heads=4, kv_heads=2, head_dim=64))
    assert "whole blocks of 64 tokens" in PEERS["vsa"].why_not(odd)
    whole = odd._replace(shape=Shape(name="whole", grid=(4, 4, 4), heads=4, kv_heads=2, head_dim=64))
    assert "as many key heads" in PEERS["vsa"].why_not(whole)
    assert "as many key heads" in PEERS["sol-attn"].why_not(whole)
    assert "bfloat16 and head size 128" in PEERS["sol-attn"].why_not(TINY)


def test_peers_take_turns_with_the_rest(installed: dict[str, Any]) -> None:
    settings = OpSettings(
        shape=("tiny",), dtype="float32", block_size=32, repeats=2, device="cpu", sparsity=(0.5,), backend=("torch",),
        peer=("flex", "sage"),
    )  # fmt: skip
    rows = [row for row in measure(settings.cases()[0], settings, lambda *_: None).rows if not row.not_run]
    assert [(row.kind, row.name, row.label) for row in rows[2:]] == [
        ("peer", "flex", "peer flex"),
        ("peer", "sage", "peer sage"),
    ]
    ours, flex, sage = rows[1:]
    assert ours.density > flex.density > 0.5  # ours computes pooled keys, too
    assert ours.error < flex.error
    assert sage.error < 1e-5  # it is played by dense attention
    assert sage.density == 1


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("sage", "pip install sageattention"),
        ("vsa", "pip install fastvideo-kernel"),
        ("sol-attn", "git clone --branch sol-engine https://github.com/NVlabs/Sana"),
    ],
)
def test_one_that_is_not_installed_is_refused_with_how_to_get_it(name: str, how: str) -> None:
    result = invoke(*OPTIONS, "--peer", name, columns=500)
    assert result.exit_code == 1
    assert how in result.output


def test_an_error_that_is_no_number_stops_everything() -> None:
    x = torch.ones(1, 2, 1, 1)
    with pytest.raises(BenchError, match="torch: got an error of nan"):
        relative_error("torch", x * torch.nan, x)
