import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rectified_spaattn import PRESETS, SparseConfig, preset
from rectified_spaattn.backends import Call, choose
from rectified_spaattn.config import ORDERS, RECTIFY, Precision
from rectified_spaattn.orders import CURVES
from rectified_spaattn.presets import origin

places = st.one_of(
    st.tuples(st.sampled_from(("gilbert", "tile", "raster")), st.booleans(), st.booleans()),
    st.just(("content", False, False)),
)
configs = st.builds(
    lambda place, **rest: SparseConfig(order=place[0], neighbours=place[1], first_frame=place[2], **rest),
    place=places,
    sparsity=st.one_of(st.just(0), st.floats(0, 1, exclude_max=True)),
    top_p=st.floats(0, 1),
    rectify=st.sampled_from(tuple(RECTIFY)),
    precision=st.sampled_from(get_args(Precision)),
    block_size=st.integers(1, 16).map(lambda n: 16 * n),
    dense_steps=st.one_of(st.integers(0, 100), st.floats(0, 1, exclude_max=True)),
    dense_last_steps=st.one_of(st.integers(0, 100), st.floats(0, 1, exclude_max=True)),
    dense_layers=st.lists(st.integers(0, 60), max_size=4),
)


def test_defaults() -> None:
    assert SparseConfig().to_dict() == {
        "sparsity": 0.8,
        "top_p": 0.3,
        "rectify": "query+slope",
        "block_size": 128,
        "order": "content",
        "precision": "inputs",
        "neighbours": False,
        "first_frame": False,
        "dense_steps": 0,
        "dense_last_steps": 0,
        "dense_layers": [],
        "tolerance": None,
        "max_density": 0.5,
        "probes": None,
        "replan": 1,
        "kept_lists": False,
    }
    assert list(SparseConfig().to_dict()) == [field.name for field in dataclasses.fields(SparseConfig) if field.init]


def test_frozen_keyword_only_and_hashable() -> None:
    config = SparseConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        SparseConfig(0.5)  # type: ignore[misc]
    assert len({SparseConfig(dense_layers=(0, 1)), SparseConfig(dense_layers=(0, 1)), config}) == 2


@given(config=configs)
def test_a_dict_and_back(config: SparseConfig) -> None:
    assert SparseConfig.from_dict(config.to_dict()) == config


@given(config=configs)
def test_a_key_holds_all_but_the_schedule(config: SparseConfig) -> None:
    schedule = {name: getattr(SparseConfig(), name) for name in ("dense_steps", "dense_last_steps", "dense_layers")}
    assert SparseConfig.from_key(config.key) == config.replace(**schedule)


@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16, float])
@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8, int])
def test_numbers_of_numpy_are_numbers(real: type, whole: type) -> None:
    """And end as Python's, so that they print, compare and save as such."""
    layers = np.array([1, 2]) if whole is np.int64 else [whole(1), whole(2)]
    config = SparseConfig(
        sparsity=real(0.5), top_p=real(0.25), block_size=whole(64), dense_steps=whole(3), dense_last_steps=real(0.125),
        dense_layers=layers, tolerance=real(0.125), max_density=real(0.5), probes=whole(8),
    )  # fmt: skip
    want = SparseConfig(
        sparsity=0.5, top_p=0.25, block_size=64, dense_steps=3, dense_last_steps=0.125, dense_layers=(1, 2),
        tolerance=0.125, max_density=0.5, probes=8,
    )  # fmt: skip
    assert config == want
    assert config.key == want.key
    assert {type(value) for value in config.to_dict().values()} == {float, str, int, bool, list}
    assert {type(layer) for layer in config.dense_layers} == {int}


def test_the_papers_settings_and_overrides() -> None:
    paper = SparseConfig.paper(sparsity=0.9)
    assert (paper.rectify, paper.order, paper.neighbours, paper.sparsity) == ("ipar+gapr", "gilbert", True, 0.9)
    with pytest.raises(TypeError, match="sparsty"):
        SparseConfig.paper(sparsty=0.9)


def test_every_order_is_a_curve_or_by_content() -> None:
    assert {order for order in ORDERS if not SparseConfig(order=order).by_content} == set(CURVES)


@given(config=configs)
def test_a_dict_is_made_of_plain_values_that_yaml_keeps(config: SparseConfig) -> None:
    assert SparseConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_what_a_dict_leaves_out_is_the_default() -> None:
    assert SparseConfig.from_dict({}) == SparseConfig()
    assert SparseConfig.from_dict({"sparsity": 0.9, "dense_layers": [0, 1]}) == SparseConfig(
        sparsity=0.9, dense_layers=(0, 1)
    )


