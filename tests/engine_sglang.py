"""The plug-in in a real SGLang: its discovery, hook registry, selector and USPAttention, on a CPU.

    python tests/engine_sglang.py

The python has the wheel of sglang, what that imports, and this package installed. Stubbed are the server's arguments
and, where it is missing, torchvision. Two processes talk over gloo for Ulysses. Prints a line a check; exits with 1 at
the first one that fails.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import rectified_spaattn as rsa
from rectified_spaattn.engines.sglang import Plugin

HEADS, SIZE, STEPS = 4, 16, 3
LATENT = (1, 16, 3, 12, 16)  # 144 tokens
VIDEO, TEXT = 144, 6
ASKED = {"sparsity": 0.7, "top_p": 0.0, "block_size": 16, "dense_steps": 1}
SPARSE = rsa.SparseConfig(**ASKED)
PARTS = "sglang.multimodal_gen.runtime."


class ServerArgs(MagicMock):
    """Everything that the layers read of the server's arguments; the rest is as if it were switched off."""


ARGS = ServerArgs(
    kv_gather_degree=1,
    attention_backend=None,
    attention_backend_config={},
    enable_attention_backend_autotune=False,
    pipeline_config=SimpleNamespace(dit_config=SimpleNamespace(patch_size=(1, 2, 2))),
)


def start(rank: int, ranks: int, meeting: str) -> None:
    """SGLang as one of its worker processes has it, with plug-ins found and applied by itself."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ["SGLANG_PLUGINS"] = "rectified_spaattn"
    import transformers  # noqa: F401  # before the stub, which it would take for the real one

    if importlib.util.find_spec("torchvision") is None:
        names = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".io")
        for name in (f"torchvision{each}" for each in names):
            stub = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __path__=[], __name__=name)
            sys.modules[name] = stub
    from sglang.multimodal_gen.runtime.layers.attention import layer
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks

    for part in ("layers.attention.selector", "pipelines_core.stages.denoising"):
        importlib.import_module(PARTS + part)  # a hook on what cannot be imported is logged by SGLang, and left out
    apply_plugin_hooks()
    for module in [module for name, module in sys.modules.items() if name.startswith("sglang")]:
        if hasattr(module, "get_global_server_args"):
            module.get_global_server_args = lambda: ARGS
    layer.get_compute_dtype = lambda: torch.float32
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    parallel_state.init_distributed_environment(ranks, rank, f"file://{meeting}", rank, "gloo")
    parallel_state.initialize_model_parallel(sequence_parallel_degree=ranks, ulysses_degree=ranks, backend="gloo")


@contextmanager
def asking(options: Any) -> Iterator[None]:
    """The server's attention-backend configuration."""
    ARGS.attention_backend_config = options
    try:
        yield
    finally:
        ARGS.attention_backend_config = {}


def attention(prefix: str = "blocks.3.attn1", config: Any = ASKED, component: str = "transformer", **more: Any) -> Any:
    """A layer as a model makes it; config=None: nothing asked of us."""
    from sglang.multimodal_gen.runtime.layers.attention.layer import USPAttention
    from sglang.multimodal_gen.runtime.layers.attention.selector import component_attn_backend_context_manager

    asked = asking({} if config is None else {"rectified_spaattn": config})
    with asked, component_attn_backend_context_manager(None, component_name=component):
        return USPAttention(num_heads=HEADS, head_size=SIZE, prefix=prefix, **more)


class Request:
    """One generation, as far as attention asks for it."""

    def __init__(self, steps: int = STEPS) -> None:
        self.raw_latent_shape, self.num_inference_steps, self.extra = LATENT, steps, {}


def run(layer: Any, tensors: Any, steps: int = STEPS, **call: Any) -> list[torch.Tensor]:
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    batch, out = Request(steps), []
    for step in range(steps):
        with set_forward_context(step, None, forward_batch=batch), torch.no_grad():
            out.append(layer(*tensors, **call))
    return out


def tensors(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, count, HEADS, SIZE, generator=generator) for _ in range(3))


def record(layer: Any) -> Any:
    return layer.attn_impl.component.seam.record


