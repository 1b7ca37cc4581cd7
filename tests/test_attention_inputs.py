"""What reaches attention besides tokens: key masks, autocast's dtypes, gradients, a default device."""

import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux
from torch.utils.checkpoint import checkpoint

import rectified_spaattn as rsa
import tiny
from model_cases import CASES, FIRST, build
from rectified_spaattn.pipelines import masks
from rectified_spaattn.pipelines.state import LayerState
from tiny_models import BATCH, TEXT

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {"block_size": 16, "dense_layers": (), "dense_steps": 0, "top_p": 0.0, "backend": "torch"}
FULL = {**PLAIN, "sparsity": 0.0}
SPARSE = {**PLAIN, "sparsity": 0.75}
SEQUENCE = TEXT + 192


@torch.no_grad()
def forward(model, inputs, **more):
    return model(**inputs, **more, return_dict=False)[0]


# masks


@pytest.fixture
def flux():
    return build("Flux.1", 16)


def with_mask(inputs, mask):
    return {**inputs, "joint_attention_kwargs": {"attention_mask": mask}}


def hiding(rows, batch=BATCH):
    """bool [batch, S], False at the places of each row; the last ones where a row has fewer rows than the batch."""
    valid = torch.ones(batch, SEQUENCE, dtype=torch.bool)
    for row, places in enumerate(rows):
        valid[row, list(places)] = False
    return valid


HIDDEN = {
    "nothing": [[], []],
    "text": [[1, 2], []],
    "some image tokens": [range(TEXT + 30, TEXT + 47), []],
    "other ones in each sample": [range(TEXT, TEXT + 5), range(SEQUENCE - 20, SEQUENCE)],
    "text and image": [[0, *range(TEXT + 7, TEXT + 100, 3)], [1, TEXT]],
}


@pytest.mark.parametrize("order", ["content", "gilbert"])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_key_mask_hides_what_dense_attention_hides(flux, name, order, quiet):
    model, inputs = flux
    valid = hiding(HIDDEN[name])
    inputs = with_mask(inputs, valid[:, None, None])
    want = forward(model, inputs)
    with rsa.enable(model, order=order, **FULL) as handle:
        got = forward(model, inputs)
        assert handle.stats().sparse_calls == 3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if name != "nothing":
        assert (got - forward(model, {**inputs, "joint_attention_kwargs": None})).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["some image tokens", "text and image"])
def test_hidden_tokens_do_not_matter_to_the_others_where_it_is_sparse(flux, name):
    model, inputs = flux
    valid = hiding(HIDDEN[name])
    inputs = with_mask(inputs, valid[:, None, None])
    poisoned = inputs["hidden_states"].clone()
    hidden = ~valid[:, TEXT:]
    poisoned[hidden] = 50.0
    with rsa.enable(model, **SPARSE) as handle:
        one, other = forward(model, inputs), forward(model, {**inputs, "hidden_states": poisoned})
        assert handle.stats().density < 0.75
    torch.testing.assert_close(one[~hidden], other[~hidden], rtol=1e-4, atol=1e-5)


