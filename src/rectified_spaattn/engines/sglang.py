"""SGLang-diffusion: a plug-in behind the entry point `sglang.multimodal_gen.plugins`.

It acts where the server's own configuration asks for it, --attention-backend-config '{"rectified_spaattn": {...}}',
with fields of SparseConfig or a preset. --attention-backend says what attends densely. Data flow: `select` gives a
layer of a transformer our backend around the dense one -> `attention` sees what a call says of its text -> our impl's
forward, after the all-to-all of Ulysses: every rank has whole sequences of its own heads.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..presets import preset
from .attend import Place, Seam, of_itself
from .masks import Masks

KEY = "rectified_spaattn"
BORROWED = "SPARGE_ATTN"  # the closed enum has no member of ours; this one is sparse and wants no metadata
_RUNTIME = "sglang.multimodal_gen.runtime"
_OTHERS = ("encoder", "vae", "vocoder")  # components that are no denoising transformer


@dataclass(kw_only=True)
class Component:
    """One denoising transformer.

    batch       the request that runs, weak
    step        of the last call; first_step: at which its share of the run began
    layers      how many attention layers it was built with: they are numbered in that order
    """

    name: str
    seam: Seam
    batch: Callable[[], Any] = lambda: None
    step: int = -1
    first_step: int = 0
    layers: int = 0

    def place(self, layer: int | None, name: str, context: Any) -> Place:
        """Of a call of a layer; a new record begins with another request, and where the step goes back."""
        batch, step = context.forward_batch, int(context.current_timestep)
        if batch is not self.batch() or step < self.step:
            self.batch = weakref.ref(batch) if batch is not None else lambda: None
            self.seam.begin_run()
            self.first_step = step
        self.step = step
        total = getattr(batch, "num_inference_steps", None)
        return Place(
            layer=layer,
            name=name,
            step=step - self.first_step,
            total=None if total is None else total - self.first_step,
            branch=getattr(batch, "is_cfg_negative", None),
        )


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a call of an attention layer says of its tokens: how many of the first and last are text; masked ones."""

    first: int = 0
    last: int = 0
    unknown: str | None = None


