"""Every kind of image collection that can be sharded: which images it has, under which labels, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmar_mega.data.index import read_index
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.shard import ShardSettings, shard_images
from hmar_mega.data.sources.base import SourceOptions, read_class_file
from hmar_mega.data.sources.detect import detect, read_source
from hmar_mega.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02000000")


def picture(value: int) -> bytes:
    """A PNG whose red tells which one it is."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def tar_bytes(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def made(src: Path | str, out: Path, **settings: object) -> dict[str, list[tuple[int, str]]]:
    """Red and class of every image, by part, after sharding."""
    indexes = shard_images(src, out, ShardSettings(**settings), progress=False)
    found = {}
    for part, index in indexes.items():
        reader = ShardReader(out / part, "images")
        samples = [reader.read_image(number) for number in range(len(reader))]
        found[part] = sorted(
            (Image.open(io.BytesIO(s.data)).getpixel((0, 0))[0], index.classes[s.label]) for s in samples
        )
    return found


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Folders


def test_train_and_val_folders_become_parts_with_the_same_classes(tmp_path):
    for part, name, value in (("train", "ant", 1), ("train", "bee", 2), ("val", "bee", 3)):
        write(tmp_path / "src" / part / name / "0.png", picture(value))
    assert made(tmp_path / "src", tmp_path / "out") == {"train": [(1, "ant"), (2, "bee")], "val": [(3, "bee")]}
    assert read_index(tmp_path / "out" / "val").classes == ("ant", "bee")


def test_classes_can_be_given_in_another_order(tmp_path):
    write(tmp_path / "src" / "ant" / "0.png", picture(1))
    write(tmp_path / "classes.txt", "wasp\nant\n")
    assert made(tmp_path / "src", tmp_path / "out", classes=tmp_path / "classes.txt") == {"": [(1, "ant")]}
    assert read_index(tmp_path / "out").classes == ("wasp", "ant")
    write(tmp_path / "src" / "fly" / "0.png", picture(2))
    with pytest.raises(UserError, match="folder fly is none of the 2 classes"):
        made(tmp_path / "src", tmp_path / "out2", classes=tmp_path / "classes.txt")


def test_files_that_are_no_images_are_told(tmp_path, caplog):
    write(tmp_path / "src" / "a" / "0.png", picture(1))
    write(tmp_path / "src" / "a" / "notes.txt", "x")
    made(tmp_path / "src", tmp_path / "out")
    assert "not taken for images: 1 × .txt" in caplog.text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n", ("cat", "dog")),
        ('["cat", "dog"]', ("cat", "dog")),
        ('{"0": ["n1", "cat"], "1": ["n2", "dog"]}', ("n1", "n2")),
        ('{"dog": 1, "cat": 0}', ("cat", "dog")),
    ],
)
def test_class_files(tmp_path, text, names):
    assert read_class_file(write(tmp_path / "c", text)) == names


@pytest.mark.parametrize("text", ["", "cat\ncat\n", '{"cat": 5}', "[1", "cat\n\ndog"])
def test_class_files_that_are_none(tmp_path, text):
    with pytest.raises(UserError, match=r"c (has no class|: )|class names from"):
        read_class_file(write(tmp_path / "c", text))


# Tables


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path,label\na/1.png,bee\na/2.png,ant\n", "t.csv"),
        ("number,LABEL,File\n7,bee,a/1.png\n8,ant,a/2.png\n", "t.csv"),
        ("a/1.png,bee\na/2.png,ant\n", "t.csv"),
        ("a/1.png\tbee\na/2.png\tant\n", "t.tsv"),
    ],
)
def test_tables_of_paths_and_labels(tmp_path, text, name):
    for number in (1, 2):
        write(tmp_path / "a" / f"{number}.png", picture(number))
    table = write(tmp_path / name, text)
    assert made(table, tmp_path / "out") == {"": [(1, "bee"), (2, "ant")]}


