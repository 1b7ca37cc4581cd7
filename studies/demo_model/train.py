"""Train the demo model: flow matching on videos drawn as they are needed. Needs torch 2.9 or newer for Muon.

python -m studies.demo_model.train --out runs/demo [--config studies/demo_model/train.yaml]
"""

from __future__ import annotations

import copy
import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rectified_spaattn.lab.demo_model.model import tokenize
from rectified_spaattn.lab.rows import write_rows

from .config import TrainingConfig
from .network import build_caption_encoder, build_transformer
from .scenes import sample_batch

SETTINGS = Path(__file__).with_name("train.yaml")
HELD_OUT_SEED = 2**40  # training uses seed * 1_000_003 + step, far below


def build_model() -> nn.ModuleDict:
    """Both trained parts, "transformer" and "caption_encoder", with fresh weights."""
    return nn.ModuleDict({"transformer": build_transformer(), "caption_encoder": build_caption_encoder()})


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels for uniform numbers in [0, 1], spread as FlowMatchEulerDiscreteScheduler's shift spreads its own."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def flow_loss(model: nn.ModuleDict, videos: Tensor, captions: list[str], sigmas: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, noise - video, at noise levels `sigmas` [B]; the rest is [B, 3, T, H, W]."""
    ids, mask = (tensor.to(videos.device, non_blocking=True) for tensor in tokenize(captions))
    embeds, pooled = model["caption_encoder"](ids, mask)
    level = sigmas.view(-1, 1, 1, 1, 1)
    velocity = model["transformer"](
        hidden_states=(1 - level) * videos + level * noise,
        timestep=sigmas * 1000,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (velocity.float() - (noise - videos)).square().mean()


@torch.no_grad()
def held_out_loss(
    model: nn.ModuleDict, shift: float, count: int = 8, size: tuple[int, int, int] = (16, 64, 64)
) -> float:
    """The loss in float32 on `count` fixed scenes that training never draws, at evenly spread noise levels."""
    device = next(model.parameters()).device
    total = 0.0
    for index in range(count):
        videos, captions = sample_batch(HELD_OUT_SEED + index, 1, *size)
        noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(index))
        sigma = shifted(torch.tensor([(index + 0.5) / count]), shift)
        total += float(flow_loss(model, videos.to(device), captions, sigma.to(device), noise.to(device)))
    return total / count


def _training_loss(model: nn.ModuleDict, config: TrainingConfig, step: int, device: torch.device) -> tuple[Tensor, int]:
    """The loss of the step's own batch, and how many samples that has."""
    seed = config.seed * 1_000_003 + step
    rng = random.Random(~seed)
    large = rng.random() < config.large_steps
    size, batch = (config.large, config.large_batch) if large else (config.small, config.small_batch)
    videos, captions = sample_batch(seed, batch, config.frames, size, size, device)
    captions = ["" if rng.random() < config.caption_dropout else caption for caption in captions]
    uniform = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    noise = torch.randn_like(videos)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return flow_loss(model, videos, captions, shifted(uniform, config.shift), noise), batch


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    in_block = "blocks." in name and not any(part in name for part in ("norm", "time_text_embed"))
    return in_block and parameter.ndim == 2


def build_optimizers(model: nn.ModuleDict, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and AdamW for the rest, or AdamW for all of them."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if config.optimizer == "muon" and _is_hidden_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.99), weight_decay=decay)
    ]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA, cuDNN attention first: with a mask, 2.7 times the speed of the memory-efficient kernel on an H200."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True)


