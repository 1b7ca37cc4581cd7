"""The figure of the operator's speed shows what the rows say."""

from pathlib import Path
from typing import Any

import pytest

from rectified_spaattn.lab.bench.rows import Row
from studies.op_speed import panels, speed_figure, spread


def gpu_rows() -> list[Row]:
    """As if measured on a GPU: two shapes, two backends, three baselines, one of which is not there."""
    rows = []
    for name, dense in (("hunyuan-video", 270.0), ("wan-14b", 135.0)):
        common: dict[str, Any] = {"shape": name, "tokens": 115_456, "heads": 24, "head_dim": 128, "block_size": 128}
        common |= {"rectify": "ipar+gapr", "order": "gilbert", "dtype": "bfloat16"}

        def row(
            kind: str, label: str, sparsity: float | None, ms: float, common: Any = common, d: float = dense
        ) -> Row:
            share = 1.0 if sparsity is None else 1.01 - sparsity
            times = {"ms": ms, "ms_q1": 0.97 * ms, "ms_q3": 1.04 * ms, "ms_min": 0.9 * ms, "ms_max": 1.2 * ms}
            ratio = {"dense": "cudnn", "dense_ms": d, "ratio": d / ms, "density": share, "ideal": 1 / share}
            return Row(**common, kind=kind, name=label, sparsity=sparsity, **times, **ratio)

        rows += [row("dense", "cudnn", None, dense), row("dense", "flash2", None, 1.7 * dense)]
        rows.append(Row(**common, kind="dense", name="fa4", not_run="flash-attn-4 is not installed"))
        for sparsity in (0.5, 0.7, 0.8, 0.8895, 0.95):
            density = 1.01 - sparsity
            rows.append(row("sparse", "triton", sparsity, dense / 270 * (15 + 300 * density)))
            rows.append(row("sparse", "torch", sparsity, dense / 270 * (200 + 900 * density)))
    return rows


def test_panels_are_the_rows_and_are_drawn(tmp_path: Path) -> None:
    drawn = panels(gpu_rows())
    assert [(panel.shape, list(panel.lines), list(panel.levels)) for panel in drawn] == [
        (name, ["triton", "torch"], ["cudnn", "flash2"]) for name in ("hunyuan-video", "wan-14b")
    ]
    first = drawn[0].lines["triton"][2]
    assert first.speedup == pytest.approx(270 / (15 + 300 * 0.21))
    assert first.low == pytest.approx(first.speedup / 1.04)
    assert first.high == pytest.approx(first.speedup / 0.97)
    assert "triton is\n8.2 times as fast as dense cudnn (ideal: 16.7 times)" in drawn[0].title()
    speed_figure(tmp_path / "speed.png", drawn, "a GPU")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no measured backend"):
        panels([row for row in gpu_rows() if row.kind == "dense"])


def test_labels_are_moved_apart() -> None:
    assert spread([1.0, 5.0, 1.1], 0.5) == [1.0, 5.0, 1.5]
    assert spread([], 1.0) == []
