"""Rules of other publications: exact where nothing is dropped, within their budget, and what each says by hand."""

import csv
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.lab.calls.capture import AttentionCall
from studies import ingredients
from studies.rivals import groups, ours, sol, sparsepr, svg_ear
from studies.rivals.__main__ import NAMES, OTHERS, Options, rivals
from studies.rivals.contract import Head, NotPossible, head_of, relative_error
from study_runs import run_study, table_lines

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = OTHERS | ours.rules(SparseConfig(block_size=64, top_p=0.0))
GRID = (4, 8, 17)  # 544 tokens: 8 blocks of 64 and 32 left over


def head(grid: tuple[int, int, int] = GRID, spread: float = 1.0, device: str = "cpu") -> Head:
    """Noise around a few means, so that tokens have something in common; 5 of 7 text tokens are valid."""
    torch.manual_seed(0)
    tokens = math.prod(grid)
    kind = torch.randint(6, (tokens + 7,))
    q, k, v = (torch.randn(6, 16)[kind] + spread * torch.randn(tokens + 7, 16) for _ in range(3))
    text = (torch.arange(7) < 5)[None]
    sequence = {name: x[None, :, None].to(device) for name, x in (("q", q), ("k", k), ("v", v))}
    sequence["text_mask"] = text.to(device)
    layout = TokenLayout.build(grid, 7)
    return head_of(AttentionCall(**sequence, layout=layout, layer=0, name="0", step=0, head=0))


def test_full_attention_is_torchs_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    one = head()
    k, v = torch.cat([one.k, one.k_alone]), torch.cat([one.v, one.v_alone])
    assert len(k) == math.prod(GRID) + 5
    expected = scaled_dot_product_attention(one.q[None], k[None], v[None])[0]
    torch.testing.assert_close(groups.exact(one), expected)
    monkeypatch.setattr(groups, "CHUNK", 3000)
    torch.testing.assert_close(groups.exact(one), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_may_keep_everything_is_exact(name: str) -> None:
    one = head()
    answer = RULES[name](one, 4.0)
    torch.testing.assert_close(answer.out, groups.exact(one), atol=2e-5, rtol=1e-4)
    assert answer.pairs.exact == pytest.approx(one.all_pairs)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_stay_within_the_budget_and_more_of_them_help(name: str) -> None:
    one = head()
    full, errors = groups.exact(one), []
    for budget in (0.5, 0.9):
        answer = RULES[name](one, budget)
        assert budget - 0.25 < answer.pairs.total / one.all_pairs <= budget  # a row of blocks of ours is 0.12
        errors.append(relative_error(answer.out, full))
    assert 1e-4 < errors[1] < errors[0]
    with pytest.raises(NotPossible, match=r"budget: got 0\.005"):
        RULES[name](one, 0.005)


def test_what_is_dropped_is_missed() -> None:
    """A negative control: the same groups and choice without a tail are worse."""
    one = head()
    full = groups.exact(one)
    for other in (RULES["sol-gilbert"], RULES["svg-ear"], RULES["row"]):
        assert relative_error(other(one, 0.5).out, full) < relative_error(RULES["plain"](one, 0.5).out, full)


def test_ingredients_put_both_rules_together_again() -> None:
    """The groups, the choice and the tail of SVG-EAR are its rule; the tail of row+slope is the operator's."""
    one = head((8, 8, 8))
    made = [ingredients.groups(one, side, "k-means") for side in ingredients.sides(one)]
    out, exact = ingredients.answer(one, *made, ingredients.estimate(one, *made), "error", "mean", 0.5)
    rule = svg_ear.svg_ear(one, 0.5)
    torch.testing.assert_close(out, rule.out, atol=1e-5, rtol=1e-4)
    assert exact == pytest.approx(rule.pairs.exact / one.all_pairs)

    expected, stats = one.call.sparse(SparseConfig(sparsity=0.7, top_p=0.0, block_size=64, rectify="row+slope"))
    blocks = groups.consecutive(stats.token_order[0, 0], 64)
    about = ingredients.estimate(one, blocks, blocks)
    out = ingredients.attended(one, blocks, blocks, stats.block_mask[0, 0], about, "slope")
    torch.testing.assert_close(out, expected[0, :512, 0], atol=1e-4, rtol=1e-3)
    assert 0.1 < stats.block_mask.float().mean() < 0.5


def test_a_tree_cuts_where_the_least_variance_is_left() -> None:
    x = torch.cat([torch.full((48, 2), 5.0), torch.zeros(96, 2), torch.full((16, 2), -3.0)])[torch.randperm(160)]
    found = ingredients.tree(x, 3, 16)
    assert sorted(found.size.tolist()) == [16, 48, 96]
    assert (x - found.mean(x)[found.label]).abs().max() == 0
    finer = ingredients.tree(x + torch.randn(160, 2), 7, 16)
    assert len(finer.size) == 7
    assert (finer.size % 16 == 0).all()
    assert finer.size.sum() == 160
    assert len(ingredients.tree(x, 50, 16).size) == 10  # no group can be smaller


def test_centroids_stand_for_keys_that_are_equal() -> None:
    """Six kinds of tokens without noise: clusters hold equal tokens, so nothing is lost, and k-means must find them."""
    one = head(spread=0.0)
    assert relative_error(svg_ear.svg_ear(one, 0.1).out, groups.exact(one)) < 1e-5
    assert relative_error(RULES["sol-raster"](one, 0.3).out, groups.exact(one)) > 0.01  # blocks in space mix them


def test_compensation_error_by_hand() -> None:
    one = head(grid=(1, 3, 8))
    of_k = groups.groups_of(torch.arange(24) % 4, 4)
    q_mean = one.q[:3]
    found = svg_ear.compensation_error(one, q_mean, of_k)
    keys = torch.cat([one.k, one.k_alone])
    for n in range(3):
        total = (one.scale * keys @ q_mean[n]).exp().sum()
        for m in range(4):
            mine = of_k.label == m
            kept = ((one.scale * one.k[mine] @ q_mean[n]).exp()[:, None] * one.v[mine]).sum(0)
            pooled = 6 * (one.scale * one.k[mine].mean(0) @ q_mean[n]).exp() * one.v[mine].mean(0)
            assert found[n, m].item() == pytest.approx(((kept - pooled) / total).norm().item(), rel=1e-4)


def test_what_is_kept_goes_by_score_as_far_as_the_room() -> None:
    score, cost = torch.tensor([[5.0, 1.0], [4.0, 3.0]]), torch.tensor([[2.0, 2.0], [3.0, 1.0]])
    assert groups.within(score, cost, 5.5).tolist() == [[True, False], [True, False]]
    assert groups.within(score, cost, 6.0).tolist() == [[True, False], [True, True]]
    low = torch.tensor([[5.0, 1.0], [0.4, 0.3]])
    assert groups.within(low, cost, 5.5, least=True).tolist() == [[True, False], [True, False]]


def test_curves_by_hand() -> None:
    assert sol.morton((2, 2, 2)) == list(range(8))
    assert sol.morton((1, 4, 4))[:6] == [0, 1, 4, 5, 2, 3]
    layout = TokenLayout.build((1, 4, 4), 3, text_first=True)
    assert sol.order_along(layout, sol.morton)[:6].tolist() == [0, 1, 4, 5, 2, 3]
    with pytest.raises(NotPossible, match="no grid"):
        sol.order_along(TokenLayout.of(8, [(0, 8)]), sol.morton)


def test_a_repair_of_low_rank_finds_what_is_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 24)
    lacks = x @ torch.randn(24, 3) @ torch.randn(3, 24) + 2.0
    left = lacks - sparsepr.repair(x[:64], lacks[:64], x)
    assert left.norm() < 0.25 * lacks.norm()
    noise = torch.randn(500, 24)  # a negative control: nothing to find
    assert (noise - sparsepr.repair(x[:64], noise[:64], x)).norm() > noise.norm()


