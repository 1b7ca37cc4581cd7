"""Single attention calls: captured from a pipeline as they are, and judged by full attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import rectified_spaattn as rsa
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.calls.capture import AttentionCall, CaptureError, capture_attention, capture_calls
from rectified_spaattn.lab.calls.error import attention_error, block_masses, full_attention, misplaced
from rectified_spaattn.lab.calls.maps import one_head, output_masses
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.demo_model.pipeline import DemoVideoPipeline
from studies.harness import EXACT

PROMPT = "a red matte sphere rolls right, sandy floor"
ARGUMENTS = {"height": 32, "width": 32, "num_frames": 8, "num_inference_steps": 3}
SPARSE = EXACT.replace(sparsity=0.8, block_size=32)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def call(pipe: DemoVideoPipeline) -> AttentionCall:
    [call] = capture_calls(pipe, [Pair(prompt=PROMPT, seed=0)], ARGUMENTS, steps=[1], layers=[1])
    return call


def test_capture_reads_the_wanted_call_and_puts_processors_back(pipe: DemoVideoPipeline) -> None:
    processors = dict(pipe.transformer.attn_processors)
    run = {"prompt": PROMPT, **ARGUMENTS}
    untouched = pipe(**run, generator=torch.Generator().manual_seed(0)).frames
    with capture_attention(pipe, steps=[2]) as calls:
        watched = pipe(**run, generator=torch.Generator().manual_seed(0)).frames
    assert torch.equal(watched, untouched)
    assert [(each.layer, each.step) for each in calls] == [(0, 2), (1, 2)]
    assert calls[0].q.shape == (1, 8 * 8 * 8 + 32, 2, 64)
    assert calls[0].layout.grid == (8, 8, 8)
    assert calls[0].text_mask.all()  # padding is a word like any other
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in processors.items())


def test_capture_refuses_what_it_cannot_do(pipe: DemoVideoPipeline) -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 1"), capture_attention(pipe, steps=[0], layers=[2]):
        pass
    with pytest.raises(CaptureError, match="never ran"), capture_attention(pipe, steps=[9]):
        pass
    with (
        rsa.enable(pipe, SPARSE),
        pytest.raises(CaptureError, match="is enabled"),
        capture_attention(pipe, steps=[0]),
    ):
        pass


def test_capture_passes_other_errors_on_and_still_cleans_up(pipe: DemoVideoPipeline) -> None:
    processors = dict(pipe.transformer.attn_processors)
    with pytest.raises(ZeroDivisionError), capture_attention(pipe, steps=[0]):
        raise ZeroDivisionError
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in processors.items())


def test_attention_error_is_zero_when_nothing_is_dropped(call: AttentionCall) -> None:
    nothing = attention_error(call, SPARSE.replace(sparsity=0.0, rectify="none"))
    assert nothing.relative_error < 1e-5
    assert attention_error(call, SPARSE.replace(rectify="none")).relative_error > 100 * nothing.relative_error


def test_full_attention_ignores_padding(call: AttentionCall) -> None:
    keep = torch.cat([torch.ones(8 * 8 * 8, dtype=torch.bool), call.text_mask[0]])
    q, k, v = (x[:, keep].transpose(1, 2) for x in (call.q, call.k, call.v))
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(full_attention(call)[:, keep], expected, atol=1e-5, rtol=1e-4)


def test_masses_are_those_of_the_softmax(call: AttentionCall) -> None:
    blocks = call.blocks(SPARSE)
    full = block_masses(call, blocks, head=1)
    torch.testing.assert_close(full.sum(-1), torch.ones(16))
    keep = torch.cat([torch.ones(8 * 8 * 8, dtype=torch.bool), call.text_mask[0]])
    weights = (call.q[0, :, 1] @ call.k[0, keep, 1].T / 8).softmax(-1)  # head_dim 64
    members = blocks.tiled[32:64]  # block 1
    to_block_3 = weights[members][:, blocks.tiled[96:128]].sum(1).mean()
    torch.testing.assert_close(full[1, 3], to_block_3)
    torch.testing.assert_close(full[1, -1], weights[members][:, 512:].sum(1).mean())


@pytest.mark.parametrize("mode", RECTIFY)
def test_output_masses_explain_the_output(mode: str, call: AttentionCall) -> None:
    """Values that are constant on every block make the output a function of the masses alone."""
    blocks, config = call.blocks(SPARSE), SPARSE.replace(rectify=mode)
    values = torch.randn(17, generator=torch.Generator().manual_seed(0))
    v = torch.full_like(call.v, float(values[-1]))
    v[:, blocks.tiled] = values[:-1].repeat_interleave(32).view(1, -1, 1, 1)
    flat = one_head(AttentionCall(**{**vars(call), "v": v}), 0)
    out, _ = flat.sparse(config)
    masses = output_masses(flat, config)
    torch.testing.assert_close(masses.sum(-1), torch.ones(16), atol=1e-4, rtol=0)
    by_block = out[0, blocks.tiled, 0, 0].view(16, 32).mean(1)
    torch.testing.assert_close(masses @ values, by_block, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", RECTIFY)
def test_a_call_put_in_order_gives_what_sorting_gives(mode: str, call: AttentionCall) -> None:
    config = SPARSE.replace(order="content", rectify=mode)
    arranged = call.in_order(config)
    assert arranged.arranged
    assert not torch.equal(arranged.q, call.q)
    assert call.in_order(SPARSE) is call
    expected = attention_error(call, config)
    found = attention_error(arranged, config)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-4)
    assert torch.equal(found.stats.block_mask, expected.stats.block_mask)


def test_misplaced_by_hand() -> None:
    full = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    other = torch.tensor([[0.7, 0.1, 0.2], [0.1, 0.1, 0.8]])
    assert misplaced(other, full) == pytest.approx(0.1)  # 0.2 of the first row's mass, none of the second's
    assert misplaced(full, full) == 0
