"""ImageNet (ILSVRC2012) as it is handed out: tars of training and validation images, and the development kit.

    ILSVRC2012_img_train.tar            a tar a class in it, n01440764.tar …, or unpacked: these, or folders
    ILSVRC2012_img_val.tar              flat, ILSVRC2012_val_00000001.JPEG …, or unpacked into val/
    ILSVRC2012_devkit_t12.tar.gz        or unpacked: data/ILSVRC2012_validation_ground_truth.txt and data/meta.mat

Label i is the i-th of the 1000 WordNet ids in sorted order, as everywhere; the kit's own numbers (ILSVRC2012_ID), which
the ground truth is written in, are another order, and meta.mat leads from one to the other.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from hmar_mega.data.sources.base import Item, Source, SourceOptions
from hmar_mega.data.sources.folder import class_items
from hmar_mega.data.sources.tars import list_tar, list_tar_of_tars
from hmar_mega.errors import UserError

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG$", re.IGNORECASE)


def is_imagenet(src: Path) -> bool:
    """Whether a path looks like something of ILSVRC2012."""
    if src.is_file():
        return src.name in (TRAIN_TAR, VAL_TAR)
    names = [entry.name for entry in src.iterdir()] if src.is_dir() else []
    known = any(name in (TRAIN_TAR, VAL_TAR) or name.startswith(DEVKIT) for name in names)
    return known or any(WNID.fullmatch(name.removesuffix(".tar")) and name.endswith(".tar") for name in names)


def read_imagenet(src: Path, options: SourceOptions) -> Source:
    """Training and validation images, as the parts `train` and `val`; what is not there is left out."""
    root = src.parent if src.is_file() else src
    lost: list[tuple[str, str]] = []
    wants_train = src.name != VAL_TAR
    train = _train(root, options, lost) if wants_train else None
    val = _val_files(root, options, lost) if src.name != TRAIN_TAR else None
    kit = _devkit(root)
    if train is None and val is None:
        raise UserError(f"{src} has neither {TRAIN_TAR} nor {VAL_TAR}, nor train/ or val/; put one of them there")
    if val is not None and kit is None:
        raise UserError(
            f"labels of the validation images are in {DEVKIT}.tar.gz, which is not in {root}; put it there"
            + (f", or give {TRAIN_TAR} alone as the source" if train is not None else "")
        )
    wnids = (
        sorted({wnid for wnid, _ in train}) if kit is None and train is not None else sorted(kit.words if kit else {})
    )
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    strange = sorted({wnid for wnid, _ in train or []} - set(numbers))
    if strange:
        raise UserError(f"{root}: {strange[0]} is none of the {len(wnids)} classes of the development kit")
    parts = {}
    if train is not None:
        parts["train"] = [item._replace(label=numbers[wnid]) for wnid, item in train]
    if val is not None and kit is not None:
        parts["val"] = [item._replace(label=numbers[kit.label_of(item)]) for item in val]
    names = tuple(kit.words[wnid] for wnid in wnids) if kit else ()
    return Source("ImageNet (ILSVRC2012)", tuple(wnids), parts, names, tuple(lost))


def _train(root: Path, options: SourceOptions, lost: list[tuple[str, str]]) -> list[tuple[str, Item]] | None:
    """(WordNet id, image) of the training images, sorted by name; None when there are none."""
    if (root / TRAIN_TAR).is_file():
        found = list_tar_of_tars(root / TRAIN_TAR, options, lost)
        return [(Path(inner).stem, item) for inner, item in found]
    folder = root / "train" if (root / "train").is_dir() else root
    tars = sorted(path for path in folder.glob("n*.tar") if WNID.fullmatch(path.stem))
    if tars:
        return [(tar.stem, item) for tar in tars for item in list_tar(tar, options, lost, f"{tar.stem}/")]
    classes = sorted(path for path in folder.glob("n*") if path.is_dir() and WNID.fullmatch(path.name))
    ignored: Counter[str] = Counter()
    found_files = [(path.name, item) for path in classes for item in class_items(folder, path, 0, options, ignored)]
    return found_files or None


def _val_files(root: Path, options: SourceOptions, lost: list[tuple[str, str]]) -> list[Item] | None:
    if (root / VAL_TAR).is_file():
        return list_tar(root / VAL_TAR, options, lost, "")
    flat = [path for path in (root / "val").glob("*") if _VAL_NUMBER.search(path.name)]
    items = [Item(str(p), 0, p.stat().st_size if options.sizes else -1, p.name, 0) for p in sorted(flat)]
    return items or None


class _Devkit:
    """The development kit: `words` by WordNet id, of the 1000 classes."""

    def __init__(self, truth: bytes, meta: bytes, where: str) -> None:
        from scipy.io import loadmat  # slow to import

        try:
            synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
            leaves = [row for row in synsets if int(row["num_children"]) == 0]
            self._wnid_of_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
            self.words = {str(row["WNID"]): str(row["words"]) for row in leaves}
            self._ids = [int(line) for line in truth.split()]
            unknown = set(self._ids) - set(self._wnid_of_id)
            if unknown:
                raise ValueError(f"ground truth {min(unknown)} is no class of {_META}")
        except (ValueError, KeyError, TypeError, IndexError) as err:
            raise UserError(f"{where} is not the development kit of ILSVRC2012: {err}; get it anew") from None

    def label_of(self, item: Item) -> str:
        """The WordNet id of a validation image, from the number in its name."""
        match = _VAL_NUMBER.search(item.name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(self._ids):
            raise UserError(
                f"{item.name} is no validation image of ILSVRC2012, whose names end in 00000001.JPEG … "
                f"{len(self._ids):08d}.JPEG; take it away"
            )
        return self._wnid_of_id[self._ids[number - 1]]


def _devkit(root: Path) -> _Devkit | None:
    for folder in (root / DEVKIT / "data", root / "data", root):
        if (folder / _TRUTH).is_file() and (folder / _META).is_file():
            return _Devkit((folder / _TRUTH).read_bytes(), (folder / _META).read_bytes(), str(folder))
    packed = root / f"{DEVKIT}.tar.gz"
    if not packed.is_file():
        return None
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(packed) as archive:
            members: Any = (m for m in archive if Path(m.name).name in (_TRUTH, _META))
            for member in members:
                file = archive.extractfile(member)
                found[Path(member.name).name] = file.read() if file else b""
    except (OSError, tarfile.TarError, EOFError) as err:
        raise UserError(f"{packed} cannot be read: {err}; get it anew") from None
    if set(found) != {_TRUTH, _META}:
        raise UserError(f"{packed} lacks {' and '.join({_TRUTH, _META} - set(found))}; get it anew")
    return _Devkit(found[_TRUTH], found[_META], str(packed))
