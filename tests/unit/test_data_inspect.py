"""Looking into shards: the check's report and exit status, figures and plots, contact sheets and pages."""

from __future__ import annotations

import argparse
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hmar_mega.data.check import check_folders, report_lines
from hmar_mega.data.cli import add_data_parser
from hmar_mega.data.index import TokenFormat, load_offsets, read_index, write_offsets
from hmar_mega.data.stats import ScaleUsage, count_folder, stats_lines, write_stats
from hmar_mega.data.tokens import TokenCodec
from hmar_mega.data.view import contact_sheet, write_view
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.scales import ScaleSchedule

FORMAT = TokenFormat(
    patch_nums=(1, 2), codebook_size=8, fingerprint="f", resolution=8, crops=2, storage="packed", bits=3
)


@pytest.fixture
def images(tmp_path) -> Path:
    """Nine images, five of ant, four of bee, whose widths are 20 … 28; the one with number 4 is damaged."""
    with open_shards(tmp_path / "images", "images", ("ant", "bee"), 4) as writer:
        for number in range(9):
            file = io.BytesIO()
            Image.new("RGB", (20 + number, 10), (20 * number, 0, 0)).save(file, format="PNG")
            data = file.getvalue()[:30] if number == 4 else file.getvalue()
            writer.write(f"{number:03d}", number % 2, {"png": data})
    return tmp_path / "images"


@pytest.fixture
def tokens(tmp_path) -> Path:
    """Six samples of two crops; scale 1 has code 0 or 1 as the crop, scale 2 always the codes 2 … 5."""
    with open_shards(tmp_path / "tokens", "tokens", ("ant", "bee"), 4, FORMAT) as writer:
        for number in range(6):
            ids = np.array([[crop, 2, 3, 4, 5] for crop in range(2)])
            writer.write(f"{number:03d}", number % 2, {"tok": TokenCodec(FORMAT).encode(ids)})
    return tmp_path / "tokens"


def run(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="hmar-mega")
    add_data_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    return args.run(args)


# check


def test_whole_shards_are_good_and_damaged_images_are_found_by_decoding(images, capsys):
    assert run("check", images, "--workers", 1) == 0
    assert "good; 9 of 9 samples whole, 0 lost, 3 shards, contents not decoded" in capsys.readouterr().out
    assert run("check", images, "--deep", "--workers", 1) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "1 problems; 8 of 9 samples whole, 1 lost, 3 shards, every sample decoded" in lines[0]
    assert re.split(r"\s{2,}", lines[2].strip())[:3] == ["shard-000001.tar", "3/4", "content"]
    assert "1 samples: 004 (" in lines[2]


def test_what_training_can_read_is_good_however_large(tmp_path):
    """101 megapixels are beyond what `data shard` takes by default, and below what Pillow opens."""
    file = io.BytesIO()
    Image.new("1", (10_100, 10_000)).save(file, format="PNG")
    with open_shards(tmp_path / "out", "images", ("ant",), 4) as writer:
        writer.write("0", 0, {"png": file.getvalue()})
    assert check_folders(tmp_path / "out", deep=True)[0].problems == ()


def test_labels_beside_a_tar_are_compared_with_those_in_it(tokens):
    """Training takes them from beside it."""
    shard = read_index(tokens).shards[0]
    offsets = load_offsets(tokens, shard)
    write_offsets(tokens / shard.name, shard, replace(offsets, labels=1 - offsets.labels))
    (problem,) = check_folders(tokens)[0].problems
    assert (problem.kind, problem.shard) == ("offsets", shard.name)


def test_report_as_json(images, capsys):
    assert run("check", images, "--deep", "--json", "--workers", 1) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["recorded"], report["whole"], report["lost"], report["good"]) == (9, 8, 1, False)
    assert [shard["whole"] for shard in report["shards"]] == [4, 3, 1]
    assert report["problems"][0]["shard"] == "shard-000001.tar"


def test_folders_in_a_folder_are_all_checked(images, tokens, tmp_path):
    reports = check_folders(tmp_path, workers=1)
    assert [Path(report.folder).name for report in reports] == ["images", "tokens"]
    assert [len(report_lines(report)) for report in reports] == [1, 1]
    with pytest.raises(UserError, match="not a folder of shards"):
        check_folders(tmp_path / "none")


def test_tokens_of_another_tokenizer_are_told(tokens):
    assert check_folders(tokens, deep=True, fingerprint="f")[0].problems == ()
    (problem,) = check_folders(tokens, fingerprint="g")[0].problems
    assert (problem.kind, "not of the one given, g" in problem.text) == ("tokenizer", True)


def test_labels_outside_the_classes_are_told(images):
    index = json.loads((images / "index.json").read_text())
    (images / "index.json").write_text(json.dumps(index | {"classes": ["ant"]}))
    report = check_folders(images)[0]
    assert {problem.kind for problem in report.problems} == {"label"}
    assert report.whole == 5
    assert "001 (label 1 of 1 classes)" in report.problems[0].text