@pytest.mark.parametrize(
    ("name", "kept", "pooled", "queries"), [("plain", 3, 0, 1), ("row", 3, 1, 1), ("query+slope", 2, 1.5, 33)]
)
def test_pairs_of_our_own_modes_are_those_of_the_operator(name: str, kept: int, pooled: float, queries: int) -> None:
    one = head()
    answer = RULES[name](one, 0.5)
    tiled, left, text = 512, 32, 5
    assert answer.pairs.exact == 8 * kept * 64**2 + 2 * tiled * left + left**2 + (tiled + left) * text
    assert answer.pairs.estimates == 8 * queries * (8 + left + text)
    assert answer.pairs.pooled == tiled * 8 * pooled


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_on_a_gpu_is_what_it_is_on_a_cpu(name: str) -> None:
    there, here = head(device="cuda"), head()
    got, expected = RULES[name](there, 0.5), RULES[name](here, 0.5)
    assert got.out.device.type == "cuda"
    assert got.pairs.total == pytest.approx(expected.pairs.total, rel=0.05)  # ties of a clustering may fall elsewhere
    errors = [relative_error(x.out, groups.exact(one)) for x, one in ((got, there), (expected, here))]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_the_study_on_the_demo_model(tmp_path: Path) -> None:
    words = ["--pairs", "1", "--height", "32", "--width", "32", "--frames", "8", "--steps", "2", "--device", "cpu"]
    words += [
        "--step",
        "1",
        "--layer",
        "0",
        "--head",
        "1",
        "--budget",
        "0.4",
        "--budget",
        "0.01",
        "--out",
        str(tmp_path),
    ]
    printed = run_study(Options, rivals, *words)
    with (tmp_path / "rivals-dev.csv").open(newline="") as file:
        rows = {row["rule"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(NAMES)
    assert all(float(row["pairs"]) <= 0.4 for row in rows.values())
    assert float(rows["row"]["error"]) < float(rows["plain"]["error"])
    lines = table_lines(printed)
    assert len(lines) == 2 + len(NAMES)
    assert max(map(len, lines)) <= 80
    assert printed.count("Not measured: ") == len(NAMES)  # nothing can be had for 1%
    again = run_study(Options, rivals, "--table-of", str(tmp_path / "rivals-dev.csv"))
    assert table_lines(again) == lines


def test_the_study_on_another_pipeline(models: Path, tmp_path: Path) -> None:
    words = ["--model", str(models / "wan"), "--height", "128", "--width", "128", "--frames", "9", "--steps", "2"]
    words += ["--argument", "max_sequence_length=12", "--device", "cpu", "--step", "1", "--budget", "0.7"]
    refused = run_study(Options, rivals, *words, code=2)
    assert "prompt: got none" in refused
    printed = run_study(
        Options,
        rivals,
        *words,
        "--prompt",
        "a b c",
        "--rule",
        "sol-gilbert",
        "--rule",
        "svg-ear",
        "--out",
        str(tmp_path),
    )
    assert [line.split("|")[1].strip() for line in table_lines(printed)[2:]]
