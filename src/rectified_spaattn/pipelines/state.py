"""What the seam knows of a transformer and its layers, and what one attention call does with it."""

import itertools
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ..budgets import Budgets
from ..config import SparseConfig
from ..kept_plans import KeptPlans
from ..layout import TokenLayout
from ..precisions import Precisions
from .balance import TOLERATED, RankRecord, dealt_out
from .branches import MOST, Branches
from .clock import RunClock
from .forwards import ForwardState, RunningForwards
from .ranks import Ranks, streams_of
from .record import Record, RunSpan

OUTSIDE = "a call outside of the transformer's forward"

_handles = itertools.count()
_TURNS = 100  # forwards of one step that are told apart


@dataclass(kw_only=True, eq=False)
class TransformerState:
    """One transformer: its settings, its layers, and what it did in the last run. Threads may share it.

    active      False once disable() was called, for ever: processors that know this state are then the original ones
    is_first    whether it is the first, or the only, transformer of its pipeline
    model       weak, as everything here that leads to the model
    forwards    the ones that are running
    run         number of the run that the figures below are of
    first_step  the step at which this transformer's share of the run began
    last_step   of the forward before, the `turn`-th of its step
    count       forwards of the run; skipped: those in which a cache left out every block
    budgets     what a tolerance learnt in the run
    plans       what calls of the run keep for later steps; branches: the guidance calls that they are told apart by
    precisions  which calls of the run are in 8 bits
    completed   whether any forward ever came to its end
    span        when the run began and ended, and on which devices
    ranks       what the processes that share the forwards computed
    balanced    whether their heads are dealt out anew after every forward
    """

    config: SparseConfig
    backend: str
    clock: RunClock
    name: str = "transformer"
    kind: str = ""
    is_first: bool = True
    model: "weakref.ref[Any]" = lambda: None  # type: ignore[assignment]
    layers: list["LayerState"] = field(default_factory=list)
    active: bool = True
    forwards: RunningForwards = field(default_factory=RunningForwards)
    lock: Any = field(default_factory=threading.RLock)
    run: int = -1
    first_step: int | None = None
    last_total: int | None = None
    last_step: int | None = None
    turn: int = 0
    steps_seen: set[int] = field(default_factory=set)
    count: int = 0
    skipped: int = 0
    budgets: Budgets = field(default_factory=Budgets)
    plans: KeptPlans = field(default_factory=KeptPlans)
    branches: Branches = field(default_factory=Branches)
    precisions: Precisions = field(default_factory=Precisions)
    completed: bool = False
    span: RunSpan = field(default_factory=RunSpan)
    ranks: RankRecord = field(default_factory=RankRecord)
    balanced: bool = False
    said_outside: bool = False

    @property
    def needs_steps(self) -> bool:
        return self.steps_wanted is not None

    @property
    def steps_wanted(self) -> str | None:
        """The settings that need the denoising step; None without any."""
        settings = [
            f"{name}={value}" for name in ("dense_steps", "dense_last_steps") if (value := getattr(self.config, name))
        ]
        return " and ".join(settings) or None

    @property
    def step(self) -> int | None:
        """The step of the forward that is running in this thread; None without one, or where nobody knows."""
        forward = self.forwards.current()
        return None if forward is None else forward.step

    def begin_forward(
        self,
        layouts: tuple[TokenLayout, ...],
        *,
        padding: int = 0,
        timestep: Any = None,
        ranks: Ranks | None = None,
        packed: bool = False,
        text: Any = None,
    ) -> ForwardState:
        """Called before every forward of the transformer, with the timestep that it gets.

        layouts, padding: as in ForwardState. ranks: the processes that share the forward; packed: as in Adapter. text:
        what guidance calls differ by: a tensor, several, or none.
        Raises RuntimeError where the step decides what is dense and two pipelines or threads share it, and where there
        is a tolerance and nobody knows the step.
        """
        with self.lock:
            step, total = self.clock.read(timestep, exact=self.needs_steps or self.config.keeps_plans)
            problem = "" if step is not None else self.clock.problem
            if self.clock.conflict and self.needs_steps:
                raise RuntimeError(
                    f"{self.name}: {problem}, so the denoising step of this forward is unknown, and with it what "
                    "should be dense. Enable without dense steps, or give each pipeline a transformer of its own "
                    "(copy.deepcopy(transformer) shares no state) and enable each."
                )
            if step is None and self.config.tolerance is not None:
                raise RuntimeError(
                    f"{self.name}: tolerance={self.config.tolerance} needs the denoising step, to tell guidance calls "
                    f"and runs apart, but {problem}. Enable on the pipeline you call, tell each step with "
                    "handle.set_step(step, total), or give a sparsity without a tolerance."
                )
            self.catch_up()
            if self.forwards.was_stopped():
                self.forget_plans()
            self.turn = min(self.turn + 1, _TURNS) if step == self.last_step else 0
            self.last_step = step
            if self.first_step is None:
                self.first_step = 0 if self.is_first and self.clock.is_told else step
            if step is not None:
                self.steps_seen.add(step)
            self.last_total = total
            self.count += 1
            self.span.begin_forward()
            streams: tuple[tuple[int, ...], ...] = ()
            if ranks is not None:
                streams = tuple(streams_of(layout, packed) for layout in layouts)
                layouts = tuple(layout.cut(each, ranks.count) for layout, each in zip(layouts, streams, strict=True))
            forward = ForwardState(
                layouts=layouts,
                padding=padding,
                ranks=ranks,
                streams=streams,
                step=step,
                total=total,
                turn=self.turn,
                branch=self._branch(text, step),
                problem=problem,
                why_dense=self._scheduled(step, total),
            )
        self.forwards.begin(forward)
        return forward

    def catch_up(self) -> None:
        """Forget the run before, if a new one has started, on this transformer or another of the pipeline."""
        with self.lock:
            if self.run == self.clock.run:
                return
            self.run, self.first_step, self.steps_seen, self.last_step = self.clock.run, None, set(), None
            self.count, self.skipped, self.ranks, self.span = 0, 0, RankRecord(), RunSpan()
            self.forget_plans()
            self.budgets, self.plans, self.precisions = Budgets(), KeptPlans(), Precisions()
            for layer in self.layers:
                layer.record = Record()

    def end_run(self) -> None:
        """Called where a pipeline goes on to something else: after the last step nothing is kept any more."""
        with self.lock:
            if self.last_step is not None and self.last_total == self.last_step + 1:
                self.forget_plans()

    def forget_plans(self) -> None:
        """Free what was kept for later steps, and the texts that it was told apart by."""
        self.plans.clear()
        self.branches = Branches()

    def end_forward(self, *, failed: bool) -> ForwardState | None:
        """Called after a forward; None where that ended before. Processes that share it tell each other what they did.

        failed: it raised, so that others may not come here. Else all do, with as many calls, and none waits in vain.
        """
        forward = self.forwards.end()
        if failed:
            self.forget_plans()
        if failed or forward is None or forward.ranks is None or not forward.shared:
            return forward
        layers, done = zip(*forward.shared, strict=True)
        of_ranks = forward.ranks.gather(torch.stack(done))  # [ranks, calls, 1 + heads of a rank]
        densities = of_ranks[..., 0]
        means = densities.mean(0)
        forward.density = means.sum()
        with self.lock:
            for layer, density in zip(layers, means, strict=True):
                layer.record.add(density)
            self.ranks.add(densities)
            self._deal_out(layers, of_ranks[..., 1:].transpose(0, 1).flatten(1), forward.ranks.count)
        return forward

    def _deal_out(self, layers: tuple["LayerState", ...], work: torch.Tensor, ranks: int) -> None:
        """Of the heads of every layer, by what they had to do: work [calls, H], place after place."""
        # what a tolerance learnt, and what is decided on a precision, is of the heads that a rank has
        if self.config.tolerance is not None or self.config.precision == "auto":
            return
        if not self.balanced and self.ranks.forwards == 1:  # waits for the device, once a run
            self.balanced = self.ranks.imbalance() > TOLERATED
        if not self.balanced or len(self.plans):  # orders, too, are of the heads that a rank has
            return
        for row, layer in zip(work, layers, strict=True):
            if layer.heads is not None:
                row.copy_(row[layer.heads[1]])
        for layer, heads in zip(layers, dealt_out(work, ranks).unbind(), strict=True):
            layer.heads = heads

    def _branch(self, text: Any, step: int | None) -> tuple[int, int] | None:
        """As in ForwardState. Called with the lock, and with `turn` of the forward that begins."""
        if not self.config.keeps_plans or step is None or self.turn >= MOST:
            return None
        return self.branches.of(text, step, self.config.replan)

    def _scheduled(self, step: int | None, total: int | None) -> str | None:
        """Why the step makes every call dense; None where it does not, or where nobody knows the step."""
        if step is None or self.first_step is None:
            return None
        if step - self.first_step < self.config.dense_step_count(total):
            return "dense_steps"
        if total is not None and step >= total - self.config.dense_last_step_count(total):
            return "dense_last_steps"
        return None


