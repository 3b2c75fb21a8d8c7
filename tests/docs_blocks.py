"""The fenced blocks of the documentation, and what the comment above each says about how it is tested.

    <!-- small: 50000 → 5; --feather 8 → --feather 2 -->    run, with these words replaced
    <!-- parse: why it cannot be run here -->               read by the real parsers, its settings resolved, not run

A block with neither comment is run as it stands.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Pages by path, and the README.
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
README = "README.md"

_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!-- (\w+): (.*) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line, for messages.
        mode: `run` or `parse`.
        reason: why it is only parsed.
        replaced: (words, words instead), in the order they are applied.
    """

    page: str
    line: int
    language: str
    text: str
    mode: str = "run"
    reason: str = ""
    replaced: tuple[tuple[str, str], ...] = ()

    @property
    def small_text(self) -> str:
        """The text with its words replaced; AssertionError for words that are not there."""
        text = self.text
        for old, new in self.replaced:
            assert old in text, f"{self.page}:{self.line}: {old!r} is not in the block below the comment"
            text = text.replace(old, new)
        return text

    def commands(self, small: bool = True) -> list[str]:
        """The command lines of a bash block, continued ones joined, without comments."""
        joined = (self.small_text if small else self.text).replace("\\\n", " ")
        return [shlex.join(words) for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page that name a language."""
    found: list[Block] = []
    language, start, body, above = "", 0, [], ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and not start:
            language, start, body = fence[1], number, []
        elif fence:
            if language:
                found.append(_block(page, start + 1, language, "\n".join(body), above))
            start = 0
        elif start:
            body.append(line)
        if not start:
            above = line
    return found


def _block(page: str, line: int, language: str, text: str, above: str) -> Block:
    comment = _COMMENT.match(above)
    if comment is None:
        return Block(page, line, language, text)
    kind, rest = comment.groups()
    if kind == "parse":
        return Block(page, line, language, text, "parse", rest)
    assert kind == "small", f"{page}:{line}: the comment says {kind!r}; use small or parse"
    pairs = [tuple(part.strip() for part in pair.split("→")) for pair in rest.split(";")]
    assert all(len(pair) == 2 for pair in pairs), f"{page}:{line}: {rest!r} is not a list of OLD → NEW"
    return Block(page, line, language, text, replaced=tuple(pairs))  # type: ignore[arg-type]