def test_numbers_in_a_table_are_labels_and_columns_can_be_named(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"{number}.png", picture(number))
    table = write(tmp_path / "t.csv", "thumb,url,kind\n1.png,x,0\n2.png,y,3\n")
    assert made(table, tmp_path / "out", image_column="thumb", label_column="kind") == {"": [(1, "0"), (2, "3")]}
    assert read_index(tmp_path / "out").classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,label\n", "no rows"),
        ("path,label\na.png\n", "row 2 has 1 columns"),
        ("path,other\na.png,1\n", "--image-column and --label-column"),
        ("path,label\nnowhere.png,1\n", "nowhere.png cannot be read"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        made(write(tmp_path / "t.csv", text), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


# ImageNet


def devkit() -> dict[str, bytes]:
    """Three classes whose numbers in the kit are in another order than their WordNet ids, and one inner node."""
    from scipy.io import savemat

    rows = [(2, WNIDS[0], "tench", 0), (3, WNIDS[1], "goldfish", 0), (1, WNIDS[2], "shark", 0), (4, "n03", "fish", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array(rows, dtype=kinds)[:, None]
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    data = "ILSVRC2012_devkit_t12/data"
    return {f"{data}/meta.mat": file.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n"}


def imagenet(root: Path) -> Path:
    train = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{n}.JPEG": picture(10 * label + n) for n in range(2)})
        for label, wnid in reversed(list(enumerate(WNIDS)))
    }
    write(root / "ILSVRC2012_img_train.tar", tar_bytes(train))
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": picture(100 + number) for number in (3, 1, 2)}
    write(root / "ILSVRC2012_img_val.tar", tar_bytes(val))
    write(root / "ILSVRC2012_devkit_t12.tar.gz", tar_bytes(devkit(), "w:gz"))
    return root


TRAIN = [(10 * label + n, wnid) for label, wnid in enumerate(WNIDS) for n in range(2)]
VAL = [(101, WNIDS[1]), (102, WNIDS[2]), (103, WNIDS[0])]


def test_imagenet_tars_with_the_development_kit(tmp_path):
    src = imagenet(tmp_path / "src")
    assert made(src, tmp_path / "out") == {"train": TRAIN, "val": VAL}
    names = json.loads((tmp_path / "out" / "val" / "classes.json").read_text())
    assert names["2"] == [WNIDS[2], "shark"]
    assert made(src / "ILSVRC2012_img_train.tar", tmp_path / "train") == {"train": TRAIN}
    assert made(src / "ILSVRC2012_img_val.tar", tmp_path / "val") == {"val": VAL}


def test_unpacked_imagenet(tmp_path):
    src = imagenet(tmp_path / "src")
    with tarfile.open(src / "ILSVRC2012_img_train.tar") as archive:
        archive.extractall(src / "train", filter="data")
    with tarfile.open(src / "ILSVRC2012_img_val.tar") as archive:
        archive.extractall(src / "val", filter="data")
    with tarfile.open(src / "ILSVRC2012_devkit_t12.tar.gz") as archive:
        archive.extractall(src, filter="data")
    for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz"):
        (src / f"ILSVRC2012_{name}").unlink()
    assert made(src, tmp_path / "out") == {"train": TRAIN, "val": VAL}


def test_imagenet_validation_without_its_labels_is_refused(tmp_path):
    src = imagenet(tmp_path / "src")
    (src / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes({"x": b""}, "w:gz"))
    with pytest.raises(UserError, match=r"lacks .*meta.mat"):
        made(src, tmp_path / "out")
    (src / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(UserError, match=r"labels of the validation images are in ILSVRC2012_devkit_t12.tar.gz"):
        made(src, tmp_path / "out")
    assert made(src / "ILSVRC2012_img_train.tar", tmp_path / "out") == {"train": TRAIN}


# WebDataset tars


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two tars: labels in cls, and in json; a sample without a label."""
    first = {"0.png": picture(1), "0.cls": b"1", "1.png": picture(2), "1.cls": b"0\n"}
    second = {
        "d/2.x.png": picture(9),
        "d/3.json": b'{"label": 1, "kind": 2}',
        "d/3.png": picture(3),
        "d/4.png": picture(4),
    }
    write(tmp_path / "tars" / "s-000.tar", tar_bytes(first))
    write(tmp_path / "tars" / "s-001.tar", tar_bytes(second))
    return tmp_path / "tars"


FOUND = [(1, "1"), (2, "0"), (3, "1")]


def test_tars_in_a_folder_by_braces_and_from_a_command_are_the_same(tars, tmp_path):
    for number, src in enumerate((tars, f"{tars}/s-{{000..001}}.tar", f"pipe:cat {tars}/s-{{000..001}}.tar")):
        out = tmp_path / f"out{number}"
        assert made(src, out) == {"": FOUND}
        index = read_index(out)
        assert [(image.source.split(": ")[-1], image.reason) for image in index.skipped] == [
            ("d/2", "no image"),
            ("d/4", "no label in png"),
        ]
        assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []


def test_another_field_of_json_can_be_the_label(tars, tmp_path):
    assert made(tars / "s-001.tar", tmp_path / "out", label_column="kind") == {"": [(3, "2")]}


def test_own_shards_keep_their_classes(tmp_path):
    write(tmp_path / "src" / "bee" / "0.png", picture(1))
    write(tmp_path / "src" / "ant" / "0.png", picture(2))
    shard_images(tmp_path / "src", tmp_path / "once", progress=False)
    assert made(tmp_path / "once", tmp_path / "again", samples_per_shard=1) == {"": [(1, "bee"), (2, "ant")]}


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ("pipe:echo no >&2; exit 3", "failed with exit status 3: no"),
        ("pipe:false | cat", "failed with exit status 1"),
        ("{root}/s-{000..1", "unbalanced|Unbalanced|write shard"),
        ("{root}/none.tar", "none.tar cannot be read"),
        ("{root}/s-000.tar.gz", "give 'pipe:gunzip -c"),
    ],
)
def test_tars_that_cannot_be_had(tars, tmp_path, src, message):
    with pytest.raises(UserError, match=message):
        made(src.replace("{root}", str(tars)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "no end", "header"])
def test_a_tar_that_lost_its_tail_stops_or_is_counted(tars, tmp_path, damage):
    path = tars / "s-000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        label = archive.getmember("1.cls")
    changed = {
        "cut": whole[: label.offset_data],
        "no end": whole[: label.offset],
        "header": whole[: label.offset] + b"\xff" * 512 + whole[label.offset + 512 :],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"s-000.tar is damaged after 3 files: .*--damaged-tars skip"):
        made(path, tmp_path / "out")
    assert made(path, tmp_path / "out", damaged_tars="skip") == {"": [(1, "1")]}
    assert [image.reason.split(":")[0] for image in read_index(tmp_path / "out").skipped] == [
        "damaged after 3 files",
        "no label in png",
    ]


# Hugging Face data sets


def write_arrow(path: Path, values: list[int | None], names: list[str] | None, kind: str = "stream") -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    images = [None if value is None else {"bytes": picture(value), "path": None} for value in values]
    table = pa.table(
        {
            "label": pa.array([(value or 0) % 2 for value in values], pa.int64()),
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        }
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return
    options = pa.ipc.IpcWriteOptions(compression="lz4" if kind == "compressed" else None)
    opener = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, opener(file, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)


@pytest.mark.parametrize("kind", ["stream", "file", "compressed", "parquet"])
def test_arrow_and_parquet_files(tmp_path, kind):
    name = "data/train-00000-of-00001.parquet" if kind == "parquet" else "data-00000-of-00001.arrow"
    write_arrow(tmp_path / "src" / name, [1, 2, 3, None, 5], ["even", "odd"], kind)
    part = "train" if kind == "parquet" else ""
    found = made(tmp_path / "src", tmp_path / "out")
    assert found == {part: [(1, "odd"), (2, "even"), (3, "odd"), (5, "odd")]}
    assert [image.reason for image in read_index(tmp_path / "out" / part).skipped] == ["no image in this row"]
    assert not (tmp_path / "out" / "spool").exists()


def test_a_saved_dataset_dict_has_parts_and_names(tmp_path):
    src = tmp_path / "src"
    write_arrow(src / "train" / "data-00000-of-00001.arrow", [1, 2], ["even", "odd"])
    write_arrow(src / "validation" / "data-00000-of-00001.arrow", [4], ["even", "odd"])
    write(src / "dataset_dict.json", '{"splits": ["train", "validation"]}')
    assert made(src, tmp_path / "out") == {"train": [(1, "odd"), (2, "even")], "val": [(4, "even")]}


def test_columns_that_are_not_there_are_named(tmp_path):
    write_arrow(tmp_path / "src" / "a.arrow", [1], None)
    with pytest.raises(UserError, match=r"which column has the images\? It has label, image; give --image-column"):
        made(tmp_path / "src", tmp_path / "out", image_column="photo")


def test_without_pyarrow_its_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path / "src" / "a.arrow", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'hmar-mega\[arrow\]'"):
        made(tmp_path / "src", tmp_path / "out")


# Which is which


def test_kinds_are_told_apart(tmp_path):
    write(tmp_path / "n" / "n01440764.tar", b"")
    write(tmp_path / "w" / "x.tar", b"")
    write(tmp_path / "a" / "state.json", "{}")
    kinds = {"n": "imagenet", "w": "webdataset", "a": "arrow", "t.csv": "csv", "p.parquet": "folder", "none": "folder"}
    assert {name: detect(str(tmp_path / name)) for name in kinds} == kinds
    assert detect("pipe:cat x") == "webdataset"


def test_looking_only_does_not_copy(tmp_path, tars):
    options = SourceOptions(spool=tmp_path / "spool", look_only=True)
    with pytest.raises(UserError, match="--dry-run does not do"):
        read_source(f"pipe:cat {tars}/s-000.tar", None, options)
    assert not (tmp_path / "spool").exists()