@dataclass(kw_only=True, eq=False)
class LayerState:
    """One self-attention layer.

    handle            what compiled code carries in its place: a tensor, so that layers share code
    module            weak: where its processor is
    heads             int64 [2, H] where ranks have heads as dealt out: which head each place has, and the place of each
    masks_text_only   whether that hides no video token, ever, so that the device need not be asked; text is behind
    called            in any run; a processor that does without the dispatcher never gets here
    """

    index: int
    name: str
    owner: TransformerState
    dense_backend: Any
    module: "weakref.ref[Any]" = lambda: None  # type: ignore[assignment]
    handle: torch.Tensor = field(default_factory=lambda: torch.tensor(next(_handles), device="cpu"))
    record: Record = field(default_factory=Record)
    heads: torch.Tensor | None = None
    masks_text_only: bool = False
    called: bool = False

    def why_dense(self, forward: ForwardState, layout: TokenLayout) -> str | None:
        if self.index in self.owner.config.dense_layers:
            return "dense_layers"
        if forward.why_dense is not None:
            return forward.why_dense
        block_size = self.owner.config.block_size
        if layout.video < block_size:
            return f"{layout.places} is smaller than one block of {block_size}"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        """q: [B, S, H, D] after RoPE; k, v: [B, S, Hk, D]; mask: as in masks.key_mask, or None. Returns q's shape."""
        if k.shape[1] != q.shape[1]:  # an IP-Adapter's cross-attention from the same processor: none of ours
            return self._dense(q, k, v, mask, scale)
        self.called = True
        forward = self.owner.forwards.current()
        if forward is None:
            self._say_outside()
            self._count_dense(OUTSIDE)
            return self._dense(q, k, v, mask, scale)
        layout = self._layout_of(forward, q.shape[1])
        varied = self.owner.steps_wanted or ("" if self.owner.config.tolerance is None else "tolerance")
        if varied and q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.name}: a CUDA graph is being captured, in which every step would do what this one does, but "
                f"{varied} asks for others. Compile in the default mode, or enable without them."
            )
        forward.calls += 1
        self.owner.span.devices.add(q.device)
        reason = self.why_dense(forward, layout)
        if reason is not None:
            self._count_dense(reason)
            return self._dense(q, k, v, mask, scale)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise RuntimeError(
                f"{self.name}: sparse attention is for inference and has no gradient. Call the model inside "
                "torch.no_grad(); to train, call disable() first."
            )
        return self._sparse(forward, layout, q, k, v, mask, scale)

    def _sparse(
        self,
        forward: ForwardState,
        whole: TokenLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        state = self.owner
        layout, text_mask = forward.unpadded(whole), None
        if mask is not None and self.masks_text_only:
            text_mask = forward.masks(whole).valid(mask, len(q))[:, layout.video : layout.video + layout.text]
        elif mask is not None:
            layout, text_mask = forward.masks(whole).masked(mask, len(q), layout)
            if layout.video < state.config.block_size:
                block_size = state.config.block_size
                self._count_dense(f"its mask leaves {layout.video} tokens, less than one block of {block_size}")
                return self._dense(q, k, v, mask, scale)
        options: dict[str, Any] = {"text_mask": text_mask, "scale": scale, "backend": state.backend}
        moment = forward.moment(self.index, self.heads)
        out, stats, full = state.precisions.attend(
            q, k, v, layout, state.config, state.budgets, state.plans, moment, turn=forward.turn, **options
        )
        density = stats.device_density
        with state.lock:
            if stats.probe is not None:
                error = stats.probe.error
                self.record.probes.append((error, torch.zeros_like(error, dtype=torch.bool) if full is None else full))
            if forward.ranks is None:
                self.record.add(density)
            else:  # of this rank's heads: counted when all ranks are through
                kept = stats.block_mask.sum((0, 2, 3), dtype=torch.float32)
                forward.shared.append((self, torch.cat([density[None], kept])))
            self.record.backends.add(stats.backend)
        forward.sparse += 1
        forward.density = forward.density + density
        return out.to(q.dtype)

    def _count_dense(self, reason: str) -> None:
        with self.owner.lock:
            self.record.dense[reason] += 1

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        forward = self.owner.forwards.current()
        layout = None if forward is None or forward.ranks is None else forward.layout_of(k.shape[1])
        if mask is not None and forward is not None and layout is not None:
            mask = forward.masks(layout).in_place(mask, len(q))
        grouped = q.shape[2] != k.shape[2]
        return dispatch_attention_fn(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped, backend=self.dense_backend
        )

    def _say_outside(self) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # gradient checkpointing: in the backward pass
        if recomputed and self.record.sparse:
            raise RuntimeError(
                f"{self.name}: sparse attention is for inference and has no gradient, and gradient checkpointing runs "
                "this layer again. To train, call disable() first."
            )
        if not recomputed and not self.owner.said_outside:
            self.owner.said_outside = True
            warnings.warn(
                f"rectified_spaattn: {self.name} was called outside of a call of its transformer (by transformer."
                "forward(...), or block by block), so its tokens and its step are unknown and attention is full. Call "
                "transformer(...) instead.",
                stacklevel=2,
            )

    def _layout_of(self, forward: ForwardState, sequence: int) -> TokenLayout:
        layout = forward.layout_of(sequence)
        if layout is None:
            raise RuntimeError(
                f"{self.name}: got {sequence} tokens; allowed: {' or '.join(map(str, forward.layouts))}. Something "
                "adds tokens or drops them (token merging); disable one of the two."
            )
        return layout

    def _layout(self, sequence: int) -> TokenLayout:
        """The layout of the forward that is running, for instruments that look at a call from inside."""
        forward = self.owner.forwards.current()
        if forward is None:
            raise RuntimeError(
                f"{self.name}: attention ran before the transformer's forward. Call the transformer, not its blocks."
            )
        return self._layout_of(forward, sequence)
