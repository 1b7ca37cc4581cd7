"""Other publications' kernels, where they are installed: timed beside ours, and no part of this package."""

import math
import shutil
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from statistics import NormalDist
from typing import Any, NamedTuple

import torch

from ...attention import rectified_attention
from ...method.density import density
from ...method.select import top_k_of
from .baselines import no_gpu_for
from .shapes import PEER_NAMES, BenchError, Case, Tensors, Variant

_VSA_BLOCK = 64


class Prepared(NamedTuple):
    """One peer at one sparsity, ready to be timed.

    run      q [1, S, H, D], k, v [1, S, Hk, D] -> [1, S, H, D]
    density  computed pairs over all pairs
    order    int64 [H, S]: the tokens in the order in which `run` takes them; None: in the model's
    equal    whether it computes the pairs that the density says on any input, so that its error can be compared
    """

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    density: float
    order: torch.Tensor | None = None
    equal: bool = True

    def error(self, qkv: Tensors, full: torch.Tensor) -> float | None:
        """|out - full| / |full| over all tokens; None where it would not be at equal pairs. BenchError for no numbers.

        qkv: those that it was prepared for; full [1, S, H, D]: their dense attention.
        """
        if not self.equal:
            return None
        if self.order is None:
            return relative_error("peer", self.run(*qkv), full)
        q, k, v = (_moved(x, self.order) for x in qkv)
        return relative_error("peer", self.run(q, k, v), _moved(full, self.order))


class Peer(NamedTuple):
    """prepare(case, variant, qkv) makes it ready, with choices made for q, k, v; sparse: it has a sparsity."""

    prepare: Callable[[Case, Variant, Tensors], Prepared]
    why_not: Callable[[Case], str | None]
    sparse: bool = True

    def variants(self, name: str, sparsities: tuple[float, ...]) -> list[Variant]:
        if not self.sparse:
            return [Variant("peer", name)]
        return [Variant("peer", name, sparsity) for sparsity in sorted(sparsities)]


def relative_error(name: str, out: torch.Tensor, full: torch.Tensor) -> float:
    """|out - full| / |full|, both [1, S, H, D], in float32, head by head. Raises BenchError where it is no number."""
    apart, whole = 0.0, 0.0
    for a, b in zip(out[0].unbind(1), full[0].unbind(1), strict=True):
        apart += float((a.float() - b.float()).square().sum())
        whole += float(b.float().square().sum())
    error = math.sqrt(apart / whole)
    if not math.isfinite(error):
        raise BenchError(f"{name}: got an error of {error}; allowed: a number. Nothing was timed.")
    return error


# --- FlexAttention, with the critical blocks of ours


