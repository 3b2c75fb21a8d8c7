"""hmar_mega: train HMAR image models at any size and take them home to one GPU."""

__version__ = "0.1.0"
