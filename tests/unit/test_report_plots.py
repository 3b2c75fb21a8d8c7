"""The curves of the demo's report: the right numbers in the right panels, in the ink of the page around them."""

from __future__ import annotations

import math

import matplotlib
import pytest

from hmar_mega import report_plots
from hmar_mega.report_plots import stage_curves, tokenizer_curves

TOKENIZER_ROWS = [{"step": s, "loss": 3.0 / s, "psnr": 10.0 + s, "usage": [0.25, s / 4]} for s in (1, 2, 3)]
STAGE_ROWS = [
    {"kind": "train", "step": 5, "loss": 4.0, "scale_loss": [2.0, 3.0]},
    {"kind": "val", "step": 5, "all_scales": 3.5, "scale_loss": [2.5, 3.5]},
]


@pytest.fixture
def drawn(monkeypatch):
    """Makes the functions of `report_plots` give the figure itself."""
    monkeypatch.setattr(report_plots, "_svg", lambda figure, description: figure)


def lines_of(axes) -> dict[str, tuple[list, list]]:
    """Label, or style where there is none → the points of each curve."""
    return {
        line.get_label() if not line.get_label().startswith("_") else f"{line.get_color()} {line.get_linestyle()}": (
            list(line.get_xdata()), list(line.get_ydata()),
        )
        for line in axes.lines
    }  # fmt: skip


def test_tokenizer_curves_show_loss_psnr_and_the_codes_of_each_scale(drawn):
    loss, quality, usage = tokenizer_curves(TOKENIZER_ROWS, (1, 2), 12.5).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0, 1.5, 1.0]]
    assert lines_of(quality)["training batch"] == ([1, 2, 3], [11.0, 12.0, 13.0])
    assert lines_of(quality)["held-out, end: 12.5 dB"][1] == [12.5, 12.5]
    assert lines_of(usage) == {
        "scale 1 (1×1)": ([1, 2, 3], [25.0, 25.0, 25.0]),
        "scale 2 (2×2)": ([1, 2, 3], [25.0, 50.0, 75.0]),
    }


def test_the_losses_of_a_stage_are_drawn_for_each_scale(drawn):
    total, scales = stage_curves(STAGE_ROWS, (1, 2), "Stage 1", "training").axes
    assert lines_of(total) == {"training": ([5], [4.0]), "validation, mean of tokens": ([5], [3.5])}
    first, second = report_plots._colours(2)
    assert lines_of(scales) == {
        f"{first} -": ([5], [2.0]),
        f"{first} --": ([5], [2.5]),
        f"{second} -": ([5], [3.0]),
        f"{second} --": ([5], [3.5]),
    }


def test_stage_2_starts_at_the_second_scale(drawn):
    rows = [{**row, "scale_loss": [None, *row["scale_loss"]]} for row in STAGE_ROWS]
    _, scales = stage_curves(rows, (1, 2, 4), "Stage 2", "training").axes
    _, middle, last = report_plots._colours(3)
    assert lines_of(scales)[f"{middle} -"] == ([5], [2.0])
    assert lines_of(scales)[f"{last} -"] == ([5], [3.0])
    names = [text.get_text() for text in scales.get_legend().get_texts()]
    assert names == ["scale 2 (2×2)", "scale 3 (4×4)", "training", "validation"]


def test_a_stage_can_be_compared_with_a_guess(drawn):
    total, _ = stage_curves(STAGE_ROWS, (1, 2), "Stage 1", "training", ("blind guess", math.log(256))).axes
    assert lines_of(total)["blind guess"][1] == [math.log(256)] * 2


def test_a_run_without_validation_is_drawn_all_the_same():
    assert "scale 2 (2×2)" in stage_curves(STAGE_ROWS[:1], (1, 2), "Stage 1", "training")


@pytest.mark.parametrize(("points", "marker"), [(1, "o"), (15, "o"), (16, "")])
def test_few_points_are_shown_each(drawn, points, marker):
    rows = [{**STAGE_ROWS[0], "step": step} for step in range(points)]
    total, _ = stage_curves(rows, (1, 2), "Stage 1", "training").axes
    assert total.lines[0].get_marker() == marker


@pytest.mark.parametrize("patch_nums", [(1, 2), (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)])
def test_every_scale_has_a_colour_of_its_own(patch_nums):
    colours = report_plots._colours(len(patch_nums))
    assert len(set(colours)) == len(patch_nums)
    assert all(colour.startswith("#") for colour in colours)


def test_curves_name_their_units():
    tokenizer = tokenizer_curves(TOKENIZER_ROWS, (1, 2), 12.5)
    for label in ("optimizer steps", "PSNR (dB)", "codes used in 100 steps (%)"):
        assert f">{label}</text>" in tokenizer
    assert stage_curves(STAGE_ROWS, (1, 2), "Stage 1", "training").count(">cross-entropy (nats per token)</text>") == 2


def test_curves_take_the_ink_of_the_page_and_keep_to_themselves():
    markup = tokenizer_curves(TOKENIZER_ROWS, (1, 2), 12.5)
    assert report_plots.INK not in markup
    assert report_plots.LINE not in markup
    assert "currentColor" in markup
    assert "var(--line)" in markup
    assert "<style" not in markup  # it would reach the whole page
    assert "://" not in markup


def test_the_same_rows_give_the_same_bytes():
    assert tokenizer_curves(TOKENIZER_ROWS, (1, 2), 12.5) == tokenizer_curves(TOKENIZER_ROWS, (1, 2), 12.5)


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    tokenizer_curves(TOKENIZER_ROWS, (1, 2), 12.5)
    assert dict(matplotlib.rcParams) == before
