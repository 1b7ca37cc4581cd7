"""The training script's settings: a frozen dataclass that is read strictly from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rectified_spaattn.lab.demo_model.model import PATCH_SIZE

POSITIVE = (
    "minutes",
    "frames",
    "small",
    "small_batch",
    "large",
    "large_batch",
    "shift",
    "lr",
    "matrix_lr",
    "log_every",
)
SHARES = ("large_steps", "caption_dropout", "decay_share", "ema_decay")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a run; train.yaml says what each one means. ValueError or TypeError for values out of range."""

    seed: int = 0
    minutes: float = 15.0
    frames: int = 16
    small: int = 64
    small_batch: int = 48
    large: int = 96
    large_batch: int = 21
    large_steps: float = 0.3
    shift: float = 3.0
    caption_dropout: float = 0.1
    optimizer: str = "muon"
    matrix_lr: float = 0.002
    lr: float = 0.001
    weight_decay: float = 0.01
    warmup_steps: int = 200
    decay_share: float = 0.5
    ema_decay: float = 0.999
    log_every: int = 50
    compile: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("small", "large"):
            if getattr(self, name) % PATCH_SIZE:
                raise ValueError(f"{name} must be a multiple of {PATCH_SIZE}, got {getattr(self, name)}")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f'optimizer must be "muon" or "adamw", got {self.optimizer!r}')

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Settings from a mapping; ValueError for an unknown key, which lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown training settings {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Settings from a YAML file; ValueError if it is not a mapping of known settings."""
        import yaml

        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
        return cls.from_dict(values)

    def for_cpu(self) -> TrainingConfig:
        """The same run with clips small enough for a CPU."""
        small = {"frames": 8, "small": 32, "small_batch": 8, "large": 48, "large_batch": 4}
        return replace(self, **small, optimizer="adamw", log_every=10, compile=False)

    def lr_factor(self, step: int, progress: float) -> float:
        """The learning rate over its peak: a warm-up in steps, a plateau, a straight line to zero by wall clock."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = (1 - progress) / self.decay_share if self.decay_share else 1.0
        return warmup * min(1.0, max(0.0, decay))


def _check_type(name: str, value: Any, wanted: type) -> None:
    allowed: tuple[type, ...] = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name} must be {wanted.__name__}, got {value!r}")