def _flex(case: Case, variant: Variant, qkv: Tensors) -> Prepared:
    """Plain block-sparse attention on the blocks that ours keeps, tokens already in the order of ours."""
    config, layout = case.config_of(variant), case.layout()
    _, stats = rectified_attention(*qkv, layout, config, return_stats=True)
    blocks, heads = case.blocks(), qkv[0].shape[2]
    tiled = blocks.tiled.expand(heads, -1) if stats.token_order is None else stats.token_order[0]
    order = torch.cat([tiled.repeat_interleave(heads // len(tiled), 0), blocks.isolated.expand(heads, -1)], dim=1)
    mask = flex_mask(stats.block_mask, order.shape[1], config.block_size)
    compiled = _compiled()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    plain = config.replace(rectify="none")
    return Prepared(run, float(density(stats.block_mask, layout, plain, None)), order)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_mask(critical: torch.Tensor, sequence: int, block_size: int) -> Any:
    """FlexAttention's BlockMask: critical [1, H, nb, nb] among the first nb blocks, all else seen and seeing."""
    from torch.nn.attention.flex_attention import BlockMask

    (batch, heads, nb, _), rows = critical.shape, -(-sequence // block_size)
    seen = critical.new_ones(batch, heads, rows, rows)
    seen[:, :, :nb, :nb] = critical
    whole = sequence // block_size  # blocks without an end inside
    full, partial_ = seen.clone(), seen
    full[..., whole:] = False
    partial_[..., :whole] = False
    (counts, index), (full_counts, full_index) = (_listed(each) for each in (partial_, full))
    return BlockMask.from_kv_blocks(
        counts, index, full_counts, full_index, BLOCK_SIZE=block_size, mask_mod=_inside(sequence),
        seq_lengths=(sequence, sequence),
    )  # fmt: skip


def _inside(sequence: int) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, kv: kv < sequence


def _listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bool [..., n] how many are set in every row, and which, these first: int32 [...] and [..., n]."""
    ranked = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), ranked.int()


def _no_flex(case: Case) -> str | None:
    if case.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on a CPU (apt-get install g++)"
    return None


# --- kernels of their own


def _sage(case: Case, variant: Variant, qkv: Tensors) -> Prepared:
    from sageattention import sageattn

    return Prepared(partial(sageattn, tensor_layout="NHD", is_causal=False), 1.0)


def _vsa(case: Case, variant: Variant, qkv: Tensors) -> Prepared:
    """Its coarse branch, whose share a model has to learn, counts nothing; consecutive tokens make a block."""
    module = import_module(_vsa_module() or "fastvideo_kernel")
    nb = case.shape.tokens // _VSA_BLOCK
    sizes = torch.full((nb,), _VSA_BLOCK, dtype=torch.int32, device=case.device)
    top_k = top_k_of(case.config_of(variant), nb)
    options = {"topk": top_k, "block_size": (4, 4, 4)}
    options |= {"variable_block_sizes": sizes, "q_variable_block_sizes": sizes}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        coarse = q.new_zeros(()).expand(q.shape)
        return module.video_sparse_attn(q, k, v, compress_attn_weight=coarse, **options).transpose(1, 2)

    return Prepared(run, top_k / nb)


def _sol_attn(case: Case, variant: Variant, qkv: Tensors) -> Prepared:
    """It has a threshold, no sparsity: the one above which independent normal numbers keep as many blocks."""
    from sol_attn import sol_attn

    assert variant.sparsity is not None
    text = {"sink_tokens": case.shape.text, "sink_start": 0 if case.shape.text_first else None}
    tau = NormalDist().inv_cdf(min(max(variant.sparsity, 1e-6), 1 - 1e-6))
    return Prepared(partial(sol_attn, tau=tau, **text), 1 - variant.sparsity, equal=False)


def _no_sage(case: Case) -> str | None:
    return _missing("sageattention", "pip install sageattention") or no_gpu_for(case, (8, 0), 128)


def _vsa_module() -> str | None:
    return next((name for name in ("fastvideo_kernel", "vsa") if find_spec(name) is not None), None)


def _no_vsa(case: Case) -> str | None:
    if _vsa_module() is None:
        return "fastvideo_kernel is not installed (pip install fastvideo-kernel)"
    if case.shape.tokens % _VSA_BLOCK:
        return f"takes whole blocks of {_VSA_BLOCK} tokens, this shape has {case.shape.tokens}"
    return no_gpu_for(case, (8, 0), 128) or _unequal_heads(case)


def _no_sol_attn(case: Case) -> str | None:
    clone = "git clone --branch sol-engine https://github.com/NVlabs/Sana"
    how = f"it is in no registry: {clone}, then pip install ./Sana/techniques/sparse_backends"
    reason = _missing("sol_attn", how) or no_gpu_for(case, (8, 0), 128) or _unequal_heads(case)
    if reason is None and (case.dtype != torch.bfloat16 or case.shape.head_dim != 128):
        return f"runs bfloat16 and head size 128 only, this is {case.dtype_name} and {case.shape.head_dim}"
    return reason


def _missing(module: str, how: str) -> str | None:
    return None if find_spec(module) is not None else f"{module} is not installed ({how})"


def _unequal_heads(case: Case) -> str | None:
    shape = case.shape
    return None if shape.kv_heads in (None, shape.heads) else f"takes as many key heads as query heads, {shape.heads}"


def _moved(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [1, S, H or Hk, D] with the tokens of every head in its order, int64 [H, S]."""
    order = order[:: len(order) // x.shape[2]]
    return x.gather(1, order.T[None, ..., None].expand_as(x))


_ROWS = (
    Peer(_flex, _no_flex),
    Peer(_sage, _no_sage, sparse=False),
    Peer(_sol_attn, _no_sol_attn),
    Peer(_vsa, _no_vsa),
)
PEERS: dict[str, Peer] = dict(zip(PEER_NAMES, _ROWS, strict=True))
