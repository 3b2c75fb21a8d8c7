"""Plain PyTorch inference: loading, sampling and editing."""
