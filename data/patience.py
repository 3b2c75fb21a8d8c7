"""Reading that does not wait for ever: a read without an answer is given up, tried again after a pause, then reported.

A thread inside a system call cannot be stopped. So reads run in a daemon thread that is watched; when one makes no
progress it is left behind, and the rest goes on in another. A read that takes long by its nature, such as that of a
whole tar, says with `still_reading` that it goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hmar_mega.data.damage import Damage, DamagePolicy

Item = TypeVar("Item")
Result = TypeVar("Result")

#: How often at most the watch looks whether it was closed, in seconds.
LOOK = 0.5


def still_reading() -> None:
    """Say that the read under way in this thread had an answer, so that its time begins anew; else do nothing."""
    thread = threading.current_thread()
    if isinstance(thread, _Runner):
        thread.answers += 1


class Closed(Exception):
    """Reading ends because nobody wants its results any more."""


def read_patiently(
    read: Callable[[Item], Result],
    items: Sequence[Item],
    policy: DamagePolicy,
    stalled: Callable[[Item], Damage],
    try_again: Callable[[], object] = lambda: None,
    closed: threading.Event | None = None,
) -> list[Result | Damage]:
    """`read` of every item, each a result or the damage that remains after `policy.retries` more tries.

    Args:
        read: may raise Damage, of which passing ones are tried again; other errors are raised here.
        stalled: called for an item whose read was given up; gives its damage, and may see to it that others like it
            fail at once.
        try_again: called before every further try.
        closed: raises Closed once set.
    """
    closed = closed or threading.Event()
    results: list[Result | Damage | None] = [None] * len(items)
    left = list(range(len(items)))
    for attempt in range(policy.retries + 1):
        if attempt and closed.wait(policy.pause * 2 ** (attempt - 1)):
            raise Closed
        if attempt:
            try_again()
        _attempt(read, items, left, results, policy.timeout, stalled, closed)
        left = [number for number in left if _passing(results[number])]
        if not left:
            break
    return results  # type: ignore[return-value]  # every item was attempted


def _passing(result: object) -> bool:
    return isinstance(result, Damage) and result.passing


def _attempt(
    read: Callable[[Item], Result],
    items: Sequence[Item],
    numbers: Sequence[int],
    results: list[Result | Damage | None],
    timeout: float,
    stalled: Callable[[Item], Damage],
    closed: threading.Event,
) -> None:
    begun = 0
    while begun < len(numbers):
        runner = _Runner(read, [items[number] for number in numbers[begun:]])
        runner.start()
        runner.watch(timeout, closed)
        for number, result in zip(numbers[begun:], runner.results, strict=False):
            results[number] = result
        begun += len(runner.results)
        if begun < len(numbers):
            results[numbers[begun]] = stalled(items[numbers[begun]])
            begun += 1


class _Runner(threading.Thread, Generic[Item, Result]):
    """Reads items one after the other until it is left behind."""

    def __init__(self, read: Callable[[Item], Result], items: Sequence[Item]) -> None:
        super().__init__(name="hmar-read", daemon=True)
        self._read = read
        self._items = items
        self._done: list[Result | Damage] = []
        self._ended = threading.Event()
        self._abandoned = False
        self._error: BaseException | None = None
        self.answers = 0  #: of reads that take long, see `still_reading`
        self.results: Sequence[Result | Damage] = ()  #: what was read when the watch ended

    def run(self) -> None:
        try:
            for item in self._items:
                try:
                    result: Result | Damage = self._read(item)
                except Damage as damage:
                    result = damage
                if self._abandoned:
                    return
                self._done.append(result)
        except BaseException as err:  # handed to whoever waits
            self._error = err
        finally:
            self._ended.set()

    def watch(self, timeout: float, closed: threading.Event) -> None:
        """Wait for the end, or until nothing was read for `timeout` seconds."""
        look, without, seen = min(LOOK, timeout / 4), 0.0, (0, 0)
        while not self._ended.wait(look):
            if closed.is_set():
                self._abandoned = True
                raise Closed
            progress = len(self._done), self.answers
            without = without + look if progress == seen else 0.0
            seen = progress
            if without >= timeout:
                self._abandoned = True
                break
        if self._error is not None:
            raise self._error
        self.results = tuple(self._done)
