"""README and docs/: a test runs a command, or its section says what it needs; options exist; links lead somewhere."""

import csv
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from rectified_spaattn import SparseConfig
from rectified_spaattn.cli.app import app
from rectified_spaattn.lab.clips.modes import file_mode
from rectified_spaattn.lab.clips.prompts import read_prompts
from rectified_spaattn.lab.demo_model.model import tokenize

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "rectified-spaattn|python|pip|make|torchrun|accelerate|cp|vbench|sglang"
INLINE = re.compile(r"`(rectified-spaattn [^`]* --[^`]+)`")
COMMAND = re.compile(rf"^\s*(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) ")
# What a section, a line or the top of a page says of commands that no test runs
NEEDS = re.compile(r"\bneeds? (?:a GPU|several GPUs|the network|weights)\b")
# Commands that a test runs, sizes and paths apart: how they begin -> the test
RUN = {
    "rectified-spaattn demo": "test_cli.py::test_demo_writes_every_file",
    "make demo": "test_docs.py::test_make_demo_is_the_command",
    "make test": "../.ci/run::make test",
    "make quick": "test_docs.py::test_make_demo_is_the_command",
    "make docs": "test_docs.py::test_every_page_and_every_public_name_is_in_the_site",
    "pip install": "test_docs.py::test_every_extra_is_there",
    "python -m pip install": "test_docs.py::test_every_extra_is_there",
    "rectified-spaattn doctor": "test_doctor.py::",
    "rectified-spaattn inspect --layer 3": "test_inspect.py::",
    "rectified-spaattn generate": "test_generate.py::",
    "rectified-spaattn evaluate --out runs/demo": "test_evaluate.py::",
    "rectified-spaattn bench op --shape tiny": "test_bench.py::",
    "rectified-spaattn bench model wan2.1-14b --size tiny": "test_bench_model.py::",
    "cp -r comfyui": "test_comfyui.py::",
    "python -m studies.ablation": "test_ablation.py::",
    "python -m studies.rivals --split dev": "test_rivals.py::",
    "python benchmarks/cpu_operator.py": "test_docs.py::test_the_benchmark_of_the_cpu_writes_its_table",
}


class Command(NamedTuple):
    """A command of a page; said: its own line, its section up to there, and the top of the page."""

    page: str
    text: str
    said: str


def commands(page: Path) -> Iterator[Command]:
    lines = re.sub(r" \\\n\s+", " ", page.read_text(encoding="utf-8")).splitlines()
    fence, top, section = "", list[str](), list[str]()
    for line in lines:
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip("` ") or "text"
        elif line.startswith("#") and not fence:
            top, section = top or section, []
        elif COMMAND.match(line) and (fence not in ("", "python") or line.startswith("    ")):
            words, _, comment = line.partition("  #")
            yield Command(page.name, words.strip(), " ".join([*top, *section, comment]))
        elif not fence:
            yield from (Command(page.name, words, " ".join([*top, line])) for words in INLINE.findall(line))
        section.append(line)


COMMANDS = [each for page in PAGES for each in commands(page)]
OURS = [each for each in COMMANDS if each.text.startswith("rectified-spaattn ") and "..." not in each.text]


@pytest.mark.parametrize("each", COMMANDS, ids=lambda each: f"{each.page}: {each.text[:60]}")
def test_a_command_is_run_by_a_test_or_says_what_it_needs(each: Command) -> None:
    runs = [test for begin, test in RUN.items() if each.text.startswith(begin)]
    assert runs or NEEDS.search(each.said), "run it in a test and add it to RUN, or write 'needs a GPU' in its section"
    for file, _, name in (test.partition("::") for test in runs):
        assert name in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_the_walk_finds_a_command_that_nobody_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# P\n\nText.\n\n    torchrun x.py \\\n        --more\n\n## Q\n\nThis needs a GPU.\n\n    python y.py\n"
    )
    first, second = commands(page)
    assert first.text == "torchrun x.py --more"
    assert not NEEDS.search(first.said)
    assert NEEDS.search(second.said)


@pytest.mark.parametrize("text", sorted({each.text for each in OURS}), ids=lambda text: text[18:70])
def test_the_command_line_takes_it(text: str) -> None:
    words = shlex.split(text)[1:]
    command: Any = typer.main.get_command(app)
    words = [word for word in words if word != "--debug"]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    if words != ["--version"]:
        command.make_context("rectified-spaattn", words).close()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_a_file_and_to_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


def test_every_extra_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for name in re.findall(r'pip install "\.\[(\w+)\]"', page.read_text())}
    assert {"diffusers", "demo"} <= named <= set(extras)


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_of_the_cpu_writes_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "cpu.csv"
    small = ["--repeats", "7", "--threads", "1", "--grid", "4", "8", "8", "--csv", str(out)]
    monkeypatch.setattr("sys.argv", ["cpu_operator.py", *small])
    runpy.run_path(str(ROOT / "benchmarks" / "cpu_operator.py"), run_name="__main__")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["input"], row["selection"]) for row in rows} == {
        (name, how) for name in ("gaussian", "smooth") for how in ("exact", "published", "default")
    }


def test_make_demo_is_the_command() -> None:
    rules = (ROOT / "Makefile").read_text()
    assert "\ndemo: $(STAMP)\n\t$(BIN)/rectified-spaattn demo " in rules
    assert "\nquick: " in rules


def test_every_page_and_every_public_name_is_in_the_site() -> None:
    """make docs builds it; a name that mkdocstrings cannot find is an error there."""
    listed = set(re.findall(r"[\w.]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.name for page in PAGES[1:]}
    described = re.findall(r"^::: rectified_spaattn\.(.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    import rectified_spaattn

    assert {name.rpartition(".")[2] for name in described} == set(rectified_spaattn.__all__) - {"PRESETS"}


def test_the_files_of_examples_are_read_by_the_commands() -> None:
    examples = ROOT / "examples"
    assert len(read_prompts(examples / "prompts.txt")) == 5
    captions = [caption for each in OURS for caption in re.findall(r'demo .*--prompt "([^"]+)"', each.text)]
    assert captions
    tokenize([*captions, *read_prompts(examples / "demo_prompts.txt")])
    assert file_mode(examples / "settings.yaml").configs == (SparseConfig.from_yaml(examples / "settings.yaml"),)
    assert file_mode(examples / "settings_tolerance.yaml").configs[0].tolerance == 0.05
    assert len(file_mode(examples / "settings_two_experts.yaml").configs) == 2


def test_what_github_reads_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (citation["version"], citation["license"]) == (version, "Apache-2.0")
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    required = [part["attributes"]["label"] for part in form["body"] if part.get("validations", {}).get("required")]
    assert "Output of `rectified-spaattn doctor --json`" in required


def cells() -> list[str]:
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for cell in cells():
        exec(compile(cell, "first_steps.ipynb", "exec"), names)
    ours, plain = map(float, re.findall(r"ours ([\d.]+) dB, plain sparse ([\d.]+) dB", capsys.readouterr().out)[0])
    assert ours > plain
