"""ComfyUI's calling contract without ComfyUI: a model patcher, a sampler, and models that call attention as its do."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HEADS, WIDTH, PATCH = 2, 32, (1, 2, 2)


def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **options):
    """Dense attention, or the override of transformer_options in its place, as ComfyUI dispatches."""
    options = dict(options)
    override = (options.get("transformer_options") or {}).get("optimized_attention_override")
    if override is not None and not options.pop("inside", False):
        more = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "inside": True}
        return override(attention, q, k, v, heads, mask, attn_precision, **more, **options)
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (-1, q.shape[2] // heads)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[(None,) * (3 - mask.ndim)].unsqueeze(1)
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=options.get("enable_gqa", False)
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Executor:
    def __init__(self, original: Callable[..., Any], wrappers: list[Any], owner: Any = None) -> None:
        self.original, self.wrappers, self.class_obj = original, wrappers, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.wrappers[1:], self.class_obj), *args, **kwargs)


class Patcher:
    """ModelPatcher, as far as nodes use it: clones copy options deeply and the lists of wrappers flatly."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.wrappers = model, {}
        self.model_options = {"transformer_options": {}}

    def clone(self) -> "Patcher":
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(each) for key, each in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])

    def all_wrappers(self, kind: str) -> list[Any]:
        return [each for wrappers in self.wrappers.get(kind, {}).values() for each in wrappers]


class Block(nn.Module):
    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.parts = [WIDTH, *[kv_heads * WIDTH // HEADS] * 2]
        self.qkv = nn.Linear(WIDTH, sum(self.parts))

    def forward(self, x: torch.Tensor, mask: Any, form: tuple[bool, bool], options: dict[str, Any]) -> torch.Tensor:
        q, k, v = self.qkv(x).split(self.parts, -1)
        skip_in, skip_out = form
        if skip_in:
            q, k, v = (each.unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2) for each in (q, k, v))
        flags = {"skip_reshape": skip_in, "skip_output_reshape": skip_out}
        if self.parts[1] < WIDTH:
            flags["enable_gqa"] = True
        out = attention(q, k, v, HEADS, mask, **flags, transformer_options=options)
        return x + (out.transpose(1, 2).flatten(2) if skip_out else out)


class Model(nn.Module):
    """Two blocks. names: whether calls tell their block, as newer versions do."""

    def __init__(self, names: bool = True, form: tuple[bool, bool] = (True, False), kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_size, self.names, self.form = PATCH, names, form
        self.blocks = nn.ModuleList([Block(kv_heads), Block(kv_heads)])
        self.text_in = nn.Linear(8, WIDTH)
        self.embed = nn.Conv3d(4, WIDTH, PATCH, PATCH)
        self.head = nn.Linear(WIDTH, 16)

    def run(self, x: torch.Tensor, mask: Any, options: dict[str, Any]) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if self.names:
                options |= {"block_type": "double", "block_index": index, "total_blocks": len(self.blocks)}
            x = block(x, mask, self.form, options)
            self.after(x, options)
        return x

    def after(self, x: torch.Tensor, options: dict[str, Any]) -> None:
        """What else a block does."""

    def pixels(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        b, _, t, h, w = like.shape
        cells = self.head(tokens).view(b, t, h // 2, w // 2, 4, 2, 2)
        return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(like.shape)


class WanModel(Model):
    """Text in cross-attention alone; references before and context latents behind the video."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.patch_embedding = self.embed

    def forward(self, x, timestep, context, transformer_options=None, reference=None, **more):
        self.context = self.text_in(context)
        tokens = self.patch_embedding(x).flatten(2).mT
        count = tokens.shape[1]
        if reference is not None:
            tokens = torch.cat([self.patch_embedding(reference).flatten(2).mT, tokens], 1)
        return self.pixels(self.run(tokens, None, transformer_options)[:, -count:], x)

    def after(self, x, options):
        attention(x, self.context, self.context, HEADS, transformer_options=options)


class HunyuanVideo(Model):
    """Text in the same sequence, on either side; ids at the rotary embedder, as far as the version has them."""

    def __init__(self, text_first: bool = False, ids: str = "own", **options: Any) -> None:
        super().__init__(**options)
        self.text_first, self.ids = text_first, ids
        self.img_in, self.pe_embedder = self.embed, nn.Identity()

    def forward(self, x, timestep, context, transformer_options=None, attention_mask=None, reference=None, **more):
        latents = [self.img_in(each).flatten(2).mT for each in (reference, x) if each is not None]
        count, text = latents[-1].shape[1], self.text_in(context)
        attention(text, text, text, HEADS, transformer_options=transformer_options)  # as its token refiner does
        video = torch.cat(latents, 1)
        places = [grid_ids(each) for each in (reference, x) if each is not None]
        words = torch.zeros(text.shape[1], 3)
        if self.ids == "of an image":
            words[:, 2] = torch.arange(text.shape[1])
        parts, ids = [video, text], [*places, words]
        if self.text_first:
            parts, ids = parts[::-1], [words, *places]
        if self.ids != "none":
            self.pe_embedder(torch.cat(ids)[None])
        mask = None
        if attention_mask is not None:  # [B, 1, S], added to the logits
            valid = torch.ones(len(attention_mask), video.shape[1])
            both = [valid, attention_mask][:: -1 if self.text_first else 1]
            mask = (1 - torch.cat(both, 1)[:, None]) * torch.finfo(torch.float32).min
        out = self.run(torch.cat(parts, 1), mask, transformer_options)
        end = len(out[0]) if self.text_first else video.shape[1]
        return self.pixels(out[:, end - count : end], x)


def grid_ids(latent: torch.Tensor) -> torch.Tensor:
    """[N, 3]: frame, row and column of each token of a latent."""
    sides = [length // side for length, side in zip(latent.shape[2:], PATCH, strict=True)]
    return torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in sides))


def sample(
    patcher: Patcher, x: torch.Tensor, context: torch.Tensor, steps: int = 4, times: int = 1, **inputs: Any
) -> Any:
    """Steps of a sampler that calls the model `times` at each; conditional and unconditional calls are one batch."""
    sigmas = torch.linspace(1, 0, steps + 1)

    def loop(x: torch.Tensor) -> torch.Tensor:
        for sigma, after in itertools.pairwise(sigmas):
            for part in range(times):
                now = sigma + (after - sigma) * part / 2
                options = copy.copy(patcher.model_options["transformer_options"])
                options |= {"sample_sigmas": sigmas, "sigmas": now[None].expand(len(x))}
                call = Executor(patcher.model.forward, patcher.all_wrappers("diffusion_model"), patcher.model)
                x = x + (after - sigma) * call(x, now, context, options, **inputs)
        return x

    with torch.no_grad():
        return Executor(loop, patcher.all_wrappers("outer_sample"))(x)
