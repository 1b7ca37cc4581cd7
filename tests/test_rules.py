"""Every rule that can be written, not only those with a name: gates, tails and estimates combine freely."""

from itertools import product

import pytest
import torch

from cases import video_like
from oracle import membership, oracle
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.config import RECTIFY, Rule

LAYOUT = TokenLayout.build((5, 8, 9), text=21)  # 5 blocks of 64 and 40 leftover tokens
RULES = [
    Rule(pooled_text=pooled_text, log_b=log_b, gate=gate, tail=tail)  # type: ignore[arg-type]
    for pooled_text, log_b, gate, tail in product((False, True), (False, True), ("none", "all", "gain"), (False, True))
]
SLOPES = [Rule(gate=gate, tail=True, slope=True, queries=queries) for gate, queries in (("all", False), ("gain", True))]
# interpreting takes a second: each gate with and without a tail, under each kind of estimate
INTERPRETED = [RULES[i] for i in (1, 2, 11, 16, 18, 21)]
MODES = ("row", "row+slope", "query+slope")
CONFIG = SparseConfig(rectify="ipar", order="gilbert", block_size=64, sparsity=0.7, top_p=0.2)


def expected(rule, qkv, mask, block_mask, compensated, scale):
    """probability, r and out of a rule, the choices made, from the oracle of the modes that have names."""

    def named(mode, **choices):
        config = CONFIG.replace(rectify=mode)
        return oracle(*qkv, LAYOUT, config, text_mask=mask, scale=scale, block_mask=block_mask, **choices)

    # a named estimate counts a block's tokens exactly where text is not pooled
    p = named("pooled" if rule.pooled_text else "ipar").probability
    if rule.log_b == rule.pooled_text:
        p[..., :-1] *= 64.0 if rule.log_b else 1 / 64
        p /= p.sum(-1, keepdim=True)
    r = 1 - (p[..., :-1] * compensated).sum(-1)
    if rule.tail:
        return p, r, named(MODES[rule.slope + rule.queries], compensated=compensated).out
    member = membership(LAYOUT, CONFIG)
    means = torch.einsum("bshd,sn->bhnd", qkv[2].double(), member / 64)
    of_block = torch.einsum("bhnm,bhmd,sn->bshd", p[..., :-1] * compensated, means, member)
    factor = torch.einsum("bhn,sn->bsh", r, member) + (member.sum(1) == 0)[None, :, None]
    return p, r, factor[..., None] * named("none").out + of_block


@pytest.mark.parametrize(
    ("backend", "rule"),
    [*(("torch", rule) for rule in RULES + SLOPES), *(("triton", rule) for rule in INTERPRETED + SLOPES[1:])],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)),
)
def test_any_rule(backend, rule, monkeypatch):
    monkeypatch.setitem(RECTIFY, "any", rule)
    qkv = video_like(2, 2, LAYOUT.sequence, 1, 64)
    mask = torch.arange(21) < torch.tensor([[21], [4]])
    config = CONFIG.replace(rectify="any")
    options = {"text_mask": mask, "scale": 0.15, "backend": backend, "return_stats": True}
    out, stats = rectified_attention(*qkv, LAYOUT, config, **options)

    free = oracle(*qkv, LAYOUT, CONFIG.replace(rectify="ipar+gapr"), text_mask=mask, block_mask=stats.block_mask)
    assert not (free.undecided & ~stats.block_mask).any()
    dropped = ~stats.block_mask
    compensated = {"none": torch.zeros_like(dropped), "all": dropped, "gain": free.compensated}[rule.gate]
    assert torch.equal(stats.compensated, compensated)
    p, r, want = expected(rule, qkv, mask, stats.block_mask, compensated, 0.15)
    torch.testing.assert_close(stats.probability.double(), p, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(stats.r.double(), r, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)


def test_the_gate_of_the_inputs_leaves_some_blocks_out():
    """Otherwise "gain" would be "all" above."""
    qkv = video_like(2, 2, LAYOUT.sequence, 1, 64)
    _, stats = rectified_attention(*qkv, LAYOUT, CONFIG.replace(rectify="ipar+gapr"), scale=0.15, return_stats=True)
    assert stats.compensated.any()
    assert (~stats.compensated & ~stats.block_mask).any()
