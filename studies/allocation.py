"""How much attention mass a sparse call gives to the tokens it keeps, against what full attention gives them.

The mass is measured, not read from the plan: the operator runs on values that are 1 for the tokens of one block and 0
elsewhere, so an output is the weight that a query gives to the block. That holds for every `rectify` mode alike.
"""

from dataclasses import dataclass, replace

import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import block_of_tokens, full_attention
from rectified_spaattn.orders import Blocks


@dataclass(frozen=True, kw_only=True, eq=False)
class Exact:
    """Full attention on one call.

    call    with the values that probe the masses behind the real ones, as further heads; where blocks are sorted by
            content, with the tokens in that order, so that one set of blocks holds for all heads
    config  whose order and block size these are
    blocks  of the call's tokens
    out     [B, S, H, D]
    masses  [B, nb, b, H, nb], weight of every tiled query on every key block; the rest is on isolated tokens
    """

    call: AttentionCall
    config: SparseConfig
    blocks: Blocks
    out: torch.Tensor
    masses: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Allocation:
    """One call under one config against full attention: float32 [B] each, over all heads.

    relative_error    |out - full| / |full| over the video tokens (Frobenius norms)
    mass_error        mean over queries of |weight given to the kept tokens - their mass under full attention|; kept are
                      the critical blocks and the isolated tokens
    block_mass_error  the same for the means of query blocks, which is all that one factor R a block can reach
    kept_mass         mean mass of the kept tokens under full attention
    density           computed query-key pairs over all pairs, mean of the batch
    """

    relative_error: torch.Tensor
    mass_error: torch.Tensor
    block_mass_error: torch.Tensor
    kept_mass: torch.Tensor
    density: float


def exact(call: AttentionCall, config: SparseConfig) -> Exact:
    """Full attention and its masses on the blocks of `config`, once for many modes and sparsities.

    Raises as blocks_of does.
    """
    heads = call.q.shape[2]
    call = call.in_order(config)
    blocks = call.blocks(config)
    probed = _probed(call, blocks)
    out = full_attention(probed)
    masses = _masses(out, blocks, heads)
    return Exact(call=probed, config=config, blocks=blocks, out=out[:, :, :heads], masses=masses)


def allocation(full: Exact, config: SparseConfig, *, backend: str = "auto") -> Allocation:
    """Compare rectified_attention under `config` with full attention. Raises as rectified_attention does."""
    call, blocks, heads = full.call, full.blocks, full.out.shape[2]
    if (config.block_size, config.order) != (full.config.block_size, full.config.order):
        raise ValueError(
            f"config: got blocks of {config.block_size} in {config.order!r} order; allowed: those of full, "
            f"{full.config.block_size} in {full.config.order!r}."
        )
    both, stats = call.sparse(config, backend=backend)
    exact_out = full.out[:, call.video]
    wrong = (both[:, call.video, :heads] - exact_out).flatten(1).norm(dim=1)
    kept = stats.block_mask[:, :heads].transpose(1, 2)[:, :, None]  # [B, nb, 1, H, nb]
    sparse, true = (_kept(masses, kept) for masses in (_masses(both, blocks, heads), full.masses))  # [B, nb, b, H]
    return Allocation(
        relative_error=wrong / exact_out.flatten(1).norm(dim=1),
        mass_error=(sparse - true).abs().mean((1, 2, 3)),
        block_mass_error=(sparse.mean(2) - true.mean(2)).abs().mean((1, 2)),
        kept_mass=true.mean((1, 2, 3)),
        density=stats.density,
    )


def _probed(call: AttentionCall, blocks: Blocks) -> AttentionCall:
    """The call with groups of further heads: the same q and k, and one column of v a block, as many as v has."""
    dim = call.v.shape[3]
    block_of = block_of_tokens(blocks)
    groups = -(-blocks.num_blocks // dim)
    columns = torch.arange(groups * dim, device=block_of.device)
    probes = (block_of[:, None] == columns).to(call.v.dtype).view(1, -1, groups, 1, dim)
    probes = probes.expand(call.v.shape[0], -1, -1, call.v.shape[2], -1).flatten(2, 3)
    return replace(
        call,
        q=call.q.repeat(1, 1, 1 + groups, 1),
        k=call.k.repeat(1, 1, 1 + groups, 1),
        v=torch.cat([call.v, probes], dim=2),
    )


def _masses(out: torch.Tensor, blocks: Blocks, heads: int) -> torch.Tensor:
    """What the heads behind the first `heads` hold: [B, nb, b, H, nb]."""
    tiled = out[:, blocks.tiled, heads:].unflatten(1, (blocks.num_blocks, blocks.block_size))
    by_group = tiled.unflatten(3, (-1, heads)).transpose(3, 4)  # [B, nb, b, H, groups, D]
    return by_group.flatten(4)[..., : blocks.num_blocks]


def _kept(masses: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """All weight but that on blocks that are not kept: [B, nb, b, H]."""
    return 1 - (masses * ~kept).sum(-1)
