"""Rectified Attention for ComfyUI. Its nodes are in the package rectified-spaattn, which must be installed beside it."""

from rectified_spaattn.engines.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
