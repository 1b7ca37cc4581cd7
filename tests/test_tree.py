"""The tree: imports point one way, files are short, and every choice has one holder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rectified_spaattn"
# What may import what: a name may import those before it, and a folder itself.
CORE = ("config", "presets", "layout", "orders", "method", "backends", "ops", "attention", "kept_plans", "budgets")
CORE += ("precisions",)
LEVELS = (*CORE, "pipelines", "lab", "cli")
ENGINES = (
    "attention",
    "budgets",
    "config",
    "kept_plans",
    "presets",
    "layout",
    "precisions",
    "engines",
)  # what an adapter to an engine may import
ENTRIES = ("__init__", "__main__")  # they only hand on
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, as dotted paths below the package."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            if node.module:
                yield ".".join((*base, node.module))
            else:
                yield from (".".join((*base, alias.name)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name.partition(".")[2] for name in names if name and name.split(".")[0] == PACKAGE.name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if top in ENTRIES:
        return
    if top == "engines":
        assert {module.partition(".")[0] for module in imported(path)} <= set(ENGINES)
        return
    assert top in LEVELS, f"{top} has no place in the order of imports {LEVELS}"
    for module in imported(path):
        target = module.partition(".")[0]
        if target in ("__version__", ""):
            continue
        assert target in LEVELS, f"{path} imports {module}, which has no place in {LEVELS}"
        assert LEVELS.index(target) <= LEVELS.index(top), f"{path} imports {module}, which stands above {top}"


def test_the_order_of_imports_would_notice_a_step_back(tmp_path: Path) -> None:
    path = PACKAGE / "method" / "pool.py"
    assert list(imported(path)) == ["config"]
    assert "pipelines" not in LEVELS[: LEVELS.index("attention")]


def test_no_file_is_above_400_lines() -> None:
    folders = ("src", "tests", "studies", "benchmarks", "examples")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_instruments_are_the_smaller_part() -> None:
    """The package generates; what measures it and what prints is beside that."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    instruments = sum(count for path, count in lines.items() if path.relative_to(PACKAGE).parts[0] in ("lab", "cli"))
    assert instruments < sum(lines.values()) / 2


def test_order_and_block_size_are_written_in_the_config_alone() -> None:
    """Elsewhere they are read: no call of the package names an order or a size of blocks."""
    holders = {PACKAGE / "config.py", PACKAGE / "orders.py"}
    writes = [
        f"{path.relative_to(PACKAGE)}:{keyword.value.lineno}"
        for path in SOURCES
        if path not in holders
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("order", "block_size") and isinstance(keyword.value, ast.Constant)
    ]
    assert writes == []