def check_selection() -> str:
    from sglang.multimodal_gen.runtime.layers.attention import selector
    from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import AttentionRequirements
    from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

    ask = {"rectified_spaattn": ASKED}
    plain = selector.get_attn_backend(SIZE, torch.float32)
    assert "Rectified" not in plain.__name__
    with asking(ask):
        ours = selector.get_attn_backend(SIZE, torch.float32)
        assert issubclass(ours, plain)
        assert ours.get_enum() is AttentionBackendEnum.SPARGE_ATTN
        assert not ours.supports_ring_rotation()
        # the denoising stage asks anew, by the member that it finds on the layers
        again = selector.get_attn_backend(
            SIZE, torch.float32, selected_attention_backend=AttentionBackendEnum.SPARGE_ATTN
        )
        assert again is ours
        others = (
            {"is_cross_attention": True},
            {"selected_attention_backend": AttentionBackendEnum.TORCH_SDPA},
            {"attention_requirements": AttentionRequirements(packed_varlen=True)},
        )
        for more in others:
            assert selector.get_attn_backend(SIZE, torch.float32, **more) is plain
        with selector.component_attn_backend_context_manager(None, component_name="text_encoder"):
            assert selector.get_attn_backend(SIZE, torch.float32) is plain
        sparse = SimpleNamespace(get_enum=lambda: AttentionBackendEnum.SLIDING_TILE_ATTN)
        with pytest.raises(ValueError, match="sparse itself"):
            Plugin().select(lambda *rest, **more: sparse, SIZE, torch.float32)
    for wrong in ("0.8", {"sparsty": 0.8}):
        with pytest.raises(TypeError, match="allowed"):
            attention(config=wrong, component=f"transformer {wrong}")
    return "where it was asked for, and nowhere else"


def check_steps() -> str:
    q = tensors(VIDEO)
    dense = run(attention(config=None), q)
    layer = attention(component="transformer of steps")
    out = run(layer, q)
    assert torch.equal(out[0], dense[0])
    expected = rsa.rectified_attention(*q, rsa.TokenLayout.build((3, 6, 8)), SPARSE, backend="torch")
    assert torch.equal(out[1], expected)
    assert record(layer).dense_reasons == {"dense_steps": 1}
    assert record(layer).sparse == STEPS - 1
    assert record(layer).layers == ["blocks.3.attn1"]
    run(layer, q)
    assert record(layer).sparse == STEPS - 1  # a new request, a new record
    return f"density {record(layer).density:.0%} behind one dense step"


def check_experts() -> str:
    """The second transformer of Wan 2.2 begins in the middle, and takes the second config of its preset."""
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    layer = attention(
        config={"preset": "wan2.2-t2v-a14b", "block_size": 16, "dense_layers": []}, component="transformer_2"
    )
    seam = layer.attn_impl.component.seam
    assert seam.config.dense_steps == rsa.preset("wan2.2-t2v-a14b")[1].dense_steps
    batch = Request(80)
    for step in range(40, 80):
        with set_forward_context(step, None, forward_batch=batch), torch.no_grad():
            layer(*tensors(VIDEO))
    assert seam.record.dense_reasons == {"dense_steps": 1}
    assert seam.record.steps == list(range(40))
    return "the second one has its own steps and config"


def check_text() -> str:
    q = tensors(VIDEO + TEXT)
    for number, first in enumerate((True, False)):
        layer = attention(component=f"transformer of text {number}")
        call = {"num_replicated_prefix" if first else "num_replicated_suffix": TEXT}
        out = run(layer, q, **call)
        layout = rsa.TokenLayout.build((3, 6, 8), TEXT, text_first=first)
        assert torch.equal(out[1], rsa.rectified_attention(*q, layout, SPARSE, backend="torch"))
    return "stands alone in front and behind"


def check_masks() -> str:
    q = tensors(VIDEO + TEXT)
    mask = torch.ones(1, VIDEO + TEXT, dtype=torch.bool)
    mask[:, :3] = False
    call = {"num_replicated_prefix": TEXT, "attn_mask": mask}
    layer = attention(component="transformer of masks")
    for ours, theirs in zip(run(layer, q, **call), run(attention(config=None), q, **call), strict=True):
        assert torch.equal(ours, theirs)
    ((reason, count),) = record(layer).dense_reasons.items()
    assert reason.startswith("a mask")
    assert count == STEPS
    return "attended by the engine, and counted"


def check_others() -> str:
    layer = attention(component="transformer of others")
    short, keys = tensors(VIDEO - 16), tensors(TEXT)
    for each in (short, (tensors(VIDEO)[0], *keys[1:])):
        for ours, theirs in zip(run(layer, each), run(attention(config=None), each), strict=True):
            assert torch.equal(ours, theirs)
    assert record(layer).others == {"of other keys than queries": STEPS}
    from sglang.multimodal_gen.runtime.layers.attention.layer import LocalAttention

    with asking({"rectified_spaattn": ASKED}):
        local = LocalAttention(num_heads=HEADS, head_size=SIZE)
    dense = run(attention(config=None), tensors(VIDEO))
    assert all(torch.equal(*pair) for pair in zip(run(local, tensors(VIDEO)), dense, strict=True))
    return "dense, bit for bit"