class Run:
    """A training run: model, its moving average, optimizers, clock and log; resumable from `out`/checkpoint.pt."""

    def __init__(self, config: TrainingConfig, out: Path, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.out, self.device = config, out, device
        self.model = build_model().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = build_optimizers(self.model, config)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.rows: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Take up `out`/checkpoint.pt; RuntimeError if there is none."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            raise RuntimeError(f"nothing to resume: {path} does not exist; start without --resume")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.rows = state["rows"]

    def save(self) -> None:
        """Write the checkpoint, the packaged-format weights (bfloat16, averaged) and loss.csv to `out`."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "rows": self.rows,
            "config": asdict(self.config),
        }
        torch.save(state, self.out / "checkpoint.pt")
        save_weights(self.average, self.config.shift, self.out / "weights")
        write_rows(self.out / "loss.csv", self.rows)

    def train_step(self) -> Tensor:
        """One optimizer step; returns the loss, a scalar on the device."""
        factor = self.config.lr_factor(self.step, self.seconds / 60 / self.config.minutes)
        loss, samples = _training_loss(self.model, self.config, self.step, self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.samples = self.step + 1, self.samples + samples
        decay = min(self.config.ema_decay, self.step / (self.step + 10))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in self.model.parameters()], 1 - decay)
        return loss.detach()

    def log(self, losses: list[Tensor], held_out: bool) -> str:
        """Add a row to the log and return it as a line of text."""
        loss = float(torch.stack(losses).mean())
        size = (self.config.frames, self.config.small, self.config.small)
        value = round(held_out_loss(self.average, self.config.shift, size=size), 5) if held_out else ""
        row = {"step": self.step, "samples": self.samples, "minutes": round(self.seconds / 60, 3)}
        self.rows.append({**row, "loss": round(loss, 5), "held_out": value})
        return " ".join(f"{name} {value}" for name, value in self.rows[-1].items() if value != "")

    def train(self, until_seconds: float, max_steps: int | None = None) -> None:
        """Train until the run's own clock reads `until_seconds` (saving at the end), or for `max_steps` more steps."""
        if self.config.compile:
            transformer: Any = self.model["transformer"]
            transformer.compile_repeated_blocks(dynamic=False)
        last = self.step + max_steps if max_steps else None
        start, before = time.perf_counter(), self.seconds
        losses: list[Tensor] = []
        last_one = False
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as progress:
            task = progress.add_task("training", total=until_seconds, completed=int(self.seconds))
            while not last_one:
                losses.append(self.train_step())
                self.seconds = before + time.perf_counter() - start
                last_one = self.seconds >= until_seconds or self.step == last
                if last_one or self.step % self.config.log_every == 0:
                    evaluate = last_one or self.step % (10 * self.config.log_every) == 0
                    progress.console.print(self.log(losses, evaluate), highlight=False)
                    losses = []
                progress.update(task, completed=self.seconds)
        self.save()


def save_weights(model: nn.ModuleDict, shift: float, folder: Path) -> None:
    """Write the pipeline's parts to `folder` as save_pretrained does, in bfloat16."""
    for name, module in model.items():
        part: Any = copy.deepcopy(module)
        part.bfloat16().save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")


def main(
    out: Annotated[Path, typer.Option(help="folder for checkpoint.pt, weights/ and loss.csv")],
    config: Annotated[Path, typer.Option(help="YAML settings")] = SETTINGS,
    resume: Annotated[bool, typer.Option(help="continue from checkpoint.pt in the output folder")] = False,
    minutes: Annotated[float | None, typer.Option(help="length of the run, instead of the settings' one")] = None,
    pause_after: Annotated[
        float | None, typer.Option(help="stop this call after so many minutes; resume later")
    ] = None,
    smoke: Annotated[bool, typer.Option(help="three steps only, to see that everything works")] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the better one if left out")] = None,
) -> None:
    """Train the demo model and write its weights. On a CPU the clips are smaller."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = TrainingConfig.from_yaml(config)
    settings = settings if place.type == "cuda" else settings.for_cpu()
    settings = replace(settings, minutes=minutes) if minutes else settings
    run = Run(settings, out, place)
    if resume:
        run.resume()
    until = settings.minutes * 60
    if pause_after:
        until = min(until, run.seconds + pause_after * 60)
    with attention_kernels(place):
        run.train(until, max_steps=3 if smoke else None)


if __name__ == "__main__":
    typer.run(main)
