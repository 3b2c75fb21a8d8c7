"""The commands `hmar-mega checkpoint …`: what a run has saved, whether it is whole, what it holds, and rewriting it."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_mega.errors import UserError
from hmar_mega.parsers import add_command

if TYPE_CHECKING:
    from hmar_mega.checkpoint.sources import CheckpointReader

#: What verification says of format 1.
UNVERIFIED = "files are complete; it has no checksums (format 1), so their content is not verified"


def add_checkpoint_parser(subparsers: Any) -> None:
    """Add `checkpoint` and its commands to the sub-parsers of `hmar-mega`; each sets `run`."""
    parser = add_command(
        subparsers,
        "checkpoint",
        "list, verify, show and rewrite checkpoints",
        "What a run has saved, whether it is whole, what it holds, and rewriting it.",
        "  hmar-mega checkpoint list runs/d16\n  hmar-mega checkpoint verify runs/d16",
    )
    commands = parser.add_subparsers(dest="checkpoint_command", metavar="COMMAND", required=True)
    _add_list(commands)
    _add_verify(commands)
    _add_show(commands)
    _add_convert(commands)


def _add_list(commands: Any) -> None:
    parser = add_command(
        commands,
        "list",
        "show the checkpoints of a run",
        "Show the checkpoints of a run. `complete` looks at names and lengths of files; `verify` hashes them.",
        "  hmar-mega checkpoint list runs/d16",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    parser.set_defaults(run=_run_list)


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        "hash every file and compare with what was written",
        "Hash every file of a checkpoint, or of all checkpoints of a run, and compare with SHA256SUMS.\n"
        "The exit status is 1 when a file is damaged or missing; each is listed.",
        "  hmar-mega checkpoint verify runs/d16\n  hmar-mega checkpoint verify runs/d16/checkpoints/step-00001000",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory or checkpoint folder")
    parser.set_defaults(run=_run_verify)


def _add_show(commands: Any) -> None:
    parser = add_command(
        commands,
        "show",
        "show what a checkpoint holds",
        "Show where a checkpoint stands in training, what it holds, and how it was configured.",
        "  hmar-mega checkpoint show runs/d16\n  hmar-mega checkpoint show runs/d16/checkpoints/best --tensors",
    )
    parser.add_argument("path", type=Path, metavar="CHECKPOINT", help="checkpoint, or run: its latest")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object, tensors and settings too")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and kinds")
    parser.set_defaults(run=_run_show)


def _add_convert(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        "rewrite a checkpoint into evenly sized files, or its weights alone",
        "Rewrite a checkpoint piece by piece, never holding more than a few megabytes of it. The result is one that\n"
        "any layout trains on from: put it into the `checkpoints` folder of a run directory and name it with\n"
        "run.resume_from. With --weights-only a new run can start from it (run.init_from=OUT).",
        "  hmar-mega checkpoint convert runs/a runs/b/checkpoints/step-00001000 --files 8\n"
        "  hmar-mega checkpoint convert runs/a/checkpoints/best weights --weights-only",
    )
    parser.add_argument("path", type=Path, metavar="CHECKPOINT", help="checkpoint, or run: its latest")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--files", type=int, default=1, help="how many files of values (default: %(default)s)")
    parser.add_argument("--weights-only", action="store_true", help="leave out what only training needs")
    parser.add_argument(
        "--kind", choices=("weight", "ema"), default="weight", help="of --weights-only (default: %(default)s)"
    )
    parser.set_defaults(run=_run_convert)


def _run_list(args: argparse.Namespace) -> int:
    print("\n".join(list_lines(args.run_dir, time.time())))
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from hmar_mega.checkpoint.checksums import find_damage, read_sums
    from hmar_mega.progress import track

    damaged = 0
    for checkpoint in _checkpoints_at(args.path):
        try:
            sums = read_sums(checkpoint)
            total = sum((checkpoint / name).stat().st_size for name in sums or () if (checkpoint / name).is_file())
            with track(f"hashing {checkpoint.name}", total, enabled=sums is not None) as tally:
                damage = find_damage(checkpoint, sums or {}, advance=tally.advance)
            if not damage:
                _open(checkpoint).check_files()
        except UserError as err:
            print(f"{checkpoint.name}: DAMAGED\n  {err}")
            damaged += 1
            continue
        damaged += bool(damage)
        word = "DAMAGED" if damage else f"whole, {len(sums)} files, {_size(total)}" if sums else UNVERIFIED
        print("\n".join([f"{checkpoint.name}: {word}", *(f"  {one}" for one in damage)]))
    return 1 if damaged else 0


def _run_show(args: argparse.Namespace) -> int:
    reader = _open(_checkpoint_at(args.path))
    if args.json:
        print(json.dumps({**_facts(reader), "state": reader.state, "tensors": _tensors(reader)}, indent=1))
    else:
        print("\n".join(show_lines(reader, args.tensors)))
    return 0


def _run_convert(args: argparse.Namespace) -> int:
    from hmar_mega.checkpoint.rewrite import rewrite_checkpoint
    from hmar_mega.progress import track

    if args.kind != "weight" and not args.weights_only:
        raise UserError(f"--kind {args.kind} chooses what becomes the weights; add --weights-only")
    reader = _open(_checkpoint_at(args.path))
    reader.verify()
    kept = [shape for _, kind, shape in reader.tensors() if not args.weights_only or kind == "weight"]
    with track("values", sum(map(math.prod, kept))) as tally:
        names = rewrite_checkpoint(reader, args.out, args.files, args.weights_only, args.kind, tally)
    what = {"weight": "weights", "ema": "averaged weights"}[args.kind] if args.weights_only else "everything"
    print(f"wrote {what} of {reader.folder} to {args.out}: {len(names)} file(s)")
    return 0


def list_lines(run: Path, now: float) -> list[str]:
    """The table of a run's checkpoints.

    Raises:
        UserError: when it has none.
    """
    from hmar_mega.checkpoint.sources import BEST, LATEST

    folder = run / "checkpoints"
    marks = {p: (folder / p).read_text().strip() for p in (LATEST, BEST) if (folder / p).is_file()}
    rows = [("name", "step", "images", "size", "written by", "age", "complete", "")]
    for checkpoint in _checkpoints_at(run):
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        age = _age(now - (checkpoint / "state.json").stat().st_mtime)
        marked = " ".join(p for p, name in marks.items() if name == checkpoint.name)
        try:
            reader = _open(checkpoint)
            state, layout = reader.state, _layout(reader.state)
            reader.check_files()
            complete = "yes"
        except UserError:
            state, layout, complete = {}, "?", "NO"
        images = f"{state['images_seen']:,}" if "images_seen" in state else "?"
        rows.append(
            (checkpoint.name, str(state.get("step", "?")), images, _size(size), layout, age, complete, marked)
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, 4, 6, 7}
    lines = [
        "  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines += [
        f"{mark} names {name}, which is not there" for mark, name in marks.items() if not (folder / name).is_dir()
    ]
    cut_short = len(list(folder.glob(".saving-*")))
    if cut_short:
        lines.append(f"{cut_short} being written or cut short; the next save removes what is left of it")
    return [line.rstrip() for line in lines]


def show_lines(reader: CheckpointReader, tensors: bool) -> list[str]:
    """What a checkpoint holds, as lines of text."""
    facts, state = _facts(reader), reader.state
    rows = [
        ("checkpoint", str(reader.folder)),
        ("step", f"{state['step']:,} of {state['last_step']:,}" if "last_step" in state else str(state["step"])),
        ("images seen", f"{state['images_seen']:,}" if "images_seen" in state else "?"),
        ("best loss", str(state.get("best_loss"))),
        ("skipped", f"{state.get('skipped_steps', 0)} steps, {state.get('failed_saves', 0)} failed saves"),
        ("data", json.dumps(state.get("stream"))),
        ("loss scaler", json.dumps(state.get("loss_scaler"))),
        ("written by", _layout(state)),
        ("revision", str(state.get("revision"))),
        ("format", f"{reader.format}" + ("" if reader.sums else " (no checksums)")),
        ("parameters", f"{facts['parameters']:,}"),
        ("values", ", ".join(f"{kind} {count:,}" for kind, count in facts["values"].items())),
        ("size", f"{_size(facts['bytes'])} in {facts['files']} files"),
    ]
    lines = [f"{name:<13}{value}" for name, value in rows]
    if tensors:
        table = _tensors(reader)
        width = max(len(row["name"]) for row in table)
        lines += ["", f"{'tensor':<{width}}  {'shape':<20}  kinds"]
        lines += [
            f"{row['name']:<{width}}  {'×'.join(map(str, row['shape'])):<20}  {', '.join(row['kinds'])}"
            for row in table
        ]
    elif "config" in state:
        import yaml

        lines += ["", *yaml.safe_dump(state["config"], sort_keys=False).rstrip().splitlines()]
    return lines


def _facts(reader: CheckpointReader) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for _, kind, shape in reader.tensors():
        counts[kind] += math.prod(shape)
    files = [file for file in reader.folder.iterdir() if file.is_file()]
    return {
        "folder": str(reader.folder),
        "format": reader.format,
        "checksums": reader.sums is not None,
        "parameters": sum(map(math.prod, reader.shapes.values())),
        "values": dict(counts),
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
    }


def _tensors(reader: CheckpointReader) -> list[dict[str, Any]]:
    kinds: dict[str, list[str]] = {}
    shapes: dict[str, Sequence[int]] = {}
    for name, kind, shape in reader.tensors():
        kinds.setdefault(name, []).append(kind)
        shapes[name] = shape
    return [{"name": name, "shape": list(shapes[name]), "kinds": sorted(have)} for name, have in kinds.items()]


def _open(checkpoint: Path) -> CheckpointReader:
    from hmar_mega.checkpoint.sources import CheckpointReader

    return CheckpointReader(checkpoint)


def _checkpoint_at(path: Path) -> Path:
    """A checkpoint folder as it is given; of a run the latest; a pointer's target."""
    from hmar_mega.checkpoint.sources import JSON_FILES, find_checkpoint

    if any((path / name).exists() for name in JSON_FILES):
        return path
    if path.is_file() and path.parent.name == "checkpoints":
        found = find_checkpoint(path.parent.parent, path.name)
    else:
        found = find_checkpoint(path)
    if found is None:
        raise UserError(f"{path} holds no checkpoint: give a run directory, or a folder RUN/checkpoints/step-…")
    return found


def _checkpoints_at(path: Path) -> list[Path]:
    """Every checkpoint of a run, whole or not; or the one that is given."""
    found = sorted((path / "checkpoints").glob("step-*"))
    return found or [_checkpoint_at(path)]


def _layout(state: dict[str, Any]) -> str:
    """Which processes wrote it, in words."""
    layout = state.get("layout") or state.get("config", {}).get("parallel")
    if layout is None:
        return "?"
    processes, tensor = layout.get("processes"), layout["tensor_parallel"]
    pipeline = layout.get("pipeline_parallel", 1)
    words = [f"{processes} process{'es' if processes > 1 else ''}"] if processes else []
    words += [f"tp{tensor}"] if tensor > 1 else []
    words += [f"pp{pipeline}"] if pipeline > 1 else []
    return " ".join([*words, f"zero{layout['zero_stage']}"])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