SHAPES = {
    "[1, 1, 1, S] for a batch": lambda valid: valid[:1, None, None],
    "[B, S]": lambda valid: valid[:1].expand(BATCH, -1),
    "[1, S]": lambda valid: valid[:1],
    "[1, 1, S]": lambda valid: valid[:1, None],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_key_mask_that_dense_attention_takes(flux, name, quiet):
    model, inputs = flux
    inputs = with_mask(inputs, SHAPES[name](hiding(HIDDEN["text and image"])))
    want = forward(model, inputs)
    with rsa.enable(model, **FULL):
        torch.testing.assert_close(forward(model, inputs), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["content", "gilbert"])
def test_key_heads_that_query_heads_share(flux, order, monkeypatch, quiet):
    """As dense attention does it, in dense layers, too."""
    model, inputs = flux
    ungrouped = forward(model, inputs)

    def grouped(q, k, v, **options):
        return dispatch_attention_fn(q, k[:, :, :1], v[:, :, :1], enable_gqa=True, **options)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", grouped)
    want = forward(model, inputs)
    assert (want - ungrouped).abs().max() > 1e-3
    with rsa.enable(model, order=order, **{**FULL, "dense_layers": (1,)}) as handle:
        got = forward(model, inputs)
        assert (handle.stats().sparse_calls, handle.stats().dense_calls) == (2, 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


REFUSED = {
    "for each query": torch.ones(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool),
    "for each head": torch.ones(BATCH, 2, 1, SEQUENCE, dtype=torch.bool),
    "additive": torch.zeros(BATCH, 1, 1, SEQUENCE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused_where_it_is_sparse_and_passed_on_where_it_is_dense(flux, name, quiet):
    model, inputs = flux
    inputs = with_mask(inputs, REFUSED[name])
    want = forward(model, inputs)
    with rsa.enable(model, **SPARSE), pytest.raises(ValueError, match=r"attention mask: got.*allowed: a bool key mask"):
        forward(model, inputs)
    with rsa.enable(model, **{**SPARSE, "dense_layers": (0, 1, 2)}):
        assert torch.equal(forward(model, inputs), want)


def test_a_mask_that_leaves_less_than_one_block_is_dense_and_says_so(flux):
    model, inputs = flux
    inputs = with_mask(inputs, hiding([range(TEXT + 10, SEQUENCE)] * 2)[:, None, None])
    want = forward(model, inputs)
    with rsa.enable(model, **SPARSE) as handle:
        assert torch.equal(forward(model, inputs), want)
        assert "its mask leaves 10 tokens, less than one block of 16" in handle.summary()


@pytest.mark.parametrize("fresh", [True, False])
def test_the_device_is_asked_once_a_forward(flux, monkeypatch, fresh):
    model, inputs = flux
    asked = []
    masked_layout = masks.masked_layout
    monkeypatch.setattr(masks, "masked_layout", lambda *args: (asked.append(1), masked_layout(*args))[1])
    mask = hiding(HIDDEN["text and image"])[:, None, None]
    if fresh:  # every block gets a view of its own

        def view(block, args, kwargs):
            return args, {**kwargs, "joint_attention_kwargs": {"attention_mask": mask.view(mask.shape)}}

        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.register_forward_pre_hook(view, with_kwargs=True)
    with rsa.enable(model, **SPARSE) as handle:
        for _ in range(2):
            forward(model, inputs if fresh else with_mask(inputs, mask))
        assert handle.stats().sparse_calls == 6
    assert len(asked) == 2


def test_hunyuan_15_is_never_asked(monkeypatch, quiet):
    model, inputs = build("HunyuanVideo 1.5 I2V", 16)
    monkeypatch.setattr(masks, "masked_layout", lambda *_: 1 / 0)
    with rsa.enable(model, **SPARSE) as handle:
        forward(model, inputs)
        assert handle.stats().sparse_calls == 2


# autocast


FIRST_OF_KIND = {CASES[name].kind: name for name in reversed(FIRST)}.values()


@pytest.mark.parametrize("name", [*FIRST_OF_KIND, "Allegro", "Cosmos Predict 1, 2", "Mochi"])
def test_under_autocast_as_dense_attention_is(name):
    model, inputs = build(name, CASES[name].head_dims[0])
    with torch.autocast("cpu", torch.bfloat16):
        dense = forward(model, inputs).float()
        with rsa.enable(model, **FULL) as handle:
            kept = forward(model, inputs).float()
            assert handle.stats().sparse_calls == CASES[name].calls
        with rsa.enable(model, **SPARSE):
            assert forward(model, inputs).isfinite().all()
    exact = forward(model, inputs)
    error = (dense - exact).norm()
    assert (kept - exact).norm() < 2 * error + 1e-6
    assert error < 0.2 * exact.norm()


@pytest.mark.parametrize("name", ["LTX-2.3", "LTX-2.5, a keyframe", "Cosmos 3"])
def test_what_autocast_breaks_in_the_untouched_model_breaks_alike(name):
    """In its own code. Where diffusers mends it, the name belongs into the list above."""
    model, inputs = build(name, CASES[name].head_dims[0])
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype") as untouched:
            forward(model, inputs)
        with rsa.enable(model, **SPARSE), pytest.raises(RuntimeError) as enabled:
            forward(model, inputs)
    assert str(enabled.value) == str(untouched.value)


@pytest.mark.parametrize("name", ["Wan 2.1 T2V", "Flux.1"])
def test_under_autocast_compiled_blocks_run(name, fresh_compiler):
    model, inputs = build(name, 16)
    with rsa.enable(model, **SPARSE) as handle, torch.autocast("cpu", torch.bfloat16):
        eager = forward(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(model, inputs).float(), eager.float(), rtol=0.1, atol=0.05)
        assert handle.stats().dense_calls == 0


# gradients


def test_sparse_attention_has_no_gradient_and_says_so_when_it_is_called():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, **SPARSE):
        with pytest.raises(RuntimeError, match=r"for inference.*torch\.no_grad\(\); to train, call disable\(\)"):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)
        model.requires_grad_(False)
        model(**inputs)


def test_compiled_blocks_have_no_gradient_and_say_so_when_they_are_called(fresh_compiler):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, **SPARSE):
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"for inference and has no gradient.*to train, call disable\(\) first"):
            model(**inputs)
        forward(model, inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Wan 2.1 T2V", "CogVideoX 1.5 T2V", "HunyuanVideo 1.5 T2V", "Flux.1"])
def test_dense_calls_keep_their_gradient(name, checkpointing):
    model, inputs = build(name, 16)
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()

    def gradients():
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    want = gradients()
    with rsa.enable(model, **{**SPARSE, "dense_layers": tuple(range(CASES[name].calls))}):
        got = gradients()
    assert got.keys() == want.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], rtol=1e-4, atol=1e-7)


