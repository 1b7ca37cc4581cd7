"""Train the demo model by flow matching on clips drawn as they are needed. Needs torch 2.9 or newer for Muon.

python -m studies.demo_model.fit --out runs/demo --minutes 9 [--resume runs/demo] [--set lr=0.0005]
torchrun --nproc-per-node 2 -m studies.demo_model.fit ...      # the batch a GPU stays: twice the clips a step
python -m studies.demo_model.fit --out runs/guided --start runs/demo --set guidance=2.0 --set minutes=5
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rectified_spaattn.lab.demo_model.model import tokenize

from . import checkpoint
from .feed import Batches, draw, feed, sample_scenes
from .network import LEAST_SIGMA, Network, forward_flops
from .recipe import Recipe, Stage
from .table import numbers_of

RECIPE = Path(__file__).with_name("recipe.yaml")
BEGIN = time.perf_counter()
SNAPSHOT_SECONDS = 150.0


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA, the fastest attention kernels first."""
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return sdpa_kernel(order, set_priority=True)


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def noise_levels(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in [0.05, 1): the logistic function of normal numbers, one from each of as many shares."""
    device = generator.device
    share = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    normal = torch.special.ndtri((share / count).clamp(1e-4, 1 - 1e-4))
    return torch.sigmoid(recipe.level_mean + recipe.level_spread * normal).clamp_min(LEAST_SIGMA)


def build_optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and AdamW for the rest, or AdamW for all of them."""
    named = list(network.named_parameters())
    inner = recipe.optimizer == "muon"
    matrices = {n: p for n, p in named if inner and "blocks." in n and "norm" not in n and p.ndim == 2}
    rest = [parameter for name, parameter in named if name not in matrices]
    fused = rest[0].device.type == "cuda"
    options: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": recipe.weight_decay, "fused": fused}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=recipe.lr, **options)]
    if matrices:
        decay = recipe.weight_decay
        optimizers.append(
            torch.optim.Muon(
                list(matrices.values()), lr=recipe.matrix_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def held_out_loss(network: Network, recipe: Recipe, device: torch.device, frames: int, count: int = 64) -> float:
    """The velocity's mean square error on `count` scenes of their own, at noise levels like a sampler's."""
    chosen = range(0, recipe.frames, recipe.frames // frames)
    network.use_frames(chosen)
    total = 0.0
    for first in range(0, count, 32):
        scenes = sample_scenes(f"held-out loss {first}", min(32, count - first))
        videos = draw(numbers_of(scenes, chosen, recipe.frames).to(device), recipe.size, recipe.compile_drawing)
        noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(first)).to(device)
        even = (torch.arange(len(scenes), device=device) + 0.5) / len(scenes)
        sigmas = (3 * even / (1 + 2 * even)).clamp_min(LEAST_SIGMA)
        ids = tokenize([scene.caption() for scene in scenes]).to(device)
        level = sigmas.view(-1, 1, 1, 1, 1)
        with mixed_precision(device):
            velocity = network((1 - level) * videos + level * noise, sigmas, ids)
        total += float((velocity - (noise - videos)).square().mean()) * len(scenes)
    return total / count


class Run:
    """A training run: the network, its moving average, optimizers, clock and log."""

    def __init__(self, recipe: Recipe, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.rank, self.ranks = recipe, device, rank, ranks
        self.network = Network(recipe).to(device)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.teacher: Network | None = None
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.rows: list[dict[str, Any]] = []
        self.snapshots: Path | None = None
        self.written = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begin with fresh optimizers and a warm-up, as every call does."""
        self.first_step = self.step
        self.optimizers = build_optimizers(self.network, self.recipe)

    def write(self, folder: Path) -> None:
        numbers = {name: getattr(self, name) for name in ("step", "samples", "seconds", "rows")}
        networks = {"raw": self.network, "average": self.average}
        checkpoint.save(folder, networks, {**numbers, "recipe": asdict(self.recipe)})

    def save(self, folder: Path) -> None:
        """Write the run and take up what was written, so that going on equals resuming."""
        self.write(folder)
        self.resume(folder)

    def resume(self, folder: Path) -> None:
        """Take up a run where it was saved."""
        numbers = checkpoint.load(folder, {"raw": self.network, "average": self.average})
        for name in ("step", "samples", "seconds", "rows"):
            setattr(self, name, numbers[name])
        self.restart()

    def start_from(self, folder: Path) -> None:
        """A new run that begins with the averaged weights of another, which guide it where `guidance` is above 1."""
        checkpoint.load(folder, {"average": self.average})
        self.network.load_state_dict(self.average.state_dict())
        if self.recipe.guidance > 1:
            self.teacher = copy.deepcopy(self.average)
        self.restart()

    @property
    def progress(self) -> float:
        recipe = self.recipe
        return min(1.0, self.step / recipe.steps if recipe.steps else self.seconds / 60 / recipe.minutes)

    def compile(self) -> None:
        for network in (self.network, self.teacher):
            if self.recipe.compile and network is not None:
                network.transformer.compile_repeated_blocks(dynamic=False)

    def batches(self, stage: Stage) -> Iterator[Any]:
        """What `videos` makes clips of, from this step on, without end; each has `frames` and `ids` as Batch has."""
        recipe = self.recipe
        data = Batches(recipe.seed, self.rank, stage.frames, recipe.frames, stage.batch, recipe.caption_dropout)
        return feed(data, self.step, recipe.workers, self.device.type == "cuda")

    @torch.no_grad()
    def videos(self, batch: Any) -> Tensor:
        """Clips float32 [B, 3, T, H, W] in [-1, 1], on the device."""
        return draw(batch.numbers.to(self.device), self.recipe.size, self.recipe.compile_drawing)

    def held_out(self, frames: int) -> float:
        """The averaged network's loss on clips that it does not train on."""
        return held_out_loss(self.average, self.recipe, self.device, frames)

    def target(self, noisy: Tensor, sigmas: Tensor, batch: Any, velocity: Tensor) -> Tensor:
        """What the network learns: the velocity, or a teacher's with guidance."""
        if self.teacher is None:
            return velocity
        self.teacher.use_frames(batch.frames)
        empty = tokenize([""] * len(batch.ids)).to(self.device)
        with torch.no_grad():
            free, told = self.teacher(noisy, sigmas, empty), self.teacher(noisy, sigmas, batch.ids)
        return free + self.recipe.guidance * (told - free)

    def loss(self, batch: Any) -> Tensor:
        """The step's loss: mean square error of the velocity."""
        device, recipe = self.device, self.recipe
        videos = self.videos(batch)
        generator = torch.Generator(device).manual_seed((recipe.seed * 1009 + self.rank) * 10**7 + self.step)
        sigmas = noise_levels(recipe, len(videos), generator)
        noise = torch.randn(videos.shape, generator=generator, device=device)
        level = sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * videos + level * noise
        batch = replace(batch, ids=batch.ids.to(device, non_blocking=True))
        self.network.use_frames(batch.frames)
        with mixed_precision(device):
            target = self.target(noisy, sigmas, batch, noise - videos)
            return (self.network(noisy, sigmas, batch.ids) - target).square().mean()

    def share_gradients(self) -> None:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        nn.utils.vector_to_parameters(flat, gradients)

    def train_step(self, batch: Any, progress: float) -> Tensor:
        """One optimizer step; the loss, a scalar on the device."""
        loss = self.loss(batch)
        loss.backward()
        if self.ranks > 1:
            self.share_gradients()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        factor = self.recipe.lr_factor(self.step - self.first_step, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.samples = self.step + 1, self.samples + len(batch.ids) * self.ranks
        decay = min(self.recipe.ema_decay, (self.step + 1) / (self.step + 10))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in self.network.parameters()], 1 - decay)
        return loss.detach()

    def report(self, losses: list[Tensor], clips: int, seconds: float, stage: Stage, held_out: bool) -> None:
        """Add a row to the log and print it."""
        speed = clips / max(seconds, 1e-9)
        flops = 3 * forward_flops(self.recipe, stage.frames, self.recipe.size, self.recipe.size)
        row = {
            "step": self.step,
            "samples": self.samples,
            "minutes": round(self.seconds / 60, 3),
            "frames": stage.frames,
            "loss": round(float(torch.stack(losses).mean()), 5),
            "clips_per_second": round(speed, 1),
            "teraflops_per_gpu": round(speed * flops / self.ranks / 1e12, 1),
        }
        if held_out:
            row["held_out"] = round(self.held_out(stage.frames), 5)
        self.rows.append(row)
        if self.rank == 0:
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    def shared(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.ranks == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def time_drawing(self, batch: Any) -> None:
        """Print how fast clips are drawn."""
        float(self.videos(batch).sum())
        start = time.perf_counter()
        float(self.videos(batch).sum())
        speed = len(batch.ids) / (time.perf_counter() - start)
        if self.rank == 0:
            print(f"{time.perf_counter() - BEGIN:.0f} s after the start: draws {speed:.0f} clips a second", flush=True)

    def snapshot(self) -> None:
        """Now and then, write the run in case the call ends before its time."""
        if self.snapshots and self.rank == 0 and time.perf_counter() - self.written > SNAPSHOT_SECONDS:
            self.write(self.snapshots)
            self.written = time.perf_counter()

    def train(self, deadline: float, steps: int | None = None) -> None:
        """Train to the run's end, to `deadline` (seconds since the program began), or for `steps` steps."""
        last = self.step + steps if steps else None
        end = False
        while not end and self.progress < 1:
            stage = self.recipe.stage(self.progress)
            end = self._train_stage(stage, deadline, last)

    def _train_stage(self, stage: Stage, deadline: float, last: int | None) -> bool:
        """Train until the stage is over (False) or the call is (True)."""
        recipe = self.recipe
        batches = self.batches(stage)
        batch = next(batches)
        self.loss(batch).backward()  # compiles, outside the run's clock
        self.network.zero_grad(set_to_none=True)
        self.time_drawing(batch)
        losses: list[Tensor] = []
        progress, evaluated = self.progress, time.perf_counter()
        start, before, clock, reported = time.perf_counter(), self.seconds, self.seconds, self.step
        while True:
            losses.append(self.train_step(batch, progress))
            end = self.step == last or (recipe.steps > 0 and self.step == recipe.steps)
            if end or self.step % recipe.sync_every == 0:
                _check_loss(float(losses[-1]), self.step)
                self.seconds = before + self.shared(time.perf_counter() - start)
                now, progress = self.shared(time.perf_counter() - BEGIN), self.progress
                end = end or now >= deadline or progress >= 1
                over = end or recipe.stage(progress) != stage
                if over or self.seconds - clock > recipe.report_seconds:
                    held_out = over or time.perf_counter() - evaluated > 60
                    clips = (self.step - reported) * stage.batch * self.ranks
                    self.report(losses, clips, self.seconds - clock, stage, held_out)
                    evaluated = time.perf_counter() if held_out else evaluated
                    losses, reported = [], self.step
                    start, before, clock = time.perf_counter(), self.seconds, self.seconds
                    self.snapshot()
                if over:
                    return end
            batch = next(batches)


def _check_loss(value: float, step: int) -> None:
    if not value < 100:
        raise RuntimeError(f"the loss is {value} at step {step}: lower lr or matrix_lr")


def main(
    out: Annotated[Path, typer.Option(help="folder for weights-*.safetensors and run.json")],
    config: Annotated[Path, typer.Option(help="YAML settings")] = RECIPE,
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value, instead of the file's")] = None,
    resume: Annotated[Path | None, typer.Option(help="folder of a run to go on with")] = None,
    start: Annotated[Path | None, typer.Option(help="folder of a run whose averages a new run begins with")] = None,
    minutes: Annotated[float, typer.Option(help="length of this call, starting up and saving included")] = 9.0,
    steps: Annotated[int | None, typer.Option(help="at most so many steps in this call")] = None,
) -> None:
    """Train, on every GPU that torchrun gives, and save."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if device:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if ranks > 1:
        dist.init_process_group("nccl" if device else "gloo")
    changes = dict(item.split("=", 1) for item in settings or [])
    recipe = Recipe.from_yaml(config, {name: yaml.safe_load(text) for name, text in changes.items()})
    run = Run(recipe, device or torch.device("cpu"), rank, ranks)
    if resume:
        run.resume(resume)
    if start:
        run.start_from(start)
    run.compile()
    run.snapshots = out
    with attention_kernels(run.device):
        run.train(minutes * 60 - 10, steps)
    if rank == 0:
        run.save(out)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
