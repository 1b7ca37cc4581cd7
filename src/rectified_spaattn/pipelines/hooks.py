"""Hooks of ours on a pipeline's modules. They are bound methods, so that copying and pickling them ends here."""

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn


class Hooks:
    """What a module of an enabled pipeline carries among its hooks. A deep copy of the module carries dead ones."""

    alive = True
    attachments: Sequence[Any] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooks":
        dead = object.__new__(type(self))
        dead.alive = False
        return dead

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.alive:
            refuse_pickling()
        return object.__new__, (type(self),), {"alive": False}


def living_hooks(module: nn.Module) -> list[Any]:
    """Hooks of ours on a module that do something."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Hooks) and owner.alive]


def remove_hooks(module: nn.Module, attachment: Any) -> None:
    """Take the hooks of one attachment off a module. By what they are: a handle may not have come back from PyTorch."""
    kinds = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_always_called),
    )
    for hooks, options in kinds:
        owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
        for key, owner in owners.items():
            if isinstance(owner, Hooks) and attachment in owner.attachments:
                del hooks[key]
                options.pop(key, None)


def refuse_pickling(what: str = "rectified attention", undoing: str = "rsa.disable(pipe)") -> NoReturn:
    """Raises TypeError. what: is enabled on a model; undoing: the call that takes it off."""
    raise TypeError(
        f"{what} is enabled on this model, and an enabled model cannot be pickled or saved whole. Call disable() of "
        f"its handle, or {undoing}, first; save_pretrained and state_dict work as they are."
    )
