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
# Of models for which nothing was published: the default sparsity with the schedule of Wan 2.1 T2V.
_NEAREST = {"video": (SparseConfig(dense_steps=0.1, dense_layers=(0, 1)),)}
_OURS = {name: getattr(SparseConfig(), name) for name in ("rectify", "order", "neighbours", "first_frame")}

# Warm-ups that others publish: the share of the first steps that is dense; besides, the first layer is, in every step.
# sol: Sol-Attn (arXiv 2607.24027), the same for every model; it has no image-to-video model.
# svg: SVG and SVG2, scripts for 720p in github.com/svg-project/Sparse-VideoGen (5ce7b01): first_times_fp, and
# first_layers_fp = 0.03 of 60 or 40 layers, rounded down; 50 steps, 40 for I2V. SVG-EAR's was not found.
_WARM_UPS: dict[str, dict[str, float]] = {
    "hunyuan-video-t2v": {"sol": 0.2, "svg": 0.1},
    "wan2.1-t2v": {"sol": 0.2, "svg": 0.2},
    "wan2.1-i2v": {"svg": 0.35},
}

# Under the name of a model its published sparsity and schedule with the defaults of this package; under NAME-paper all
# as published; under NAME-sol and NAME-svg the same sparsity and defaults with the warm-up of somebody else.
_OWN = {name: tuple(each.replace(**_OURS) for each in published) for name, published in _PUBLISHED.items()}
_OTHERS = {
    f"{name}-{whose}": tuple(each.replace(dense_steps=share, dense_layers=(0,)) for each in _OWN[name])
    for name, shares in _WARM_UPS.items()
    for whose, share in shares.items()
}
PRESETS: dict[str, tuple[SparseConfig, ...]] = {
    **_OWN,
    **_NEAREST,
    **{f"{name}-paper": published for name, published in _PUBLISHED.items()},
    **_OTHERS,
}
# for people
PRESET_NAMES = f"{', '.join(_PUBLISHED)}; each also with -paper behind it; {', '.join([*_NEAREST, *_OTHERS])}"


def preset(name: str) -> tuple[SparseConfig, ...]:
    """The settings under `name`, one config a transformer. Raises ValueError for a name it does not know."""
    if name not in PRESETS:
        raise ValueError(
            f"preset: got {name!r}; allowed: one of {list(_PUBLISHED)}, or one of them with '-paper' behind it for all "
            "as published, or '-sol' and '-svg' for the warm-up of others where there is one (docs/models.md); or one "
            f"of {list(_NEAREST)}.{nearest(name, PRESETS)}"
        )
    return PRESETS[name]
