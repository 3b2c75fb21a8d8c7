"""Plain PyTorch inference: loading an exported model, sampling and editing.

The names are imported when they are first used, so that the command line can read its options without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmar_mega.inference.editing import Edit, edit, edit_images
    from hmar_mega.inference.opening import open_model
    from hmar_mega.inference.pipeline import ImageModel, load_model
    from hmar_mega.inference.smooth import Smoothing

__all__ = ["Edit", "ImageModel", "Smoothing", "edit", "edit_images", "load_model", "open_model"]

_HOMES = {
    "Edit": "editing",
    "ImageModel": "pipeline",
    "Smoothing": "smooth",
    "edit": "editing",
    "edit_images": "editing",
    "load_model": "pipeline",
    "open_model": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
