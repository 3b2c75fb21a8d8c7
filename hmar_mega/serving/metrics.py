"""What the service counts, and its text for Prometheus (exposition format 0.0.4). No client library is needed."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Upper bounds of the buckets of requests and batches, in seconds.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

#: Upper bounds of the buckets of batch sizes, in images.
IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counter:
    """A number that only grows, one for each set of labels."""

    name: str
    text: str
    values: dict[Labels, float] = field(default_factory=lambda: defaultdict(float))

    def lines(self) -> list[str]:
        """Its text."""
        shown = [f"{self.name}{_braces(labels)} {value:.0f}" for labels, value in sorted(self.values.items())]
        return [*_head(self.name, self.text, "counter"), *shown]


@dataclass
class Histogram:
    """How often values fell below each bound, their sum and their number, for each set of labels."""

    name: str
    text: str
    bounds: Sequence[float]
    counts: dict[Labels, list[int]] = field(default_factory=dict)
    sums: dict[Labels, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, labels: Labels, value: float) -> None:
        """Count one value."""
        counts = self.counts.setdefault(labels, [0] * (len(self.bounds) + 1))
        for number, bound in enumerate((*self.bounds, float("inf"))):
            counts[number] += value <= bound
        self.sums[labels] += value

    def lines(self) -> list[str]:
        """Its text."""
        shown = []
        for labels, counts in sorted(self.counts.items()):
            for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
                le = "+Inf" if bound == float("inf") else f"{bound:g}"
                shown.append(f"{self.name}_bucket{_braces((*labels, ('le', le)))} {count}")
            shown.append(f"{self.name}_sum{_braces(labels)} {self.sums[labels]:.6f}")
            shown.append(f"{self.name}_count{_braces(labels)} {counts[-1]}")
        return [*_head(self.name, self.text, "histogram"), *shown]


class Metrics:
    """Everything that is counted; any thread may count.

    Args:
        waiting: images in the queue now.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._lock = threading.Lock()
        self._waiting = waiting
        self._requests = Counter("hmar_mega_requests_total", "Answered requests by endpoint and HTTP status.")
        self._errors = Counter(
            "hmar_mega_errors_total",
            "Requests without images: denied, invalid, too_large, slow, busy, timeout, cancelled, failed, stopping.",
        )
        self._images = Counter("hmar_mega_images_total", "Images computed.")
        self._latency = Histogram(
            "hmar_mega_request_seconds", "From a request's head to the end of its answer.", SECONDS
        )
        self._batches = Histogram("hmar_mega_batch_images", "Images a batch.", IMAGES)
        self._batch_seconds = Histogram("hmar_mega_batch_seconds", "Time a batch.", SECONDS)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """An answered request."""
        with self._lock:
            self._requests.values[("endpoint", endpoint), ("status", str(status))] += 1
            self._latency.add((("endpoint", endpoint),), seconds)

    def error(self, kind: str) -> None:
        """A request without its images."""
        with self._lock:
            self._errors.values[(("kind", kind),)] += 1

    def batch(self, images: int, seconds: float) -> None:
        """A finished batch."""
        with self._lock:
            self._images.values[()] += images
            self._batches.add((), images)
            self._batch_seconds.add((), seconds)

    def text(self) -> str:
        """The page that Prometheus reads."""
        name = "hmar_mega_queue_images"
        lines = [*_head(name, "Images that wait for a batch.", "gauge"), f"{name} {self._waiting()}"]
        with self._lock:
            for kept in (
                self._requests, self._errors, self._images, self._latency, self._batches, self._batch_seconds
            ):  # fmt: skip
                lines += kept.lines()
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _braces(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
