"""The nodes in a real ComfyUI: tiny random models, 4 steps of euler on a CPU.

    python tests/engine_comfyui.py FOLDER [MODEL ...]

FOLDER is a checkout of ComfyUI; the python is one that can run it and has this package. MODEL: names of CASES, or all.
Prints a line a model and check; exits with 1 at the first check that fails.
"""

import asyncio
import dataclasses
import importlib
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rectified_spaattn as rsa
from comfy_cases import CASES, LETTERS, TEXT, Case
from rectified_spaattn.engines.comfyui import override_of, patch

STEPS = 4
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SPARSE = rsa.SparseConfig(sparsity=0.6, top_p=0.0, block_size=16)
FULL = SPARSE.replace(sparsity=0.0, top_p=1.0)
ATOL = 1e-5  # of full attention by other kernels, float32, four steps of values near one


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


def run(model: Any, case: Case, callback: Any = None, prompt: int = 1, **part: int) -> torch.Tensor:
    """What a sampler makes of noise. part: the first and last of its steps, as for one of two experts."""
    import comfy.sample

    generator = torch.Generator().manual_seed(prompt)
    words = torch.randn(1, TEXT, case.channels, generator=generator)
    letters = {name: torch.randn(case.extra[name].shape, generator=generator) for name in LETTERS & set(case.extra)}
    positive, negative = ([[each, case.extra | letters]] for each in (words, words.flip(1)))
    noise = torch.randn(case.latent, generator=torch.Generator().manual_seed(1))
    latent = torch.zeros(case.latent)
    if case.audio:
        from comfy.nested_tensor import NestedTensor

        noise, latent = (
            NestedTensor([x, x.flatten()[: math.prod(case.audio)].view(case.audio)]) for x in (noise, latent)
        )
    options = {"disable_pbar": True, "seed": 3, "callback": callback, **part}
    settings = (STEPS, case.guidance, "euler", "simple")
    out = comfy.sample.sample(model, noise, *settings, positive, negative, latent, **options)
    return torch.cat([each.flatten() for each in out.unbind()]) if case.audio else out


def block(model: Any, index: int) -> str:
    """The name of a block of the transformer itself, not of what embeds text for it."""
    names = (name for name, _ in model.model.named_modules())
    return next(name for name in names if re.fullmatch(rf"diffusion_model\.\w*blocks\.{index}", name))


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
    assert 0.3 < record.density < 1, record.density  # exact text is part of it
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
    assert torch.equal(changed, layout.text_places[case.padding :]), (changed, layout)
    return f"{layout}, the text from {changed.tolist()[:1]} on"


def check_expert(model: Any, case: Case, dense: torch.Tensor) -> str:
    """A sampler that runs the second half of the steps counts them as its own."""
    patched = patch(model, SPARSE.replace(dense_steps=0.5))
    run(patched, case, start_step=STEPS // 2, last_step=STEPS)
    record = override_of(patched).seam.record
    assert record.steps == list(range(STEPS // 2))
    assert record.sparse == sum(record.dense_reasons.values()) > 0
    return f"an expert's {STEPS // 2} steps, half of them dense"


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

    inside = model.model.get_submodule(block(model, 1))
    for where, callback in (("between steps", cancel), ("within a step", None)):
        handle = inside.register_forward_pre_hook(stop) if callback is None else None
        try:
            run(patched, case, callback)
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
    first = block(model, 0) + "."
    linear = (
        n for n, w in model.model.named_parameters() if n.startswith(first) and n.endswith(".weight") and w.ndim == 2
    )
    name = next(linear)
    weight = model.model.get_parameter(name)
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


def check_tolerance(model: Any, case: Case, dense: torch.Tensor) -> str:
    patched = patch(model, SPARSE.replace(tolerance=1e-4, max_density=1.0))
    out = run(patched, case)
    seam = override_of(patched).seam
    densities = [float(seam.record.cells[seam.record.layers[0], step].density) for step in range(STEPS)]
    assert not seam.record.dense_reasons, seam.record.dense_reasons
    assert densities[0] < densities[-1], densities
    assert len(seam.budgets)
    error = float((out - dense).norm() / dense.norm())
    return f"tolerance: density {', '.join(f'{density:.0%}' for density in densities)}, off by {error:.1e}"


CHECKS = (
    check_full,
    check_places,
    check_sparse,
    check_tolerance,
    check_expert,
    check_untouched,
    check_cancelled,
    check_composed,
)


def fill(inputs: dict[str, Any], kind: dict[str, Any], values: Iterator[Any], prefix: str = "") -> None:
    """Gives the widgets of a node their saved values in turn; what a choice adds comes behind it, named under it."""
    for name, (form, *options) in (kind["required"] | kind.get("optional", {})).items():
        settings = options[0] if options else {}
        choice = form == "COMFY_DYNAMICCOMBO_V3"
        if settings.get("hidden") or not (choice or isinstance(form, list) or form in WIDGETS):
            continue
        value = inputs[prefix + name] = next(values, settings.get("default"))
        if settings.get("control_after_generate"):
            next(values)  # "fixed"
        if choice:
            chosen = next(each for each in settings["options"] if each["key"] == value)
            fill(inputs, chosen["inputs"], values, f"{prefix}{name}.")


def prompt_of(workflow: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """A saved workflow as ComfyUI's page hands it to the server: {node: its class and its inputs by name}."""
    sources = {link: [str(source), slot] for link, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        inputs, values = {each["name"]: sources[each["link"]] for each in node["inputs"]}, iter(node["widgets_values"])
        fill(inputs, kinds[node["type"]].INPUT_TYPES(), values)
        assert not list(values), f"{node['type']} has more widgets than this version"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def check_nodes() -> str:
    """ComfyUI loads the folder, and its validation takes the example workflows, with empty files as weights."""
    import execution
    import folder_paths
    import nodes

    folder = Path(__file__).parents[1] / "comfyui"
    assert asyncio.run(nodes.load_custom_node(str(folder)))
    asyncio.run(nodes.init_builtin_extra_nodes())
    paths = sorted((folder / "workflows").glob("*.json"))
    with tempfile.TemporaryDirectory() as weights:
        for kind in ("diffusion_models", "text_encoders", "vae"):
            folder_paths.add_model_folder_path(kind, weights)
        for path in paths:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            for node in workflow["nodes"]:
                for value in node["widgets_values"]:
                    if str(value).endswith(".safetensors"):
                        Path(weights, value).touch()
            prompt = prompt_of(workflow, nodes.NODE_CLASS_MAPPINGS)
            valid, error, outputs, errors = asyncio.run(execution.validate_prompt("example", prompt, None))
            assert valid, (path.name, error, errors)
            kinds = [nodes.NODE_CLASS_MAPPINGS[node["type"]] for node in workflow["nodes"]]
            assert len(outputs) == sum(bool(getattr(kind, "OUTPUT_NODE", False)) for kind in kinds) > 1
    return f"valid {', '.join(path.name for path in paths)}"


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
