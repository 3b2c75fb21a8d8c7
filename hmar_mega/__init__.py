"""hmar_mega: train HMAR image models at any size and take them home to one GPU."""

from hmar_mega.versions import check_versions

__version__ = "0.1.0"

check_versions("torch")
