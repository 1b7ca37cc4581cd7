"""cache-dit: its caches on every pipeline that both know, and its registry of attention backends."""

import pytest
import torch

import rectified_spaattn as rsa
import tiny
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
STEPS, WARM_UP = 4, 1


@pytest.mark.parametrize("name", [name for name, case in PIPELINES.items() if "ControlNet" not in name])
def test_its_cache_goes_on_and_off_in_either_order(name):
    case = PIPELINES[name]
    pipeline, arguments = case.make(), case.arguments()
    untouched = run(pipeline, arguments, STEPS)
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=WARM_UP, residual_diff_threshold=1e9)
    outputs, calls = [], []
    for cache_first in (True, False):
        if cache_first:
            cache_dit.enable_cache(pipeline, cache_config=config)
        handle = rsa.enable(pipeline, sparsity=0.8, **PLAIN)
        if not cache_first:
            cache_dit.enable_cache(pipeline, cache_config=config)
        try:
            outputs.append(run(pipeline, arguments, STEPS))
            calls.append(handle.stats().sparse_calls)
            assert handle.stats().dense_calls == 0
        finally:
            if cache_first:
                handle.disable()
            cache_dit.disable_cache(pipeline)  # it patches the pipeline's class
            handle.disable()
        assert torch.equal(run(pipeline, arguments, STEPS), untouched)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)
    assert calls[0] == calls[1]
    assert 0 < calls[0] < STEPS * case.calls  # it leaves out what it is made to leave out


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
