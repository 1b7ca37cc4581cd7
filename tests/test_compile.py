"""The operator as one node of a compiled model. Backends that need no C++ compiler."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rectified_spaattn
from cases import STRIDED, video_like
from rectified_spaattn import SparseConfig, TokenLayout, ops, rectified_attention
from rectified_spaattn.orders import blocks_of

GRID, TEXT, HEADS, HEAD_DIM = (2, 5, 8), 5, 2, 8
LAYOUT = TokenLayout.build(GRID, TEXT)
SMALL = SparseConfig(block_size=16, sparsity=0.6, top_p=0.1, rectify="ipar+gapr", order="gilbert")  # 5 blocks
BLOCKS = torch.rand(2, HEADS, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
TEXT_MASK = torch.tensor([[True, True, False, True, False], [False] * 5])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- the op itself


def arguments(
    layout: TokenLayout = LAYOUT,
    strides: str | None = None,
    key_heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
    text_mask: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    token_order: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    backend: str = "torch",
    **settings: Any,
) -> tuple[Any, ...]:
    q, k, v = video_like(0, 2, layout.sequence, HEADS, HEAD_DIM, dtype, key_heads)
    if strides:
        q, k, v = (STRIDED[strides](x) for x in (q, k, v))
    keys = layout.key, SMALL.replace(**settings).key
    return q, k, v, text_mask, block_mask, token_order, top_k, *keys, 0.3, backend


ORDER = blocks_of(LAYOUT, SMALL).tiled.flip(0).expand(2, HEADS, -1)
GIVEN = {"block_mask", "token_order", "top_k"}  # what no plan is asked for with
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "none": {"rectify": "none"},
    "pooled": {"rectify": "pooled"},
    "ipar": {"rectify": "ipar", "neighbours": True, "first_frame": True},
    "text_mask": {"text_mask": TEXT_MASK},
    "text first, tile": {"layout": TokenLayout.build(GRID, TEXT, text_first=True), "order": "tile"},
    "no block": {"layout": TokenLayout.build((1, 3, 3), TEXT)},
    "one block": {"layout": TokenLayout.build((1, 2, 8))},
    "content": {"order": "content", "rectify": "row"},
    "one key head": {"key_heads": 1, "rectify": "row"},
    "content, one key head": {"key_heads": 1, "order": "content", "rectify": "query+slope"},
    "content, no block": {"order": "content", "layout": TokenLayout.build((1, 3, 3), TEXT)},
    "content, no grid": {"order": "content", "layout": TokenLayout.of(90, [(3, 40), (45, 80)])},
    "token_order": {"order": "content", "token_order": ORDER},
    "token_order, int32": {"order": "content", "token_order": ORDER.int(), "rectify": "row"},
    "top_k": {"top_k": torch.tensor([[1.0, 2.0], [3.5, 5.0]])},
    "top_k by error": {"top_k": torch.tensor([[1.0, 2.0], [3.5, 5.0]]), "rectify": "row+slope"},
    "block_mask": {"block_mask": BLOCKS},
    "block_mask, transposed": {"block_mask": BLOCKS.transpose(2, 3)},
    "block_mask, transposed, none": {"block_mask": BLOCKS.transpose(2, 3), "rectify": "none"},
    "block_mask, channels last": {"block_mask": BLOCKS.to(memory_format=torch.channels_last)},
    "block_mask, expanded": {"block_mask": BLOCKS[:1, :1].expand(2, HEADS, 5, 5), "rectify": "ipar"},
    **{name: {"strides": name} for name in STRIDED},
}


# The schema and the fake are those of every backend: the second one on a case of each kind.
REFERENCE = ["bfloat16", "pooled", "content, one key head", "token_order, int32", "top_k", "block_mask, expanded"]
BY_BACKEND = [*((name, "torch") for name in CASES), *((name, "reference") for name in REFERENCE)]


@pytest.mark.parametrize(("name", "backend"), BY_BACKEND)
def test_opcheck(name: str, backend: str) -> None:
    """Schema, fake against real outputs (shapes, dtypes, strides), and tracing with dynamic shapes."""
    torch.library.opcheck(ops.attention, arguments(**CASES[name], backend=backend))


@pytest.mark.parametrize(("name", "backend"), [each for each in BY_BACKEND if not GIVEN & {*CASES[each[0]]}])
def test_opcheck_of_a_plan(name: str, backend: str) -> None:
    q, k, v, text_mask, _, _, _, *rest = arguments(**CASES[name], backend=backend)
    torch.library.opcheck(ops.plan, (q, k, v, text_mask, *rest))


# --- models


class Layer(nn.Module):
    def __init__(self, config: SparseConfig, layout: TokenLayout = LAYOUT) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)

    def forward(self, x: torch.Tensor, text_mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return x + rectified_attention(q, k, v, self.layout, self.config, text_mask=text_mask).flatten(2)


class Model(nn.Module):
    def __init__(self, configs: list[SparseConfig]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(config) for config in configs)

    def forward(self, x: torch.Tensor, text_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, text_mask)
        return x


def tokens(batch: int) -> torch.Tensor:
    return torch.randn(batch, LAYOUT.sequence, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(batch))


EQUAL_CONFIGS = [SparseConfig(sparsity=0.6, block_size=16) for _ in range(4)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("text_mask", [None, TEXT_MASK])
@torch.no_grad()
def test_a_whole_model_is_one_graph(backend: str, text_mask: torch.Tensor | None) -> None:
    model, counter = Model(EQUAL_CONFIGS), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    want = model(tokens(2), text_mask)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(compiled(tokens(2), text_mask), want)
    assert counter.frame_count == 1
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("rectified_spaattn" in target for target in targets) == len(EQUAL_CONFIGS)  # one node a call


@torch.no_grad()
def test_layers_compiled_one_by_one_share_one_compilation() -> None:
    """As diffusers' compile_repeated_blocks does. Equal configs need not be the same object."""
    model, counter = Model(EQUAL_CONFIGS), CompileCounterWithBackend("aot_eager")
    want = model(tokens(2), TEXT_MASK)
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model(tokens(2), TEXT_MASK), want)
    assert counter.frame_count == 1


