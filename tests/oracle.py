"""An independent oracle: the method of docs/method.md on dense S x S float64 matrices, without loops over blocks.

Membership of tokens in blocks is a 0/1 matrix, so every stage is one einsum or one line of boolean algebra. Nothing
here comes from the package but the order of the curve, which test_orders.py judges by itself.
"""

from dataclasses import dataclass

import torch

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.orders import CURVES

BY_ERROR = ("row+slope", "query+slope")  # modes that choose blocks by the error they would leave


@dataclass
class Truth:
    """What a call must give. `weights` is the effective attention matrix: out = weights @ v, rows of sum 1."""

    out: torch.Tensor  # [B, S, H, D]
    weights: torch.Tensor  # [B, H, S, S]
    critical: torch.Tensor  # bool [B, H, nb, nb]
    compensated: torch.Tensor  # bool [B, H, nb, nb]
    probability: torch.Tensor  # [B, H, nb, nb + 1]
    r: torch.Tensor  # [B, H, nb]
    density: float
    undecided: torch.Tensor  # bool [B, H, nb, nb]: the gain is within float32 rounding of the pooling error


def membership(layout: TokenLayout, config: SparseConfig) -> torch.Tensor:
    """0/1 [S, nb]: which token of the sequence is in which block; rows of zeros are isolated tokens."""
    tokens, b = _along_the_curve(layout, config), config.block_size
    member = torch.zeros(layout.sequence, len(tokens) // b, dtype=torch.float64)
    for position, place in enumerate(tokens):
        if position // b < len(tokens) // b:
            member[place, position // b] = 1
    return member


def _along_the_curve(layout: TokenLayout, config: SparseConfig) -> list[int]:
    """Places of the tokens that can be tiled, in the order in which blocks are cut."""
    tileable = {place for first, last in layout.spans for place in range(first, last)}
    if layout.grid is None:
        return sorted(tileable)
    curve = CURVES.get(config.order, CURVES["gilbert"])(layout.grid, config.block_size)
    return [layout.grid_start + raster for raster in curve if layout.grid_start + raster in tileable]


def touching(layout: TokenLayout, config: SparseConfig) -> torch.Tensor:
    """bool [nb, nb] by brute force over all pairs of video tokens: is any pair at most one step apart on every axis?"""
    t, h, w = layout.grid
    places = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
    near = ((places[:, None] - places[None, :]).abs().amax(-1) <= 1).double()
    member = _in_the_grid(layout, config)
    return (member.T @ near @ member) > 0


def holds_frame_0(layout: TokenLayout, config: SparseConfig) -> torch.Tensor:
    """bool [nb]"""
    return _in_the_grid(layout, config)[: layout.grid[1] * layout.grid[2]].sum(0) > 0


def _in_the_grid(layout: TokenLayout, config: SparseConfig) -> torch.Tensor:
    t, h, w = layout.grid
    return membership(layout, config)[layout.grid_start : layout.grid_start + t * h * w]


def choose_blocks(
    probability: torch.Tensor, layout: TokenLayout, config: SparseConfig, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Stage 3 by counting: a block's rank is how many blocks beat it, and it is kept for top_p while those above it,
    with the isolated tokens, hold less than top_p. probability: [..., nb, nb + 1]. residual: [..., nb, nb], for modes
    that rank blocks by it among those of the whole head, behind the best of every row.
    """
    p, alone = probability[..., :-1].double(), probability[..., -1:].double()
    nb = p.shape[-1]
    if config.top_p == 1:
        return torch.ones((*p.shape[:-1], nb), dtype=torch.bool)
    index = torch.arange(nb)
    mine, other = p[..., :, None], p[..., None, :]
    beats = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))  # [..., mine, other]
    rank = beats.sum(-1)
    above = (beats * other).sum(-1)
    top_k = max(1, int((1 - config.sparsity) * nb))
    keep = rank < top_k
    if config.rectify in BY_ERROR:
        best = torch.nn.functional.one_hot(residual.argmax(-1), nb) > 0 if nb else keep
        score = residual.masked_fill(best, torch.inf).flatten(-2)
        at_least = (score[..., None, :] >= score[..., :, None]).sum(-1)  # all that tie with a block go with it
        keep = best | (at_least <= top_k * nb).view(keep.shape)
    keep = keep | (alone + above < config.top_p)
    if config.neighbours:
        keep = keep | touching(layout, config)
    if config.first_frame:
        first = holds_frame_0(layout, config)
        keep = keep | (first[:, None] & first[None, :])
    return keep


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    *,
    text_mask: torch.Tensor | None = None,
    scale: float | None = None,
    block_mask: torch.Tensor | None = None,
    compensated: torch.Tensor | None = None,
) -> Truth:
    """q: [B, S, H, D]; k, v: [B, S, Hk, D], whose heads serve H / Hk of q each. `block_mask` and `compensated` replace
    stages 3 and 4 where selection could flip.
    """
    group = q.shape[2] // k.shape[2]
    q = q.double().transpose(1, 2)  # [B, H, S, D]
    k, v = (x.double().transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    batch, _, sequence, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    b, member = config.block_size, membership(layout, config)  # [S, nb]
    tiled = member.sum(1) > 0  # [S]
    tileable = torch.tensor([any(first <= s < last for first, last in layout.spans) for s in range(sequence)])
    text_at = (~tileable).nonzero().flatten()
    valid = torch.ones(batch, sequence, dtype=torch.bool)
    if text_mask is not None:
        valid[:, text_at] = text_mask
    alone = valid & ~tiled  # [B, S]
    k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))  # whatever padding holds, it is not attended to

    # 1 pool
    member_b = member / b
    q_block = q.masked_fill(~tiled[:, None], 0)  # padding may hold NaN, and 0 * NaN is NaN
    qm, km = (torch.einsum("bhsd,sn->bhnd", x, member_b) for x in (q_block, k))
    dq, dk = (
        torch.einsum("bhsd,sn->bhnd", (x - torch.einsum("bhnd,sn->bhsd", mean, member)).abs(), member_b)
        for x, mean in ((q_block, qm), (k, km))
    )

    # 2 estimate
    block_logits = scale * torch.einsum("bhnd,bhmd->bhnm", qm, km)
    if config.rectify == "pooled":
        columns, present = _pooled_columns(k, alone, b, text_at, tiled)
    else:
        columns, present = k, alone
        block_logits = block_logits + torch.log(torch.tensor(b, dtype=torch.float64))
    alone_logits = scale * torch.einsum("bhnd,bhtd->bhnt", qm, columns)
    alone_logits = alone_logits.masked_fill(~present[:, None, None, :], -torch.inf)
    total = torch.logsumexp(torch.cat([block_logits, alone_logits], -1), -1, keepdim=True)
    p_blocks = (block_logits - total).exp()
    probability = torch.cat([p_blocks, (alone_logits - total).exp().sum(-1, keepdim=True)], -1)

    # 3 select, 4 gain
    half_variance = _half_variance(qm, k, member_b, scale)
    critical, residual = block_mask, None
    if block_mask is None:
        if config.rectify in BY_ERROR:
            told = p_blocks * (2 * half_variance).sqrt()
            if config.rectify == "query+slope":
                place = torch.zeros(sequence)
                for position, at in enumerate(_along_the_curve(layout, config)):
                    place[at] = position % b
                told = _told_by_queries(q_block, k, member_b, alone[:, None, None, :], place, scale, b)
            residual = told * _moved(q_block, k, v, member_b, tiled, scale, group)
        critical = choose_blocks(probability, layout, config, residual)
    worth = torch.einsum("bhnd,bhmd->bhnm", qm, km).abs()
    error = torch.einsum("bhnd,bhmd->bhnm", dq, km).abs() + torch.einsum("bhnd,bhmd->bhnm", qm, dk).abs()
    bulk = torch.einsum("bhnd,bhmd->bhnm", qm.abs() + dq, km.abs() + dk)  # what float32 sums up, before it cancels
    undecided = (worth - error).abs() <= head_dim * 2.0**-23 * bulk
    if compensated is None:
        compensated = {
            "none": torch.zeros_like(critical),
            "pooled": ~critical,
            "ipar": ~critical,
            "ipar+gapr": ~critical & (worth > error),
            "row": ~critical,
            "row+slope": ~critical,
            "query+slope": ~critical,
        }[config.rectify]

    # 5 rectify, 6 attend: one S x S matrix for all of it
    r = 1 - (p_blocks * compensated).sum(-1)
    spread = torch.einsum("bhnm,sn,tm->bhst", p_blocks * compensated / b, member, member)
    sees = torch.einsum("bhnm,sn,tm->bhst", critical.double(), member, member) > 0
    sees = sees | ~tiled[:, None]  # isolated queries see every key
    sees = (sees | alone[:, None, None, :]) & valid[:, None, None, :]
    logits = scale * torch.einsum("bhsd,bhtd->bhst", q, k)
    attention = logits.masked_fill(~sees, -torch.inf).softmax(-1)
    r_token = torch.einsum("bhn,sn->bhs", r, member) + (~tiled).double()
    weights = r_token[..., None] * attention + spread
    if config.rectify in ("row", *BY_ERROR):
        half = _half_variance(q, k, member_b, scale) if config.rectify == "query+slope" else member @ half_variance
        exact, pooled = _with_pooled_keys(
            q, km, logits.masked_fill(~sees, -torch.inf), member @ compensated.double() > 0, half.clamp(max=2), scale, b
        )
        weights = exact + torch.einsum("bhsm,tm->bhst", pooled, member_b)
    if config.rectify in BY_ERROR:
        spread = half_variance if config.rectify == "row+slope" else torch.zeros_like(half_variance)
        mass = (p_blocks * spread.clamp(max=2).exp() * compensated).sum(2)  # [B, H, nb]
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)
        # q·(k_t - k̄) for the token t of block m, times the weight of m over b: row s of q H Vᵀ without V
        within = torch.eye(sequence, dtype=torch.float64) - member @ member_b.T
        moved = scale * q @ (within @ k).transpose(-1, -2) * torch.einsum("bhm,tm->bht", mass, member_b)[:, :, None]
        weights = weights + pooled.sum(-1, keepdim=True) * (moved @ within)
    executed = sees.double().mean(1).sum((1, 2))
    if config.rectify in ("row", *BY_ERROR):  # a pooled key of a block is one key to each of b queries
        executed = executed + b * compensated.double().mean(1).sum((1, 2))
    pairs = executed / (sequence * valid.sum(1))
    return Truth(
        out=(weights @ v).transpose(1, 2),
        weights=weights,
        critical=critical,
        compensated=compensated,
        probability=probability,
        r=r,
        density=pairs.mean().item(),
        undecided=undecided,
    )


def _half_variance(q: torch.Tensor, k: torch.Tensor, member_b: torch.Tensor, scale: float) -> torch.Tensor:
    """½ scale² Σ_d q_d² (mean of k_d² - k̄_d²), of queries or their means: [B, H, S or nb, nb]."""
    mean, square = (torch.einsum("bhsd,sn->bhnd", x, member_b) for x in (k, k * k))
    return scale**2 / 2 * torch.einsum("bhnd,bhmd->bhnm", q**2, square - mean**2)


def _with_pooled_keys(
    q: torch.Tensor,
    km: torch.Tensor,
    logits: torch.Tensor,
    joins: torch.Tensor,
    half: torch.Tensor,
    scale: float,
    b: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, H, S, S] and [B, H, S, nb] of one softmax over exact and pooled keys, whose logits are
    scale * q·k̄ + log b + half where joins, bool [B, H, S, nb]; half: [B, H, S, nb].
    """
    pooled = scale * torch.einsum("bhsd,bhmd->bhsm", q, km) + torch.tensor(float(b)).double().log() + half
    both = torch.cat([logits, pooled.masked_fill(~joins, -torch.inf)], -1).softmax(-1)
    return both[..., : logits.shape[-1]], both[..., logits.shape[-1] :]


def _told_by_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    member_b: torch.Tensor,
    alone: torch.Tensor,
    place: torch.Tensor,
    scale: float,
    b: int,
) -> torch.Tensor:
    """The root mean square of P_i σ_i over some queries of a block: [B, H, nb, nb]. alone: bool [B, 1, 1, S], isolated
    valid keys; place: [S], a token's in its block.
    """
    half = _half_variance(q, k, member_b, scale)
    km = torch.einsum("bhsd,sn->bhnd", k, member_b)
    pooled = scale * torch.einsum("bhsd,bhmd->bhsm", q, km) + torch.tensor(float(b)).double().log()
    single = (scale * q @ k.transpose(-1, -2)).masked_fill(~alone, -torch.inf)
    weights = torch.cat([pooled + half.clamp(max=2), single], -1).softmax(-1)[..., : member_b.shape[1]]
    step = max(1, b // 32)  # of the queries of a block that are looked at
    some = member_b * (place % step == step // 2)[:, None]
    return torch.einsum("bhsm,sn->bhnm", weights**2 * 2 * half, some / some.sum(0)).sqrt()


def _moved(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    member_b: torch.Tensor,
    tiled: torch.Tensor,
    scale: float,
    group: int,
) -> torch.Tensor:
    """The root mean square of |scale q H_m| over the queries of a block, H_m projected on the 8 main generalised
    eigenvectors of M_q and the covariance of keys, over all tiled tokens (fewer than the 2048 of a sample) of the
    `group` heads that share keys. q, k, v: [B, H, S, D].
    """
    if not tiled.sum() > q.shape[3]:  # one block at most: there is nothing to choose
        return q.new_zeros(*q.shape[:2], member_b.shape[1], member_b.shape[1])
    some_q, some_k = q[:, :, tiled], k[:, :, tiled]
    covariance = (some_k - some_k.mean(2, keepdim=True)).transpose(-1, -2) @ some_k / tiled.sum()
    lower = torch.linalg.cholesky(covariance)
    square = (some_q.transpose(-1, -2) @ some_q).unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1)
    seen = scale**2 * lower.transpose(-1, -2) @ square @ lower
    main = torch.linalg.eigh(seen)[1][..., -8:]  # u = L⁻ᵀ z
    projector = lower @ main @ main.transpose(-1, -2) @ torch.linalg.inv(lower)  # C U Uᵀ, for q from the left
    km, vm = (torch.einsum("bhsd,sn->bhnd", x, member_b) for x in (k, v))
    h = torch.einsum("bhtd,bhte,tm->bhmde", k, v, member_b) - torch.einsum("bhmd,bhme->bhmde", km, vm)
    moved = scale * torch.einsum("bhsd,bhmde->bhsme", q @ projector, h)
    mean_square = torch.einsum("bhsm,sn->bhnm", moved.square().sum(-1), member_b)
    return mean_square.clamp(min=0).sqrt()


def _pooled_columns(
    k: torch.Tensor, alone: torch.Tensor, b: int, text_at: torch.Tensor, tiled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The "pooled" ablation's isolated columns: one mean of the leftover video tokens, one of every b text tokens, over
    the valid ones. Returns [B, H, columns, D] and bool [B, columns], which of them hold a token.
    """
    sequence = len(tiled)
    groups = torch.zeros(sequence, 1 + -(-len(text_at) // b), dtype=torch.float64)
    groups[~tiled, 0] = 1
    groups[text_at] = 0
    groups[text_at, 1 + torch.arange(len(text_at)) // b] = 1
    weight = groups[None] * alone[..., None]  # [B, S, columns]
    count = weight.sum(1)
    means = torch.einsum("bhsd,bsc->bhcd", k, weight / count.clamp(min=1)[:, None])
    return means, count > 0


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sees: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Full attention in float64, [B, S, H, D]; sees: bool, broadcastable to [B, H, S, S]; k, v maybe of fewer heads."""
    q, k, v = (x.double().repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    if sees is not None:
        logits = logits.masked_fill(~sees, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sees: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """PyTorch's own attention on [B, S, H, D], in the dtype of the inputs; k, v: maybe of fewer heads."""
    q, k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)
    return out.transpose(1, 2)
