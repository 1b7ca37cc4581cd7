"""Every bad input is refused at the door: right class, what was got, what is allowed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_spaattn import SparseConfig, TokenLayout, preset, rectified_attention

LAYOUT = TokenLayout.build((2, 4, 4), text=3)  # 2 blocks of 16, 35 tokens
SHAPE = (2, 35, 3, 8)
SMALL = SparseConfig(block_size=16)
PAPER = SparseConfig.paper(block_size=16)


def call(**changed: Any) -> Any:
    arguments: dict[str, Any] = {"layout": LAYOUT, "config": SMALL, **{name: torch.zeros(SHAPE) for name in "qkv"}}
    return rectified_attention(**{**arguments, **changed})


def build(**changed: Any) -> TokenLayout:
    return TokenLayout.build(**{"grid": (2, 4, 4), **changed})


def refused(kind: type[Exception], got: object, allowed: str, function: Callable[..., Any], **arguments: Any) -> None:
    """`function` raises `kind`; the message holds what was got and what is allowed."""
    with pytest.raises(kind) as caught:
        function(**arguments)
    message = str(caught.value)
    assert caught.type is kind
    assert "got" in message, message
    assert str(got) in message, message
    assert "allowed" in message, message
    assert allowed in message, message


def test_the_call_that_the_others_spoil_is_good() -> None:
    assert call().shape == SHAPE
    assert call(backend="reference").shape == SHAPE


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("value", "kind", "got", "allowed"),
    [
        (None, TypeError, "NoneType", "torch.Tensor [B, S, H, D]"),
        ([[1.0]], TypeError, "list", "torch.Tensor"),
        (torch.zeros(35, 3, 8), ValueError, "(35, 3, 8)", "[B, S, H, D]"),
        (torch.zeros(1, 2, 35, 3, 8), ValueError, "(1, 2, 35, 3, 8)", "[B, S, H, D]"),
        (torch.zeros(SHAPE, dtype=torch.int64), TypeError, "torch.int64", "torch.bfloat16"),
        (torch.zeros(SHAPE, dtype=torch.bool), TypeError, "torch.bool", "torch.float32"),
        (torch.zeros(SHAPE, dtype=torch.complex64), TypeError, "torch.complex64", "torch.float16"),
        (torch.zeros(SHAPE, dtype=torch.float64), TypeError, "torch.float64", "torch.float32"),
    ],
)
def test_one_bad_tensor(name: str, value: object, kind: type[Exception], got: str, allowed: str) -> None:
    refused(kind, got, allowed, call, **{name: value})


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize(
    ("value", "kind", "got"),
    [
        (torch.zeros(2, 35, 3, 4), ValueError, "(2, 35, 3, 4)"),
        (torch.zeros(1, 35, 3, 8), ValueError, "(1, 35, 3, 8)"),
        (torch.zeros(2, 36, 3, 8), ValueError, "(2, 36, 3, 8)"),
        (torch.zeros(SHAPE, dtype=torch.float16), TypeError, "torch.float16"),
        (torch.zeros(SHAPE, device="meta"), TypeError, "meta"),
    ],
)
def test_q_k_and_v_that_differ(name: str, value: torch.Tensor, kind: type[Exception], got: str) -> None:
    refused(kind, got, "q's" if kind is TypeError else "that of q", call, **{name: value})


@pytest.mark.parametrize(("of_k", "of_v"), [(2, 2), (4, 4), (6, 6), (1, 3), (3, 1)])
def test_heads_that_do_not_make_groups(of_k: int, of_v: int) -> None:
    k, v = (torch.zeros(2, 35, heads, 8) for heads in (of_k, of_v))
    refused(ValueError, f"{of_k} and {of_v} heads for 3 of q", "a number that divides 3", call, k=k, v=v)


@pytest.mark.parametrize(
    ("shape", "allowed"),
    [
        ((2, 3, 35, 8), "[B, S, H, D], not [B, H, S, D]"),
        ((2, 32, 3, 8), "2*4*4 video + 3 that stand alone = 35"),
        ((2, 36, 3, 8), "2*4*4 video + 3 that stand alone = 35"),
        ((0, 35, 3, 8), "1 or more"),
        ((2, 0, 3, 8), "1 or more"),
        ((2, 35, 0, 8), "1 or more"),
        ((2, 35, 3, 0), "1 or more"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_shapes_that_do_not_fit_the_layout(shape: tuple[int, ...], allowed: str, backend: str) -> None:
    got = f"S = {shape[1]} tokens" if 0 not in shape else shape
    refused(ValueError, got, allowed, call, **{name: torch.zeros(shape) for name in "qkv"}, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float64_is_for_the_reference_only(backend: str) -> None:
    tensors = {name: torch.zeros(SHAPE, dtype=torch.float64) for name in "qkv"}
    refused(TypeError, "torch.float64", "torch.float32", call, **tensors, backend=backend)
    assert call(**tensors, backend="reference").dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "kind", "got", "allowed"),
    [
        ({"text_mask": torch.ones(2, 3)}, TypeError, "torch.float32", "bool"),
        ({"text_mask": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "torch.int64", "bool"),
        ({"text_mask": [[True] * 3] * 2}, TypeError, "list", "bool"),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "(2, 4)", "(2, 3)"),
        ({"text_mask": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "(1, 3)", "(2, 3)"),
        ({"text_mask": torch.ones(2, 1, 1, 3, dtype=torch.bool)}, ValueError, "(2, 1, 1, 3)", "(2, 3)"),
        ({"text_mask": torch.ones(2, 35, dtype=torch.bool)}, ValueError, "(2, 35)", "(2, 3)"),
        ({"text_mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "meta", "cpu"),
        ({"block_mask": torch.ones(2, 3, 2, 2)}, TypeError, "torch.float32", "bool"),
        ({"block_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "(2, 2)", "(2, 3, 2, 2)"),
        ({"block_mask": torch.ones(2, 1, 2, 2, dtype=torch.bool)}, ValueError, "(2, 1, 2, 2)", "(2, 3, 2, 2)"),
        ({"block_mask": torch.ones(2, 3, 2, 3, dtype=torch.bool)}, ValueError, "(2, 3, 2, 3)", "(2, 3, 2, 2)"),
        ({"block_mask": torch.ones(2, 3, 2, 2, dtype=torch.bool, device="meta")}, ValueError, "meta", "cpu"),
        ({"token_order": [[0]]}, TypeError, "list", "int32 or int64"),
        ({"token_order": torch.zeros(2, 3, 32)}, TypeError, "torch.float32", "int32 or int64"),
        ({"token_order": torch.zeros(2, 3, 16, dtype=torch.int32)}, ValueError, "(2, 3, 16)", "(2, 3, 32)"),
        ({"token_order": torch.zeros(2, 3, 32, dtype=torch.int32), "config": PAPER}, ValueError, "gilbert", "content"),
        ({"scale": 0}, ValueError, "0", "positive"),
        ({"scale": -0.1}, ValueError, "-0.1", "positive"),
        ({"scale": math.nan}, ValueError, "nan", "finite"),
        ({"scale": math.inf}, ValueError, "inf", "finite"),
        ({"scale": True}, TypeError, "True", "number"),
        ({"scale": "0.1"}, TypeError, "'0.1'", "number"),
        ({"scale": torch.tensor(0.1)}, TypeError, "tensor", "number"),
        ({"backend": "cuda"}, ValueError, "'cuda'", "'torch'"),
        ({"backend": ""}, ValueError, "''", "'auto'"),
        ({"backend": None}, TypeError, "None", "'reference'"),
        ({"layout": None}, TypeError, "NoneType", "TokenLayout"),
        ({"layout": (2, 4, 4)}, TypeError, "tuple", "TokenLayout.build"),
        ({"config": {"sparsity": 0.5}}, TypeError, "dict", "SparseConfig"),
        ({"config": 0.8}, TypeError, "float", "SparseConfig"),
    ],
)
def test_bad_options(arguments: dict[str, Any], kind: type[Exception], got: str, allowed: str) -> None:
    refused(kind, got, allowed, call, **arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("text", [0, 3])
def test_a_query_block_without_any_key(backend: str, text: int) -> None:
    """No critical block, no leftover, no text or none that is valid, and no pooled key as "row" has them."""
    layout = TokenLayout.build((2, 4, 4), text=text)
    q = torch.zeros(2, 32 + text, 1, 8)
    mask = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    mask[1, 0, 1] = False
    nothing = torch.zeros(2, text, dtype=torch.bool)
    arguments = {"layout": layout, "block_mask": mask, "text_mask": nothing, "backend": backend, "config": PAPER}
    refused(ValueError, "no critical block for query block 1", "at least one", call, q=q, k=q, v=q, **arguments)
    mask[1, 0, 1, 0] = True
    assert call(q=q, k=q, v=q, **arguments).shape == q.shape


def test_one_valid_text_token_is_enough_for_an_empty_row() -> None:
    one = torch.tensor([[False, True, False]] * 2)
    empty = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    assert not call(block_mask=empty, text_mask=one, config=PAPER).isnan().any()


NUMBERS: list[tuple[Any, type[Exception]]] = [
    (-0.1, ValueError),
    (1.1, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    (True, TypeError),
    ("0.8", TypeError),
    (None, TypeError),
    ([0.8], TypeError),
    (1j, TypeError),
]


@pytest.mark.parametrize(("value", "kind"), [*NUMBERS, (1.0, ValueError), (1, ValueError)])
def test_bad_sparsity(value: Any, kind: type[Exception]) -> None:
    refused(kind, repr(value), "[0, 1)", SparseConfig, sparsity=value)


@pytest.mark.parametrize(("value", "kind"), NUMBERS)
def test_bad_top_p(value: Any, kind: type[Exception]) -> None:
    refused(kind, repr(value), "[0, 1]", SparseConfig, top_p=value)


def test_the_ends_that_are_allowed() -> None:
    assert SparseConfig(sparsity=0, top_p=0) == SparseConfig(sparsity=0.0, top_p=0.0)
    assert SparseConfig(top_p=1).top_p == 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((value, ValueError) for value in (0, -16, 8, 24)),
        *((value, TypeError) for value in (True, 64.0, "64", None)),
    ],
)
def test_bad_block_size(value: Any, kind: type[Exception]) -> None:
    refused(kind, repr(value), "multiple of 16", SparseConfig, block_size=value)


@pytest.mark.parametrize(
    ("arguments", "kind", "got", "allowed"),
    [
        ({"rectify": "gapr"}, ValueError, "'gapr'", "'ipar+gapr'"),
        ({"rectify": "IPAR"}, ValueError, "'IPAR'", "'ipar'"),
        ({"rectify": None}, TypeError, "None", "'none'"),
        ({"rectify": True}, TypeError, "True", "'pooled'"),
        ({"order": "hilbert"}, ValueError, "'hilbert'", "'gilbert'"),
        ({"order": 1}, TypeError, "1", "'raster'"),
        ({"neighbours": 1}, TypeError, "1", "True or False"),
        ({"neighbours": "no"}, TypeError, "'no'", "True or False"),
        ({"first_frame": None}, TypeError, "None", "True or False"),
        ({"dense_steps": -1}, ValueError, "-1", "0 or more"),
        ({"dense_steps": -0.1}, ValueError, "-0.1", "[0, 1)"),
        ({"dense_steps": 1.0}, ValueError, "1.0", "an int"),
        ({"dense_steps": 5.0}, ValueError, "5.0", "an int"),
        ({"dense_steps": math.nan}, ValueError, "nan", "[0, 1)"),
        ({"dense_steps": math.inf}, ValueError, "inf", "[0, 1)"),
        ({"dense_steps": True}, TypeError, "True", "count"),
        ({"dense_steps": "5"}, TypeError, "'5'", "count"),
        ({"dense_last_steps": 1.0}, ValueError, "dense_last_steps: got 1.0", "an int"),
        ({"dense_last_steps": False}, TypeError, "dense_last_steps: got False", "count"),
        ({"dense_layers": 2}, TypeError, "2", "indices"),
        ({"dense_layers": "01"}, TypeError, "'01'", "indices"),
        ({"dense_layers": None}, TypeError, "None", "indices"),
        ({"dense_layers": (0, -1)}, ValueError, "-1", "0 or more"),
        ({"dense_layers": (0, 1.0)}, TypeError, "1.0", "integers"),
        ({"dense_layers": (True,)}, TypeError, "True", "integers"),
    ],
)
def test_bad_config(arguments: dict[str, Any], kind: type[Exception], got: str, allowed: str) -> None:
    refused(kind, got, allowed, SparseConfig, **arguments)


@pytest.mark.parametrize("values", [{"sparsty": 0.8}, {"sparsity": 0.8, "Top_P": 0.1}, {3: 4}, {3: 4, "x": 1}])
def test_unknown_keys(values: dict[Any, Any]) -> None:
    unknown = next(key for key in values if key != "sparsity")
    refused(TypeError, repr(unknown), "top_p", SparseConfig.from_dict, values=values)


@pytest.mark.parametrize("text", ["- sparsity\n", "0.8\n", "", "sparsity: 0.8\nunknown: 1\n"])
def test_yaml_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(TypeError, match=r"got .*allowed: "):
        SparseConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("arguments", "kind", "got", "allowed"),
    [
        ({"grid": (2, 4)}, TypeError, "(2, 4)", "(T, H, W)"),
        ({"grid": (2, 4, 4, 1)}, TypeError, "(2, 4, 4, 1)", "(T, H, W)"),
        ({"grid": 32}, TypeError, "32", "(T, H, W)"),
        ({"grid": (2, 4, 4.0)}, TypeError, "(2, 4, 4.0)", "integers"),
        ({"grid": (True, 4, 4)}, TypeError, "(True, 4, 4)", "integers"),
        ({"grid": torch.tensor([2, 4, 4])}, TypeError, "tensor([2, 4, 4])", "integers"),
        ({"grid": (0, 4, 4)}, ValueError, "(0, 4, 4)", "1 or more"),
        ({"grid": (2, -4, 4)}, ValueError, "(2, -4, 4)", "1 or more"),
        ({"text": -1}, ValueError, "-1", "0 or more"),
        ({"text": 3.0}, TypeError, "3.0", "integer"),
        ({"text": None}, TypeError, "None", "integer"),
        ({"text": True}, TypeError, "True", "integer"),
        ({"text_first": 1}, TypeError, "1", "True or False"),
        ({"text_first": "yes"}, TypeError, "'yes'", "True or False"),
    ],
)
def test_bad_layout(arguments: dict[str, Any], kind: type[Exception], got: str, allowed: str) -> None:
    refused(kind, got, allowed, build, **arguments)


@pytest.mark.parametrize(
    "spans", [[(0, 40)], [(-1, 3)], [(3, 3)], [(5, 3)], [(0, 4), (4, 8)], [(4, 8), (0, 2)], [(0, 5), (4, 8)]]
)
def test_spans_that_are_none(spans: list[tuple[int, int]]) -> None:
    refused(ValueError, tuple(spans), "ascending", TokenLayout, sequence=35, spans=tuple(spans))


def test_orders_in_space_need_a_grid() -> None:
    layout = TokenLayout.of(35, [(0, 20), (24, 35)])
    assert call(layout=layout).shape == SHAPE
    refused(ValueError, "order: got 'gilbert'", "'content'", call, layout=layout, config=PAPER)


@pytest.mark.parametrize("name", ["neighbours", "first_frame"])
def test_places_need_an_order_in_space(name: str) -> None:
    refused(ValueError, f"{name}: got True with order='content'", "False", SparseConfig, **{name: True})
    assert getattr(SparseConfig(order="gilbert", **{name: True}), name)


def test_unknown_preset() -> None:
    refused(ValueError, "'wan'", "'wan2.1-t2v'", preset, name="wan")
