"""The table of adapters for people: which transformers of diffusers are supported, and with which presets."""

from typing import NamedTuple

from .adapters import ADAPTERS, presets_of


class SupportedModel(NamedTuple):
    """One transformer class of diffusers.

    transformer  name of the class; a pipeline that has one can be enabled
    presets      names in PRESETS that `enable` chooses from
    """

    transformer: str
    presets: tuple[str, ...]


def supported() -> list[SupportedModel]:
    """All that `enable` takes, in the order of docs/models.md."""
    return [SupportedModel(name, presets_of(adapter)) for name, adapter in ADAPTERS.items()]
