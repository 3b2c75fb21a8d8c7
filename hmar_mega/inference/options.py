"""What people write on the command line of sampling: classes by name, guidance, mask schedules, lists of images."""

from __future__ import annotations

import contextlib
import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmar_mega.errors import UserError

#: At the end of a mask schedule: every further scale is one pass.
ELLIPSES = ("…", "...")


def parse_mask_schedule(text: str, option: str = "--mask-schedule") -> list[list[int]]:
    """`1;1,3;1,1,2,5` → [[1], [1, 3], [1, 1, 2, 5]]: scales by `;`, passes by `,`.

    A trailing `…` or `...` says that the scales beyond are one pass each, which they are anyway. Whether the numbers
    fit the scales is for `scales.mask_schedule_for` to say.

    Raises:
        UserError: for anything but numbers.
    """
    scales = [part.strip() for part in text.strip().rstrip(";").split(";")]
    if scales and scales[-1] in ELLIPSES:
        scales.pop()
    try:
        return [[int(count) for count in scale.split(",")] for scale in scales]
    except ValueError:
        raise UserError(
            f"{option} {text!r} is not of the form '1;1,3;1,1,2,5;16': for each scale, separated by semicolons, "
            "the tokens that each pass keeps, separated by commas; scales left out are one pass"
        ) from None


def format_mask_schedule(schedule: Iterable[Iterable[int]]) -> str:
    """The text that `parse_mask_schedule` reads."""
    return ";".join(",".join(map(str, entry)) for entry in schedule)


def parse_cfg(text: str, option: str = "--cfg") -> float | list[float]:
    """`1.5` → 1.5; `0,0.5,1` → [0, 0.5, 1], the strength at every scale."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{option} {text!r} is neither a number, such as 1.5, nor a comma-separated list with one number a scale"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


@dataclass(frozen=True)
class ClassNames:
    """Classes by number or name.

    Attributes:
        names: of classes 0, 1, …; may be empty. A name may list synonyms separated by commas, as ImageNet's do.
        count: classes of the model.
    """

    names: tuple[str, ...]
    count: int

    def number(self, text: str) -> int:
        """The class that `text` means: digits are a number, anything else a name or one of its synonyms.

        Raises:
            UserError: for a name that is unknown, or means several classes. Numbers are not checked here.
        """
        text = text.strip()
        with contextlib.suppress(ValueError):
            return int(text)
        if not self.names:
            raise UserError(
                f"class {text!r} is not a number, and this model knows no class names; give --class-names FILE, or "
                "numbers such as 0,3,7"
            )
        found = self._by_name.get(text.casefold(), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"class {text!r} means {' and '.join(map(str, found))}; give the number")
        near = self._nearest(text)
        raise UserError(f"class {text!r} is not known{near}; there are {self.count} classes, 0 to {self.count - 1}")

    def numbers(self, text: str) -> list[int]:
        """The classes of a comma-separated list."""
        return [self.number(part) for part in text.split(",")]

    @property
    def _by_name(self) -> dict[str, list[int]]:
        table: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(self.names):
            for synonym in dict.fromkeys(part.strip().casefold() for part in (name, *name.split(","))):
                table[synonym].append(number)
        return table

    def _nearest(self, text: str) -> str:
        import difflib

        close = difflib.get_close_matches(text.casefold(), self._by_name, 3)
        return f"; did you mean {' or '.join(close)}?" if close else ""


def class_names(file: Path | None, own: Sequence[str] | None, count: int) -> ClassNames:
    """The names in `file`, else the model's own.

    Args:
        file: a name a line, line n for class n; or JSON: a list of names, or {"0": "tench", …}, whose values may be
            [id, name] pairs as in the usual `imagenet_class_index.json`.
        own: what the export says.
        count: classes of the model.

    Raises:
        UserError: when the file cannot be read or has another number of names.
    """
    if file is None:
        return ClassNames(tuple(own or ()), count)
    try:
        names = _names_in(file.read_text())
    except (OSError, ValueError, TypeError, KeyError, IndexError) as err:
        raise UserError(
            f"cannot read class names from {file} ({err}); give a text file with a name a line, or JSON: a list, or an "
            "object of numbers and names"
        ) from None
    if len(names) != count:
        raise UserError(f"{file} has {len(names)} names, the model {count} classes; give a name for each class")
    return ClassNames(tuple(names), count)


def _names_in(text: str) -> list[str]:
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.strip().splitlines()]
    tree = json.loads(text)
    if isinstance(tree, dict):
        tree = [tree[str(number)] for number in range(len(tree))]
    return [name if isinstance(name, str) else str(name[-1]) for name in tree]


def read_requests(file: Path, names: ClassNames) -> tuple[list[int], list[int]]:
    """Classes and seeds of a CSV file, a line `class,seed` an image; a first line `class,seed` is a heading.

    Raises:
        UserError: naming the line that cannot be used.
    """
    labels, seeds = [], []
    try:
        with file.open(newline="") as lines:
            rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise UserError(f"cannot read {file}: {err}; give a file with a line class,seed for each image") from None
    for line, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (line == 1 and cells == ["class", "seed"]):
            continue
        try:
            name, seed = cells
            seeds.append(int(seed))
        except ValueError:
            raise UserError(
                f"{file}, line {line}: {','.join(row)!r} is not class,seed (quote a name that has a comma)"
            ) from None
        labels.append(names.number(name))
    if not labels:
        raise UserError(f"{file} asks for no image; give a line class,seed for each")
    return labels, seeds