def check_shared_heads() -> str:
    """Fewer heads of keys, as GLM-Image and Cosmos 3 have them."""
    q, k, v = tensors(VIDEO)
    k, v = k[:, :, :2], v[:, :, :2]
    out = run(attention(component="transformer of shared heads", num_kv_heads=2), (q, k, v))
    layout = rsa.TokenLayout.build((3, 6, 8))
    assert torch.equal(out[1], rsa.rectified_attention(q, k, v, layout, SPARSE, backend="torch"))
    dense = run(attention(config=None, num_kv_heads=2), (q, k, v))
    torch.testing.assert_close(out[0], dense[0])
    return "2 of keys for 4 of queries"


def check_tolerance() -> str:
    config = {"tolerance": 1e-4, "max_density": 1.0, "top_p": 0.0, "block_size": 16}
    layer = attention(component="transformer of a tolerance", config=config)
    run(layer, tensors(VIDEO))
    densities = [float(record(layer).cells["blocks.3.attn1", step].density) for step in range(STEPS)]
    assert densities[0] < densities[1] <= densities[2], densities
    assert len(layer.attn_impl.component.seam.budgets) == 1
    return f"density {', '.join(f'{density:.0%}' for density in densities)}"


def ulysses(rank: int, ranks: int, folder: str) -> None:
    """Every process has a part of the video's tokens, and all of the text's."""
    start(rank, ranks, f"{folder}/meeting")
    torch.set_num_threads(1)
    part = slice(rank * VIDEO // ranks, (rank + 1) * VIDEO // ranks)
    for name, first in (("none", None), ("first", True), ("last", False)):
        text = 0 if first is None else TEXT
        whole = tensors(VIDEO + text)
        video = [x[:, text:] if first else x[:, :VIDEO] for x in whole]
        words = [x[:, :text] if first else x[:, VIDEO:] for x in whole]
        order = 1 if first is False else -1
        mine = [torch.cat([v[:, part], w][::order], 1) for v, w in zip(video, words, strict=True)]
        call = {} if first is None else {"num_replicated_prefix" if first else "num_replicated_suffix": TEXT}
        out = run(attention(component=f"transformer {name}"), mine, **call)
        torch.save(out, f"{folder}/{name}-{rank}.pt")


def check_ulysses() -> str:
    ranks = 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ulysses, (ranks, folder), ranks)
        for name, first in (("none", None), ("first", True), ("last", False)):
            call = {} if first is None else {"num_replicated_prefix" if first else "num_replicated_suffix": TEXT}
            text = 0 if first is None else TEXT
            alone = run(attention(component=f"transformer {name}"), tensors(VIDEO + text), **call)
            for rank, step in itertools.product(range(ranks), range(STEPS)):
                mine = torch.load(f"{folder}/{name}-{rank}.pt")[step]
                half = VIDEO // ranks
                got = mine[:, text:] if first else mine[:, :half]
                start_of = (text if first else 0) + rank * half
                torch.testing.assert_close(got, alone[step][:, start_of : start_of + half], rtol=1e-5, atol=1e-5)
                if text:
                    words = (mine, alone[step])
                    ends = [x[:, :text] if first else x[:, -text:] for x in words]
                    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    return f"{ranks} processes give what one gives"


def check_log() -> str:
    """What the denoising loop writes when it is done."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    hook = DenoisingStage.forward.__closure__
    plugin = next(cell.cell_contents.__self__ for cell in hook if hasattr(cell.cell_contents, "__self__"))
    lines = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())
    logger = logging.getLogger("rectified_spaattn.engines.sglang")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # as the server's --log-level sets the root
    assert plugin.denoise(lambda: "result") == "result"
    logger.removeHandler(handler)
    assert len(lines) == len(plugin.components)
    line = next(line for line in lines if line.startswith("transformer of steps"))
    assert "sparse: 2 calls" in line
    return line


CHECKS = (
    check_selection,
    check_steps,
    check_experts,
    check_text,
    check_masks,
    check_others,
    check_shared_heads,
    check_tolerance,
    check_log,
    check_ulysses,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start(0, 1, f"{folder}/meeting")
        torch.set_num_threads(1)
        print(f"SGLang {importlib.metadata.version('sglang')}")
        for check in CHECKS:
            print(f"  {check.__name__.removeprefix('check_')}: {check()}")


if __name__ == "__main__":
    main()
