"""The multi-scale residual VQ-VAE that turns images into token maps and back."""

from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer, QuantizerOutput

__all__ = ["MultiScaleQuantizer", "MultiScaleVQVAE", "QuantizerOutput"]
