"""Damages shards and disks in every way that is named here, and writes down what came of it.

    python benchmarks/data_damage.py --markdown benchmarks/results/data_damage.md

Every scenario makes a small set of shards, damages it or the way to it, runs the library as `hmar-mega data` does, and
gives a row: what was damaged, what was said, samples lost and of how many. `tests/unit/test_data_damage.py` runs them
too, and says what each must give.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from hmar_mega.data.assembly import partial_folder
from hmar_mega.data.check import Report, check_folder
from hmar_mega.data.index import read_index, scan_tar, write_index
from hmar_mega.data.shard import ShardSettings, shard_images
from hmar_mega.errors import UserError
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.encode import EncodeSettings, encode_shards

SAMPLES, PER_SHARD, OFFSETS = 24, 8, 20


@dataclass(frozen=True)
class Row:
    """What came of one damage.

    Attributes:
        damage: what was done.
        kinds: the problems that were told, in short; or "error" where the command stopped.
        said: what was told, in words.
        lost, of: samples that are not there afterwards, of how many.
    """

    damage: str
    kinds: tuple[str, ...]
    said: str
    lost: int
    of: int


class FlatTokenizer:
    """Tokens from the mean of red, without any weights."""

    schedule = ScaleSchedule((1, 2, 4))
    config = SimpleNamespace(codebook_size=256, downsample=4)
    fingerprint = "flat"

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 16, 16) → (B, 21)."""
        maps = [torch.nn.functional.adaptive_avg_pool2d(images[:, :1], p) for p in self.schedule.patch_nums]
        return torch.cat([((m.flatten(1) + 1) * 127).long() for m in maps], dim=1)


