"""ComfyUI: nodes that patch any MODEL, for its loader of custom nodes."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from .override import Override, override_of, patch

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "Override", "override_of", "patch"]
