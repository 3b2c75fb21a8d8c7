"""What people write for sampling: mask schedules, guidance, class names and lists of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.errors import UserError
from hmar_mega.inference.options import (
    ClassNames,
    class_names,
    format_mask_schedule,
    parse_cfg,
    parse_mask_schedule,
    read_requests,
)
from hmar_mega.scales import MASK_SCHEDULES, PATCH_NUMS, ScaleSchedule, mask_schedule_for

IMAGENET_LIKE = ClassNames(("tench, Tinca tinca", "crane", "great white shark, white shark", "Crane"), 4)


# ---------------------------------------------------------------------------------------------------- mask schedules


@given(st.lists(st.lists(st.integers(1, 4096), min_size=1, max_size=6), min_size=1, max_size=14))
def test_a_mask_schedule_survives_being_written(schedule: list[list[int]]):
    text = format_mask_schedule(schedule)
    assert parse_mask_schedule(text) == schedule
    for end in (";…", ";...", ";", " ; … "):
        assert parse_mask_schedule(text + end) == schedule
    assert parse_mask_schedule(text.replace(";", " ; ").replace(",", ", ")) == schedule


@given(st.text(alphabet="0123456789,;-. x…", max_size=12))
def test_a_text_is_a_schedule_or_an_error_that_shows_one(text: str):
    try:
        schedule = parse_mask_schedule(text)
    except UserError as err:
        message = str(err)
        schedule = []
    else:
        message = "'1;1,3;1,1,2,5;16'"
    assert "'1;1,3;1,1,2,5;16'" in message
    assert all(isinstance(count, int) for scale in schedule for count in scale)


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_the_published_schedules_are_read_and_fit(resolution: int):
    scales = ScaleSchedule(PATCH_NUMS[resolution])
    text = format_mask_schedule(MASK_SCHEDULES[resolution]) + ";…"
    assert mask_schedule_for(scales, parse_mask_schedule(text)) == mask_schedule_for(scales)


def test_the_schedule_of_the_issue():
    fitted = mask_schedule_for(ScaleSchedule(PATCH_NUMS[256]), parse_mask_schedule("1;1,3;1,1,2,5;16;…"))
    assert fitted[:4] == ((1,), (1, 3), (1, 1, 2, 5), (16,))
    assert sum(map(len, fitted)) == 14


@given(data=st.data())
def test_what_is_parsed_is_checked_against_the_scales(data: st.DataObject):
    """Any split of p_k² is accepted; one token more or less is refused, by the number of the scale."""
    scales = ScaleSchedule((1, 2, 3, 4))
    given_scales = data.draw(st.integers(1, 4))
    entries = []
    for length in scales.scale_lengths[:given_scales]:
        cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
        entries.append([b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)])
    assert mask_schedule_for(scales, parse_mask_schedule(format_mask_schedule(entries)))[:given_scales] == tuple(
        map(tuple, entries)
    )
    wrong = data.draw(st.integers(0, given_scales - 1))
    entries[wrong][-1] += 1
    with pytest.raises(ValueError, match=f"of scale {wrong + 1} "):
        mask_schedule_for(scales, parse_mask_schedule(format_mask_schedule(entries)))


def test_guidance_is_a_number_or_a_list():
    assert parse_cfg("1.5") == 1.5
    assert parse_cfg("0, 0.5,1") == [0.0, 0.5, 1.0]
    for text in ("", "a", "1,,2"):
        with pytest.raises(UserError, match="--cfg"):
            parse_cfg(text)


# ------------------------------------------------------------------------------------------------------ class names


def test_classes_are_numbers_names_or_synonyms():
    assert IMAGENET_LIKE.numbers("2, tench,WHITE shark, tinca TINCA") == [2, 0, 2, 0]
    assert IMAGENET_LIKE.number("tench, Tinca tinca") == 0
    assert IMAGENET_LIKE.number("-1") == -1  # out of range is said where the model is known


def test_a_name_of_two_classes_or_of_none_is_refused():
    with pytest.raises(UserError, match=r"class 'crane' means 1 and 3; give the number"):
        IMAGENET_LIKE.number("crane")
    with pytest.raises(UserError, match=r"'tensh' is not known; did you mean tench\?; there are 4 classes, 0 to 3"):
        IMAGENET_LIKE.number("tensh")
    with pytest.raises(UserError, match="knows no class names; give --class-names FILE"):
        ClassNames((), 4).number("tench")


@pytest.mark.parametrize(
    "text",
    ["ant\nbee\n", '["ant", "bee"]', '{"1": "bee", "0": "ant"}', '{"0": ["n01", "ant"], "1": ["n02", "bee"]}'],
    ids=["lines", "list", "object", "imagenet"],
)
def test_names_come_from_a_file(tmp_path: Path, text: str):
    (tmp_path / "names").write_text(text)
    assert class_names(tmp_path / "names", ["x", "y"], 2).names == ("ant", "bee")


def test_without_a_file_they_are_the_models_own():
    assert class_names(None, ["x", "y"], 2).names == ("x", "y")
    assert class_names(None, None, 2).names == ()


@pytest.mark.parametrize("text", ["ant\n", '["ant", "bee", "cow"]', '{"0": "ant", "2": "bee"}', "[1", "{"])
def test_names_that_do_not_fit_are_refused(tmp_path: Path, text: str):
    (tmp_path / "names").write_text(text)
    with pytest.raises(UserError, match="names"):
        class_names(tmp_path / "names", None, 2)


# ------------------------------------------------------------------------------------------------------------- lists


def test_a_list_gives_classes_and_seeds(tmp_path: Path):
    (tmp_path / "a.csv").write_text('class,seed\n2,5\n tench , 6\n\n"great white shark, white shark",7\n')
    assert read_requests(tmp_path / "a.csv", IMAGENET_LIKE) == ([2, 0, 2], [5, 6, 7])
    (tmp_path / "b.csv").write_text("1,9\n")
    assert read_requests(tmp_path / "b.csv", IMAGENET_LIKE) == ([1], [9])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3\n", "line 2: '3' is not class,seed"),
        ("1,2,3\n", "line 1"),
        ("1,two\n", "line 1: '1,two' is not class,seed"),
        ("tensh,1\n", "'tensh' is not known"),
        ("class,seed\n", "asks for no image"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_requests(tmp_path / "a.csv", IMAGENET_LIKE)


def test_json_of_names_need_not_be_in_order(tmp_path: Path):
    (tmp_path / "names").write_text(json.dumps({str(n): f"c{n}" for n in reversed(range(12))}))
    assert class_names(tmp_path / "names", None, 12).names == tuple(f"c{n}" for n in range(12))
