"""cache-dit: its cache on every model that both know, and its registry of attention backends."""

import pytest
import torch

import rectified_spaattn as rsa
import tiny
from model_cases import CASES, FIRST, build
from rectified_spaattn.pipelines.processor import BACKEND_NAME
from tiny_pipelines import PIPELINES, run

cache_dit = pytest.importorskip("cache_dit")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"),  # diffusers' own ControlNet
]

PLAIN = {
    "block_size": 16,
    "neighbours": False,
    "first_frame": False,
    "top_p": 0.0,
    "dense_layers": (),
    "dense_steps": 0,
}
STEPS = 4
CONFIG = cache_dit.DBCacheConfig(
    Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9, num_inference_steps=STEPS
)


def both_orders(model, call):
    """What call() gives and how many sparse calls it made, with cache-dit on first and last, each as it was after."""
    untouched, outputs, calls = call(), [], []
    for cache_first in (True, False):
        if cache_first:
            cache_dit.enable_cache(model, cache_config=CONFIG)
        handle = rsa.enable(model, sparsity=0.8, **PLAIN)
        if not cache_first:
            cache_dit.enable_cache(model, cache_config=CONFIG)
        try:
            outputs.append(call())
            calls.append(handle.stats().sparse_calls)
            assert handle.stats().dense_calls == 0
        finally:
            if cache_first:
                handle.disable()
            cache_dit.disable_cache(model)  # it patches classes
            handle.disable()
        assert torch.equal(call(), untouched)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)
    assert calls[0] == calls[1]
    return calls[0]


OF_KIND = {CASES[name].kind: name for name in reversed(FIRST)}  # the first case of each class


@pytest.mark.parametrize("name", [name for name in OF_KIND.values() if name != "Wan Animate"])  # it knows nothing of it
def test_every_transformer_that_both_know_in_either_order(name):
    model, inputs = build(name, 16)

    def call():
        with torch.no_grad():
            return torch.stack([tiny.forward(model, inputs) for _ in range(STEPS)])

    made, full = both_orders(model, call), STEPS * CASES[name].calls
    assert full / 2 <= made <= full  # the first block of each list is never left out, and some have one alone


def test_a_pipeline_of_two_experts_in_either_order():
    case = PIPELINES["Wan 2.2 T2V-A14B"]
    pipeline, arguments = case.make(), case.arguments()
    made = both_orders(pipeline, lambda: run(pipeline, arguments, STEPS))
    assert 0 < made < STEPS * case.calls  # it leaves out what it is made to leave out


def test_its_registry_hands_our_name_on_to_diffusers():
    from cache_dit.attention.backends.register import _AttnBackendRegistry

    with rsa.enable(tiny.wan_pipeline(), sparsity=0.8, **PLAIN):
        assert callable(_AttnBackendRegistry.get_backend(BACKEND_NAME))
    with pytest.raises(ValueError, match="no_such_backend"):
        _AttnBackendRegistry.get_backend("no_such_backend")


def test_its_own_processor_attends_through_ours(monkeypatch):
    """As its context parallelism puts it in the place of diffusers' one, on one process."""
    from cache_dit.distributed.transformers import wan as theirs
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, sparsity=0.8, **PLAIN) as handle:
        expected, calls = tiny.run_wan(pipeline), handle.stats().sparse_calls
        monkeypatch.setattr(WanAttnProcessor, "__call__", vars(theirs)["__patch_WanAttnProcessor__call__"])
        monkeypatch.setattr(WanAttnProcessor, "_cp_config", None, raising=False)
        assert torch.equal(tiny.run_wan(pipeline), expected)
        assert handle.stats().sparse_calls == calls > 0
