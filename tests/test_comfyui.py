"""ComfyUI's nodes on a stand-in for its calling contract; tests/engine_comfyui.py runs them in a real one."""

import importlib.util
import itertools
import json
import tomllib
from pathlib import Path

import pytest
import torch

import comfy_stand_in as comfy
from rectified_spaattn import PRESETS, SparseConfig
from rectified_spaattn.engines.comfyui import NODE_CLASS_MAPPINGS, override_of, patch
from rectified_spaattn.engines.comfyui.nodes import MODES, config_of

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = SparseConfig(sparsity=0.7, top_p=0.0, block_size=16)
FULL = SPARSE.replace(sparsity=0.0, top_p=1.0)
STEPS, WORDS = 4, 6
LATENT = torch.randn(2, 4, 3, 12, 16, generator=torch.Generator().manual_seed(1))  # 144 tokens
CONTEXT = torch.randn(2, WORDS, 8, generator=torch.Generator().manual_seed(2))
REFERENCE = torch.randn(2, 4, 1, 12, 16, generator=torch.Generator().manual_seed(3))
KINDS = {
    "wan": comfy.WanModel,
    "hunyuan, text last": comfy.HunyuanVideo,
    "hunyuan, text first": lambda **options: comfy.HunyuanVideo(text_first=True, **options),
}
FORMS = list(itertools.product((False, True), (False, True)))  # skip_reshape, skip_output_reshape


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def run(patcher, **inputs):
    return comfy.sample(patcher, LATENT, CONTEXT, STEPS, **inputs)


def record_of(patcher):
    return override_of(patcher).seam.record


def layouts_of(patcher, **inputs):
    """The layouts of the calls of a run."""
    seam, seen = override_of(patcher).seam, []
    attend = seam.attend
    seam.attend = lambda q, k, v, layout, *rest, **more: (seen.append(layout), attend(q, k, v, layout, *rest, **more))[
        1
    ]
    run(patcher, **inputs)
    del seam.attend
    return seen


@pytest.mark.parametrize(("form", "kv_heads"), [(form, 2) for form in FORMS] + [((False, True), 1), ((True, False), 1)])
def test_all_blocks_kept_is_full_attention_and_the_model_itself_stays(kind, form, kv_heads):
    model = comfy.Patcher(kind(form=form, kv_heads=kv_heads))
    dense = run(model)
    patched = patch(model, FULL)
    torch.testing.assert_close(run(patched), dense, rtol=1e-5, atol=1e-5)
    assert record_of(patched).density == 1
    assert record_of(patched).dense_reasons == {}
    sparse = patch(model, SPARSE)
    assert not torch.allclose(run(sparse), dense, atol=1e-3)
    assert 0.2 < record_of(sparse).density < 0.6
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("reference", [None, REFERENCE])
@pytest.mark.parametrize("text_first", [False, True])
def test_text_stands_alone_wherever_it_stands(text_first, reference):
    patched = patch(comfy.Patcher(comfy.HunyuanVideo(text_first=text_first)), SPARSE)
    (layout,) = set(layouts_of(patched, reference=reference))
    tokens = 144 + (48 if reference is not None else 0)
    assert layout.sequence == tokens + WORDS
    start = 0 if text_first else tokens
    assert layout.text_places.tolist() == list(range(start, start + WORDS))
    assert layout.grid == (None if reference is not None else (3, 6, 8))


def test_references_of_wan_are_tiled_with_the_video():
    patched = patch(comfy.Patcher(comfy.WanModel()), SPARSE)
    (layout,) = set(layouts_of(patched, reference=REFERENCE))
    assert layout.spans == ((0, 192),)
    assert layout.grid is None


def test_an_order_in_space_takes_the_grid_and_is_dense_where_there_is_none():
    paper = SparseConfig.paper(sparsity=0.7, block_size=16, top_p=0.0)
    patched = patch(comfy.Patcher(comfy.WanModel()), paper)
    run(patched)
    assert record_of(patched).sparse == 8
    run(patched, reference=REFERENCE)
    assert record_of(patched).dense_reasons == {
        "order='gilbert', which needs the grid of the tokens, and there is none": 8
    }


@pytest.mark.parametrize("ids", ["none", "of an image"])
def test_text_of_unknown_place_runs_dense_and_says_so(ids):
    model = comfy.Patcher(comfy.HunyuanVideo(ids=ids))
    patched = patch(model, SPARSE)
    assert torch.equal(run(patched), run(model))
    ((reason, count),) = record_of(patched).dense_reasons.items()
    assert reason.startswith("6 tokens beside the 144 of the latents")
    assert count == 8


