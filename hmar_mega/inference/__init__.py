"""Plain PyTorch inference: loading an exported model, sampling and editing."""

from hmar_mega.inference.editing import edit_images
from hmar_mega.inference.pipeline import ImageModel, load_model

__all__ = ["ImageModel", "edit_images", "load_model"]
