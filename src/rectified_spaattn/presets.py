"""The settings of every model: what was published for it, and what this package makes of that."""

from .config import SparseConfig, nearest

_WAN = SparseConfig.paper(sparsity=0.75, dense_layers=(0, 1), first_frame=True)
_WAN_A14B = _WAN.replace(sparsity=0.85)

# One config a transformer, in the order of the pipeline (Wan2.2 A14B has two). Warm-ups are kept as fractions of the
# published number of steps (5 of 50; 3 and 1 of 40), so that samplers with fewer steps keep their sparse share.
_PUBLISHED: dict[str, tuple[SparseConfig, ...]] = {
    "hunyuan-video-t2v": (SparseConfig.paper(sparsity=0.80),),
    "wan2.1-t2v": (_WAN.replace(dense_steps=0.1),),
    "wan2.1-i2v": (_WAN,),
    "wan2.2-t2v-a14b": (_WAN_A14B.replace(dense_steps=0.075), _WAN_A14B.replace(dense_steps=0.025)),
    "wan2.2-i2v-a14b": (_WAN_A14B, _WAN_A14B),
    "wan2.2-ti2v-5b": (_WAN.replace(dense_steps=0.1),),
    "cogvideox1.5-t2v": (SparseConfig.paper(sparsity=0.85, dense_steps=0.1),),
    "cogvideox1.5-i2v": (SparseConfig.paper(sparsity=0.75, dense_steps=0.1),),
    "flux.1-dev-4096": (SparseConfig.paper(sparsity=0.90),),
}
# Of models of whose family nothing was published: the default sparsity, for video with the schedule of Wan 2.1 T2V, for
# images with that of Flux.1. Chosen here, and measured on no such model.
_CHOSEN_HERE = {
    "video": (SparseConfig(dense_steps=0.1, dense_layers=(0, 1)),),
    "image": (SparseConfig(),),
}
_OURS = {name: getattr(SparseConfig(), name) for name in ("rectify", "order", "neighbours", "first_frame")}
_OWN = {name: tuple(each.replace(**_OURS) for each in published) for name, published in _PUBLISHED.items()}
_OWN |= _CHOSEN_HERE

# The shares of the first steps that SVG and SVG2 leave dense in their scripts for 720p, github.com/svg-project/
# Sparse-VideoGen (5ce7b01): first_times_fp; first_layers_fp is 0.03 of 60 or 40 layers, rounded down. 50 steps, I2V 40.
_SVG = {"hunyuan-video-t2v": 0.1, "wan2.1-t2v": 0.2, "wan2.1-i2v": 0.35}


def _warmed(name: str, **first: object) -> tuple[SparseConfig, ...]:
    """The configs of `name` with a warm-up in the first transformer; a second one comes after it, and keeps its own."""
    return (_OWN[name][0].replace(**first), *_OWN[name][1:])


def _safe(name: str) -> tuple[SparseConfig, ...]:
    """Of two transformers the first may have fewer than 40% of the steps: the second goes on with a tenth."""
    return tuple(each.replace(dense_steps=(0.4, 0.1)[i], dense_last_steps=0.1) for i, each in enumerate(_OWN[name]))


# Under the name of a model its published sparsity and schedule with the defaults of this package; under NAME-paper all
# as published. Under three other endings the same sparsity and defaults with another schedule:
# sol   the warm-up of Sol-Attn (arXiv 2607.24027): the first 20% of the steps, and the first layer in every step
# svg   that of SVG and SVG2, as above; 30% of the steps where they have no such model
# safe  the first 40% and the last 10% of the steps
PRESETS: dict[str, tuple[SparseConfig, ...]] = {
    **_OWN,
    **{f"{name}-paper": published for name, published in _PUBLISHED.items()},
    **{f"{name}-sol": _warmed(name, dense_steps=0.2, dense_layers=(0,)) for name in _OWN},
    **{f"{name}-svg": _warmed(name, dense_steps=_SVG.get(name, 0.3), dense_layers=(0,)) for name in _OWN},
    **{f"{name}-safe": _safe(name) for name in _OWN},
}
ENDINGS = "-sol, -svg or -safe behind it for another schedule, or, but for video and image, -paper for all as published"
PRESET_NAMES = f"{', '.join(_OWN)}; each also with {ENDINGS}"  # for people


def preset(name: str) -> tuple[SparseConfig, ...]:
    """The settings under `name`, one config a transformer. Raises ValueError for a name it does not know."""
    if name not in PRESETS:
        raise ValueError(
            f"preset: got {name!r}; allowed: one of {list(_OWN)}, also with {ENDINGS} (docs/models.md)."
            f"{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def origin(name: str) -> str:
    """Where the sparsity and schedule of a model's preset come from: "published" or "chosen here, not published"."""
    return "published" if name in _PUBLISHED else "chosen here, not published"
