"""What `rectified-spaattn inspect` is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RECTIFY_MODES, SparseConfig
from ..curve import ORDERS
from ..lab.clips.options import ModelOptions
from ..lab.demo_model.prompts import PROMPTS
from ..lab.option import option

_PRESET = "the preset's; {} for the demo model"


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """One head; None leaves the choice to the model, its preset or its pipeline.

    Raises ValueError or TypeError for values out of range.
    """

    layer: int | None = option("Self-attention layer, from 0.", None, unset="the middle one")
    head: int | None = option("Head, from 0.", None, unset="the middle one")
    step: int | None = option("Denoising step, from 0.", None, unset="the middle one")
    prompt: str = option("What the model is asked for.", PROMPTS[0])
    seed: int = option("Seed of the noise.", 0)
    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", (0.8, 0.9))
    rectify: str = option("The mode that the pictures show beside none.", SparseConfig().rectify)
    block_size: int | None = option("Tokens a block.", None, unset=_PRESET.format(64))
    order: str | None = option(
        "How blocks are made.", None, choices=tuple(ORDERS), unset=_PRESET.format(SparseConfig().order)
    )
    top_p: float | None = option("Least mass the kept blocks hold.", None, unset=_PRESET.format(0))
    neighbours: bool | None = option(
        "Always keep blocks that touch in 3-D; needs an --order other than content.", None, unset=_PRESET.format("no")
    )
    out: Path = option("Folder for the page, pictures and tables.", Path("inspect-output"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rectify == "none":
            raise ValueError(f"rectify: got 'none'; allowed: a mode to show beside it, {list(RECTIFY_MODES[1:])}.")
        for name in ("layer", "head", "step"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}; allowed: 0 or more.")
        for sparsity in self.sparsity:
            self.config(SparseConfig()).replace(sparsity=sparsity)

    def config(self, base: SparseConfig) -> SparseConfig:
        """What all modes and sparsities have in common: `base`, changed where an option was given."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("block_size", "order", "top_p", "neighbours")}
        return base.replace(rectify=self.rectify, **{name: each for name, each in values.items() if each is not None})
