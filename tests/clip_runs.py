"""Folders with tiny models, and the command line run in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tiny
from rectified_spaattn.cli.app import app

WIDE = {"COLUMNS": "2000"}
SHORT_TEXT = ["--argument", "max_sequence_length=12"]
WAN = ["--prompt", "a b c", "--height", 128, "--width", 128, "--frames", 9, "--steps", 3, *SHORT_TEXT]
HUNYUAN = ["--prompt", "a b c", "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, *SHORT_TEXT]
HUNYUAN += ["--argument", f"prompt_template={json.dumps(tiny.PROMPT_TEMPLATE)}"]


def command(*words: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], env=WIDE)


def generate(*words: Any) -> Result:
    return command("generate", *words)


def told(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan, wan-2 (two experts), ti2v and hunyuan, each as save_pretrained writes it; sparse.yaml that fits them."""
    folder = tmp_path_factory.mktemp("models")
    wan = tiny.wan_pipeline()
    wan.save_pretrained(folder / "wan")
    wan.register_to_config(expand_timesteps=True)
    wan.save_pretrained(folder / "ti2v")
    tiny.wan_pipeline(experts=2).save_pretrained(folder / "wan-2")
    tiny.hunyuan_pipeline().save_pretrained(folder / "hunyuan")
    (folder / "sparse.yaml").write_text("{sparsity: 0.8, block_size: 16, top_p: 0.0, neighbours: false}\n")
    return folder
