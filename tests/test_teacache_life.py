"""What users do with TeaCache, in any order: after disable() the model gives the bits of an untouched one."""

import copy
import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import rectified_spaattn as rsa
import tiny
from teacache_cases import HUGE, MODELS, at_step, blocks_of, forward
from test_teacache_interrupts import STOPS, assert_whole, interrupted_at, places, stopping

pytestmark = pytest.mark.usefixtures("one_thread")

TOTAL = 8
NAMES = ("wan", "hunyuan", "flux", "cogvideox")
BRANCHES = st.sampled_from([None, "cond", "uncond"])


class Life(RuleBasedStateMachine):
    """One model, with its handle where TeaCache is on. Sparse attention may come and go beside it."""

    inputs, untouched = {}, {}

    @initialize(name=st.sampled_from(NAMES))
    def begin(self, name):
        make, inputs = MODELS[name]
        if name not in self.inputs:
            self.inputs[name] = inputs()
            self.untouched[name] = [forward(make(), at_step(self.inputs[name], step, TOTAL)) for step in range(TOTAL)]
        self.name, self.model = name, make()
        self.attributes, self.blocks = set(vars(self.model)), blocks_of(self.model)
        self.handle = self.sparse = None
        self.step = -1

    def step_of(self, step):
        return at_step(self.inputs[self.name], step, TOTAL)

    def is_untouched(self, model, step):
        return torch.equal(forward(model, self.step_of(step)), self.untouched[self.name][step])

    @precondition(lambda self: self.handle is None)
    @rule(threshold=st.sampled_from([0, 0.3, HUGE, None]))
    def enable(self, threshold):
        self.handle, self.step = rsa.enable_teacache(self.model, threshold=threshold), -1
        self.threshold = threshold

    @precondition(lambda self: self.handle is not None)
    @rule(lost=st.booleans())
    def disable(self, lost):
        if lost:
            self.handle = None
            gc.collect()
            assert rsa.disable_teacache(self.model)
        else:
            self.handle.disable()
            self.handle = None
        if self.sparse is None:
            assert self.is_untouched(self.model, 3)

    @precondition(lambda self: self.sparse is None)
    @rule()
    def make_sparse(self):
        self.sparse = rsa.enable(self.model, **tiny.SPARSE)

    @precondition(lambda self: self.sparse is not None)
    @rule()
    def make_dense(self):
        self.sparse.disable()
        self.sparse = None

    @precondition(lambda self: self.handle is not None)
    @rule(steps=st.integers(1, TOTAL), branch=BRANCHES)
    def run(self, steps, branch):
        for step in range(steps):
            self.handle.set_step(step, TOTAL)
            output = forward(self.model, self.step_of(step), branch)
            computed = self.threshold == 0 or step == 0 or step == TOTAL - 1
            if computed and self.sparse is None:
                assert torch.equal(output, self.untouched[self.name][step])
        self.step = steps - 1

    def next_step(self):
        self.step = (self.step + 1) % TOTAL
        self.handle.set_step(self.step, TOTAL)
        return self.step_of(self.step)

    @precondition(lambda self: self.handle is not None)
    @rule(place=st.integers(0, 4), stop=st.sampled_from(STOPS), branch=BRANCHES)
    def stop_in_a_module(self, place, stop, branch):
        hook = places(self.model)[place].register_forward_hook(stopping(stop))
        try:
            forward(self.model, self.next_step(), branch)
        except stop:
            pass
        finally:
            hook.remove()

    @precondition(lambda self: self.handle is not None)
    @rule(line=st.integers(0, 300))
    def interrupt_a_line(self, line):
        interrupted_at(line, forward, self.model, self.next_step())

    @rule()
    def deep_copy(self):
        copied = copy.deepcopy(self.model)
        assert [key for key, _ in copied.named_modules()] == [key for key, _ in MODELS[self.name][0]().named_modules()]
        assert self.is_untouched(copied, 2)

    @rule()
    def call_forward_itself(self):
        """Past nn.Module.__call__, and so past TeaCache."""
        if self.sparse is None:
            with torch.no_grad():
                output = self.model.forward(**self.step_of(4)).sample
            assert torch.equal(output, self.untouched[self.name][4])

    @invariant()
    def the_lists_of_blocks_are_the_models_own(self):
        if self.handle is None and self.sparse is None:
            assert_whole(self.model, self.attributes)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        rsa.disable(self.model)
        rsa.disable_teacache(self.model)
        assert_whole(self.model, self.attributes)
        assert all(a is b for a, b in zip(blocks_of(self.model), self.blocks, strict=True))
        assert self.is_untouched(self.model, 5)


def test_lives():
    run_state_machine_as_test(Life, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))


@pytest.mark.slow
def test_many_lives():
    run_state_machine_as_test(Life, settings=settings(max_examples=300, stateful_step_count=30, deadline=None))
