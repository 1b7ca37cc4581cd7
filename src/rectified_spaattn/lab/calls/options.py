"""What `inspect` is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import ORDERS, RECTIFY, SparseConfig, check_choice
from ..clips.options import ModelOptions
from ..demo_model.prompts import PROMPTS
from ..option import given, option

_SHOWN = tuple(name for name in RECTIFY if name != "none")
_THE_PRESETS: dict[str, Any] = {"unset": "the preset's"}
_THE_MIDDLE: dict[str, Any] = {"least": 0, "unset": "the middle one"}


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """One run; None leaves the choice to the model, its preset or its pipeline.

    Raises ValueError or TypeError for values out of range.
    """

    layer: int | None = option("Self-attention layer, from 0.", None, **_THE_MIDDLE)
    head: int | None = option("Head, from 0.", None, **_THE_MIDDLE)
    step: int | None = option("Denoising step, from 0.", None, **_THE_MIDDLE)
    prompt: str = option("What the model is asked for.", PROMPTS[0])
    seed: int = option("Seed of the noise.", 0)
    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", (0.8, 0.9))
    config: Path | None = option("YAML file with fields of SparseConfig, instead of a preset.", None, **_THE_PRESETS)
    rectify: str | None = option("The mode that the pictures show beside none.", None, choices=_SHOWN, **_THE_PRESETS)
    block_size: int | None = option("Tokens a block.", None, **_THE_PRESETS)
    order: str | None = option("How blocks are made.", None, choices=ORDERS, **_THE_PRESETS)
    top_p: float | None = option("Least attention mass the kept blocks hold.", None, **_THE_PRESETS)
    neighbours: bool | None = option(
        "Always keep blocks that touch in 3-D; needs an --order other than content.", None, **_THE_PRESETS
    )
    out: Path = option("Folder for the page, pictures and tables.", Path("inspect-output"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config is not None and not self.config.is_file():
            raise ValueError(f"config: got {self.config}; allowed: a YAML file, and there is none at that path.")
        for sparsity in self.sparsity:
            self.config_on(SparseConfig()).replace(sparsity=sparsity)

    @property
    def sparsities(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.sparsity)))

    def config_on(self, base: SparseConfig) -> SparseConfig:
        """What all modes and sparsities have in common: the file or `base`, with the options' own values.

        Raises ValueError where that is a mode with nothing to show beside it.
        """
        start = base if self.config is None else SparseConfig.from_yaml(self.config)
        config = start.replace(**given(self, "rectify", "block_size", "order", "top_p", "neighbours"))
        check_choice("rectify", config.rectify, _SHOWN)
        return config
