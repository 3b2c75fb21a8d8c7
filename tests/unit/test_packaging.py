"""The house as it is packaged: every room is installed, under our name, and heavy dependencies stay at the edge."""

from __future__ import annotations

import ast
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hmar_mega

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGE_DIR: dict[str, str] = SETUPTOOLS["package-dir"]

#: Rooms that stand at the top level and are installed under `hmar_mega`.
TOP_LEVEL_ROOMS = {name.removeprefix("hmar_mega.") for name in PACKAGE_DIR} - {"hmar_mega"}

#: Where Megatron-core, DeepSpeed and Transformer Engine may be imported (STYLE: dependencies at the edge).
EDGE = (
    "hmar_mega/parallel/",
    "hmar_mega/engine.py",
    "hmar_mega/precision.py",
    "hmar_mega/plugin/",
    "hmar_mega/checkpoint/canonical.py",
    "hmar_mega/model/layers_mcore.py",
    "hmar_mega/model/layers_te.py",
    "hmar_mega/model/fp8_scaling.py",
    "hmar_mega/model/attention_te.py",
    "hmar_mega/probe.py",
    "data/energon_stream.py",
    "tests/",
    "benchmarks/",
    "examples/",
)


def folder_of(package: str) -> Path:
    """The folder that setuptools takes `package` from: the longest mapped prefix, then the remaining names."""
    prefix = max((p for p in PACKAGE_DIR if package == p or package.startswith(f"{p}.")), key=len)
    return ROOT.joinpath(PACKAGE_DIR[prefix], *package[len(prefix) :].split("."))


def python_sources() -> list[Path]:
    rooms = [ROOT / d for d in (*PACKAGE_DIR.values(), "tests", "benchmarks", "examples", ".ci")]
    return sorted({p for room in rooms for p in room.rglob("*.py")})


def imported_names(source: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"), str(source))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!~;]", r, maxsplit=1)[0].lower() for r in requirements}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_folder_of_modules_is_a_listed_package() -> None:
    """What is not listed is missing from the wheel, though it works in the editable install."""
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    modules = {p.parent for d in PACKAGE_DIR.values() for p in (ROOT / d).rglob("*.py")}
    assert {relative(p) for p in listed} == {relative(p) for p in modules}
    assert [relative(p) for p in sorted(listed) if not (p / "__init__.py").is_file()] == []
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])


def test_every_other_file_of_a_room_is_package_data() -> None:
    """YAML files, batch scripts and `py.typed` reach the wheel only through a package-data pattern."""
    owner = {folder_of(package): package for package in SETUPTOOLS["packages"]}
    left_out = []
    for room in PACKAGE_DIR.values():
        for path in (ROOT / room).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc") or path.name.startswith("."):
                continue
            covered = any(
                len(path.relative_to(folder).parts) == len(Path(pattern).parts)
                and fnmatch.fnmatch(relative(path), f"{relative(folder)}/{pattern}")
                for folder in path.parents
                if folder in owner
                for pattern in SETUPTOOLS["package-data"].get(owner[folder], [])
            )
            if not covered:
                left_out.append(relative(path))
    assert left_out == []


@pytest.mark.parametrize("section", ["dependencies", "optional-dependencies"])
def test_apex_is_never_a_dependency(section: str) -> None:
    """`apex` on the package index is an unrelated project; NVIDIA's is used where it is already importable."""
    given = PYPROJECT["project"][section]
    requirements = given if isinstance(given, list) else [r for extra in given.values() for r in extra]
    names = distribution_names(requirements)
    assert len(names) > 1
    assert "apex" not in names


def test_no_room_is_imported_by_its_bare_name() -> None:
    """`import data` works in the repository root and nowhere else."""
    bare = [
        f"{relative(source)}:{line}: {name}"
        for source in python_sources()
        for line, name in imported_names(source)
        if name.split(".")[0] in TOP_LEVEL_ROOMS
    ]
    assert {"configs", "data", "launchers", "tokenizer"} == TOP_LEVEL_ROOMS
    assert bare == []


def test_heavy_dependencies_stay_at_the_edge() -> None:
    heavy = [
        f"{relative(source)}:{line}: {name}"
        for source in python_sources()
        if not relative(source).startswith(EDGE)
        for line, name in imported_names(source)
        if name.split(".")[0] in {"megatron", "deepspeed", "transformer_engine", "apex"}
    ]
    assert heavy == []


def test_the_scales_import_nothing_of_ours() -> None:
    names = [name for _, name in imported_names(ROOT / "hmar_mega" / "scales.py")]
    assert "torch" in names
    assert [name for name in names if name.startswith("hmar_mega")] == []


def test_version_is_stated_once_and_the_same() -> None:
    version = PYPROJECT["project"]["version"]
    assert hmar_mega.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_constraints_pin_every_dependency_but_torch() -> None:
    """`make venv` must give everyone the versions that the suite was run with."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name.lower()] = version
    extras = PYPROJECT["project"]["optional-dependencies"]
    needed = distribution_names([*PYPROJECT["project"]["dependencies"], *extras["dev"], *extras["docs"]])
    assert all(pinned.values())
    assert needed - set(pinned) == {"torch"}
    assert "torch" not in pinned


def test_no_folder_of_tests_is_left_out(request: pytest.FixtureRequest) -> None:
    """By its own list pytest walks into no folder named dist or build, and says nothing."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    left_out = [
        folder.name
        for folder in folders
        for pattern in request.config.getini("norecursedirs")
        if fnmatch.fnmatch(folder.name, pattern)
    ]
    assert len(folders) >= 3
    assert not left_out
