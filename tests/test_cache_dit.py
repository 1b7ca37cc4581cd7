"""cache-dit: its cache on every model that both know, and its registry of attention backends."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import rectified_spaattn as rsa
import tiny
from model_cases import CASES, build
from rectified_spaattn.pipelines.processor import BACKEND_NAME
from test_models import forward
from tiny_pipelines import PIPELINES, run

cache_dit = pytest.importorskip("cache_dit")
adapters = pytest.importorskip("cache_dit.caching.block_adapters")

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
STEPS = 3  # a warm-up, one to compare with, one that leaves blocks out
CONFIG = cache_dit.DBCacheConfig(
    Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9, num_inference_steps=STEPS
)
FAILS_ALONE = {  # what it says without us
    "LTX-2.3": (TypeError, "unexpected keyword argument 'sigma'"),  # the forward that it brings is LTX-2.0's
    "LTX-2.5, a keyframe": (TypeError, "unexpected keyword argument 'sigma'"),
    "Cosmos 2.5": (AttributeError, "'tuple' object has no attribute 'contiguous'"),  # text and picture in one argument
    "Cosmos 3": (TypeError, "unexpected keyword argument 'return_dict'"),  # which its pipeline gives
    "Bria 3": (RuntimeError, "must match the size"),  # it takes the outputs of a block in the other order
}


BY_PIPELINE = {"SD3.5": "StableDiffusion3"}  # its registry goes by the beginning of a name: of this pipeline, not model


def known(name):
    """Whether its registry has an adapter, which looks at the class, too."""
    with torch.device("meta"):
        model = CASES[name].make(CASES[name].head_dims[0])
    try:
        return adapter(name, model, skip_post_init=True) is not None
    except AssertionError:
        return False


def adapter(name, model, **more):
    if name in BY_PIPELINE:
        return adapters.BlockAdapterRegister._adapters[BY_PIPELINE[name]](adapters.FakeDiffusionPipeline(model), **more)
    return adapters.BlockAdapterRegister.get_adapter(model, **more)


KNOWN = tuple(name for name in CASES if known(name))


def both_orders(model, run, look, given=None):
    """Sparse calls of run(), which gives the same in either order; look() is as it was, whatever goes off first.

    given: to cache-dit in place of the model.
    """
    given, handles, outputs, calls = given or model, [], [], []
    switches = {
        "cache": (
            lambda: cache_dit.enable_cache(given, cache_config=CONFIG),
            lambda: cache_dit.disable_cache(given),  # it patches classes
        ),
        "ours": (lambda: handles.append(rsa.enable(model, sparsity=0.8, **PLAIN)), lambda: handles[-1].disable()),
    }
    untouched = look()
    for on, off in itertools.product(itertools.permutations(switches), repeat=2):
        try:
            for name in on:
                switches[name][0]()
            if on == off:
                outputs.append(run())
                calls.append(handles[-1].stats().sparse_calls)
                assert handles[-1].stats().dense_calls == 0
        finally:
            for name in off:
                switches[name][1]()
        assert torch.equal(look(), untouched)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], untouched)
    assert calls[0] == calls[1]
    return calls[0]


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in FAILS_ALONE])
def test_every_transformer_that_both_know_in_either_order(name):
    model, inputs = build(name, CASES[name].head_dims[0])

    def look():
        return forward(model, inputs)

    given = adapter(name, model) if name in BY_PIPELINE else model
    made = both_orders(model, lambda: [look() for _ in range(STEPS)][-1], look, given)
    full = STEPS * CASES[name].calls
    assert full / 2 <= made <= full  # the first block of each list is never left out, and some have one alone


@pytest.mark.parametrize("name", FAILS_ALONE)
def test_what_it_does_not_run_without_us_either(name):
    model, inputs = build(name, CASES[name].head_dims[0])
    cache_dit.enable_cache(model, cache_config=CONFIG)
    error, words = FAILS_ALONE[name]
    try:
        with pytest.raises(error, match=words):
            forward(model, inputs)
    finally:
        cache_dit.disable_cache(model)


def test_a_pipeline_of_two_experts_in_either_order():
    case = PIPELINES["Wan 2.2 T2V-A14B"]
    pipeline, arguments = case.make(), case.arguments()

    def video():
        return run(pipeline, arguments, STEPS)

    made = both_orders(pipeline, video, video)
    assert 0 < made < STEPS * case.calls  # it leaves out what it is made to leave out


def test_the_page_names_what_both_know():
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    listed = page.partition("<!-- both know -->")[2].partition("<!-- end -->")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {CASES[name].kind for name in KNOWN}


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