def test_dense_layers_end_as_a_tuple() -> None:
    assert SparseConfig(dense_layers=[3, 1]).dense_layers == (3, 1)  # type: ignore[arg-type]
    assert SparseConfig(dense_layers=range(2)).dense_layers == (0, 1)  # type: ignore[arg-type]


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sparsity: [0.8")
    with pytest.raises(ValueError, match=r"config\.yaml: got a file that is no YAML"):
        SparseConfig.from_yaml(path)


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "sparsity: 0.85\nrectify: none\norder: tile\nfirst_frame: true\ndense_steps: 5\ndense_layers: [0, 1]\n"
    )
    want = SparseConfig(
        sparsity=0.85, rectify="none", order="tile", first_frame=True, dense_steps=5, dense_layers=(0, 1)
    )
    assert SparseConfig.from_yaml(path) == SparseConfig.from_yaml(str(path)) == want


def test_replace_keeps_the_rest_and_checks() -> None:
    config = SparseConfig(order="tile", first_frame=True, dense_layers=(0,))
    want = SparseConfig(sparsity=0.5, order="tile", first_frame=True, dense_layers=(0,))
    assert config.replace(sparsity=0.5) == want
    assert config == SparseConfig(order="tile", first_frame=True, dense_layers=(0,))
    with pytest.raises(ValueError, match="sparsity"):
        config.replace(sparsity=1.5)
    with pytest.raises(TypeError, match="sparsty"):
        config.replace(sparsty=0.5)


@pytest.mark.parametrize(
    ("dense_steps", "total", "count"),
    [
        (0, 50, 0),
        (5, 50, 5),
        (5, None, 5),
        (1, None, 1),
        (0.0, None, 0),
        (0.1, 50, 5),
        (0.1, 30, 3),
        (0.1, 4, 0),
        (0.1, 5, 1),  # half a step rounds up
        (0.25, 10, 3),
        (0.99, 1, 1),
    ],
)
def test_dense_step_count(dense_steps: int | float, total: int | None, count: int) -> None:
    got = SparseConfig(dense_steps=dense_steps).dense_step_count(total)
    assert got == count
    assert isinstance(got, int)


def test_the_last_steps_count_as_the_first() -> None:
    config = SparseConfig(dense_last_steps=0.1)
    assert [config.dense_last_step_count(total) for total in (50, 30, 4)] == [5, 3, 0]
    assert SparseConfig(dense_last_steps=2).dense_last_step_count(None) == 2
    with pytest.raises(RuntimeError, match=r"dense_last_steps=0\.1 is a fraction"):
        config.dense_last_step_count(None)


def test_a_fraction_of_an_unknown_number_of_steps_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"dense_steps=0\.1 is a fraction"):
        SparseConfig(dense_steps=0.1).dense_step_count(None)


# As published, a row a transformer: sparsity, dense steps (of 40 for A14B, else 50), dense layers, first frame.
TABLE = {
    "hunyuan-video-t2v": [(0.80, 0, (), False)],
    "wan2.1-t2v": [(0.75, 5, (0, 1), True)],
    "wan2.1-i2v": [(0.75, 0, (0, 1), True)],
    "wan2.2-t2v-a14b": [(0.85, 3, (0, 1), True), (0.85, 1, (0, 1), True)],
    "wan2.2-i2v-a14b": [(0.85, 0, (0, 1), True), (0.85, 0, (0, 1), True)],
    "wan2.2-ti2v-5b": [(0.75, 5, (0, 1), True)],
    "cogvideox1.5-t2v": [(0.85, 5, (), False)],
    "cogvideox1.5-i2v": [(0.75, 5, (), False)],
    "flux.1-dev-4096": [(0.90, 0, (), False)],
}


def test_there_are_no_other_presets() -> None:
    models = [*TABLE, "video", "image"]
    warmed = [f"{name}-{ending}" for ending in ("sol", "svg", "safe") for name in models]
    assert list(PRESETS) == [*models, *(f"{name}-paper" for name in TABLE), *warmed]
    assert {name: origin(name) for name in models} == {
        **dict.fromkeys(TABLE, "published"),
        **dict.fromkeys(("video", "image"), "chosen here, not published"),
    }


def test_where_nothing_was_published_it_is_the_default_sparsity_with_the_schedule_of_the_nearest() -> None:
    for name, nearest in (("video", "wan2.1-t2v"), ("image", "flux.1-dev-4096")):
        (near,) = preset(nearest)
        assert preset(name) == (SparseConfig(dense_steps=near.dense_steps, dense_layers=near.dense_layers),)


