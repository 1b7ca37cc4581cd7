"""What importing and running costs, each in a process of its own."""

import json
import subprocess
import sys
import textwrap

import pytest

OPTIONAL = ("accelerate", "diffusers", "flash_attn", "imageio", "jinja2", "matplotlib", "rich", "safetensors")
OPTIONAL += ("torchmetrics", "triton", "typer", "yaml")

# Refuses the optional packages, and notes which module asked for them (torch itself may).
BLOCK = f"""
import importlib.abc, sys

asked = []

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.startswith("<frozen importlib"):
                frame = frame.f_back
            asked.append((frame.f_globals.get("__name__"), name))
            raise ModuleNotFoundError(f"No module named {{name!r}}: refused by the test", name=name)

sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> dict:
    """Runs `code` in a fresh interpreter; it prints one JSON object last."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=1800
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_the_operator_needs_torch_alone() -> None:
    got = python(
        BLOCK
        + """
import json
import torch
from rectified_spaattn import PRESETS, SparseConfig, SparseStats, TokenLayout, preset, rectified_attention

layout = TokenLayout.build((2, 4, 8), text=3)
q, k, v = torch.randn(3, 1, layout.sequence, 2, 8)
out, small = {}, SparseConfig(block_size=16)
for backend in ("auto", "reference"):
    result, stats = rectified_attention(q, k, v, layout, small, backend=backend, return_stats=True)
    assert isinstance(stats, SparseStats)
    out[backend] = bool(result.isfinite().all())
assert preset("wan2.1-t2v") == PRESETS["wan2.1-t2v"]
ours = [pair for pair in asked if pair[0].startswith("rectified_spaattn")]
print(json.dumps({**out, "ours": ours}))
"""
    )
    assert got == {"auto": True, "reference": True, "ours": []}


def test_importing_the_package_imports_no_module_of_it_and_not_even_torch_before_a_name_is_used() -> None:
    got = python(
        """
        import json, sys
        import rectified_spaattn
        print(json.dumps(sorted(m for m in sys.modules if m == "torch" or m.startswith("rectified_spaattn."))))
        """
    )
    assert got == []


def test_help_and_version_come_without_what_commands_need() -> None:
    got = python(
        """
        import json, sys
        from typer.testing import CliRunner
        from rectified_spaattn.cli.app import app

        commands = ["demo", "advise", "generate", "evaluate", "inspect", "doctor", "bench op", "bench model", ""]
        asked = [["--version"], *([*words.split(), "--help"] for words in commands)]
        codes = [CliRunner().invoke(app, words).exit_code for words in asked]
        heavy = {"torch", "diffusers", "matplotlib", "numpy", "transformers", "gradio", "yaml"}
        print(json.dumps({"codes": codes, "heavy": sorted(heavy & set(sys.modules))}))
        """
    )
    assert got == {"codes": [0] * 10, "heavy": []}


def test_enable_without_diffusers_says_what_to_install() -> None:
    got = python(
        BLOCK
        + """
import json
import rectified_spaattn
try:
    rectified_spaattn.enable
except ImportError as error:
    print(json.dumps({"message": str(error)}))
"""
    )
    assert "rectified-spaattn[diffusers]" in got["message"]


def test_every_public_name_resolves_and_unknown_ones_are_named() -> None:
    got = python(
        BLOCK
        + """
import json
import rectified_spaattn

needing = ("enable", "disable", "parallelize", "Handle", "Parallelism", "SupportedModel", "supported")
names = [n for n in rectified_spaattn.__all__ if n not in needing and "eacache" not in n.lower()]
kinds = {name: getattr(rectified_spaattn, name).__class__.__name__ for name in names}
assert set(rectified_spaattn.__all__) <= set(dir(rectified_spaattn))
try:
    rectified_spaattn.atention
except AttributeError as error:
    kinds["error"] = str(error)
print(json.dumps(kinds))
"""
    )
    assert "'atention'" in got.pop("error")
    assert got == {
        "PRESETS": "dict",
        "Plan": "type",
        "SparseConfig": "type",
        "SparseStats": "type",
        "TokenLayout": "type",
        "attend": "function",
        "plan": "function",
        "preset": "function",
        "rectified_attention": "function",
    }


def test_blocks_of_a_real_layout_are_made_in_seconds_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    """HunyuanVideo at 720p: 115,200 video tokens, 900 blocks, their neighbours."""
    got = python(
        """
        import json, time
        from rectified_spaattn import SparseConfig, TokenLayout
        from rectified_spaattn.orders import blocks_of

        start = time.perf_counter()
        blocks = blocks_of(TokenLayout.build((32, 45, 80), text=256), SparseConfig.paper())
        seconds = time.perf_counter() - start
        again = blocks_of(TokenLayout.build((32, 45, 80), text=256), SparseConfig.paper(sparsity=0.9))
        print(json.dumps({"seconds": seconds, "same": again is blocks, "blocks": list(blocks.neighbours.shape)}))
        """
    )
    with capsys.disabled():
        print(f" [blocks of 32x45x80 in {got['seconds']:.2f} s] ", end="")
    assert got["same"]
    assert got["blocks"] == [900, 900]
    assert got["seconds"] < 60  # 2 s on a quiet machine
