"""The documentation says what is so: quoted errors exist, settings and commands are all there, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from docs_blocks import PAGES, README, ROOT, blocks
from docs_workplace import Workplace, check_yaml

from hmar_mega.cli import build_parser
from hmar_mega.config_io import known_keys, packaged_configs

TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")

#: A message in the first column of a table under "By message", as it is quoted.
QUOTED = re.findall(r"^\| `([^`]+)` \|", TROUBLESHOOTING.partition("## Configuration")[2], re.M)


def load(path: Path) -> ModuleType:
    """A module that lies outside of packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load(ROOT / "docs" / "reference_pages.py")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every text in the sources, f-strings with … for their values; and the Makefile."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for room in ("hmar_mega", "data", "tokenizer", "launchers"):
        for source in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_many_messages_are_explained() -> None:
    assert len(QUOTED) >= 70


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_sources(message: str, texts: list[str]) -> None:
    """Its words, in their order, stand in one text; … is whatever differs from case to case."""
    words = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    pattern = re.compile(".*".join(words), re.S)
    assert any(pattern.search(text) for text in texts)


def test_every_setting_is_in_the_reference(reference: ModuleType) -> None:
    page = reference.settings_page()
    sections = re.split(r"^#{2,4} ", page, flags=re.M)
    rows = {
        f"{section.partition('`')[2].partition('`')[0]}.{key}"
        for section in sections
        for key in re.findall(r"^\| `(\w+)` \|", section, re.M)
    }
    leaves = {key for key in known_keys() if "." in key}
    assert leaves
    assert leaves - rows == set()
    assert all(f"`{name}`" in page for name in packaged_configs())
    assert "| `depth` | integer ≥ 1, ≤ 128 | `16` | layers |" in page
    assert "| `dir` | text | **required** |" in page


def test_every_setting_of_a_run_says_what_it_is(reference: ModuleType) -> None:
    of_runs = reference.settings_page().partition("## Other files")[0]
    assert re.findall(r"^\| `(\w+)` \|.*\|  \|$", of_runs, re.M) == []


def test_every_command_is_in_the_reference(reference: ModuleType) -> None:
    page = reference.cli_page()
    names = [name for name, _ in reference.commands(build_parser())]
    assert {"train", "data shard", "sweep fit"} <= set(names)
    assert [name for name in names if f"# hmar-mega {name}\n" not in page] == []
    assert "--mask-schedule" in page


@pytest.mark.parametrize("page", [README, *PAGES])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """mkdocs checks those of the site; this also the README's, and without building anything."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    generated = {ROOT / "docs" / "reference" / name for name in ("settings.md", "cli.md")}
    targets = [((ROOT / page).parent / link).resolve() for link in links if "://" not in link]
    assert [str(path) for path in targets if not path.exists() and path not in generated] == []


def test_the_yaml_of_the_readme_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [block for block in blocks(README) if block.language == "yaml"]
    assert shown
    for block in shown:
        check_yaml(block.text)


@pytest.mark.parametrize(
    "command",
    ["frobnicate shards", "make nothing", "pip install 'hmar-mega[nothing]'", "hmar-mega train demo optim.epoch=3"],
)
def test_commands_that_cannot_work_are_noticed_where_they_are_only_parsed(command: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        Workplace().command(command, "parse")
