"""One call of the video's self-attention: sparse where the schedule and the tensors allow it, and noted either way."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from ..attention import DTYPES
from ..budgets import Budgets
from ..config import SparseConfig
from ..kept_plans import KeptPlans, Moment
from ..layout import TokenLayout
from ..precisions import Precisions
from .masks import Masks
from .record import Record


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a run a call stands: index and name of its layer, the step, the number of steps; None: unknown.

    branch: what the engine says of the guidance call that it belongs to.
    """

    layer: int | None
    name: str
    step: int | None
    total: int | None
    branch: Hashable = None


@dataclass(kw_only=True)
class Seam:
    """What the attention calls of one model share.

    record   of the run that goes on, or else of the last one
    budgets  what a tolerance learnt in it
    plans    what calls of it keep for later steps; precisions: which of them are in 8 bits
    layers   how many layers it was seen to have
    """

    config: SparseConfig
    record: Record = field(default_factory=Record)
    budgets: Budgets = field(default_factory=Budgets)
    plans: KeptPlans = field(default_factory=KeptPlans)
    precisions: Precisions = field(default_factory=Precisions)
    layers: int = 0

    def begin_run(self) -> None:
        """Forget the run before."""
        self.plans.clear()
        self.record, self.budgets, self.plans, self.precisions = Record(), Budgets(), KeptPlans(), Precisions()
        self.layers = 0

    def end_run(self) -> None:
        """Free what was kept for later steps."""
        self.plans.clear()

    def summary(self) -> str:
        """What the run did, in a few lines."""
        kept, decided = self.plans.lines(self.config), self.precisions.lines(self.config)
        lines = [self.record.summary(settings(self.config)), *kept, *decided]
        beyond = [layer for layer in self.config.dense_layers if layer >= self.layers > 0]
        if beyond:
            lines.append(f"  NO SUCH LAYER: dense_layers {beyond}; this model has 0 to {self.layers - 1}")
        return "\n".join(lines)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout | str,
        place: Place,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        masks: Masks,
    ) -> torch.Tensor | None:
        """out [B, S, H, D]; None where the call must run dense, which is noted with its reason.

        q: [B, S, H, D]; k, v: the same, or fewer heads. layout: of their tokens, or the reason why nobody knows it.
        mask: as masks.masked takes it. masks: those of the forward that runs.
        """
        if place.layer is not None:
            self.layers = max(self.layers, place.layer + 1)
        plain = layout if isinstance(layout, str) else self.why_dense(place) or unfit(q, k, v, layout, self.config)
        text_mask = None
        if plain is None and mask is not None:
            read = masks.of(mask, layout, len(q))  # type: ignore[arg-type]  # no reason, so a layout
            if isinstance(read, str):
                plain = read
            else:
                layout, text_mask = read
                plain = unfit(q, k, v, layout, self.config)
        if plain is not None or isinstance(layout, str):
            self.record.note_dense(place.name, place.step, str(plain))
            return None
        turn = self.record.calls(place.name, place.step)
        moment = Moment(
            layer=place.layer,
            branch=(place.branch, turn),
            step=place.step,
            total=place.total,
            problem=_why_unknown(place),
        )
        options = {"text_mask": text_mask, "scale": scale}
        out, stats, _ = self.precisions.attend(
            q, k, v, layout, self.config, self.budgets, self.plans, moment, turn=turn, **options
        )
        self.record.note_sparse(place.name, place.step, stats)
        return out

    def why_dense(self, place: Place) -> str | None:
        """What the schedule says of a call; None where it may run sparse."""
        config = self.config
        if config.tolerance is not None and (place.layer is None or place.step is None):
            return f"tolerance, as the {'layer' if place.layer is None else 'step'} is unknown"
        if place.layer in config.dense_layers:
            return "dense_layers"
        if config.dense_layers and place.layer is None:
            return "dense_layers, as the layer is unknown"
        if config.dense_steps and (place.step is None or place.total is None):
            return "dense_steps, as the step is unknown"
        if config.dense_last_steps and (place.step is None or place.total is None):
            return "dense_last_steps, as the step is unknown"
        if place.step is None or place.total is None:
            return None
        if place.step < config.dense_step_count(place.total):
            return "dense_steps"
        if place.step >= place.total - config.dense_last_step_count(place.total):
            return "dense_last_steps"
        return None


def of_itself(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether q, k, v [B, S, H, D] have as many tokens each, and the heads of k and v are shared evenly by q's."""
    same = q.shape[:2] == k.shape[:2] and q.shape[3:] == k.shape[3:] and k.shape == v.shape
    return same and q.shape[2] % k.shape[2] == 0


def unfit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, config: SparseConfig) -> str | None:
    """Why the operator cannot take a call of self-attention; None where it can."""
    if layout.video < config.block_size:
        return f"{layout.video} tokens that can be tiled, less than one block of {config.block_size}"
    if layout.grid is None and not config.by_content:
        return f"order={config.order!r}, which needs the grid of the tokens, and there is none"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"its dtypes {q.dtype}, {k.dtype} and {v.dtype}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "the gradient that it is asked for"
    return None


def _why_unknown(place: Place) -> str:
    """Why no plan can be kept for a call; empty where it can."""
    unknown = [name for name in ("layer", "step") if getattr(place, name) is None]
    return f"the {' and the '.join(unknown)} is unknown" if unknown else ""


def settings(config: SparseConfig) -> str:
    """A config in words, for the head of a summary."""
    tolerance = "" if config.tolerance is None else f"tolerance {config.tolerance:g}, first step at "
    return f"{tolerance}sparsity {config.sparsity:g}, {config.description}"
