"""Every command of the documentation works: run on small sizes, or, with the reason above it, read and resolved.

The first page makes what the others use: shards, tokenizer, tokens, both stages, an export. Commands run one after the
other in one process a page; torchrun's are run by that process alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from docs_blocks import PAGES, README, blocks
from docs_workplace import furnish, run_blocks
from harness import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FIRST = "docs/getting-started.md"

#: Where `models/d16` comes from.
PUBLISHED = "docs/published-weights.md"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The workplace after the first page and the first block of the page on published weights; what went wrong."""
    folder = tmp_path_factory.mktemp("workplace")
    furnish(folder)
    imports = next(block for block in blocks(PUBLISHED) if "models/d16" in block.text)
    (wrong,) = run_ranks(1, run_blocks, folder, [*blocks(FIRST), imports], timeout=400)
    return folder, wrong


def test_the_first_page_works(finished: tuple[Path, list[str]]) -> None:
    folder, wrong = finished
    assert not wrong, "\n".join(wrong)
    assert (folder / "edited.png").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page != FIRST and blocks(page)])
def test_every_command_of_a_page_works(page: str, finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "place")
    (wrong,) = run_ranks(1, run_blocks, tmp_path / "place", blocks(page), timeout=300)
    assert not wrong, "\n".join(wrong)


def test_the_readme_shows_no_command_that_the_guide_does_not_run() -> None:
    of_guide = {
        command
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash"
        for command in block.commands(small=False)
    }
    shown = [command for block in blocks(README) if block.language == "bash" for command in block.commands()]
    assert len(shown) >= 10
    assert [command for command in shown if command not in of_guide] == []


def test_what_is_only_parsed_says_why() -> None:
    parsed = [block for page in PAGES for block in blocks(page) if block.mode == "parse"]
    assert parsed
    assert [f"{block.page}:{block.line}" for block in parsed if len(block.reason.split()) < 4] == []