@torch.no_grad()
def test_layers_of_different_sparsity_compile_too() -> None:
    configs = [SparseConfig(sparsity=s, block_size=16) for s in (0.0, 0.4, 0.6, 0.8)]
    model = Model(configs)
    want = model(tokens(2))
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(model(tokens(2)), want)
    assert not torch.equal(Model([configs[0]] * 4)(tokens(2)), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_one_compilation_serves_every_batch_size(backend: str) -> None:
    model, counter = Model(EQUAL_CONFIGS[:2]), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 2, 4):
            x, mask = tokens(batch), TEXT_MASK[:1].repeat(batch, 1)
            for tensor in (x, mask):
                torch._dynamo.mark_dynamic(tensor, 0)
            assert torch.equal(compiled(x, mask), model(x, mask))
    assert counter.frame_count == 1


@torch.no_grad()
def test_statistics_come_out_of_a_compiled_call() -> None:
    q, k, v = video_like(1, 2, LAYOUT.sequence, HEADS, HEAD_DIM)

    def run(block_mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        out, stats = rectified_attention(q, k, v, LAYOUT, EQUAL_CONFIGS[0], block_mask=block_mask, return_stats=True)
        return out, stats.block_mask, stats.compensated, stats.probability, stats.r

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for mask in (None, BLOCKS, BLOCKS.transpose(2, 3)):
        for got, want in zip(compiled(mask), run(mask), strict=True):
            assert torch.equal(got, want)


@torch.no_grad()
def test_through_the_packages_lazy_name() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rectified_spaattn.rectified_attention(q, k, v, LAYOUT, SMALL)

    q, k, v = video_like(2, 1, LAYOUT.sequence, HEADS, HEAD_DIM)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(q, k, v), run(q, k, v))


@pytest.mark.parametrize("bad", [{"text_mask": TEXT_MASK[:1]}, {"scale": -1.0}, {"backend": "fastest"}])
@torch.no_grad()
def test_bad_input_is_refused_inside_a_compiled_call_too(bad: dict[str, Any]) -> None:
    q, k, v = video_like(3, 2, LAYOUT.sequence, HEADS, HEAD_DIM)
    compiled = torch.compile(lambda *x: rectified_attention(*x, LAYOUT, **bad), backend="eager")
    with pytest.raises(Exception, match=r"got .*allowed"):
        compiled(q, k, v)
