"""What users do to a model, in any order: enable, disable, interrupt, copy, save, thread. hypothesis chooses."""

import copy
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import rectified_spaattn as rsa
from model_cases import build
from rectified_spaattn.pipelines.adapters import adapter_for
from rectified_spaattn.pipelines.processor import is_wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.75, "block_size": 16, "dense_layers": (), "dense_steps": 0, "top_p": 0.0}
STOPS = [KeyboardInterrupt, GeneratorExit, SystemExit, MemoryError]


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs, return_dict=False)[0]


class Life(RuleBasedStateMachine):
    """`mirror` gets what users do to a model, but is never enabled: it says what dense means."""

    @initialize(name=st.sampled_from(["Wan 2.1 T2V", "CogVideoX 1.5 T2V"]))
    def make(self, name):
        self.default_backend = _AttentionBackendRegistry.get_active_backend()[0]
        self.name = name
        (self.model, self.inputs), (self.mirror, _) = build(name, 16), build(name, 16)
        self.attentions = adapter_for(self.model).attentions(self.model)
        self.handle, self.on, self.fused, self.saved = None, False, False, []
        self.backends = {"native"}

    def teardown(self):
        if hasattr(self, "model"):
            rsa.disable(self.model)
            _AttentionBackendRegistry.set_active_backend(self.default_backend)
            assert not self.model._forward_pre_hooks
            assert torch.equal(forward(self.model, self.inputs), forward(self.mirror, self.inputs))

    @rule(order=st.sampled_from(["content", "gilbert"]))
    def enable(self, order):
        if self.on:
            with pytest.raises(RuntimeError, match=r"enabled already: call rsa\.disable\(pipe\)"):
                rsa.enable(self.model, order=order, **SPARSE)
        else:
            self.handle, self.on = rsa.enable(self.model, order=order, **SPARSE), True

    @precondition(lambda self: self.handle is not None)
    @rule()
    def disable_by_the_handle(self):
        self.handle.disable()
        self.on = False

    @rule()
    def disable_by_the_model(self):
        assert rsa.disable(self.model) is self.on
        self.on = False

    @rule()
    def lose_the_handle(self):
        self.handle = None
        gc.collect()

    @rule(again=st.booleans())
    def copy_deeply(self, again):
        other = copy.deepcopy(self.model)
        before = self.handle.stats() if self.handle else None
        assert torch.equal(forward(other, self.inputs), forward(self.mirror, self.inputs))
        assert rsa.disable(other) is False
        if again:
            with rsa.enable(other, **SPARSE) as handle:
                assert not torch.equal(forward(other, self.inputs), forward(self.mirror, self.inputs))
                assert handle.stats().sparse_calls == len(self.attentions)
            assert torch.equal(forward(other, self.inputs), forward(self.mirror, self.inputs))
        assert before == (self.handle.stats() if self.handle else None) or before.density != before.density

    @rule(backend=st.sampled_from(["native", "_native_math"]))
    def choose_a_backend(self, backend):
        self.backends.add(backend)
        for model in (self.model, self.mirror):
            model.set_attention_backend(backend)
        _AttentionBackendRegistry.set_active_backend(self.default_backend)  # the process-wide half of it

    @rule()
    def save_processors(self):
        self.saved.append((self.model.attn_processors, self.mirror.attn_processors, self.fused))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def put_processors_back(self, data):
        mine, others, fused = data.draw(st.sampled_from(self.saved))
        if fused == self.fused:
            self.model.set_attn_processor(dict(mine))
            self.mirror.set_attn_processor(dict(others))

    @precondition(lambda self: "CogVideoX" in self.name)
    @rule()
    def fuse_or_unfuse(self):
        for model in (self.model, self.mirror):
            model.unfuse_qkv_projections() if self.fused else model.fuse_qkv_projections()
        self.fused = not self.fused

    @rule(stop=st.sampled_from(STOPS), block=st.integers(0, 1))
    def interrupt(self, stop, block):
        def raising(*_):
            raise stop

        hook = self.attentions[block][1].to_out[0].register_forward_pre_hook(raising)
        try:
            with pytest.raises(stop):
                self.run()
        finally:
            hook.remove()

    @rule()
    def call_forward_directly(self):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            got = self.model.forward(**self.inputs, return_dict=False)[0]
        want = forward(self.mirror, self.inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))

    @precondition(lambda self: self.backends == {"native"})  # the other one sets a switch of the whole process
    @rule(count=st.integers(2, 3))
    def run_in_threads(self, count):
        want = self.run()
        with warnings.catch_warnings(), ThreadPoolExecutor(count) as pool:
            warnings.simplefilter("ignore")
            for got in pool.map(lambda _: forward(self.model, self.inputs), range(count)):
                assert torch.equal(got, want)

    def run(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return forward(self.model, self.inputs)

    @invariant()
    def is_what_it_says(self):
        if not hasattr(self, "model"):
            return
        got, dense = self.run(), forward(self.mirror, self.inputs)
        processors = [module.processor for _, module in self.attentions]
        ours = [p for p in processors if getattr(p, "rectified_layer", None) is not None]
        living = [p for p in ours if p.rectified_layer.owner.active and is_wrapped(p, p.rectified_layer)]
        if not living:
            assert torch.equal(got, dense)
        else:
            assert not torch.equal(got, dense)
        if self.handle is not None and self.handle.active:
            assert self.on
            calls = {layer.name: layer for layer in self.handle.stats().layers}
            assert all(calls[p.rectified_layer.name].sparse_calls for p in living)
            assert ("LOST" in self.handle.summary()) == (len(living) < len(processors))


@pytest.fixture(autouse=True)
def frozen():
    """What is there before is no garbage, and need not be looked through at every collection."""
    gc.freeze()
    yield
    gc.unfreeze()


def explore(examples, steps):
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_twenty_lives():
    explore(20, 15)


@pytest.mark.slow
def test_three_hundred_lives():
    explore(300, 30)
