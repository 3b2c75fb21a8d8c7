"""The multi-scale residual VQ-VAE that turns images into token maps and back."""