def make_source(root: Path, large: int = -1) -> Path:
    """A folder of images of two classes; the one with number `large` has ten times the bytes of the others."""
    noise = np.random.RandomState(0)
    for number in range(SAMPLES):
        path = root / "src" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 160 if number == large else 24
        Image.fromarray(noise.randint(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return root / "src"


def make_shards(root: Path) -> Path:
    """Three image shards of eight samples each."""
    shard_images(make_source(root), root / "images", ShardSettings(PER_SHARD), progress=False)
    return root / "images"


def make_tokens(root: Path) -> Path:
    """The same as tokens."""
    settings = EncodeSettings(samples_per_shard=PER_SHARD, workers=0)
    encode_shards(make_shards(root), FlatTokenizer(), root / "tokens", settings, progress=False)
    return root / "tokens"


def checked(damage: str, folder: Path, deep: bool = False) -> Row:
    """What `data check` says of a damaged folder."""
    try:
        report: Report = check_folder(folder, deep, progress=False)
    except UserError as err:
        return Row(damage, ("error",), _short(err, folder.parent), SAMPLES, SAMPLES)
    said = "; ".join(f"{problem.shard}: {problem.text}" for problem in report.problems)
    return Row(damage, tuple(p.kind for p in report.problems), said, report.recorded - report.whole, report.recorded)


def _short(err: UserError, root: Path) -> str:
    return str(err).replace(f"{root}/", "")


def second(folder: Path) -> Path:
    """The shard that is damaged."""
    return folder / "shard-000001.tar"


# Shards that are damaged after they were made


def truncations(root: Path) -> Iterator[Row]:
    """A tar cut at random places; what must be lost is known from the places of its samples."""
    folder = make_shards(root)
    whole = second(folder).read_bytes()
    offsets = scan_tar(second(folder))
    ends = (offsets.starts + offsets.sizes).max(axis=1)
    for cut in sorted(np.random.RandomState(1).choice(len(whole), OFFSETS, replace=False).tolist()):
        second(folder).write_bytes(whole[:cut])
        row = checked(f"tar cut after {cut:,} of {len(whole):,} bytes", folder)
        expected = int((ends > cut).sum())
        if row.lost != expected:
            raise AssertionError(f"cut at {cut}: {row.lost} lost, {expected} expected")
        yield row
    second(folder).write_bytes(whole)


def garbage_header(root: Path) -> Row:
    """512 bytes of garbage where a header should be: `tarfile` takes it for the end."""
    folder = make_shards(root)
    at = int(scan_tar(second(folder)).starts[3].min()) - 512
    _overwrite(second(folder), at, b"\xff" * 512)
    return checked("garbage instead of the header of sample 3 of 8", folder)


def changed_bytes(root: Path) -> Row:
    """A few bytes of an image are others."""
    folder = make_shards(root)
    offsets = scan_tar(second(folder))
    column = offsets.fields.index("png")
    _overwrite(second(folder), int(offsets.starts[2, column]) + 60, b"\0" * 40)
    return checked("40 bytes inside an image overwritten, looked at with --deep", folder, deep=True)


def wrong_checksum(root: Path) -> Row:
    """The index says another checksum."""
    folder = make_shards(root)
    _edit_index(folder, lambda shards: shards[1].update(sha256="0" * 64))
    return checked("wrong checksum in the index", folder)


def missing_shard(root: Path) -> Row:
    """A tar is gone."""
    folder = make_shards(root)
    second(folder).unlink()
    return checked("a shard is missing", folder)


def shard_twice_in_index(root: Path) -> Row:
    """The index names a tar two times."""
    folder = make_shards(root)
    _edit_index(folder, lambda shards: shards.append(shards[1]))
    return checked("a shard stands in the index twice", folder)


def shard_copied(root: Path) -> Row:
    """A tar lies there under a second name."""
    folder = make_shards(root)
    shutil.copy(second(folder), folder / "shard-000009.tar")
    return checked("a copy of a shard under another name", folder)


def copy_in_index(root: Path) -> Row:
    """A tar lies there under a second name, which the index knows."""
    folder = make_shards(root)
    shutil.copy(second(folder), folder / "shard-000009.tar")
    shutil.copy(folder / "shard-000001.offsets.npz", folder / "shard-000009.offsets.npz")
    _edit_index(folder, lambda shards: shards.append(shards[1] | {"name": "shard-000009.tar"}))
    return checked("a copy of a shard under another name, also in the index", folder)


def empty_shard(root: Path) -> Row:
    """A tar without a file in it."""
    folder = make_shards(root)
    second(folder).write_bytes(bytes(10240))
    return checked("a shard without samples in its place", folder)


def zero_bytes(root: Path) -> Row:
    """A file of no bytes."""
    folder = make_shards(root)
    second(folder).write_bytes(b"")
    return checked("a shard of zero bytes", folder)


def stale_offsets(root: Path) -> Row:
    """The offsets are those of another tar."""
    folder = make_shards(root)
    shutil.copy(folder / "shard-000000.offsets.npz", folder / "shard-000001.offsets.npz")
    return checked("offsets of another shard", folder)


def token_out_of_range(root: Path) -> Row:
    """An index that says a smaller codebook than the tokens are from."""
    folder = make_tokens(root)
    tree = json.loads((folder / "index.json").read_text())
    tree["tokens"]["codebook_size"] = 130
    (folder / "index.json").write_text(json.dumps(tree))
    return checked("a codebook smaller than some tokens, looked at with --deep", folder, deep=True)


def other_tokenizer(root: Path) -> Row:
    """The index names another tokenizer than the tars themselves."""
    folder = make_tokens(root)
    tree = json.loads((folder / "index.json").read_text())
    tree["tokens"]["fingerprint"] = "other"
    (folder / "index.json").write_text(json.dumps(tree))
    return checked("token shards put under the index of another tokenizer", folder)


def index_cut(root: Path) -> Row:
    """Half an index."""
    folder = make_shards(root)
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[: len(text) // 2])
    return checked("an index that is cut off", folder)


def _overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def _edit_index(folder: Path, edit: Callable[[list[dict]], object]) -> None:
    index = read_index(folder)
    shards = [shard.model_dump() for shard in index.shards]
    edit(shards)
    samples = sum(shard["samples"] for shard in shards)
    tree = index.model_dump() | {"shards": shards, "samples": samples}
    write_index(folder, type(index).model_validate(tree))


# Damage while shards are made


def bad_images(root: Path) -> Row:
    """Three files of the source are no images, or not whole."""
    src = make_source(root)
    (src / "a" / "text.png").write_text("no image")
    (src / "a" / "empty.png").write_bytes(b"")
    half = io.BytesIO()
    Image.new("RGB", (300, 300)).save(half, format="JPEG")
    (src / "b" / "half.jpg").write_bytes(half.getvalue()[:400])
    index = shard_images(src, root / "images", ShardSettings(PER_SHARD), progress=False)[""]
    said = "; ".join(f"{image.source}: {image.reason}" for image in sorted(index.skipped, key=lambda s: s.source))
    problems = check_folder(root / "images", deep=True, progress=False).problems
    kinds = ("skipped",) * len(index.skipped) + tuple(problem.kind for problem in problems)
    return Row("three bad files among the images to shard", kinds, said, len(index.skipped), SAMPLES + 3)


def source_truncations(root: Path) -> Iterator[Row]:
    """A tar to shard from is cut: `stop` names it, `skip` goes on with what is whole and lists the rest."""
    shards = make_shards(root)
    source = root / "tars"
    source.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, source)
    whole = second(source).read_bytes()
    offsets = scan_tar(second(source))
    ends = (offsets.starts + offsets.sizes).max(axis=1)
    for number, cut in enumerate(sorted(np.random.RandomState(2).choice(len(whole), OFFSETS, replace=False).tolist())):
        second(source).write_bytes(whole[:cut])
        damage = f"source tar cut after {cut:,} of {len(whole):,} bytes"
        try:
            shard_images(source, root / f"stop{number}", ShardSettings(PER_SHARD), progress=False)
        except UserError as err:
            stopped = "shard-000001.tar" in str(err)
        else:
            stopped = False
        settings = ShardSettings(PER_SHARD, damaged_tars="skip")
        index = shard_images(source, root / f"skip{number}", settings, progress=False)[""]
        lost = SAMPLES - index.samples
        if lost != int((ends > cut).sum()) or (lost and not stopped):
            raise AssertionError(f"cut at {cut}: {lost} lost, stopped: {stopped}")
        named = [image for image in index.skipped if "shard-000001.tar" in image.source]
        said = "; ".join(f"{Path(image.source).name}: {image.reason}" for image in named)
        said = said or "nothing: only the zeros behind the end marker are gone"
        yield Row(damage, ("skipped",) * len(named), said.replace(f"{root}/", ""), lost, SAMPLES)


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int, file_bytes: int) -> Iterator[Callable[[], object]]:
    """`place` as a disk of so many kilobytes, where this process may mount one; gives a function that makes room.

    Elsewhere no file may grow beyond `file_bytes`, which a writer cannot tell from a full disk.
    """
    place.mkdir()
    if _mount(place, f"size={kilobytes}k"):
        try:
            yield lambda: _mount(place, "remount,size=64m")
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _mount(place: Path, options: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def _stopped(
    damage: str, out: Path, make_room: Callable[[], object], run: Callable[[Path], object], undisturbed: Path
) -> Row:
    """A command that is stopped by its disk: nothing under OUT, no half shard, and the same bytes when it goes on."""
    stopped = ""
    try:
        run(out)
    except UserError as err:
        stopped = str(err)
    partial = partial_folder(out)
    found = list(partial.glob(".state/*.json"))
    halves = sorted(path.name for path in partial.glob(".shard*"))
    if not stopped or out.exists() or halves:
        raise AssertionError(f"{damage}: error {stopped!r}, {out} {out.exists()}, {halves}")
    make_room()
    run(out)
    lost = 0 if content(out) == content(undisturbed) else SAMPLES
    said = (
        f"{stopped.replace(f'{out.parent}/', '')}. {len(found)} finished shards stayed, nothing half-written; with "
        "room, the same command ended with the same bytes"
    )
    return Row(damage, ("error",), said, lost, SAMPLES)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_while_sharding(root: Path) -> Row:
    """A disk with room for a few of six shards."""
    src, settings = make_source(root, large=7), ShardSettings(4)

    def run(out: Path) -> None:
        shard_images(src, out, settings, progress=False)

    run(root / "undisturbed")
    with small_disk(root / "disk", 100, 40_000) as make_room:
        return _stopped("disk full while sharding", root / "disk" / "images", make_room, run, root / "undisturbed")


def full_while_encoding(root: Path) -> Row:
    """A disk with room for a few of six shards of tokens."""
    images, settings = make_shards(root), EncodeSettings(samples_per_shard=4, workers=0)

    def run(out: Path) -> None:
        encode_shards(images, FlatTokenizer(), out, settings, progress=False)

    run(root / "undisturbed")
    with small_disk(root / "disk", 80, 8000) as make_room:
        return _stopped("disk full while encoding", root / "disk" / "tokens", make_room, run, root / "undisturbed")


def read_only(root: Path) -> Row:
    """A folder that may only be read: by its file system where this process may mount one, else by its permissions."""
    src, place = make_source(root), root / "place"
    place.mkdir()
    mounted = _mount(place, "ro")
    if not mounted:
        place.chmod(0o500)
    said = ""
    try:
        shard_images(src, place / "images", ShardSettings(PER_SHARD), progress=False)
    except UserError as err:
        said = str(err).replace(f"{root}/", "")
    left = list(place.iterdir())
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
    if not said or left:
        raise AssertionError(f"written to a read-only folder: {left}")
    return Row("read-only folder", ("error",), said, 0, SAMPLES)


def killed(root: Path) -> Row:
    """`data shard` in two processes gets SIGKILL in the middle, and is started again."""
    src = make_source(root)
    noise = np.random.RandomState(3)
    for number in range(600):  # enough to be in the middle
        path = src / "a" / f"more{number:03d}.png"
        Image.fromarray(noise.randint(0, 256, (128, 128, 3), dtype=np.uint8)).save(path)
    shard_images(src, root / "undisturbed", ShardSettings(8), progress=False)
    out = root / "images"
    command = [sys.executable, "-m", "hmar_mega", "data", "shard", str(src), str(out)]
    command += ["--samples-per-shard", "8", "--workers", "2"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and len(list(partial_folder(out).glob("*.tar"))) < 5:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    found = len(list(partial_folder(out).glob("*.tar")))
    if out.exists() or not found:
        raise AssertionError("the kill came too late, or too early")
    before = {path.name: path.stat().st_mtime_ns for path in partial_folder(out).glob("*.tar")}
    shard_images(src, out, ShardSettings(8), progress=False)
    kept = sum((out / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    same = content(out) == content(root / "undisturbed")
    said = f"{found} of 78 tars were there, {kept} stayed as they were; the same command then ended with the same bytes"
    return Row("SIGKILL while sharding in two processes", ("killed",), said, 0 if same else 624, 624)


#: In the order of the table; those that give many rows are generators.
SCENARIOS: tuple[Callable[[Path], Row], ...] = (
    garbage_header,
    changed_bytes,
    wrong_checksum,
    missing_shard,
    shard_twice_in_index,
    shard_copied,
    copy_in_index,
    empty_shard,
    zero_bytes,
    stale_offsets,
    token_out_of_range,
    other_tokenizer,
    index_cut,
    bad_images,
    full_while_sharding,
    full_while_encoding,
    read_only,
)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| damage | told | what was said | samples lost |", "|---|---|---|---|"]
    for row in rows:
        kinds = ", ".join(dict.fromkeys(row.kinds)) or "nothing"
        lines.append(f"| {row.damage} | {kinds} | {row.said.replace('|', '/')} | {row.lost} of {row.of} |")
    return "\n".join(lines)


HEAD = """# What damage does to shards, and to making them

Written by `python benchmarks/data_damage.py --markdown benchmarks/results/data_damage.md`. The sets have 24 samples in
shards of 8. "Told" are the kinds of problems that `hmar-mega data check` reports (exit status 1), that an index lists
(`skipped`), or that a command ends with (`error`, exit status 2). Lost samples are always counted and their shard or
file named; where a place is cut off, that the number is the right one is computed from the places of the samples.
"""


def main() -> None:
    """Run all scenarios and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="file to write")
    args = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def fresh() -> Path:
            return Path(tempfile.mkdtemp(dir=root))

        rows = [scenario(fresh()) for scenario in SCENARIOS]
        rows.append(killed(fresh()))
        sections.append(table(rows))
        sections.append("## A shard cut at 20 random places\n\n" + table(list(truncations(fresh()))))
        sections.append(
            "## A source tar cut at 20 random places\n\n`--damaged-tars stop` (the default) ended each time with an "
            "error that names the tar; with `skip`:\n\n" + table(list(source_truncations(fresh())))
        )
    text = HEAD + "\n" + "\n\n".join(sections) + "\n"
    if args.markdown is not None:
        args.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
