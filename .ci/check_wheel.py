"""Check an installed wheel from outside the repository: `PYTHONPATH=SITE python -P check_wheel.py SITE REPOSITORY`.

Every package must come from SITE, the packaged configurations must be those of the repository, and the rooms that
stand at the repository's top level must not be importable by their bare names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path


def main(site: Path, repository: Path) -> None:
    """Raise SystemExit, with what is wrong, unless the wheel in `site` is whole."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = sorted(
        ".".join((name, *init.parent.relative_to(repository / folder).parts))
        for name, folder in settings["package-dir"].items()
        for init in (repository / folder).rglob("__init__.py")
    )
    for name in (*packages, "hmar_mega.cli", "hmar_mega.config_io"):
        found_at = importlib.util.find_spec(name)
        origin = Path(found_at.origin or "") if found_at else None
        if origin is None or not origin.is_relative_to(site):
            raise SystemExit(f"{name} comes from {origin}, not from the wheel: is it in `packages` of pyproject.toml?")
        importlib.import_module(name)

    config = importlib.import_module("hmar_mega.config_io")
    sources = repository / "configs"
    expected = sorted(p.relative_to(sources).with_suffix("").as_posix() for p in sources.rglob("*.yaml"))
    cluster = importlib.import_module("hmar_mega.planning.cluster")
    configs, clusters = config.packaged_configs(), cluster.packaged_clusters()
    found = sorted([*configs, *(f"cluster/{name}" for name in clusters)])
    if found != expected or not configs or not clusters:
        raise SystemExit(f"packaged configs differ from configs/: {sorted(set(found) ^ set(expected))}")
    for name in configs:
        config.load_config(name)
    for name in clusters:
        cluster.load_cluster(name)

    for room in (n.removeprefix("hmar_mega.") for n in settings["package-dir"] if n != "hmar_mega"):
        spec = importlib.util.find_spec(room)
        places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
        for place in (Path(p) for p in places if p):
            in_checkout = place.is_relative_to(repository) and not place.is_relative_to(sys.prefix)
            if in_checkout or place.is_relative_to(site):
                raise SystemExit(f"`import {room}` finds ours at {place}; it must be hmar_mega.{room} only")
    print(f"{len(packages)} packages and {len(found)} configs come from the wheel")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
