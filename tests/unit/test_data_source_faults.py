"""Faults of image collections that once went by unseen: copies of another, labels that are none, parts named twice."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest

from hmar_mega.data.sources.base import Source, SourceOptions, label_text
from hmar_mega.data.sources.detect import read_source
from hmar_mega.errors import UserError


def tar(path: Path, name: str, label: str = "0", field: str = "cls") -> bytes:
    """A tar of two samples, with the image `name`; images are not looked into."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for sample in ("0", "1"):
            for suffix, data in (("png", name.encode()), (field, label.encode())):
                member = tarfile.TarInfo(f"{sample}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    path.write_bytes(file.getvalue())
    return file.getvalue()


def read(src: Path | str, tmp_path: Path, **options: object) -> Source:
    return read_source(str(src), None, SourceOptions(spool=tmp_path / "spool", **options))


def contents(source: Source) -> list[bytes]:
    found = []
    for item in source.parts[""]:
        found.append(Path(item.path).read_bytes()[item.start : item.start + item.size])
    return found


def labels(source: Source) -> list[str]:
    return [source.classes[item.label] for items in source.parts.values() for item in items]


# Copies


def test_a_copy_is_taken_for_the_same_command_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tar(tmp_path / "a.tar", "a")
    tar(tmp_path / "b.tar", "b")
    assert contents(read(f"pipe:cat {tmp_path}/a.tar", tmp_path)) == [b"a", b"a"]
    assert "printed before" not in caplog.text
    assert contents(read(f"pipe:cat {tmp_path}/b.tar", tmp_path)) == [b"b", b"b"]
    (tmp_path / "a.tar").unlink()
    assert contents(read(f"pipe:cat {tmp_path}/a.tar", tmp_path)) == [b"a", b"a"]
    assert "printed before" in caplog.text


def test_a_damaged_copy_is_made_anew(tmp_path):
    whole = tar(tmp_path / "a.tar", "a")
    os.truncate(tmp_path / "a.tar", 1600)
    with pytest.raises(UserError, match="is damaged after"):
        read(f"pipe:cat {tmp_path}/a.tar", tmp_path)
    (tmp_path / "a.tar").write_bytes(whole)
    assert contents(read(f"pipe:cat {tmp_path}/a.tar", tmp_path)) == [b"a", b"a"]


def test_tables_of_one_name_and_a_table_that_changes_have_copies_of_their_own(tmp_path):
    for folder, value in (("x", 1), ("y", 2)):
        parquet(tmp_path / folder / "data" / "a.parquet", [value, value])
        assert labels(read(tmp_path / folder, tmp_path)) == [str(value)] * 2
    parquet(tmp_path / "x" / "data" / "a.parquet", [3, 0])
    assert labels(read(tmp_path / "x", tmp_path)) == ["3", "0"]
    assert labels(read(tmp_path / "x", tmp_path, label_column="other")) == ["cat", "cat"]


# Labels


def parquet(path: Path, values: list[object], names: list[str] | None = None, arrow: bool = False) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"label": values, "image": [b"x"] * len(values), "other": ["cat"] * len(values)})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrow:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((3, "3"), (3.0, "3"), (-0.0, "0"), (1.5, None), (float("nan"), None), (float("inf"), None)),
        *((None, None), ("", None), ("cat", "cat"), ("1.0", "1.0"), (True, "True")),
    ],
)
def test_what_is_a_label(value, text):
    assert label_text(value) == text


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("values", [[1, 10, None, 2], [1.0, 10.0, None, 2.0], [1.0, 10.0, 0.5, 2.0]])
def test_rows_without_a_label_are_lost_and_whole_floats_are_whole_numbers(tmp_path, values, arrow):
    source = read(parquet(tmp_path / ("a.arrow" if arrow else "a.parquet"), values, arrow=arrow), tmp_path)
    assert labels(source) == ["1", "10", "2"]
    assert source.classes == tuple(map(str, range(11)))
    assert [name.split(":")[-1] for name, _ in source.lost] == ["2"]
    assert source.lost[0][1] == "no label in label: a name, or a whole number"


def test_rows_without_a_label_among_named_classes(tmp_path):
    source = read(parquet(tmp_path / "a.parquet", [1, None, 0], ["ant", "bee"]), tmp_path)
    assert (labels(source), len(source.lost)) == (["bee", "ant"], 1)
    with pytest.raises(UserError, match="labels outside 0 … 1, its classes, such as 2"):
        read(parquet(tmp_path / "b.parquet", [1, 2], ["ant", "bee"]), tmp_path)
    with pytest.raises(UserError, match=r"not the number of a class: .*'cat'"):
        read(parquet(tmp_path / "c.parquet", ["cat"], ["ant", "bee"]), tmp_path)
    with pytest.raises(UserError, match=r"no images with a label in .*; the first row: no label in label"):
        read(parquet(tmp_path / "d.parquet", [0.5]), tmp_path)


@pytest.mark.parametrize(("label", "found"), [("3.0", ["3", "3"]), ("null", None), ("0.5", None)])
def test_labels_in_json(tmp_path, label, found):
    tar(tmp_path / "a.tar", "a", f'{{"label": {label}}}', "json")
    if found is None:
        with pytest.raises(UserError, match="no samples with an image"):
            read(tmp_path / "a.tar", tmp_path)
    else:
        assert labels(read(tmp_path / "a.tar", tmp_path)) == found


def test_empty_cells_of_a_table_are_no_class(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\n1.png,bee\n2.png,\n")
    source = read(tmp_path / "t.csv", tmp_path)
    assert (source.classes, source.lost) == (("bee",), (("2.png", "no label in this row"),))


# Parts


def test_val_beside_validation_is_refused(tmp_path):
    for split in ("val", "validation"):
        (tmp_path / "folders" / split / "ant").mkdir(parents=True)
        (tmp_path / "folders" / split / "ant" / "0.png").touch()
        parquet(tmp_path / "tables" / f"{split}-00000-of-00001.parquet", [0])
    for name in ("folders", "tables"):
        with pytest.raises(UserError, match="both val and validation, which mean the same part"):
            read(tmp_path / name, tmp_path)
