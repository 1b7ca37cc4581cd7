"""The tables of docs/models.md, from the rows, the refusals and what the tests build.

    python tests/model_tables.py

writes them between the marks in that file; tests/test_model_tables.py holds that they are there.
"""

from itertools import pairwise
from pathlib import Path

from cache_cases import cache_of
from model_cases import CASES, built
from model_sizes import tokens_of
from rectified_spaattn.layout import TokenLayout
from rectified_spaattn.pipelines.adapters import ADAPTERS
from rectified_spaattn.pipelines.refused import REFUSED
from rectified_spaattn.presets import origin

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
# For whom the settings were published; for all others they are those of the nearest.
PUBLISHED = ("HunyuanVideo T2V", "Wan 2.1 T2V", "Wan 2.1 I2V", "Wan 2.2 I2V", "Wan 2.2 TI2V", "CogVideoX 1.5 T2V")
PUBLISHED += ("CogVideoX 1.5 I2V", "Flux.1")
# Whose diffusers pipelines tests run, too: tiny_pipelines, tiny_later_pipelines, test_diffusers, test_minimax_h3.
PIPELINES = ("HunyuanVideo", "HunyuanVideo15", "Wan", "WanVACE", "SkyReelsV2", "CogVideoX", "Flux", "LTXVideo")
PIPELINES += ("QwenImage", "MiniMaxH3", "Kandinsky5", "Kandinsky6", "ZImage", "LTX2Video", "Cosmos3Omni", "MotifVideo")
PIPELINES += ("Mochi",)


def supported() -> str:
    """One line a class: its models, tokens, what stands alone, preset, cache, how they are proven."""
    heads = ("diffusers transformer", "models", "tokens", "stands alone", "preset", "cache", "proof")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in ADAPTERS:
        names = [name for name, case in CASES.items() if _kind(name) == kind]
        alone = sorted({_alone(_layout(name)) for name in names})
        presets = list(dict.fromkeys(_preset(name) for name in names))
        proof = "M P" if kind.partition("Transformer")[0] in PIPELINES else "M"
        columns = [
            f"`{kind}`",
            "; ".join(names),
            tokens_of(kind),
            "; ".join(alone),
            "; ".join(presets),
            cache_of(kind) or "none",
            proof,
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def refused() -> str:
    """One line a reason."""
    lines = ["| diffusers transformer | why it has no row |", "|---|---|"]
    for reason in dict.fromkeys(REFUSED.values()):
        kinds = ", ".join(f"`{kind}`" for kind, why in REFUSED.items() if why == reason)
        lines.append(f"| {kinds} | {reason} |")
    return "\n".join(lines)


def _kind(name: str) -> str:
    return type(built(name, CASES[name].head_dims[0])[0]).__name__


def _layout(name: str) -> TokenLayout:
    model, inputs = built(name, CASES[name].head_dims[0])
    return ADAPTERS[_kind(name)].layouts(model, inputs)[0]


def _alone(layout: TokenLayout) -> str:
    inside = [last < first for (_, last), (first, _) in pairwise(layout.spans)]
    sides = {
        "before": layout.spans[0][0] > 0,
        "between": any(inside),
        "behind": layout.spans[-1][1] < layout.sequence,
    }
    return ", ".join(side for side, there in sides.items() if there) or "nothing"


def _preset(name: str) -> str:
    preset = CASES[name].preset
    source = origin(preset) if name in PUBLISHED or origin(preset) != "published" else "nearest"
    return f"`{preset}` ({source.partition(',')[0]})"


def page() -> str:
    """docs/models.md with the tables of now."""
    text = PAGE.read_text()
    for mark, table in (("supported", supported()), ("refused", refused())):
        start, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
        before, _, rest = text.partition(start)
        text = before + start + table + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
