"""The demo's report: one page that stands alone, says what was measured, and holds commands that are real."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hmar_mega import report_plots
from hmar_mega.cli import parse
from hmar_mega.config_io import config_to_yaml, load_config
from hmar_mega.errors import UserError
from hmar_mega.report import DemoFigures, duration, memory, percent, write_report
from hmar_mega.report_page import bars, comparison, element, facts, page, picture
from hmar_mega.report_runs import read_stage

FIGURES = DemoFigures(
    accuracy=0.934,
    per_class=(1.0, 0.9, 0.98, 0.96, 0.82, 0.9, 1.0, 0.94, 0.86, 0.98),
    num_samples=500,
    classifier_accuracy=0.972,
    reconstruction_accuracy=0.958,
    val_psnr=22.5,
    seconds={"images": 1.25, "tokenizer": 270.0, "stage 1": 96.0},
    peak_memory_bytes=3 * 2**29,
    versions={"torch": "2.13.0+cpu", "transformer-engine": "absent"},
)

#: Elements of HTML that have no end tag.
VOID = {"meta", "link", "img", "br"}

#: A weight cut in two with its moments, and a frozen one: 40 + 6 parameters, 40 of them trained.
ENTRIES = [
    {
        "name": "cut",
        "kind": kind,
        "file": "f",
        "key": "k",
        "global_shape": [4, 10],
        "offset": [row, 0],
        "shape": [2, 10],
    }
    for kind in ("weight", "exp_avg", "exp_avg_sq")
    for row in (0, 2)
] + [{"name": "cold", "kind": "weight", "global_shape": [6], "offset": [0], "shape": [6]}]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    figures = {"usage": [0.25, 0.5, 1.0], "perplexity": [9.0, 50.0, 99.0]}
    rows = [{"step": 20 * i, "loss": 1 / i, "psnr": 10.0 + i, **figures} for i in range(1, 31)]
    write_lines(folder / "metrics.jsonl", rows)
    summary = {"parameters": 783635, "steps": 600, "num_images_seen": 19200, "fingerprint": "6772c2bd", **figures}
    (folder / "metrics.json").write_text(json.dumps(summary))
    Image.new("RGB", (768, 256)).save(folder / "reconstructions.png")
    return folder


def make_run(folder: Path, stage: str, world_size: int, entries: list[dict]) -> Path:
    checkpoint = folder / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text(checkpoint.name)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "index.json").write_text(json.dumps({"format": 1, "entries": entries}))
    (folder / "config.yaml").write_text(config_to_yaml(load_config("demo", [f"stage.name={stage}"])))
    versions = {"world_size": world_size, "device": "cpu", "revision": "0123456789abcdef+changes"}
    (folder / "versions.json").write_text(json.dumps(versions))
    scales = [4.0 if stage == "next_scale" else None, 5.0, 6.0]
    rows: list[dict] = []
    for step, loss in ((50, 5.5), (100, 4.5)):
        rows.append(
            {"kind": "train", "step": step, "loss": loss, "scale_loss": scales, "images_per_second": 2.0 * step}
        )
        rows.append({"kind": "val", "step": step, "all_scales": loss - 0.25, "scale_loss": scales})
    write_lines(folder / "metrics.jsonl", rows)
    return folder


def make_demo(root: Path) -> dict:
    """Arguments of `write_report` for a finished demo; the folder's name has to be quoted in a shell."""
    out = root / "demo out"
    Image.new("RGB", (178, 178), "red").save(root / "samples.png")
    Image.new("RGB", (52, 34), "blue").save(root / "edited.png")
    return {
        "out": out,
        "tokenizer": make_tokenizer(out / "tokenizer"),
        "stage1": make_run(out / "stage1", "next_scale", 1, [e for e in ENTRIES if e["name"] == "cut"]),
        "stage2": make_run(out / "stage2", "masked", 2, ENTRIES),
        "figures": FIGURES,
        "images": {"Samples, a row a class": root / "samples.png", "Inpainting": root / "edited.png"},
    }


