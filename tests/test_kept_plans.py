"""Plans that live for several steps: what is kept, for whom, how long, how much memory it takes, and what ends it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rectified_spaattn as rsa
import tiny
from cases import video_like
from rectified_spaattn import SparseConfig, TokenLayout, kept_plans, rectified_attention
from rectified_spaattn.kept_plans import KeptPlans, Moment, packed, unpacked
from rectified_spaattn.pipelines.branches import MOST

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = (TokenLayout.build((2, 4, 8)), TokenLayout.build((2, 4, 8), 3), TokenLayout.build((4, 4, 4)))
CONFIG = SparseConfig(block_size=16, sparsity=0.5, top_p=0.0, replan=3)
TOTAL = 9


def moment(step: int | None, total: int | None = None, **more) -> Moment:
    return Moment(**{"layer": 0, "branch": 0, "step": step, "total": total} | more)


def held(plans: KeptPlans) -> int:
    """Bytes of all tensors that are kept, as their storages have them."""
    tensors = [x for plan in plans._plans.values() for x in (plan.token_order, plan.block_bits) if x is not None]
    return sum(x.untyped_storage().nbytes() for x in tensors)


@given(bits=st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_and_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits)[None, None].expand(1, 2, -1)
    kept = packed(mask)
    assert (kept.dtype, kept.shape[-1]) == (torch.uint8, -(-len(bits) // 8))
    assert torch.equal(unpacked(kept, len(bits)), mask)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("lists", [False, True])
def test_a_later_call_is_the_operator_with_what_was_kept(backend: str, lists: bool) -> None:
    """What kernels make of both is in test_plan.py."""
    layout, config, plans = LAYOUTS[1], CONFIG.replace(kept_lists=lists), KeptPlans()
    now, later = (video_like(seed, 1, layout.sequence, 2, 8) for seed in (0, 1))
    _, first = plans.attention(*now, layout, config, moment(0), backend=backend)
    out, stats = plans.attention(*later, layout, config, moment(1), backend=backend)
    choices = {"block_mask": first.block_mask} if lists else {}
    want = rectified_attention(*later, layout, config, backend=backend, token_order=first.token_order, **choices)
    assert torch.equal(out, want)
    assert torch.equal(stats.token_order, first.token_order)
    assert torch.equal(stats.block_mask, first.block_mask) == lists
    assert not torch.equal(out, rectified_attention(*later, layout, config, backend=backend))


def test_places_are_as_small_as_the_sequence_lets_them() -> None:
    """And come out as they went in."""
    for sequence, dtype in ((1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)):
        plans, q = KeptPlans(), torch.empty(1, sequence, 1, 1)
        with operator(lambda: torch.arange(sequence).flip(0)[None, None]) as given:  # noqa: B023
            for step in range(2):
                plans.attention(q, q, q, TokenLayout.of(sequence, [(0, sequence)]), CONFIG, moment(step))
                assert plans.nbytes == held(plans) == sequence * dtype.itemsize
        assert given[1].tolist() == [[list(reversed(range(sequence)))]]


# --- any sequence of calls


@contextmanager
def operator(order):
    """In place of the operator one that gives the orders that `order` makes; yields what it was given instead."""
    given = []

    def call(q, k, v, layout, config, *, return_stats, token_order=None, block_mask=None):
        given.append(token_order)
        mask = torch.zeros(len(q), q.shape[2], 4, 4, dtype=torch.bool)
        own = order() if token_order is None else token_order.long()
        return q, SimpleNamespace(token_order=own, block_mask=mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_plans, "rectified_attention", call)
        yield given


HEADS = (None, torch.zeros(2, 2))
USUAL = {"layer": 0, "branch": 0, "layout": 0, "batch": 1, "heads": 4, "key_heads": 2, "dealt": 0}
OTHER = {"layer": 1, "branch": 1, "layout": 2, "batch": 2, "heads": 2, "key_heads": 1, "dealt": 1}


def call(plans: KeptPlans, of: dict[str, int], step: int, total: int | None = None, config: SparseConfig = CONFIG):
    q, k = (torch.zeros(of["batch"], 64, of[name], 1) for name in ("heads", "key_heads"))
    when = moment(step, total, layer=of["layer"], branch=of["branch"], heads=HEADS[of["dealt"]])
    plans.attention(q, k, k, LAYOUTS[of["layout"]], config, when)


@pytest.mark.parametrize("name", OTHER)
def test_calls_that_differ_in_one_thing_share_no_plan(name: str) -> None:
    with operator(lambda: torch.zeros(1, 1, 64)) as given:
        for first, second in ((USUAL, USUAL), (USUAL, {**USUAL, name: OTHER[name]})):
            plans = KeptPlans()
            call(plans, first, 0)
            call(plans, second, 1)
    assert [order is None for order in given] == [True, False, True, True]


calls = st.sampled_from([USUAL, USUAL, *({**USUAL, name: value} for name, value in OTHER.items())])
moves = st.sampled_from((1, 1, 1, 2, 3, 4, 6, -1, -3))
events = st.one_of(calls, calls, moves, moves, st.sampled_from(("clear", "expire", "stop", "new run")))


@given(
    events=st.lists(events, max_size=40),
    replan=st.integers(2, 5),
    lists=st.booleans(),
    total=st.sampled_from((None, TOTAL)),
    dense_last=st.integers(0, 2),
)
def test_no_interleaving_takes_a_plan_that_is_not_its_own(events, replan, lists, total, dense_last) -> None:
    """Against a table of who planned when. Every plan has a number, which its order is made of."""
    config = CONFIG.replace(replan=replan, kept_lists=lists, dense_last_steps=dense_last)
    plans, step, number = KeptPlans(), 0, 0
    table: dict[tuple, tuple[int, int]] = {}  # who -> the step and the number of the plan that may be kept
    with operator(lambda: torch.full((1, 1, 64), number)) as given:
        for event in events:
            if isinstance(event, int):
                step = min(max(step + event, 0), TOTAL - 1)
            elif event in ("clear", "new run"):
                plans.clear()
                plans = KeptPlans() if event == "new run" else plans
                table.clear()
            elif event == "expire":
                plans.expire(step)
            elif event == "stop":
                plans.attention(*[torch.zeros(1, 64, 2, 1)] * 3, LAYOUTS[0], config, moment(None, problem="why"))
                assert given[-1] is None
            else:
                number += 1
                who = tuple(event[name] for name in event if name != "dealt")
                call(plans, event, step, total, config)
                made, kept, dealt = table.get(who, (step, None, None))
                if given[-1] is None:
                    table[who] = step, number, event["dealt"]
                else:
                    assert made < step < made + replan
                    assert dealt == event["dealt"]
                    assert int(given[-1][0, 0, 0]) == kept
            assert plans.nbytes == held(plans) <= plans.peak
            last = TOTAL if total is None else total - dense_last
            assert all(
                plan.made < plan.until < last + (replan if total is None else 0) for plan in plans._plans.values()
            )
    assert sum(plans.unkept.values()) <= events.count("stop")


def test_steps_are_counted_by_the_clock_and_not_by_calls() -> None:
    """A cache left steps out; a plan is gone once it is taken for the last time, and too old after four steps."""
    number = iter(range(9))
    with operator(lambda: torch.full((1, 1, 64), next(number))) as given:
        plans, q = KeptPlans(), torch.zeros(1, 64, 2, 1)
        for step in (2, 5, 6, 10, 11):
            plans.attention(q, q, q, LAYOUTS[0], CONFIG.replace(replan=4), moment(step, 12))
            assert len(plans) == (step in (2, 6, 10))
    assert [None if order is None else int(order[0, 0, 0]) for order in given] == [None, 0, None, None, 2]
    assert (plans.planned, plans.taken) == (3, 2)
    assert plans.nbytes == 0 < plans.peak


# --- whole models


def taken(handle) -> int:
    return sum(state.plans.taken for state in handle._watch.states)


def kept(handle) -> int:
    return sum(len(state.plans) for state in handle._watch.states)


@pytest.fixture(scope="module")
def model():
    return tiny.wan_transformer()


@pytest.fixture(scope="module")
def pipeline():
    return tiny.wan_pipeline(experts=2)


@contextmanager
def at_step_one(model, **settings):
    """Enabled, after step 0 of 6 with one input: a forward of step 1 would take three plans."""
    inputs = tiny.wan_inputs()
    with rsa.enable(model, **{**tiny.SPARSE, "replan": 3, **settings}) as handle, torch.no_grad():
        handle.set_step(0, 6)
        model(**inputs)
        assert (taken(handle), kept(handle)) == (0, 3)
        handle.set_step(1, 6)
        yield handle, inputs


@pytest.mark.parametrize("lists", [False, True])
def test_on_the_same_latents_nothing_changes(model, lists: bool) -> None:
    inputs, outputs = tiny.wan_inputs(), []
    for settings in ({}, {"replan": 3, "kept_lists": lists}):
        with rsa.enable(model, **tiny.SPARSE, **settings) as handle, torch.no_grad():
            for step in range(4):
                handle.set_step(step, 4)
                outputs.append(model(**inputs).sample)
            assert taken(handle) == (6 if settings else 0)
    assert all(torch.equal(each, outputs[0]) for each in outputs)


def other_text(inputs):
    return inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + 1}


def same_text_again(inputs):
    return inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}


CHANGES = {
    "nothing": (lambda inputs: inputs, 3),
    "the text, as a new tensor": (same_text_again, 3),
    "a smaller grid": (lambda inputs: inputs | {"hidden_states": inputs["hidden_states"][..., :8]}, 0),
    "another grid of as many tokens": (lambda inputs: inputs | {"hidden_states": inputs["hidden_states"].mT}, 3),
    "the batch": (lambda inputs: {name: value[:1] for name, value in inputs.items()}, 0),
    "the text": (other_text, 0),
    "the guidance in the batch": (lambda inputs: {name: value.flip(0) for name, value in inputs.items()}, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_between_steps_leaves(model, change: str) -> None:
    """A grid of the same sides is no change: an order is of tokens, which lie where they lay."""
    changed, want = CHANGES[change]
    with at_step_one(model) as (handle, inputs):
        model(**changed(inputs))
        assert taken(handle) == want


def test_a_text_that_was_written_to_is_another(model) -> None:
    with at_step_one(model) as (handle, inputs):
        inputs["encoder_hidden_states"].add_(1)
        model(**inputs)
        assert taken(handle) == 0


def test_guidance_calls_in_another_order_take_their_own(model) -> None:
    """The unconditional call comes first from step 1 on, and is alone at step 2; then it comes twice."""
    inputs = tiny.wan_inputs()
    one, other = inputs, other_text(inputs)
    orders = []
    with rsa.enable(model, **tiny.SPARSE, replan=9) as handle, torch.no_grad():
        state = handle._watch.states[0]
        for step, texts in enumerate(((one, other), (other, one), (other,), (other, other))):
            handle.set_step(step, 12)
            for each in texts:
                model(**each)
                orders.append((step, state.forwards, taken(handle)))
    assert [count for *_, count in orders] == [0, 0, 3, 6, 9, 12, 12]


def test_a_step_back_is_a_new_run(model) -> None:
    with at_step_one(model) as (handle, inputs):
        handle.set_step(2, 6)
        model(**inputs)
        assert taken(handle) == 3
        handle.set_step(1, 6)
        model(**inputs)
        assert (taken(handle), kept(handle)) == (0, 3)


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_after_a_stopped_forward_nothing_is_taken(model, stop) -> None:
    def stopped(*_):
        raise stop

    with at_step_one(model) as (handle, inputs):
        hook = model.blocks[1].register_forward_pre_hook(stopped)
        with pytest.raises(stop):
            model(**inputs)
        hook.remove()
        assert stop is not ValueError or kept(handle) == 0  # no hook is told of a KeyboardInterrupt
        before = taken(handle)
        handle.set_step(2, 6)  # what was planned at step 0 would do
        model(**inputs)
        assert taken(handle) == before


def test_heads_that_moved_to_another_rank_plan_anew_and_stay_while_plans_live(model) -> None:
    with at_step_one(model) as (handle, inputs):
        (state,) = handle._watch.states
        work = torch.ones(3, 2)
        state.ranks.add(torch.tensor([[0.1], [0.5]]))
        state._deal_out(tuple(state.layers), work, 1)
        assert state.balanced
        assert all(layer.heads is None for layer in state.layers)
        state.layers[0].heads = torch.arange(2).repeat(2, 1)
        model(**inputs)
        assert taken(handle) == 2
        state.plans.clear()
        state._deal_out(tuple(state.layers), work, 1)
        assert all(layer.heads is not None for layer in state.layers)


def test_disable_frees_everything_for_ever(model) -> None:
    with at_step_one(model) as (handle, _):
        (state,) = handle._watch.states
        assert handle.stats().plan_bytes == held(state.plans) > 0
        handle.disable()
        assert (held(state.plans), handle.stats().plan_bytes, state.branches._texts) == (0, 0, [])
        assert handle.stats().plan_bytes_peak > 0
        layer = state.layers[0]  # of a thread that is inside of a call still
        q = torch.randn(2, 192, 2, 16)
        state.plans.attention(q, q, q, TokenLayout.build((3, 8, 8)), state.config, moment(1, 6, layer=layer.index))
        assert len(state.plans) == 0


def test_without_a_step_every_call_plans_and_the_summary_says_why(model) -> None:
    inputs = tiny.wan_inputs()
    with rsa.enable(model, **tiny.SPARSE, replan=3) as handle:
        for _ in range(2):
            tiny.forward(model, inputs)
        assert (taken(handle), kept(handle)) == (0, 0)
        assert "replan 3: 6 calls planned for themselves, because the step is unknown: no pipeline" in handle.summary()
    with rsa.enable(model, **tiny.SPARSE, replan=3) as handle, torch.no_grad():
        handle.set_step(0)
        for _ in range(MOST + 2):
            model(**inputs)
        assert kept(handle) == 3 * MOST
        assert f"6 calls planned for themselves, because they are of forwards after the first {MOST} of a step" in (
            handle.summary()
        )
    with rsa.enable(model, **tiny.SPARSE, order="gilbert", replan=3) as handle:
        assert "replan 3" not in handle.summary()
        tiny.forward(model, inputs)
        assert "replan 3: nothing to keep, as order gilbert is the grid's" in handle.summary()


def test_a_run_keeps_per_expert_and_frees_at_its_end(pipeline, quiet) -> None:
    """One expert's plans are freed when they are too old, while the other works; a second run is the first again."""
    with rsa.enable(pipeline, **tiny.SPARSE, replan=3, kept_lists=True) as handle:
        seen = []
        high, low = handle._watch.states
        pipeline.transformer_2.register_forward_hook(lambda *_: seen.append((len(high.plans), len(low.plans))))
        first = tiny.run_wan(pipeline, steps=8, guidance_scale_2=5.0)
        stats, summary = handle.stats(), handle.summary()
        assert low.plans.taken > 0
        assert [count for count, _ in seen] == [6, 6, 6, 6, 0, 0, 0, 0]  # two guidance calls in each of its four steps
        assert max(count for _, count in seen) == 6
        assert stats.plan_bytes == kept(handle) == 0
        assert stats.plan_bytes_peak == high.plans.peak + low.plans.peak > 0
        assert f"replan 3 of transformer_2: orders and block lists of {low.plans.planned} calls were kept" in summary
        assert torch.equal(tiny.run_wan(pipeline, steps=8, guidance_scale_2=5.0), first)


