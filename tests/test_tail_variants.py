"""The dense-matrix variants of the tail study against the reference backend, where both know the mode."""

from functools import partial

import pytest
import torch

from cases import video_like
from rectified_spaattn import TokenLayout, rectified_attention
from rectified_spaattn.lab.calls.capture import attending
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS
from rectified_spaattn.orders import blocks_of
from studies.harness import EXACT
from studies.tail_variants import VARIANTS, Layer, attend

MODES = {"none": "none", "ipar": "ipar", "ipar+gapr": "ipar+gapr", "row + s2, cap 2": "row"}


@pytest.mark.parametrize("variant", MODES)
def test_a_variant_is_the_reference_backend_in_that_mode(variant: str) -> None:
    layout = TokenLayout.build((3, 5, 7), text=9)  # 6 blocks of 16 and 9 leftover tokens
    q, k, v = (x.double() for x in video_like(5, 2, layout.sequence, 2, 8))
    valid = torch.arange(9) < torch.tensor([9, 4])[:, None]
    config = EXACT.replace(sparsity=0.6, rectify=MODES[variant], block_size=16)
    want = rectified_attention(q, k, v, layout, config, text_mask=valid, backend="reference")
    got = attend(VARIANTS[variant], q, k, v, blocks_of(layout, config), valid, 0.6)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_clips_made_with_every_block_kept_are_those_of_the_untouched_pipeline() -> None:
    pipe = load_demo_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)

    def clip() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            return pipe(PROMPTS[0], 16, 24, 4, num_inference_steps=2, generator=generator).frames

    steps = set()

    def run(layer, step, q, k, v, blocks, valid):
        steps.add((layer, step))
        return attend(VARIANTS["none"], q, k, v, blocks, valid, 0.0)

    untouched = clip()
    with attending(pipe, EXACT.replace(block_size=16), partial(Layer, run=run)):
        torch.testing.assert_close(clip(), untouched, rtol=0, atol=1e-4)
    assert steps == {(layer, step) for layer in range(5) for step in range(2)}
    assert torch.equal(clip(), untouched)