class Reader(HTMLParser):
    """Text, tags and attributes of a page; complains of tags that do not match."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def commands(self) -> list[str]:
        return [self.words[i] for i in range(len(self.words)) if self.words[i].startswith(("hmar-mega ", "torchrun "))]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Finished:
    """A page for tests that only look at it, and what it was made from."""

    given: dict
    path: Path
    page: str
    reader: Reader


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    given = make_demo(tmp_path_factory.mktemp("demo"))
    path = write_report(**given)
    return Finished(given, path, path.read_text(encoding="utf-8"), read(path))


@pytest.fixture
def demo(tmp_path: Path, monkeypatch) -> dict:
    """Arguments that a test may change; curves are left out, since drawing them takes most of the time."""
    for name in ("tokenizer_curves", "stage_curves"):
        monkeypatch.setattr(report_plots, name, lambda *_, **__: "<svg></svg>")
    return make_demo(tmp_path)


def test_the_page_lies_in_the_demo_folder_and_loads_nothing(finished):
    assert finished.path == finished.given["out"] / "report.html"
    text, reader = finished.page, finished.reader
    assert "://" not in text
    assert not {tag for tag, _ in reader.tags} & {"script", "iframe", "object"}
    sources = [value for _, a in reader.tags for name, value in a.items() if name in ("src", "href", "xlink:href")]
    assert len(sources) > 4
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_writing_again_replaces_the_page_and_leaves_nothing_else(demo):
    before = {p.name for p in demo["out"].iterdir()}
    first = write_report(**demo).read_bytes()
    assert write_report(**demo).read_bytes() == first
    assert {p.name for p in demo["out"].iterdir()} == before | {"report.html"}


def test_the_headline_is_the_accuracy_of_the_samples(finished):
    reader = finished.reader
    assert "93.4 %" in reader.words
    assert "of 500 samples show the class asked for" in reader.text


@pytest.mark.parametrize(
    ("accuracy", "verdict", "colour"),
    [(0.85, "✓ at least the 85 % demanded", "good"), (0.849, "✗ below the 85 % demanded", "poor")],
)
def test_the_verdict_is_about_85_percent(demo, accuracy, verdict, colour):
    demo["figures"] = replace(FIGURES, accuracy=accuracy)
    page_text = write_report(**demo).read_text(encoding="utf-8")
    assert f'<div class="verdict {colour}">{verdict}</div>' in page_text
    assert page_text.count('class="verdict') == 1


def test_every_figure_is_on_the_page(finished):
    text = finished.reader.text
    for figure in (
        "97.2 %",
        "95.8 %",
        "82.0 %",
        "22.50 dB",
        "25 %, 50 %, 100 %",
        "1.5 GiB",
        "6 min 07 s",
        "4 min 30 s",
    ):
        assert figure in text, figure
    for version in ("torch 2.13.0+cpu", "transformer-engine absent"):
        assert version in text
    assert "class 9 98.0 %" in text


def test_the_tables_say_what_the_runs_recorded(finished):
    text = finished.reader.text
    assert "parameters 46 (40 without the mask branch)" in text
    assert "parameters trained 40 40" in text
    assert "images seen 6,400 (batches of 64) 6,400 (batches of 64)" in text
    assert "1 process (cpu), tensor-parallel 2, fp32 2 processes (cpu)" in text
    assert "speed, median 150 images/s" in text
    assert "best validation loss 4.2500 nats per token, at step 100" in text
    assert "1×1, 2×2, 4×4 tokens an image 21" in text
    assert "0123456789ab+changes" in text


def test_parameters_are_counted_once_however_they_are_cut(finished):
    assert (read_stage(finished.given["stage1"]).parameters, read_stage(finished.given["stage2"]).parameters) == (
        40,
        46,
    )
    assert read_stage(finished.given["stage2"]).trained_parameters == 40


def test_images_are_inside_the_page_in_order_enlarged_by_whole_numbers(finished):
    reader = finished.reader
    images = [a for tag, a in reader.tags if tag == "img"]
    paths = [*finished.given["images"].values(), finished.given["tokenizer"] / "reconstructions.png"]
    for attributes, path in zip(images, paths, strict=True):
        kind, _, data = attributes["src"].partition(";base64,")
        assert kind == "data:image/png"
        assert base64.b64decode(data) == path.read_bytes()
    assert [(int(a["width"]), int(a["height"])) for a in images] == [(534, 534), (156, 102), (768, 256)]
    assert [a.get("class") for a in images] == ["pixels"] * 3
    assert [a["alt"] for a in images[:2]] == list(finished.given["images"])
    assert "image-rendering: pixelated" in finished.page


def test_a_large_image_is_neither_enlarged_nor_shown_with_sharp_pixels(tmp_path):
    Image.new("RGB", (1400, 300)).save(tmp_path / "wide.png")
    (attributes,) = [a for tag, a in Reader(picture(tmp_path / "wide.png", "wide")).tags if tag == "img"]
    assert (attributes["width"], attributes["height"]) == ("1400", "300")
    assert "class" not in attributes


def test_rows_of_the_reconstructions_have_names(finished):
    text = finished.reader.text
    assert "original all 3 scales scale 1 alone scales 1–2" in text


def test_text_from_outside_cannot_become_markup(demo):
    nasty = '<img src=x onerror="1">&amp;'
    demo["figures"] = replace(FIGURES, versions={nasty: nasty}, seconds={nasty: 1.0})
    demo["images"] = {nasty: demo["images"]["Inpainting"]}
    path = write_report(**demo)
    assert "<img src=x" not in path.read_text(encoding="utf-8")
    reader = read(path)
    assert reader.words.count(nasty) == 4  # two cells, a bar, a caption
    assert next(a["alt"] for tag, a in reader.tags if tag == "img") == nasty


@given(st.text(st.characters(exclude_categories=("C",)), min_size=1))
def test_the_pieces_give_back_any_text(text):
    markup = element("p", text) + facts({text: text}) + comparison([text], {text: [text]}) + bars([(text, 0.5, text)])
    assert Reader(markup).words == [text] * 8
    assert text in page(text, []) or html.escape(text) in page(text, [])


@pytest.mark.parametrize(("share", "width"), [(-0.1, "0.00%"), (0.5, "50.00%"), (1.2, "100.00%")])
def test_bars_stay_in_their_track(share, width):
    assert f'style="width:{width}"' in bars([("a", share, "b")])


def test_the_commands_are_ones_the_command_line_takes(finished):
    out = finished.given["out"]
    parsed = {}
    for line in finished.reader.commands():
        words = shlex.split(line)
        args = parse(words[words.index("hmar_mega") + 1 :] if words[0] == "torchrun" else words[1:])
        parsed.setdefault(args.command, []).append(args)
    assert {name: len(found) for name, found in parsed.items()} == {
        "sample": 2, "edit": 1, "train": 2, "export": 1, "demo": 1,
    }  # fmt: skip
    assert parsed["sample"][0].model == parsed["edit"][0].model == out / "model"
    assert parsed["sample"][0].classes == "0,1,2,3,4,5,6,7,8,9"
    assert parsed["edit"][0].image == parsed["sample"][1].out
    assert [args.config for args in parsed["train"]] == [
        str(finished.given[s] / "config.yaml") for s in ("stage1", "stage2")
    ]
    first, second = (dict(text.split("=", 1) for text in args.overrides) for args in parsed["train"])
    assert second["run.init_from"] == first["run.dir"]
    assert str(parsed["export"][0].run_dir) == second["run.dir"]
    assert not Path(first["run.dir"]).is_relative_to(out)  # nothing of the demo is written over


def test_a_run_of_several_processes_is_started_with_torchrun(finished):
    train = [shlex.split(line) for line in finished.reader.commands() if "train " in line]
    assert train[0][0] == "hmar-mega"
    assert train[1][:6] == ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "hmar_mega"]


def test_the_mask_that_the_commands_draw_is_the_lower_half(finished, tmp_path, monkeypatch):
    (line,) = [words for words in finished.reader.words if words.startswith("python -c ")]
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(line)[2])
    mask = Image.open(tmp_path / "mask.png")
    assert (mask.mode, mask.size) == ("L", (16, 16))
    assert list(mask.tobytes()) == [0] * 128 + [255] * 128


def test_the_curves_of_the_tokenizer_and_both_stages_are_on_the_page(finished):
    labels = [a["aria-label"] for tag, a in finished.reader.tags if tag == "svg"]
    assert [label.split(":")[0] for label in labels] == ["Tokenizer training", "Stage 1", "Stage 2"]
    assert finished.reader.words.count("blind guess, ln 256") == 1  # stage 2 does not start from a guess
    assert "scale 3 (4×4)" in finished.reader.words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"), (8.24, "8.2 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (75.4, "1 min 15 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (3700.0, "1 h 02 min"),
    ],
)  # fmt: skip
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_shares_and_memory_are_written_for_people():
    assert [percent(x) for x in (0.0, 0.93449, 1.0)] == ["0.0 %", "93.4 %", "100.0 %"]
    assert [memory(x) for x in (300 * 2**20, 2**30, 5 * 2**29)] == ["300 MiB", "1.0 GiB", "2.5 GiB"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer/metrics.json", "hmar-mega tokenizer train"),
        ("tokenizer/metrics.jsonl", "hmar-mega tokenizer train"),
        ("tokenizer/reconstructions.png", "as an image"),
        ("stage1/config.yaml", "is not a run directory"),
        ("stage1/metrics.jsonl", "hmar-mega train"),
        ("stage2/versions.json", "hmar-mega train"),
    ],
)
def test_what_is_missing_is_named_and_an_older_page_stays(demo, missing, message):
    old = write_report(**demo).read_bytes()
    (demo["out"] / missing).unlink()
    with pytest.raises(UserError, match=message) as caught:
        write_report(**demo)
    assert str(demo["out"] / missing.split("/")[0]) in str(caught.value)
    assert (demo["out"] / "report.html").read_bytes() == old


@pytest.mark.parametrize(
    ("damaged", "content", "message"),
    [
        ("tokenizer/metrics.json", "{", "damaged"),
        ("stage1/metrics.jsonl", "", "no rows to draw"),
        ("tokenizer/reconstructions.png", "no image", "as an image"),
    ],
)
def test_what_is_damaged_is_named(demo, damaged, content, message):
    (demo["out"] / damaged).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(**demo)
    assert str(demo["out"] / damaged) in str(caught.value)
    assert not (demo["out"] / "report.html").exists()