# Dense first steps of so many; as SVG publishes them, where it does.
WARM_UPS = {"sol": dict.fromkeys([*TABLE, "video", "image"], (10, 50))}
WARM_UPS["svg"] = dict.fromkeys([*TABLE, "video", "image"], (15, 50)) | {
    "hunyuan-video-t2v": (5, 50),
    "wan2.1-t2v": (10, 50),
    "wan2.1-i2v": (14, 40),
}


@pytest.mark.parametrize("ending", WARM_UPS)
def test_a_warm_up_of_others_is_all_that_differs_from_the_models_preset(ending: str) -> None:
    for name, (dense, steps) in WARM_UPS[ending].items():
        config, *second = preset(f"{name}-{ending}")
        own, *after = preset(name)
        assert (config.dense_step_count(steps), config.dense_layers) == (dense, (0,)), name
        assert config == own.replace(dense_steps=config.dense_steps, dense_layers=(0,))
        assert second == after  # which begins when the warm-up is over


def test_the_safe_schedule_is_all_that_differs_from_the_models_preset() -> None:
    for name in (*TABLE, "video", "image"):
        safe, own = preset(f"{name}-safe"), preset(name)
        assert [(c.dense_step_count(50), c.dense_last_step_count(50)) for c in safe] == [(20, 5), (5, 5)][: len(own)]
        for config, each in zip(safe, own, strict=True):
            assert config == each.replace(dense_steps=config.dense_steps, dense_last_steps=0.1), name


@pytest.mark.parametrize("name", TABLE)
def test_presets_with_paper_in_their_name_are_the_published_settings(name: str) -> None:
    steps = 40 if name.endswith("a14b") else 50
    published = preset(f"{name}-paper")
    got = [(c.sparsity, c.dense_step_count(steps), c.dense_layers, c.first_frame) for c in published]
    assert got == TABLE[name]
    assert PRESETS[f"{name}-paper"] == published
    for config in published:
        rest = (config.top_p, config.block_size, config.rectify, config.order, config.neighbours)
        assert rest == (0.3, 128, "ipar+gapr", "gilbert", True)


@pytest.mark.parametrize("name", TABLE)
def test_other_presets_have_the_published_sparsity_and_schedule_and_our_defaults(name: str) -> None:
    assert len(preset(name)) == len(preset(f"{name}-paper"))
    for config, published in zip(preset(name), preset(f"{name}-paper"), strict=True):
        schedule = (published.sparsity, published.dense_steps, published.dense_layers)
        assert config == SparseConfig(sparsity=schedule[0], dense_steps=schedule[1], dense_layers=schedule[2])
        assert (config.rectify, config.order) == ("query+slope", "content")
        assert not config.neighbours
        assert not config.first_frame


def test_an_unknown_preset_lists_each_model_once() -> None:
    with pytest.raises(
        ValueError, match=r"got 'wan'; allowed: one of .*'wan2\.1-t2v'.*-safe behind it.*-paper"
    ) as told:
        preset("wan")
    assert str(told.value).count("wan2.1-t2v") == 1


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: SparseConfig(sparsity=80), "Did you mean 0.8?"),
        (lambda: SparseConfig(tolerance=5), "Did you mean 0.05?"),
        (lambda: SparseConfig(rectify="rwo"), "Did you mean 'row'?"),  # type: ignore[arg-type]
        (lambda: SparseConfig.from_dict({"sparcity": 0.8}), "Did you mean 'sparsity'?"),
        (lambda: preset("wan2.1t2v"), "Did you mean 'wan2.1-t2v'?"),
        (lambda: choose("tritn", Call(torch.device("cpu"), torch.float32, 64, 64)), "Did you mean 'triton'?"),
    ],
)
def test_what_was_probably_meant_is_said(make: Callable[[], object], meant: str) -> None:
    with pytest.raises((TypeError, ValueError)) as told:
        make()
    assert str(told.value).endswith(meant)


@pytest.mark.parametrize("sparsity", [1, 800, -0.2, float("nan")])
def test_nothing_is_guessed_where_no_share_is_near(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"allowed: a number in \[0, 1\)\.$"):
        SparseConfig(sparsity=sparsity)


@pytest.mark.parametrize(
    ("name", "steps", "counts"),
    [
        ("wan2.1-t2v", 30, [3]),
        ("cogvideox1.5-i2v", 30, [3]),
        ("wan2.2-t2v-a14b", 20, [2, 1]),
        ("wan2.2-t2v-a14b", 8, [1, 0]),
        ("wan2.2-t2v-a14b", 4, [0, 0]),
    ],
)
def test_a_warm_up_is_a_share_of_the_steps(name: str, steps: int, counts: list[int]) -> None:
    assert [config.dense_step_count(steps) for config in preset(name)] == counts