def test_conditional_and_unconditional_calls_in_one_batch_are_each_their_own(kind):
    patched = patch(comfy.Patcher(kind()), SPARSE)
    both = run(patched)
    alone = [comfy.sample(patched, LATENT[i : i + 1], CONTEXT[i : i + 1], STEPS) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text_first", [False, True])
def test_padded_text_is_hidden_as_it_is_without_us(text_first):
    model = comfy.Patcher(comfy.HunyuanVideo(text_first=text_first))
    valid = torch.tensor([[1.0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    dense = run(model, attention_mask=valid)
    patched = patch(model, FULL)
    torch.testing.assert_close(run(patched, attention_mask=valid), dense, rtol=1e-5, atol=1e-5)
    assert record_of(patched).sparse == 8
    assert not torch.allclose(run(model), dense, atol=1e-3)


@pytest.mark.parametrize("names", [True, False])
def test_the_schedule_is_of_the_samplers_steps_and_of_blocks(names):
    patched = patch(
        comfy.Patcher(comfy.WanModel(names=names)),
        SPARSE.replace(dense_steps=0.25, dense_last_steps=0.25, dense_layers=(1,)),
    )
    run(patched, times=2)  # a second evaluation within each step
    record = record_of(patched)
    assert record.steps == [0, 1, 2, 3]
    assert record.dense_reasons == {"dense_steps": 2, "dense_last_steps": 2, "dense_layers": 8}
    assert record.sparse == 4
    assert record.table()[0].isnan().sum() == 0
    assert (record.table() == 1).tolist() == [[True, False, False, True], [True] * 4]


def test_a_step_that_nobody_knows_is_dense_where_it_matters(monkeypatch):
    monkeypatch.setattr("rectified_spaattn.engines.comfyui.override._step", lambda options: (None, None))
    model = comfy.Patcher(comfy.WanModel())
    for config, reason in ((SPARSE, {}), (SPARSE.replace(dense_steps=1), {"dense_steps, as the step is unknown": 8})):
        patched = patch(model, config)
        run(patched)
        assert record_of(patched).dense_reasons == reason


def test_other_overrides_get_the_dense_calls():
    seen = []

    def other(func, *args, **kwargs):
        seen.append(args[0].shape != args[1].shape)
        return func(*args, **kwargs)

    model = comfy.Patcher(comfy.WanModel())
    dense = run(model)
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    patched = patch(patch(model, SPARSE), FULL.replace(dense_layers=(1,)))  # the first patch is replaced
    torch.testing.assert_close(run(patched), dense, rtol=1e-5, atol=1e-5)
    assert len(seen) == STEPS * 3
    assert sum(seen) == STEPS * 2
    assert record_of(patched).others == {"cross-attention": STEPS * 2}


def test_a_clone_of_a_patched_model_is_patched_and_shares_its_record():
    patched = patch(comfy.Patcher(comfy.WanModel()), SPARSE)
    later = patched.clone().clone()
    assert override_of(later) is override_of(patched)
    torch.testing.assert_close(run(later), run(patched))
    assert record_of(patched).sparse == 8
    assert record_of(patched).forwards == 4


class Cancelled(Exception):
    pass


def test_a_run_that_is_cancelled_leaves_nothing():
    model = comfy.Patcher(comfy.HunyuanVideo())
    dense, patched = run(model), patch(model, SPARSE.replace(replan=9))
    expected, plans = run(patched), override_of(patched).seam.plans
    assert (plans.planned, plans.taken, plans.nbytes) == (2, 6, 0)

    def cancel(*args):
        raise Cancelled

    handle = model.model.blocks[1].register_forward_pre_hook(cancel)
    with pytest.raises(Cancelled):
        run(patched)
    handle.remove()
    assert override_of(patched)._running == {}
    assert override_of(patched).seam.plans.nbytes == 0 < override_of(patched).seam.plans.peak
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.model.modules())
    assert torch.equal(run(patched), expected)
    assert torch.equal(run(model), dense)


def test_a_cache_that_skips_the_model_is_counted():
    patched = patch(comfy.Patcher(comfy.WanModel()), SPARSE)
    patched.add_wrapper_with_key("diffusion_model", "cache", lambda executor, x, *rest, **more: torch.zeros_like(x))
    run(patched)
    assert record_of(patched).skipped == record_of(patched).forwards == STEPS
    assert "4 forwards (4 without attention" in override_of(patched).summary()


def test_calls_that_are_not_understood_run_dense_and_are_counted():
    class Strange(comfy.WanModel):
        pass

    Strange.__mro__[1].__name__ = "Stranger"  # no class of ours
    try:
        model = comfy.Patcher(Strange())
        patched = patch(model, FULL)
        torch.testing.assert_close(run(patched), run(model), rtol=1e-5, atol=1e-5)
        assert record_of(patched).sparse == 8  # its patch size gives the tokens
        run(patched, reference=REFERENCE)
        assert record_of(patched).dense_reasons == {"Strange, whose 48 tokens beside the latent's are unknown": 8}
        del model.model.patch_size
        assert torch.equal(run(patched), run(model))
        assert record_of(patched).dense_reasons == {"Strange, whose tokens are unknown": 8}
    finally:
        comfy.WanModel.__name__ = "WanModel"


def test_cross_attention_of_the_same_shape_is_never_taken_for_the_videos():
    model = comfy.Patcher(comfy.WanModel())
    patched, words = patch(model, SPARSE), torch.randn(2, 144, 8)
    assert torch.equal(*(comfy.sample(each, LATENT, words, STEPS) for each in (model, patched)))
    assert record_of(patched).dense_reasons == {"144 tokens of text and of video, which nobody can tell apart": 16}


def test_a_stream_of_other_width_is_not_the_videos():
    """Audio beside the video, of as many tokens."""
    model = comfy.WanModel()
    narrow = torch.randn(2, 144, 8)
    model.after = lambda x, options: comfy.attention(narrow, narrow, narrow, comfy.HEADS, transformer_options=options)
    patched = patch(comfy.Patcher(model), SPARSE)
    run(patched)
    assert record_of(patched).others == {"of other tokens than the video's": 8}
    assert record_of(patched).sparse == 8


def test_attention_outside_of_a_forward_is_dense():
    patched = patch(comfy.Patcher(comfy.WanModel()), SPARSE)
    x, options = torch.randn(2, 144, comfy.WIDTH), patched.model_options["transformer_options"]
    assert torch.equal(comfy.attention(x, x, x, 2, transformer_options=options), comfy.attention(x, x, x, 2))
    assert record_of(patched).others == {"outside of a forward of the model": 1}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS["RectifiedAttention"].INPUT_TYPES()["required"]["preset"][0][1:])
def test_every_preset_of_the_node_is_one_of_ours(name):
    config = config_of(0.5, "row", 50, 0, "7", name)
    assert config in PRESETS[name.split(" (")[0]]


def test_the_inputs_of_the_node_become_a_config():
    for mode in MODES:
        config = config_of(0.9, mode, 20, 5, "0, 3", "custom")
        assert (config.sparsity, config.dense_steps, config.dense_last_steps) == (0.9, 0.2, 0.05)
        assert config.dense_layers == (0, 3)
        assert config.rectify == ("ipar+gapr" if mode == "paper" else mode)
        assert config.order == ("gilbert" if mode == "paper" else "content")
    assert config_of(0.9, "row", 0, 0, "", "custom").tolerance is None
    for preset in ("custom", "wan2.1-t2v"):
        assert config_of(0.9, "row", 0, 0, "", preset, 0.05).tolerance == 0.05
        assert config_of(0.9, "row", 0, 0, "", preset, 0.0, 4).replan == 4
    for blocks in ("0-3", "²"):
        with pytest.raises(ValueError, match="dense_blocks: got"):
            config_of(0.9, "row", 0, 0, blocks, "custom")


def test_nodes_patch_and_report():
    kinds = NODE_CLASS_MAPPINGS["RectifiedAttention"].INPUT_TYPES()["required"]
    values = {name: spec[1]["default"] for name, spec in kinds.items() if name != "model"}
    model = comfy.Patcher(comfy.WanModel())
    (patched,) = NODE_CLASS_MAPPINGS["RectifiedAttention"]().patch(model, **values)
    report = NODE_CLASS_MAPPINGS["RectifiedAttentionReport"]()
    assert "nothing has run yet" in report.report(patched, None)["result"][1]
    run(patched)
    image, text, latent = report.report(patched, LATENT)["result"]
    assert latent is LATENT
    assert "sparse: 8 calls" in text
    assert "8 other calls, cross-attention" in text
    assert image.ndim == 4
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    with pytest.raises(ValueError, match="without Rectified Attention"):
        report.report(model, LATENT)


FOLDER = Path(__file__).parents[1] / "comfyui"


@pytest.mark.parametrize("path", sorted((FOLDER / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_the_example_workflows_use_the_nodes_as_they_are(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][entry] == {
            "name": nodes[target]["inputs"][entry]["name"],
            "type": kind,
            "link": number,
        }
    ours = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in ours} == set(NODE_CLASS_MAPPINGS)
    for node in ours:
        kind = NODE_CLASS_MAPPINGS[node["type"]]
        inputs = kind.INPUT_TYPES()["required"]
        linked = [each["name"] for each in node["inputs"]]
        assert [each["type"] for each in node["outputs"]] == list(kind.RETURN_TYPES)
        assert [name for name in inputs if name in linked] == linked
        widgets = [name for name in inputs if name not in linked]
        assert len(widgets) == len(node["widgets_values"])
        if widgets:
            config_of(**dict(zip(widgets, node["widgets_values"], strict=True)))


def test_the_folder_of_custom_nodes_gives_the_nodes():
    spec = importlib.util.spec_from_file_location("custom_nodes_of_ours", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
    assert tomllib.loads((FOLDER / "pyproject.toml").read_text())["tool"]["comfy"]["DisplayName"]
