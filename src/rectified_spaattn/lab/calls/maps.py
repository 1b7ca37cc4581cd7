"""One head of one attention call, block by block: where its attention mass goes under every rectify mode."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import RECTIFY, SparseConfig
from ...orders import Blocks
from .capture import AttentionCall
from .error import attention_error, block_masses, block_of_tokens, full_attention, kept_mass, misplaced

OnResult = Callable[[str], None]  # what is finished, once a result
KINDS = ("critical", "compensated", "rejected")  # what becomes of a block


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadResult:
    """One head under one config, against full attention of the same q, k and v.

    relative_error    |out - full| / |full| over the video tokens (Frobenius norms)
    density           computed query-key pairs over all pairs
    kept_mass         full-attention mass on the critical blocks and the isolated tokens, mean over query blocks
    mass_error        mean over query blocks of |weight given to what is kept - its full-attention mass|
    r_error           the same for all that is not compensated: |R - full-attention mass of the critical, isolated and
                      rejected columns|, R being what the output gives them in all; 0 where nothing is compensated
    misplaced         share of the mass that lies on other blocks than under full attention: half the L1 distance
    compensated       share of the dropped blocks that is compensated
    masses            float32 [nb, nb + 1], how the output weighs the values of every block and of the isolated tokens
    probability       float32 [nb, nb + 1], the estimate P the plan was made from
    block_mask        bool [nb, nb], the critical blocks
    compensated_mask  bool [nb, nb], the compensated ones; all others are rejected
    """

    sparsity: float
    rectify: str
    relative_error: float
    density: float
    kept_mass: float
    mass_error: float
    r_error: float
    misplaced: float
    compensated: float
    masses: torch.Tensor
    probability: torch.Tensor
    block_mask: torch.Tensor
    compensated_mask: torch.Tensor

    def kinds(self) -> torch.Tensor:
        """int64 [nb, nb]: the place in KINDS of every block."""
        return torch.where(self.block_mask, 0, torch.where(self.compensated_mask, 1, 2))

    def scores(self) -> dict[str, Any]:
        """All that is no map, by name."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)}


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadStudy:
    """One head under every mode and sparsity.

    call     in the order of the blocks
    order    of SparseConfig
    blocks   of its tokens
    full     float32 [nb, nb + 1], the block masses of full attention
    results  (sparsity, mode) -> what came of it, sparsity by sparsity
    """

    call: AttentionCall
    order: str
    blocks: Blocks
    full: torch.Tensor
    results: dict[tuple[float, str], HeadResult]

    def shares(self, result: HeadResult) -> dict[str, float]:
        """KIND_blocks, KIND_mass: the share of the blocks that is of a kind, and of the full-attention mass on them.

        text_mass: on the isolated tokens; correlation: of the estimate with the full-attention masses.
        """
        both = torch.stack([self.full.flatten(), result.probability.flatten()])
        shares = {"correlation": torch.corrcoef(both)[0, 1].item(), "text_mass": self.full[:, -1].mean().item()}
        for index, kind in enumerate(KINDS):
            blocks = result.kinds() == index
            shares[f"{kind}_blocks"] = blocks.float().mean().item()
            shares[f"{kind}_mass"] = (self.full[:, :-1] * blocks).sum(1).mean().item()
        return shares


def one_head(call: AttentionCall, head: int, device: torch.device | str = "cpu") -> AttentionCall:
    """The same call with batch 0 and one head alone, [1, S, 1, D], on `device`. Raises ValueError for no such head."""
    heads = call.q.shape[2]
    if not 0 <= head < heads:
        raise ValueError(f"head: got {head}; allowed: 0 to {heads - 1}.")
    of_k = head // (heads // call.k.shape[2])
    places = {"q": head, "k": of_k, "v": of_k}
    alone = {name: getattr(call, name)[:1, :, at : at + 1].to(device) for name, at in places.items()}
    return replace(call, **alone, text_mask=call.text_mask[:1].to(device), head=head)


def output_masses(call: AttentionCall, config: SparseConfig, backend: str = "auto") -> torch.Tensor:
    """How the output of a call weighs the values of every block, whatever the rectify mode: float32 [nb, nb + 1].

    call: one head, in the config's order (see `in_order`). An output is linear in the values, so it is computed for
    values that tell their block: column m is the mean over a query block of the output for v = 1 on block m and 0
    elsewhere. The last column is all isolated tokens. Rows sum to 1.
    """
    blocks = call.blocks(config)
    num_blocks, channels = blocks.num_blocks, call.v.shape[-1]
    block_of = block_of_tokens(blocks)
    columns = []
    for first in range(0, num_blocks + 1, channels):
        wanted = torch.arange(first, first + channels, device=block_of.device)
        values = (block_of[:, None] == wanted).to(call.v)[None, :, None]  # [1, S, 1, D]
        out, _ = replace(call, v=values).sparse(config, backend=backend)
        columns.append(out[0, blocks.tiled, 0].view(num_blocks, blocks.block_size, channels).mean(1))
    return torch.cat(columns, dim=1)[:, : num_blocks + 1]


def study_head(
    call: AttentionCall,
    config: SparseConfig,
    sparsities: Sequence[float],
    modes: Sequence[str] = tuple(RECTIFY),
    *,
    backend: str = "auto",
    on_result: OnResult = lambda name: None,
) -> HeadStudy:
    """Every rectify mode at every sparsity on one head; all else as in `config`.

    Raises ValueError for a grid that is smaller than one block, and as rectified_attention does.
    """
    call = call.in_order(config)
    blocks = call.blocks(config)
    if not blocks.num_blocks:
        raise ValueError(
            f"block_size: got {config.block_size} for {call.layout.video} video tokens; allowed: at most that many, as "
            "fewer make no block and run full attention."
        )
    exact = full_attention(call)
    on_result("full attention")
    full = block_masses(call, blocks, 0)
    on_result("block masses of full attention")
    results = {}
    for sparsity, mode in itertools.product(sparsities, modes):
        results[sparsity, mode] = _result(call, config.replace(sparsity=sparsity, rectify=mode), exact, full, backend)
        on_result(f"{mode} at {sparsity:.4g}")
    return HeadStudy(call=call, order=config.order, blocks=blocks, full=full.cpu(), results=results)


def _result(
    call: AttentionCall, config: SparseConfig, exact: torch.Tensor, full: torch.Tensor, backend: str
) -> HeadResult:
    error = attention_error(call, config, full=exact, backend=backend)
    critical, compensated = error.stats.block_mask[0, 0], error.stats.compensated[0, 0]
    masses = output_masses(call, config, backend)
    apart = masses - full  # rows sum to 0
    on_kept = (apart[:, :-1] * critical).sum(1) + apart[:, -1]
    on_compensated = (apart[:, :-1] * compensated).sum(1)  # what is too much here is too little in R
    dropped = int((~critical).sum())
    return HeadResult(
        sparsity=config.sparsity,
        rectify=config.rectify,
        relative_error=error.relative_error,
        density=error.stats.density,
        kept_mass=kept_mass(critical, full),
        mass_error=on_kept.abs().mean().item(),
        r_error=on_compensated.abs().mean().item(),
        misplaced=misplaced(masses, full),
        compensated=int(compensated.sum()) / dropped if dropped else 0.0,
        masses=masses.cpu(),
        probability=error.stats.probability[0, 0].float().cpu(),
        block_mask=critical.cpu(),
        compensated_mask=compensated.cpu(),
    )
