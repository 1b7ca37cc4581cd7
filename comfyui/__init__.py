"""Rectified Attention for ComfyUI. The nodes are in the package rectified-spaattn: install that beside this folder."""

from rectified_spaattn.engines.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
