"""Folders of shards: what is written, that it is reproducible, and that nothing half-written or damaged passes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hmar_mega.data.index import load_offsets, offsets_path, read_index, scan_tar
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError

CLASSES = ("ant", "bee")


def write_images(out: Path, count: int = 5, samples_per_shard: int = 2) -> Path:
    with open_shards(out, "images", CLASSES, samples_per_shard) as writer:
        for number in range(count):
            writer.write(f"{number:08d}", number % 2, {"png": b"image %d" % number, "json": b"{}"})
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_index_records_shards_samples_and_classes(tmp_path):
    index = read_index(write_images(tmp_path / "out"))
    assert (index.kind, index.samples, index.classes, index.tokens) == ("images", 5, CLASSES, None)
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        ("shard-000000.tar", 2),
        ("shard-000001.tar", 2),
        ("shard-000002.tar", 1),
    ]
    assert all(shard.bytes == (tmp_path / "out" / shard.name).stat().st_size for shard in index.shards)


def test_tar_is_a_webdataset_with_fixed_owner_and_time(tmp_path):
    with tarfile.open(write_images(tmp_path / "out") / "shard-000000.tar") as archive:
        members = archive.getmembers()
        assert archive.extractfile("00000001.cls").read() == b"1"
    assert [member.name for member in members[:3]] == ["00000000.cls", "00000000.json", "00000000.png"]
    assert {(member.mtime, member.uid, member.uname, member.gname) for member in members} == {(0, 0, "root", "root")}


def test_the_library_itself_reads_the_shards(tmp_path):
    import webdataset

    tar = write_images(tmp_path / "out") / "shard-000001.tar"
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [(sample["__key__"], sample["cls"], sample["png"]) for sample in samples] == [
        ("00000002", b"0", b"image 2"),
        ("00000003", b"1", b"image 3"),
    ]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    assert content(write_images(tmp_path / "a")) == content(write_images(tmp_path / "b"))


def test_offsets_point_at_the_bytes_of_every_field(tmp_path):
    folder = write_images(tmp_path / "out")
    entry = read_index(folder).shards[1]
    offsets = load_offsets(folder, entry)
    data = (folder / entry.name).read_bytes()
    column = offsets.fields.index("png")
    found = [
        data[start : start + size]
        for start, size in zip(offsets.starts[:, column], offsets.sizes[:, column], strict=True)
    ]
    assert found == [b"image 2", b"image 3"]
    assert offsets.labels.tolist() == [0, 1]
    assert offsets.keys.tolist() == [b"00000002", b"00000003"]


def test_error_in_the_middle_leaves_nothing_behind(tmp_path):
    def interrupted() -> None:
        with open_shards(tmp_path / "out", "images", CLASSES, 1) as writer:
            writer.write("0", 0, {"png": b"x"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_clear_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left"):
        write_images(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_writing_no_sample_is_an_error_that_tells_what_was_skipped(tmp_path):
    with (
        pytest.raises(UserError, match=r"1 were skipped, the first is a/b.png: not an image"),
        open_shards(tmp_path / "out", "images", CLASSES, 1) as writer,
    ):
        writer.skip("a/b.png", "not an image")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled_and_a_used_one_not(tmp_path):
    (tmp_path / "out").mkdir()
    write_images(tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="is not an empty folder"):
        write_images(tmp_path / "out", count=1)
    assert content(tmp_path / "out") == before


def test_output_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        write_images(tmp_path / "file" / "out")


def test_samples_per_shard_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="samples_per_shard=0"):
        write_images(tmp_path / "out", samples_per_shard=0)


@pytest.mark.parametrize(("key", "label"), [("a.b", 0), ("a", 2), ("a", -1)])
def test_keys_with_dots_and_unknown_labels_are_refused(tmp_path, key, label):
    with pytest.raises(ValueError, match="key="), open_shards(tmp_path / "out", "images", CLASSES, 1) as writer:
        writer.write(key, label, {"png": b""})


# Offsets that are missing or belong to another tar


def test_missing_offsets_are_rebuilt_byte_for_byte(tmp_path, caplog):
    folder = write_images(tmp_path / "out")
    before = content(folder)
    path = offsets_path(folder / "shard-000000.tar")
    path.unlink()
    load_offsets(folder, read_index(folder).shards[0])
    assert content(folder) == before
    assert "missing: rebuilding" in caplog.text


@pytest.mark.parametrize("damage", ["other tar's", "garbage", "cut off"])
def test_stale_or_damaged_offsets_are_rebuilt(tmp_path, caplog, damage):
    folder = write_images(tmp_path / "out")
    before = content(folder)
    path = offsets_path(folder / "shard-000000.tar")
    other = offsets_path(folder / "shard-000001.tar").read_bytes()
    path.write_bytes({"other tar's": other, "garbage": b"garbage", "cut off": path.read_bytes()[:-30]}[damage])
    assert load_offsets(folder, read_index(folder).shards[0]).keys.tolist() == [b"00000000", b"00000001"]
    assert content(folder) == before
    assert "rebuilding" in caplog.text


def test_offsets_of_a_read_only_folder_are_kept_in_memory(tmp_path, caplog, monkeypatch):
    folder = write_images(tmp_path / "out")
    offsets_path(folder / "shard-000000.tar").unlink()

    def refuse(*_args: object) -> None:
        raise UserError("Read-only file system")

    monkeypatch.setattr("hmar_mega.data.index.write_atomic", refuse)
    assert len(load_offsets(folder, read_index(folder).shards[0])) == 2
    assert "in memory only" in caplog.text


# Damaged tars


def damage_first_shard(folder: Path, change) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(change(path.read_bytes()))


def load_first(folder: Path) -> None:
    load_offsets(folder, read_index(folder).shards[0])


def test_truncated_tar_names_the_shard(tmp_path):
    folder = write_images(tmp_path / "out")
    damage_first_shard(folder, lambda data: data[:700])
    with pytest.raises(UserError, match=r"shard-000000\.tar is truncated: it has 700 bytes"):
        load_first(folder)


def test_missing_tar_names_the_shard(tmp_path):
    folder = write_images(tmp_path / "out")
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar cannot be read"):
        load_first(folder)


def test_garbage_header_which_hides_the_rest_of_a_tar_is_found_by_the_count(tmp_path):
    folder = write_images(tmp_path / "out")
    second_sample = 3 * 1024  # three members of a header and a block of content before it
    damage_first_shard(folder, lambda data: data[:second_sample] + b"\xff" * 512 + data[second_sample + 512 :])
    offsets_path(folder / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar is damaged: 1 samples can be read in it, 2 were written"):
        load_first(folder)


def test_other_content_of_the_same_size_is_found_when_offsets_are_rebuilt(tmp_path):
    folder = write_images(tmp_path / "out")
    damage_first_shard(folder, lambda data: data.replace(b"image 0", b"image 9"))
    offsets_path(folder / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="checksum"):
        load_first(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.cls", "b.png"], "sample b has no field cls"),
        (["a.cls", "a.cls"], "sample a has field cls twice"),
        (["a.cls", "d/b.c.cls"], "sample d/b has no field cls"),
    ],
)
def test_tar_whose_samples_are_not_whole(tmp_path, names, message):
    tar = tmp_path / "shard.tar"
    with tarfile.open(tar, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"0"))
    with pytest.raises(UserError, match=rf"shard\.tar.*{message}"):
        scan_tar(tar)


def test_label_that_is_no_number(tmp_path):
    folder = write_images(tmp_path / "out")
    damage_first_shard(folder, lambda data: data.replace(b"0" + bytes(511), b"x" + bytes(511), 1))
    with pytest.raises(UserError, match="damaged: invalid literal"):
        scan_tar(folder / "shard-000000.tar")


# index.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads format 1"),
        ({"kind": "sounds"}, "kind"),
        ({"samples": 4}, "contradicts itself"),
        ({"kind": "tokens"}, "contradicts itself"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_index_that_cannot_be_used_says_why(tmp_path, change, message):
    folder = write_images(tmp_path / "out")
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_index(folder)


def test_index_that_is_not_json(tmp_path):
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not an index"):
        read_index(tmp_path)


def test_folder_of_folders_of_shards_names_them(tmp_path):
    write_images(tmp_path / "train")
    with pytest.raises(UserError, match=f"use {tmp_path}/train"):
        read_index(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match="not a folder of shards"):
        read_index(tmp_path / "none")


def test_offsets_mark_fields_a_sample_lacks(tmp_path):
    with open_shards(tmp_path / "out", "images", CLASSES, 2) as writer:
        writer.write("0", 0, {"png": b"p"})
        writer.write("1", 0, {"jpg": b"j"})
    offsets = load_offsets(tmp_path / "out", writer.index.shards[0])
    assert offsets.fields == ("cls", "jpg", "png")
    np.testing.assert_array_equal(offsets.sizes, [[1, -1, 1], [1, 1, -1]])
