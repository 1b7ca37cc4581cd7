"""Draws a workflow as ComfyUI shows it: python comfyui/workflows/draw.py WORKFLOW.json PICTURE.png"""

import json
import sys
import textwrap
from pathlib import Path

from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

from rectified_spaattn.engines.comfyui import NODE_CLASS_MAPPINGS

OURS, THEIRS, SCALE = "#c9dcf0", "#f1efe9", 100  # pixels of the canvas an inch
COLOURS = {"MODEL": "#1f5a96", "CONDITIONING": "#b36b00", "LATENT": "#9b3f86", "VAE": "#a33", "IMAGE": "#2d7a3a"}
LINE, TITLE = 17, 24


def place(node: dict, index: int) -> tuple[float, float]:
    """Height of an input or output below the top of its node."""
    return node["pos"][0], node["pos"][1] + TITLE + LINE * (index + 0.6)


def draw(workflow: dict, path: Path) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + 20
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values()) + 20
    top = min(node["pos"][1] for node in nodes.values()) - 20
    figure, axes = pyplot.subplots(figsize=((right + 20) / SCALE, (bottom - top) / SCALE))
    for _, source, slot, target, entry, kind in workflow["links"]:
        (x, y), (u, v) = place(nodes[source], slot), place(nodes[target], entry)
        x += nodes[source]["size"][0]
        bend = max(40, abs(u - x) / 2)
        points = [(i / 40, 1 - i / 40) for i in range(41)]
        xs = [b**3 * x + 3 * b * b * a * (x + bend) + 3 * b * a * a * (u - bend) + a**3 * u for a, b in points]
        ys = [(b**3 + 3 * b * b * a) * y + (3 * b * a * a + a**3) * v for a, b in points]
        axes.plot(xs, ys, color=COLOURS.get(kind, "#777"), linewidth=1.6, zorder=1)
    for node in nodes.values():
        box(axes, node)
    axes.set_xlim(-20, right)
    axes.set_ylim(bottom, top)
    axes.axis("off")
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05)


def box(axes: pyplot.Axes, node: dict) -> None:
    (x, y), (width, height) = node["pos"], node["size"]
    colour = OURS if node["type"].startswith("Rectified") else THEIRS
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=8", fc=colour, ec="#555", zorder=2
    )
    axes.add_patch(shape)
    axes.text(x + 10, y + 5, node.get("title", node["type"]), va="top", fontsize=8.5, weight="bold", zorder=3)
    for index, each in enumerate(node["inputs"]):
        axes.text(x + 10, place(node, index)[1], each["name"], va="center", fontsize=7.5, color="#333", zorder=3)
    for index, each in enumerate(node["outputs"]):
        height_of = place(node, index)[1]
        axes.text(
            x + width - 10, height_of, each["name"], va="center", ha="right", fontsize=7.5, color="#333", zorder=3
        )
    line = max(len(node["inputs"]), len(node["outputs"]))
    for value in named(node):
        for part in textwrap.wrap(str(value), int(width / 8)) or [""]:
            axes.text(x + 18, place(node, line)[1], part, va="center", fontsize=7.5, family="monospace", zorder=3)
            line += 1


def named(node: dict) -> list[str]:
    """Values of the widgets; those of our nodes with their names."""
    values = [str(value) for value in node["widgets_values"]]
    if node["type"] not in NODE_CLASS_MAPPINGS:
        return values
    names = [name for name in NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"] if name != "model"]
    return [f"{name}: {value}" for name, value in zip(names, values, strict=False)]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
