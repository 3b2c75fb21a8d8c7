"""The versions this package is tested with, checked where the packages are first needed."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

#: Supported versions; what is outside is refused, since these libraries change their internals between releases.
SUPPORTED = {
    "torch": ">=2.11,<2.14",
    "megatron-core": "==0.16.1",
    "deepspeed": "==0.19.8",
    "webdataset": "==1.0.2",
    "transformer-engine": ">=2.11,<2.12",
}


def check_versions(*packages: str) -> None:
    """Raise ImportError, saying what to install, unless each package is there in a supported version."""
    for package in packages:
        wanted = SUPPORTED[package]
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ImportError(
                f"{package} is not installed; hmar_mega needs it: pip install '{package}{wanted}'"
            ) from None
        if not SpecifierSet(wanted).contains(found.split("+")[0], prereleases=True):
            raise ImportError(
                f"{package} {found} is installed; hmar_mega is tested with {package}{wanted}: "
                f"pip install '{package}{wanted}'"
            )


def installed_versions() -> dict[str, str]:
    """Versions of what a run depends on, `absent` where a package is missing."""
    versions = {}
    for package in ("hmar-mega", *SUPPORTED, "safetensors", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def git_revision() -> str:
    """Revision of the source tree, with `+changes` when it is not clean; `unknown` outside git."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        command = ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"]
        dirty = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return revision + ("+changes" if dirty else "")
