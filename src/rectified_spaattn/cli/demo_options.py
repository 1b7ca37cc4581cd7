"""What `rectified-spaattn demo` can be asked for."""

from dataclasses import dataclass
from pathlib import Path

from ..config import SparseConfig
from ..curve import CONTENT
from ..device import device_of
from ..evaluation.paired import Mode, full_mode

RECTIFIED, ORDER = "ipar+gapr", "gilbert"  # the paper's, which the report explains
# word of a mode -> rectify, order
_MODES = {
    "sparse": ("none", ORDER),
    "rectified": (RECTIFIED, ORDER),
    "default": (SparseConfig().rectify, SparseConfig().order),
}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """One run. Raises ValueError or TypeError for values out of range.

    prompts      how many of the fixed prompts; captions, where given, take their place
    size         height and width in pixels
    timing_size  a larger size at which only the speed of a step is measured, None for no such measurement
    command      what was typed, for the record
    """

    out: Path = Path("demo-output")
    prompts: int = 3
    captions: tuple[str, ...] = ()
    seeds: int = 1
    steps: int = 12
    size: int = 64
    sparsity: tuple[float, ...] = (0.8, 0.9)
    block_size: int = 64
    top_p: float = 0.0
    neighbours: bool = False
    device: str = "auto"
    backend: str = "auto"
    weights: Path | None = None
    timing_size: int | None = 96
    command: str = "rectified-spaattn demo"

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 1 or more.")
        if self.size < 16 or self.size % 4:
            raise ValueError(f"size: got {self.size}; allowed: a multiple of 4 from 16 on, best 64 or 96.")
        if not self.sparsity:
            raise ValueError("sparsity: got none; allowed: one or more values in [0, 1).")
        device_of(self.device)
        if len({f"{100 * sparsity:g}" for sparsity in self.sparsity}) != len(self.sparsity):
            raise ValueError(f"sparsity: got {self.sparsity}; allowed: values that differ.")
        for sparsity in self.sparsity:
            self.config(sparsity, RECTIFIED)

    def config(self, sparsity: float, rectify: str, order: str = ORDER) -> SparseConfig:
        """Everything but these is the same in all modes, and blocks by content have no neighbours."""
        return SparseConfig.from_dict(
            {
                "sparsity": sparsity,
                "rectify": rectify,
                "block_size": self.block_size,
                "order": order,
                "top_p": self.top_p,
                "neighbours": self.neighbours and order != CONTENT,
            }
        )

    def modes(self) -> list[Mode]:
        """Full attention, then sparse, rectified as in the paper, and this package's default at every sparsity."""
        modes = [full_mode()]
        for sparsity in self.sparsity:
            share = f"{100 * sparsity:g}"
            for word, setting in _MODES.items():
                config = self.config(sparsity, *setting)
                modes.append(Mode(name=f"{word}-{share}", label=f"{word} {share}%", config=config))
        return modes


DEFAULT = DemoOptions()
QUICK = DemoOptions(prompts=1, steps=6, timing_size=None)
