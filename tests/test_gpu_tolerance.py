"""Probe rows and budgets on a GPU: the same bits as a sparsity, and nothing waits for the device."""

import pytest
import torch

import rectified_spaattn as rsa
import tiny
from cases import video_like
from oracle import dense
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends import Call, choose
from rectified_spaattn.method.probe import probe_places
from rectified_spaattn.method.select import top_k_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

LAYOUT = TokenLayout.build((8, 16, 17), 33)  # 17 blocks of 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where this file is only collected
QKV = tuple(x.to(DEVICE) for x in video_like(2, 2, LAYOUT.sequence, 3, 64, torch.bfloat16))
MASK = (torch.arange(33) < torch.tensor([[20], [33]])).to(DEVICE)


@pytest.mark.parametrize("mode", ["none", "ipar+gapr", "row", "row+slope"])
@pytest.mark.parametrize("backend", ["torch", "triton", "fa4"])
def test_budgets_of_heads(backend: str, mode: str) -> None:
    config = SparseConfig(rectify=mode, sparsity=0.7, top_p=0.0, probes=40)
    try:
        choose(backend, Call(torch.device("cuda"), torch.bfloat16, 64, 128, 17))
    except RuntimeError as error:
        pytest.skip(str(error))

    def call(order: torch.Tensor | None = None, **options: object):
        return rectified_attention(
            *QKV, LAYOUT, config, text_mask=MASK, backend=backend, token_order=order, return_stats=True, **options
        )

    out, stats = call()
    order = stats.token_order
    constant = torch.full((2, 3), float(top_k_of(config, 17)), device="cuda")
    again, same = call(order, top_k=constant)
    assert torch.equal(call(order)[1].block_mask, same.block_mask)
    assert torch.equal(call(order)[0], again)

    budgets = torch.tensor([[1.0, 4.5, 9.0], [17.0, 2.0, 6.25]], device="cuda")
    got = call(order, top_k=budgets)[1].block_mask
    by_error = config.rule.choice == "error"
    wanted = ((17 * budgets).floor() if by_error else 17 * budgets.floor()).long()
    assert (got.sum((2, 3)) <= wanted).all()
    assert (got.sum((2, 3)) >= (0.97 * wanted if by_error else wanted)).all()  # ties go together
    assert got.any(-1).all()

    valid = torch.ones(2, LAYOUT.sequence, dtype=torch.bool, device="cuda")
    valid[:, LAYOUT.text_places.cuda()] = MASK
    full = dense(*QKV, sees=valid[:, None, None])
    at = probe_places(order, 40)[..., None].expand(-1, -1, -1, 64)
    wrong, exact = (x.transpose(1, 2).gather(2, at).norm(dim=(2, 3)) for x in (out.double() - full, full))
    torch.testing.assert_close(
        stats.probe.error.double(), wrong / exact, rtol=0.05, atol=5e-3
    )  # bfloat16 on both sides


def test_a_run_under_a_tolerance_waits_for_nothing() -> None:
    model = tiny.wan_transformer(attention_head_dim=64).to("cuda", torch.bfloat16)
    inputs = {name: x.cuda() for name, x in tiny.wan_inputs(batch=2, grid=(4, 16, 16)).items()}
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    config = SparseConfig(block_size=64, sparsity=0.8, tolerance=0.05, rectify="row+slope")
    with rsa.enable(model, config, backend="triton") as handle, torch.no_grad():
        for step in range(6):
            handle.set_step(step, 6)
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                model(**inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        stats = handle.stats()
    assert (stats.sparse_calls, stats.probed) == (18, 18 * 2 * 2)
    assert stats.error < 0.5


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tolerance_with_offloading(compiled: bool, fresh_compiler: None) -> None:
    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, **tiny.SPARSE, backend="torch", probes=8, tolerance=0.1) as handle:
        if compiled:
            pipeline.transformer.compile_repeated_blocks(fullgraph=True)
        pipeline.enable_model_cpu_offload()
        latents = tiny.run_wan(pipeline, steps=4)
        (state,) = handle._watch.states
        assert {place.device.type for place in state.budgets._learnt} == {"cuda"}
        assert handle.stats().probed == 3 * 4 * 2 * 2  # layers, steps, guidance calls, heads
    assert latents.isfinite().all()
    assert len(state.budgets) == 0
