"""The queue of the service: what goes together, what is refused, what is dropped; without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hmar_mega.serving.batcher import Abandoned, Batcher, Busy, Closing, Failure, Job, Part


class Machine:
    """A `Run` that notes its batches, doubles its items, and holds while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, list[int]]] = []
        self.gate, self.began = threading.Event(), threading.Event()

    def __call__(self, key: Any, items: Any, emit: Any, abandoned: Callable[[], bool]) -> None:
        self.batches.append((key, list(items)))
        self.began.set()
        while not self.gate.wait(0.005):
            if abandoned():
                raise Abandoned
        if key == "bad":
            raise RuntimeError("out of memory")
        emit(0, False, items)
        emit(1, True, [2 * item for item in items])


class Asker:
    """A job and what came of it."""

    def __init__(self, key: str, *items: int, seconds: float = 30.0) -> None:
        self.events: list[Part | Failure] = []
        self.job = Job(key, items, self.events.append, time.monotonic() + seconds)

    def results(self) -> list[int]:
        """The results of the last scale, in order."""
        wait(lambda: sum(len(e.results) for e in self.parts()) == len(self.job.items))
        return [result for part in sorted(self.parts(), key=lambda part: part.first) for result in part.results]

    def parts(self) -> list[Part]:
        return [event for event in self.events if isinstance(event, Part) and event.last]

    def error(self) -> Exception:
        wait(lambda: any(isinstance(event, Failure) for event in self.events))
        return next(event.error for event in self.events if isinstance(event, Failure))


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def batcher(machine: Machine) -> Iterator[Batcher]:
    made = Batcher(machine, max_batch=4, max_wait=0.0, max_queue=8)
    made.start()
    yield made
    made.close()
    assert not made.alive


def held(batcher: Batcher, machine: Machine) -> Asker:
    """A job that the worker is busy with."""
    first = Asker("own", 0)
    batcher.submit(first.job)
    assert machine.began.wait(20)
    return first


def test_equal_keys_go_together_the_oldest_first_and_split_at_the_largest_batch(batcher: Batcher, machine: Machine):
    askers = [held(batcher, machine), Asker("a", 1, 2, 3), Asker("b", 4), Asker("a", 5, 6), Asker("b", 7)]
    for asker in askers[1:]:
        batcher.submit(asker.job)
    assert batcher.waiting == 7
    machine.gate.set()
    assert [asker.results() for asker in askers] == [[0], [2, 4, 6], [8], [10, 12], [14]]
    assert machine.batches == [("own", [0]), ("a", [1, 2, 3, 5]), ("b", [4, 7]), ("a", [6])]
    assert batcher.waiting == 0


def test_an_idle_worker_waits_for_company_but_not_once_the_batch_is_full(machine: Machine):
    machine.gate.set()
    batcher = Batcher(machine, max_batch=3, max_wait=60.0, max_queue=8)
    batcher.start()
    first, second = Asker("a", 1), Asker("a", 2, 3)
    batcher.submit(first.job)
    time.sleep(0.05)
    assert not machine.batches
    batcher.submit(second.job)
    assert (first.results(), second.results()) == ([2], [4, 6])
    assert machine.batches == [("a", [1, 2, 3])]
    batcher.close()


def test_a_full_queue_refuses_whole_jobs_with_the_time_to_wait(batcher: Batcher, machine: Machine):
    held(batcher, machine)
    batcher.submit(Asker("a", *range(6)).job)
    with pytest.raises(Busy, match="6 images are waiting and at most 8 may") as refusal:
        batcher.submit(Asker("a", 1, 2, 3).job)
    assert refusal.value.retry_after >= 1
    batcher.submit(Asker("a", 1, 2).job)


def test_jobs_that_nobody_waits_for_are_not_computed(batcher: Batcher, machine: Machine):
    first, cancelled, late, last = held(batcher, machine), Asker("a", 1), Asker("a", 2, seconds=0.0), Asker("a", 3)
    for asker in (cancelled, late, last):
        batcher.submit(asker.job)
    batcher.cancel(cancelled.job)
    assert batcher.waiting == 1
    machine.gate.set()
    assert (first.results(), last.results()) == ([0], [6])
    assert machine.batches == [("own", [0]), ("a", [3])]
    assert not cancelled.events
    assert not late.events


def test_a_batch_of_cancelled_jobs_alone_is_broken_off(batcher: Batcher, machine: Machine):
    first, second = held(batcher, machine), Asker("a", 1)
    batcher.submit(second.job)
    batcher.cancel(first.job)
    wait(lambda: len(machine.batches) == 2)  # though the gate is closed
    machine.gate.set()
    assert second.results() == [2]
    assert not first.events


def test_a_batch_that_fails_fails_its_own_jobs_alone(batcher: Batcher, machine: Machine):
    machine.gate.set()
    bad, good = Asker("bad", *range(6)), Asker("a", 1)
    for asker in (bad, good):
        batcher.submit(asker.job)
    assert good.results() == [2]
    assert str(bad.error()) == "out of memory"
    assert ("bad", [4, 5]) not in machine.batches  # what was left of the job went with it
    assert batcher.alive


def test_closing_refuses_what_waits_and_ends_the_batch_under_way(batcher: Batcher, machine: Machine):
    first, second = held(batcher, machine), Asker("a", 1)
    batcher.submit(second.job)
    batcher.close()
    assert isinstance(first.error(), Closing)
    assert isinstance(second.error(), Closing)
    with pytest.raises(Closing):
        batcher.submit(Asker("a", 1).job)
