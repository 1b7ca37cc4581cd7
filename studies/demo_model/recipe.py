"""Settings of a training run: a frozen dataclass, read strictly from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

CHOICES = {"prediction": ("velocity", "clean"), "optimizer": ("muon", "adamw")}
SHARES = ("caption_dropout", "decay_share", "ema_decay")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Part of a run: up to which share of it, how many frames of each clip, and clips a step and GPU."""

    until: float
    frames: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What recipe.yaml says; ValueError or TypeError for what is out of range or not known."""

    seed: int = 0
    minutes: float = 27.0
    steps: int = 0  # length of the run in steps, instead of `minutes`
    frames: int = 16
    size: int = 64
    heads: int = 4
    dual_blocks: int = 1
    single_blocks: int = 4
    refiner_blocks: int = 2
    prediction: str = "clean"
    level_mean: float = 0.8
    level_spread: float = 1.0
    caption_dropout: float = 0.1
    guidance: float = 1.0
    optimizer: str = "muon"
    lr: float = 0.001
    matrix_lr: float = 0.002
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_share: float = 0.4
    ema_decay: float = 0.999
    sync_every: int = 20  # steps between looks at the clock
    report_seconds: float = 10.0
    workers: int = 10
    compile: bool = True
    compile_drawing: bool = True
    stages: tuple[Stage, ...] = (Stage(until=1.0, frames=16, batch=128),)

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(ends) or ends[-1] != 1.0:
            raise ValueError(f"stages must end in order, the last at 1.0, got {ends}")
        for stage in self.stages:
            if self.frames % stage.frames:
                raise ValueError(f"a stage's frames must divide {self.frames}, got {stage.frames}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Settings from a mapping; ValueError for an unknown key, which lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown training settings {', '.join(unknown)}; known are {', '.join(known)}")
        rest = dict(values)
        if "stages" in rest:
            rest["stages"] = tuple(Stage(**stage) for stage in rest["stages"])
        return cls(**rest)

    @classmethod
    def from_yaml(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Settings from a YAML file, with `changes` in place of its own; ValueError if it holds no mapping."""
        import yaml

        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
        return cls.from_dict({**values, **(changes or {})})

    def stage(self, progress: float) -> Stage:
        """The stage of a run that is `progress` of the way through, in [0, 1]."""
        return next((stage for stage in self.stages if progress < stage.until), self.stages[-1])

    def lr_factor(self, steps_since_start: int, progress: float) -> float:
        """The learning rate over its peak: a warm-up after every start, a plateau, a straight line to zero."""
        warmup = min(1.0, (steps_since_start + 1) / max(1, self.warmup_steps))
        decay = (1 - progress) / self.decay_share if self.decay_share else 1.0
        return warmup * min(1.0, max(0.0, decay))


def _check_type(name: str, value: Any, wanted: type) -> None:
    allowed: tuple[type, ...] = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name} must be {wanted.__name__}, got {value!r}")