@pytest.mark.parametrize("output", ["latent", "np"])
def test_guidance_that_ends_early_leaves_nothing_behind(output: str, quiet) -> None:
    """Of the branch that came no more, once the video is decoded."""
    pipeline = tiny.wan_pipeline()

    def stop_guiding(pipe, step, timestep, values):
        pipe._guidance_scale = 1.0 if step >= 2 else 5.0
        return values

    with rsa.enable(pipeline, **tiny.SPARSE, replan=9) as handle:
        tiny.run_wan(pipeline, steps=4, output_type=output, callback_on_step_end=stop_guiding)
        assert handle.stats().forwards == 7
        assert kept(handle) == (3 if output == "latent" else 0)
        assert bool(handle._watch.states[0].branches._texts) == (output == "latent")
        tiny.run_wan(pipeline, steps=1)
        assert kept(handle) == 0


def test_wrong_settings() -> None:
    for wrong, error, match in (
        ({"replan": 0}, ValueError, "allowed: 1"),
        ({"replan": 1.5}, TypeError, "integer of 1 or more"),
        ({"replan": True}, TypeError, "integer of 1 or more"),
        ({"kept_lists": 1}, TypeError, "True or False"),
        ({"kept_lists": True, "replan": 2, "tolerance": 0.1}, ValueError, "tolerance"),
        ({"kept_lists": True}, ValueError, "replan=1"),
    ):
        with pytest.raises(error, match=match):
            SparseConfig(**wrong)
    assert not SparseConfig.paper(replan=4).keeps_plans
    assert SparseConfig.paper(replan=4, kept_lists=True).keeps_plans