class Plugin:
    """The hooks of one worker process, and what they share: one Component a transformer."""

    def __init__(self) -> None:
        self.components: dict[str, Component] = {}
        self._backends: dict[tuple[Any, str], Any] = {}

    def select(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around get_attn_backend: for self-attention of a transformer, our backend around what it chose."""
        from sglang.multimodal_gen.runtime.layers.attention.selector import get_component_attn_backend_name

        options, wanted = asked(), kwargs.get("selected_attention_backend")
        borrowed = wanted is not None and wanted.name == BORROWED
        if options is None or (wanted is not None and not borrowed) or kwargs.get("is_cross_attention"):
            return original(*args, **kwargs)
        requirements = kwargs.get("attention_requirements")
        name = get_component_attn_backend_name() or "transformer"
        if getattr(requirements, "packed_varlen", False) or any(word in name for word in _OTHERS):
            return original(*args, **kwargs)
        dense = original(*args, **(kwargs | {"selected_attention_backend": None} if borrowed else kwargs))
        if dense.get_enum().is_sparse:
            raise ValueError(
                f"--attention-backend: got {dense.get_enum()}, which is sparse itself; allowed with {KEY} in "
                "--attention-backend-config: one that attends densely, such as fa or torch_sdpa."
            )
        if (dense, name) not in self._backends:
            component = self.components.get(name)
            if component is None:
                component = self.components[name] = Component(name=name, seam=Seam(config=config_of(options, name)))
            self._backends[dense, name] = backend_around(dense, component)
        return self._backends[dense, name]

    def attention(self, original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Around USPAttention.forward: what the call says of its text, for our impl; masked calls are the engine's."""
        impl = layer.attn_impl
        if not hasattr(impl, "rectified_text"):
            return original(layer, *args, **kwargs)
        unknown = "seq_lens, packed sequences" if kwargs.get("seq_lens") is not None else None
        impl.rectified_text = Text(
            first=kwargs.get("num_replicated_prefix", 0), last=kwargs.get("num_replicated_suffix", 0), unknown=unknown
        )
        impl.rectified_called = False
        try:
            out = original(layer, *args, **kwargs)
        finally:
            impl.rectified_text = None
        if not impl.rectified_called:
            impl.note_dense("a mask or packed sequences, which the engine attends by itself")
        return out

    def denoise(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the denoising loop: what it did goes to the log."""
        from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

        try:
            out = original(*args, **kwargs)
        finally:
            for component in self.components.values():
                component.seam.end_run()
        for component in self.components.values():
            init_logger(__name__).info("%s: %s", component.name, component.seam.summary())
        return out


def plugin() -> None:
    """What the entry point names: registers the hooks."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    hooks = Plugin()
    for target, hook in (
        ("layers.attention.selector.get_attn_backend", hooks.select),
        ("layers.attention.layer.USPAttention.forward", hooks.attention),
        ("pipelines_core.stages.denoising.DenoisingStage.forward", hooks.denoise),
    ):
        HookRegistry.register(f"{_RUNTIME}.{target}", hook, HookType.AROUND)


def asked() -> Mapping[str, Any] | None:
    """What the server's attention-backend configuration holds for us; None without. TypeError for no mapping."""
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    options = (get_global_server_args().attention_backend_config or {}).get(KEY)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            f"--attention-backend-config: {KEY} got {options!r}; allowed: fields of SparseConfig or a preset, such as "
            f'{{"{KEY}": {{"preset": "wan2.1-t2v", "sparsity": 0.8}}}}.'
        )
    return options


def config_of(options: Mapping[str, Any], component: str) -> SparseConfig:
    """The settings of one transformer: a preset's, the second one's for transformer_2, with the fields over them."""
    fields = {name: value for name, value in options.items() if name != "preset"}
    base = SparseConfig()
    if "preset" in options:
        configs = preset(options["preset"])
        base = configs[-1] if component.endswith("_2") else configs[0]
    return base.replace(**fields)


def backend_around(dense: Any, owner: Component) -> Any:
    """An AttentionBackend of SGLang that attends through `owner`, and densely as the backend `dense` does."""
    from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import AttentionImpl
    from sglang.multimodal_gen.runtime.layers.attention.layer import AttentionBackendEnum
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context

    class RectifiedImpl(AttentionImpl):
        component = owner

        def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
            self.dense = dense.get_impl_cls()(*args, prefix=prefix, **kwargs)
            self.index = None
            if prefix and "audio" not in prefix:  # LocalAttention, as of text refiners, gives none
                self.index, self.component.layers = self.component.layers, self.component.layers + 1
            self.name = prefix.removesuffix(".impl") or f"layer {self.index}"
            self.scale, self.causal = kwargs.get("softmax_scale"), kwargs.get("causal", False)
            self.rectified_text: Text | None = None
            self.rectified_called = False

        def note_dense(self, reason: str) -> None:
            place = self.component.place(self.index, self.name, get_forward_context())
            self.component.seam.record.note_dense(place.name, place.step, reason)

        @torch.compiler.disable
        def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any = None, **more: Any) -> torch.Tensor:
            """query: [B, S, H, D]; key, value: the same, or fewer heads."""
            self.rectified_called = True
            context, out = get_forward_context(), None
            place = self.component.place(self.index, self.name, context)
            record = self.component.seam.record
            if not of_itself(query, key, value):
                record.note_other("of other keys than queries")
            elif self.causal or more:
                record.note_dense(place.name, place.step, f"causal={self.causal} and {sorted(more)}")
            else:
                layout = layout_of(query.shape[1], self.rectified_text, context.forward_batch)
                if layout is None or self.index is None:
                    record.note_other("of other tokens than the video's")
                else:
                    out = self.component.seam.attend(query, key, value, layout, place, scale=self.scale, masks=Masks())
            return self.dense.forward(query, key, value, attn_metadata, **more) if out is None else out

    class RectifiedBackend(dense):
        @staticmethod
        def get_enum() -> Any:
            return AttentionBackendEnum[BORROWED]

        @staticmethod
        def get_impl_cls() -> Any:
            return RectifiedImpl

        @classmethod
        def supports_ring_rotation(cls) -> bool:
            return False  # a ring gives parts of the keys, of which nothing can be chosen

        @staticmethod
        def get_metadata_cls() -> Any:
            raise NotImplementedError

        @staticmethod
        def get_builder_cls() -> Any:
            raise NotImplementedError

    return RectifiedBackend


def layout_of(sequence: int, text: Text | None, batch: Any) -> TokenLayout | str | None:
    """Of the S tokens of a call; the reason where nobody knows; None: they are fewer than the latent's."""
    if text is None or text.unknown:
        return "an attention layer that does not say which tokens are text" if text is None else str(text.unknown)
    span = (text.first, sequence - text.last)
    grid, count = grid_of(batch)
    if span[1] - span[0] < count:
        return None
    if grid is not None and span[1] - span[0] == count:
        return TokenLayout(sequence=sequence, spans=(span,), grid=grid, grid_start=span[0])
    return TokenLayout(sequence=sequence, spans=(span,))


def grid_of(batch: Any) -> tuple[tuple[int, int, int] | None, int]:
    """(T, H, W) in tokens of the latent that is denoised, None: unknown; and how many tokens it has, 0: unknown."""
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    shape = tuple(getattr(batch, "raw_latent_shape", None) or ())
    if len(shape) == 3:  # packed already: [B, N, C]
        return None, int(shape[1])
    model = getattr(get_global_server_args().pipeline_config, "dit_config", None)
    patch = getattr(model, "patch_size", None)
    if isinstance(patch, int):
        patch = (getattr(model, "patch_size_t", None) or 1, patch, patch)
    if len(shape) != 5 or not isinstance(patch, list | tuple) or len(patch) != 3:
        return None, 0
    t, h, w = (int(length) // int(side) for length, side in zip(shape[2:], patch, strict=True))
    return (t, h, w), math.prod((t, h, w))