def test_checking_changes_nothing(images):
    (images / "shard-000001.offsets.npz").unlink()
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    (problem,) = check_folders(images)[0].problems
    assert (problem.kind, problem.shard) == ("offsets", "shard-000001.tar")
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


# stats


def test_figures_of_images(images, capsys):
    stats = count_folder(images, progress=False)
    assert stats.per_class.tolist() == [5, 4]
    assert stats.sizes[:, 0].tolist() == [20, 21, 22, 23, 25, 26, 27, 28]
    assert stats.unreadable == 1
    lines = stats_lines(stats)
    assert "9 images of 2 classes; from 4 (bee) to 5 (ant) a class" in lines[0]
    assert lines[2] == "width      min 20, median 24, mean 24, max 28"
    assert run("stats", images, "--samples", 3) == 0
    assert "3 samples read (evenly spaced)" in capsys.readouterr().out


def test_codebook_usage_of_each_scale(tokens):
    stats = count_folder(tokens, progress=False)
    assert [scale.counts.tolist() for scale in stats.scales] == [[6, 6, 0, 0, 0, 0, 0, 0], [0, 0, 12, 12, 12, 12, 0, 0]]
    assert [scale.used for scale in stats.scales] == [0.25, 0.5]
    assert [scale.perplexity for scale in stats.scales] == pytest.approx([2, 4])


def test_perplexity_is_that_of_the_entropy():
    assert ScaleUsage(1, np.array([3, 1, 0])).perplexity == pytest.approx(
        np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    )


def test_plots_are_pngs_beside_the_figures(images, tokens, tmp_path):
    for folder, names in ((images, ["classes.png", "resolutions.png"]), (tokens, ["classes.png", "codebook.png"])):
        paths = write_stats(count_folder(folder, progress=False), tmp_path / "out" / folder.name)
        assert [path.name for path in paths] == ["stats.json", *names]
        assert all(Image.open(path).size[0] > 800 for path in paths[1:])
        assert json.loads(paths[0].read_text())["per_class"]["ant"] == (5 if folder == images else 3)


# view


def test_a_sheet_shows_the_samples_of_a_class(images, tmp_path):
    """Without the damaged one: its place says so in red."""
    assert write_view(images, tmp_path / "s.png", classes=("ant",), side=40) == 5
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    reds = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert {(0, 0, 0), (40, 0, 0), (120, 0, 0), (160, 0, 0), (192, 57, 43)} <= reds
    assert not {(20, 0, 0), (60, 0, 0)} & reds


def test_the_same_seed_gives_the_same_page_and_another_another(images, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_view(images, tmp_path / f"{name}.html", count=4, seed=seed) == 4
    pages = [(tmp_path / f"{name}.html").read_text() for name in "abc"]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


def test_a_page_needs_nothing_beside_it_and_says_what_is_damaged(images, tmp_path):
    assert run("view", images, "--out", tmp_path / "p.html") == 0
    page = (tmp_path / "p.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "sample 004 cannot be decoded" in page
    assert "shard-000002 008, 28×10" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


class Decoder:
    """Paints an image in its first token."""

    schedule = ScaleSchedule((1, 2))
    fingerprint = "f"

    def decode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, :1, None, None] * 2.0 - 1).expand(-1, 3, 8, 8)


def test_tokens_are_decoded_by_their_tokenizer_and_crop(tokens, tmp_path):
    for crop, grey in ((0, 0), (1, 255)):
        write_view(tokens, tmp_path / "t.png", tokenizer=Decoder(), crop=crop, side=16)
        assert Image.open(tmp_path / "t.png").getpixel((12, 30)) == (grey, grey, grey)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "give the tokenizer that made them"),
        ({"crop": 2}, "has the crops 0 … 1"),
        ({"classes": ("wasp",)}, "class 'wasp' is none of the 2: ant, bee"),
        ({"out": "x.jpg"}, r"ends in \.png"),
        ({"count": 0}, "at least 1 image"),
    ],
)
def test_views_that_cannot_be(tokens, tmp_path, options, message):
    chosen = {"tokenizer": Decoder()} | options
    with pytest.raises(UserError, match=message):
        write_view(tokens, tmp_path / chosen.pop("out", "x.png"), **chosen)


def test_small_pictures_are_enlarged_by_whole_factors(tmp_path):
    from hmar_mega.data.view import Picture

    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, np.uint8))
    sheet = np.asarray(contact_sheet([Picture(image, "a", "b")], 33, "facts"))
    shown = sheet[26 : 26 + 33, 8 : 8 + 33]
    assert (shown[16, :16] == 0).all()
    assert (shown[16, 16:32] == 255).all()
