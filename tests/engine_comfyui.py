"""The nodes in a real ComfyUI: tiny random models, 4 steps of euler on a CPU.

    python tests/engine_comfyui.py FOLDER [MODEL ...]

FOLDER is a checkout of ComfyUI; the python is one that can run it and has this package. MODEL: names of CASES, or all.
Prints a line a model and check; exits with 1 at the first check that fails.
"""

import asyncio
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import rectified_spaattn as rsa
from rectified_spaattn.engines.comfyui import override_of, patch

STEPS, TEXT, WIDTH = 4, 8, 64
SPARSE = rsa.SparseConfig(sparsity=0.6, top_p=0.0, block_size=16)
FULL = SPARSE.replace(sparsity=0.0, top_p=1.0)
ATOL = 1e-5  # of full attention by other kernels, float32, four steps of values near one


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model.

    layers    those whose self-attention can run sparse
    extra     entries of its conditioning
    params    the dataclass that its config fills, whose other fields, which differ between versions, are None
    guidance  1 runs one prompt alone, which masks and references of HunyuanVideo are written for
    """

    family: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    layers: int
    extra: dict[str, Any] = field(default_factory=dict)
    params: str = ""
    guidance: float = 5.0


FLUX = {
    "in_channels": 16,
    "context_in_dim": 32,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 256,
    "qkv_bias": True,
    "vec_in_dim": 32,
    "guidance_embed": True,
    "out_channels": 16,
    "txt_ids_dims": [],
}
POOLED = {"pooled_output": torch.zeros(1, 32), "guidance": 3.0}
WAN = {
    "image_model": "wan2.1",
    "dim": WIDTH,
    "ffn_dim": 128,
    "num_heads": 4,
    "num_layers": 2,
    "in_dim": 16,
    "out_dim": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "patch_size": (1, 2, 2),
    "text_len": TEXT,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "model_type": "t2v",
}
HUNYUAN = {**FLUX, "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "axes_dim": [4, 6, 6]}
HUNYUAN_PARAMS = "comfy.ldm.hunyuan_video.model.HunyuanVideoParams"
FLUX_PARAMS = "comfy.ldm.flux.model.FluxParams"
LETTERS = {"conditioning_byt5small"}  # text, too: other for every prompt
VIDEO = (1, 16, 5, 16, 16)  # 320 tokens
CASES = {
    "Wan": Case(family="WAN21_T2V", config=WAN, latent=VIDEO, layers=2),
    "Wan I2V": Case(family="WAN21_I2V", config=WAN | {"in_dim": 36}, latent=VIDEO, layers=2),
    "Wan with a reference": Case(
        family="WAN21_T2V",
        config=WAN | {"in_dim_ref_conv": 16},
        latent=VIDEO,
        layers=2,
        extra={"reference_latents": [torch.zeros(1, 16, 1, 16, 16)]},
    ),
    "HunyuanVideo": Case(
        family="HunyuanVideo", params=HUNYUAN_PARAMS, config=HUNYUAN, latent=VIDEO, layers=4, extra=POOLED
    ),
    "HunyuanVideo with padded text": Case(
        family="HunyuanVideo",
        params=HUNYUAN_PARAMS,
        config=HUNYUAN,
        latent=VIDEO,
        layers=4,
        extra=POOLED | {"attention_mask": torch.tensor([[1] * 5 + [0] * 3])},
        guidance=1.0,
    ),
    "HunyuanVideo with a reference": Case(
        family="HunyuanVideo",
        params=HUNYUAN_PARAMS,
        config=HUNYUAN,
        latent=VIDEO,
        layers=4,
        extra=POOLED | {"ref_latent": torch.zeros(1, 16, 1, 16, 16)},
        guidance=1.0,
    ),
    "HunyuanVideo 1.5": Case(
        family="HunyuanVideo15",
        params=HUNYUAN_PARAMS,
        config=HUNYUAN | {"in_channels": 33, "use_cond_type_embedding": True, "vision_in_dim": 32, "byt5": True},
        latent=VIDEO,
        layers=4,
        extra=POOLED | {"conditioning_byt5small": torch.zeros(1, 4, 1472)},
    ),
    "Flux": Case(
        family="Flux",
        params=FLUX_PARAMS,
        config=FLUX | {"image_model": "flux", "patch_size": 2, "axes_dim": [4, 6, 6]},
        latent=(1, 16, 32, 32),
        layers=4,
        extra=POOLED,
    ),
    "Flux with a reference": Case(
        family="Flux",
        params=FLUX_PARAMS,
        config=FLUX | {"image_model": "flux", "patch_size": 2, "axes_dim": [4, 6, 6]},
        latent=(1, 16, 32, 32),
        layers=4,
        extra=POOLED | {"reference_latents": [torch.zeros(1, 16, 16, 16)]},
    ),
    "LTX": Case(
        family="LTXV",
        config={
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "caption_channels": 32,
            "num_layers": 2,
        },
        latent=(1, 128, 5, 8, 8),
        layers=2,
        extra={"attention_mask": torch.ones(1, TEXT, dtype=torch.int64)},
    ),
    "Qwen-Image": Case(
        family="QwenImage",
        config={
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        latent=(1, 16, 1, 32, 32),
        layers=2,
    ),
}


def model_of(case: Case) -> Any:
    """A ModelPatcher with random weights on the CPU."""
    import comfy.model_patcher
    import comfy.supported_models

    torch.manual_seed(0)
    config = dict(case.config)
    if case.params:
        module, _, name = case.params.rpartition(".")
        fields = dataclasses.fields(getattr(importlib.import_module(module), name))
        wanted = {each.name: config.get(each.name) for each in fields if each.default is dataclasses.MISSING}
        config = {name: value for name, value in config.items() if name in {each.name for each in fields}} | wanted
        config["image_model"] = case.config["image_model"]
    settings = getattr(comfy.supported_models, case.family)(config)
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "")
    for weight in model.diffusion_model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    model.diffusion_model.eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def run(model: Any, case: Case, callback: Any = None, prompt: int = 1) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(prompt)
    words = torch.randn(1, TEXT, 32, generator=generator)
    letters = {name: torch.randn(case.extra[name].shape, generator=generator) for name in LETTERS & set(case.extra)}
    positive, negative = ([[each, case.extra | letters]] for each in (words, words.flip(1)))
    latent = torch.zeros(case.latent)
    noise = torch.randn(case.latent, generator=torch.Generator().manual_seed(1))
    options = {"disable_pbar": True, "seed": 3, "callback": callback}
    settings = (STEPS, case.guidance, "euler", "simple")
    return comfy.sample.sample(model, noise, *settings, positive, negative, latent, **options)


def hooks(model: Any) -> int:
    modules = model.model.diffusion_model.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def check_full(model: Any, case: Case, dense: torch.Tensor) -> str:
    patched = patch(model, FULL)
    out = run(patched, case)
    record = override_of(patched).seam.record
    assert record.sparse
    assert not record.dense_reasons, record.dense_reasons
    assert record.density == 1
    error = float((out - dense).norm() / dense.norm())
    assert error < ATOL, error
    return f"all blocks kept: off by {error:.1e}"


def check_sparse(model: Any, case: Case, dense: torch.Tensor) -> str:
    patched = patch(model, SPARSE.replace(dense_steps=0.25, dense_layers=(1,)))
    out = run(patched, case)
    record = override_of(patched).seam.record
    forwards = record.forwards
    assert record.steps == list(range(STEPS)), record.steps
    assert len(record.layers) == case.layers, record.layers
    per_step = forwards // STEPS
    assert record.dense_reasons == {
        "dense_steps": per_step * (case.layers - 1),
        "dense_layers": per_step * STEPS,
    }, record.dense_reasons
    assert record.sparse == per_step * (STEPS - 1) * (case.layers - 1)
    assert 0.3 < record.density < 0.7, record.density
    assert not torch.equal(out, dense)
    return f"{record.sparse} sparse calls, density {record.density:.0%}, other calls {dict(record.others)}"


def check_places(model: Any, case: Case, dense: torch.Tensor) -> str:
    """Tokens that stand alone are those whose queries in the first layer change with the prompt."""
    seen = []
    for prompt in (1, 2):
        patched = patch(model, FULL)
        seam = override_of(patched).seam
        attend = seam.attend

        def spy(q: torch.Tensor, k: Any, v: Any, layout: Any, *rest: Any, attend: Any = attend, **more: Any) -> Any:
            seen.append((q, layout))
            return attend(q, k, v, layout, *rest, **more)

        seam.attend = spy
        run(patched, case, prompt=prompt)
    (first, layout), (second, again) = seen[0], seen[len(seen) // 2]
    changed = (first != second).any(-1).any(-1).any(0).nonzero().flatten()
    assert layout == again
    assert torch.equal(changed, layout.text_places), (changed, layout)
    return f"{layout}, the text at {layout.text_places.tolist()}"


def check_untouched(model: Any, case: Case, dense: torch.Tensor) -> str:
    assert torch.equal(run(model, case), dense)
    return "unpatched: bit for bit"


def check_cancelled(model: Any, case: Case, dense: torch.Tensor) -> str:
    class Cancelled(Exception):
        pass

    def cancel(step: int, *rest: Any) -> None:
        if step == 1:
            raise Cancelled

    patched = patch(model, SPARSE)
    expected = run(patched, case)

    def stop(module: Any, inputs: Any) -> None:
        raise Cancelled

    inside = next(part for name, part in model.model.named_modules() if name.endswith("blocks.1"))
    for where in ("between steps", "within a step"):
        handle = inside.register_forward_pre_hook(stop) if where == "within a step" else None
        try:
            run(patched, case, cancel)
        except Cancelled:
            pass
        else:
            raise AssertionError(f"not cancelled {where}")
        finally:
            if handle is not None:
                handle.remove()
        assert hooks(model) == 0
        assert not override_of(patched)._running
    assert torch.equal(run(patched, case), expected)
    assert torch.equal(run(model, case), dense)
    return "cancelled: nothing left"


def check_composed(model: Any, case: Case, dense: torch.Tensor) -> str:
    """With another override below, and weights patched as a LoRA does."""
    calls = []

    def other(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(func)
        return func(*args, **kwargs)

    changed = model.clone()
    linear = ((n, w) for n, w in model.model.named_parameters() if w.ndim == 2 and "blocks" in n and ".weight" in n)
    name, weight = next(linear)
    changed.add_patches({name: ("diff", (torch.randn_like(weight),))}, 1.0)
    below = changed.clone()
    below.model_options["transformer_options"]["optimized_attention_override"] = other
    with_lora = run(changed, case)
    patched = patch(below, FULL)
    out = run(patched, case)
    record = override_of(patched).seam.record
    assert len(calls) == record.others.total(), (len(calls), record.others)
    assert float((out - with_lora).norm() / with_lora.norm()) < ATOL
    assert float((out - dense).norm() / dense.norm()) > ATOL
    assert torch.equal(run(model, case), dense)
    twice = patch(patch(below, SPARSE), FULL)
    assert torch.equal(run(twice, case), out)
    return f"another override got {len(calls) // 2} dense calls; LoRA; patched twice"


CHECKS = (check_full, check_places, check_sparse, check_untouched, check_cancelled, check_composed)


def check_nodes() -> str:
    """ComfyUI's loader takes the folder, and knows every node, input and output of the example workflows."""
    import nodes

    folder = Path(__file__).parents[1] / "comfyui"
    assert asyncio.run(nodes.load_custom_node(str(folder)))
    asyncio.run(nodes.init_builtin_extra_nodes())
    count = 0
    for path in sorted((folder / "workflows").glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        kinds = {node["id"]: nodes.NODE_CLASS_MAPPINGS[node["type"]] for node in workflow["nodes"]}
        entries = {node["id"]: node["inputs"] for node in workflow["nodes"]}
        for _, source, slot, target, entry, kind in workflow["links"]:
            assert kinds[source].RETURN_TYPES[slot] == kind
            required = kinds[target].INPUT_TYPES()["required"]
            assert required[entries[target][entry]["name"]][0] == kind
            count += 1
    return f"{count} links of the example workflows fit"


def main() -> None:
    folder, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CASES)
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version

    torch.set_num_threads(1)
    print(f"ComfyUI {comfyui_version.__version__}: {check_nodes()}")
    for name in names:
        case = CASES[name]
        if not hasattr(importlib.import_module("comfy.supported_models"), case.family):
            print(f"  {name}: not in this version")
            continue
        start = time.perf_counter()
        model = model_of(case)
        dense = run(model, case)
        assert torch.isfinite(dense).all()
        for check in CHECKS:
            print(f"  {name}: {check(model, case, dense)}")
        print(f"  {name}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
