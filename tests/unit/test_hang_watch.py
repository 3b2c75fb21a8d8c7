"""When a step counts as hanging: measured against the median of those before it, and only while it runs."""

from __future__ import annotations

import threading
import time

import pytest

from hmar_mega.parallel.hang import ENOUGH, StepWatch


class Reports:
    """What was reported, and an event to wait for."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.came = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.came.set()


def steps(watch: StepWatch, count: int) -> None:
    for _ in range(count):
        watch.begin()
        watch.end()


def test_a_step_much_longer_than_the_median_is_reported_once() -> None:
    reports = Reports()
    with StepWatch(10, 0.1, reports) as watch:
        steps(watch, ENOUGH)
        watch.begin()
        assert reports.came.wait(5)
        time.sleep(0.2)
    assert len(reports.reasons) == 1
    assert reports.reasons[0].startswith("no step for 0 s, where the median is ")


@pytest.mark.parametrize(("factor", "known"), [(0, ENOUGH), (10, ENOUGH - 1)])
def test_nothing_is_watched_when_switched_off_or_while_too_few_steps_are_known(factor: float, known: int) -> None:
    reports = Reports()
    with StepWatch(factor, 0.05, reports) as watch:
        steps(watch, known)
        watch.begin()
        assert not reports.came.wait(0.4)


def test_what_lies_between_steps_is_not_watched() -> None:
    reports = Reports()
    with StepWatch(10, 0.05, reports) as watch:
        steps(watch, ENOUGH)
        assert not reports.came.wait(0.4)


def test_the_limit_is_a_multiple_of_the_median_and_never_below_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 4, 10, 15, 20, 26, 30, 35, 40, 140])  # steps of 4, 5, 6, 5 and 100 s
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watch = StepWatch(20, 3, print)
    steps(watch, ENOUGH)
    assert watch.limit == 100
    assert StepWatch(20, 3, print).limit == float("inf")
    monkeypatch.setattr(watch, "_floor", 300)
    assert watch.limit == 300
