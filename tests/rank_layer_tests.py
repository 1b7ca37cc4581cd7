"""One layer over several processes, on the same queries, keys and values to the bit. Run as `rank_tests.py` is."""

import types
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
import tiny_models
from rank_group import CONTENT, COUNT, GPU, PLAIN, RANK, apart
from rectified_spaattn.layout import TokenLayout
from rectified_spaattn.pipelines import processor
from rectified_spaattn.pipelines.clock import RunClock
from rectified_spaattn.pipelines.ranks import ranks_of, streams_of
from rectified_spaattn.pipelines.state import LayerState, TransformerState
from tensors import video_like


class Layer(torch.nn.Module):
    """A self-attention layer with nothing around it, on a part of the tokens."""

    def __init__(self, config: rsa.SparseConfig, backend: str) -> None:
        super().__init__()
        self.state = TransformerState(config=config, backend=backend, clock=RunClock(None))
        self.layer = LayerState(index=0, name="layer", owner=self.state, dense_backend=None)
        processor._layers[int(self.layer.handle)] = self.layer

    def forward(self, qkv: list[torch.Tensor], mask: torch.Tensor, layout: TokenLayout, config: Any) -> torch.Tensor:
        ranks = ranks_of(types.SimpleNamespace(_parallel_config=config))
        self.state.begin_forward((layout,), ranks=ranks)
        processor._caller.handle, processor._caller.heads = self.layer.handle, self.layer.heads
        try:
            return processor._backend(*qkv, attn_mask=mask, _parallel_config=config)
        finally:
            processor._caller.handle = processor._caller.heads = None
            self.state.end_forward(failed=False)


LAYER_BACKENDS = ["torch", "triton", "fa4"] if GPU else ["torch"]


@pytest.mark.parametrize("placed", [True, False], ids=["", "without the places"])
@pytest.mark.parametrize("text", [24, 23])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("order", ["content", "gilbert"])
@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_a_layer(
    backend: str, order: Any, text_first: bool, text: int, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit on a CPU; kernels on fewer heads may sum otherwise. Without the places nothing is right."""
    grid = (4, 16, 32) if GPU else (4, 6, 8)
    layout = TokenLayout.build(grid, text, text_first)
    dtype = torch.bfloat16 if GPU else torch.float32
    qkv = [x.to("cuda" if GPU else "cpu") for x in video_like(0, 2, layout.sequence, 4, 128 if GPU else 16, dtype)]
    valid = torch.ones(2, text, dtype=torch.bool, device=qkv[0].device)
    valid[1, 5:] = False
    config = rsa.SparseConfig(**{**PLAIN, "order": order, "rectify": "row" if order == "content" else "ipar+gapr"})
    want = rsa.rectified_attention(*qkv, layout, config, text_mask=valid, backend=backend).float()
    model = tiny_models.wan(16, num_attention_heads=4)  # through which the processes find each other
    rsa.parallelize(model, uneven=text % COUNT > 0)
    cut = layout.cut(streams_of(layout), COUNT)
    ranks = ranks_of(model)
    assert ranks is not None
    start = sum(ranks.part(streams_of(layout), rank) for rank in range(RANK))
    mine = cut.token[start : start + ranks.part(streams_of(layout), RANK)].to(qkv[0].device)
    mask = torch.ones(2, layout.sequence, dtype=torch.bool, device=valid.device)
    mask[:, layout.text_tokens] = valid
    if not placed:
        monkeypatch.setattr(TokenLayout, "cut", lambda layout, streams, ranks: layout)
    layer = Layer(config, backend)
    got = layer([x[:, mine] for x in qkv], mask[:, None, None], layout, model._parallel_config).float()
    off = apart(got[0], want[0, mine])  # of the second sample some tokens are padding
    if not placed:
        assert off > 0.05
    elif GPU:
        assert off < 2e-2
    else:
        assert torch.equal(got[0], want[0, mine])


def test_heads_are_dealt_out_where_some_have_much_more_to_do() -> None:
    """Half of the heads look at few tokens, and lie on half of the ranks: from the second forward on they do not."""
    grid = (4, 16, 32) if GPU else (4, 6, 8)
    layout = TokenLayout.build(grid)
    dtype = torch.bfloat16 if GPU else torch.float32
    q, k, v = (x.to("cuda" if GPU else "cpu") for x in video_like(0, 1, layout.sequence, 8, 128 if GPU else 16, dtype))
    q[:, :, :4] *= 8
    config = CONTENT.replace(top_p=0.7, sparsity=0.9)
    model = tiny_models.wan(16, num_attention_heads=8)
    rsa.parallelize(model)
    mine = slice(RANK * layout.sequence // COUNT, (RANK + 1) * layout.sequence // COUNT)
    mask = torch.ones(1, layout.sequence, dtype=torch.bool, device=q.device)
    want = rsa.rectified_attention(q, k, v, layout, config).float()
    layer, spread = Layer(config, "auto"), []
    for _ in range(3):
        layer.state.ranks = type(layer.state.ranks)()
        got = layer([x[:, mine] for x in (q, k, v)], mask, layout, model._parallel_config).float()
        assert apart(got, want[:, mine]) < (2e-2 if GPU else 1e-5)
        spread.append(layer.state.ranks.imbalance())
    assert spread[0] > 0.2
    assert spread[1] < 0.2 * spread[0]
    assert spread[2] < 0.2 * spread[0]
    assert layer.layer.heads is not None
    assert sorted(layer.layer.heads[0].tolist()) == list(range(8))