def test_checkpointing_that_hides_the_gradient_is_refused_in_the_backward_pass():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=True))
    model.train()
    inputs["hidden_states"].requires_grad_(True)
    with rsa.enable(model, **SPARSE):
        loss = model(**inputs).sample.square().mean()
        with pytest.raises(RuntimeError, match="gradient checkpointing runs this layer again"):
            loss.backward()


# classes


def test_a_subclass_of_a_supported_class_works():
    class Mine(diffusers.WanTransformer3DModel):
        pass

    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, **SPARSE):
        want = forward(model, inputs)
    model.__class__ = Mine
    with rsa.enable(model, **SPARSE) as handle:
        assert torch.equal(forward(model, inputs), want)
        assert "Mine" in handle.summary()


def test_a_foreign_class_of_the_same_name_is_refused():
    foreign = type("WanTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(TypeError, match=r"got a WanTransformer3DModel \(.*another class than diffusers'\)"):
        rsa.enable(foreign)


def test_the_row_of_every_class_is_found_by_the_class():
    from rectified_spaattn.pipelines.adapters import ADAPTERS, adapter_for

    for name, row in ADAPTERS.items():
        assert adapter_for(object.__new__(getattr(diffusers, name))) is row


# devices


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


def test_a_default_device_is_none_of_ours(default_device, monkeypatch):
    model, inputs = build("HunyuanVideo T2V", 16)
    with rsa.enable(model, **SPARSE):
        want = forward(model, inputs)
    default_device("meta")
    with rsa.enable(model, **SPARSE) as handle:
        handles = [p.rectified_handle for p in model.attn_processors.values() if hasattr(p, "rectified_handle")]
        assert {each.device.type for each in handles} == {"cpu"}
        default_device(None)
        attend = LayerState.attend

        def attend_there(*args):  # the model makes tensors of its own, so it is the default inside attention alone
            with torch.device("meta"):
                return attend(*args)

        monkeypatch.setattr(LayerState, "attend", attend_there)
        assert torch.equal(forward(model, inputs), want)
        assert handle.stats().sparse_calls == 2


def test_the_clock_reads_numbers_and_tensors_under_a_default_device():
    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1}) as handle:
        clock = handle._clock
        pipeline.scheduler.set_timesteps(3)
        with torch.device("meta"):
            assert clock.read(torch.tensor([500.0], device="cpu"), exact=True) == (0, 3)
            assert clock.read(500, exact=True) == (0, 3)


def test_importing_an_enabled_model_needs_nothing_of_ours(tmp_path):
    """A model that was enabled once and disabled is pickled without a trace of this package."""
    model = tiny.wan_transformer()
    with rsa.enable(model, **SPARSE):
        forward(model, tiny.wan_inputs())
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(model))
    code = f"import pickle, sys; pickle.load(open({str(path)!r}, 'rb')); assert 'rectified_spaattn' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
