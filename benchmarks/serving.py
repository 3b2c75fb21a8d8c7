"""A load on `hmar-mega serve`: latency, images a second, mean batch, and what becomes of malformed requests.

    python benchmarks/serving.py models/d16 --concurrency 1,4,16 --requests 200 --malformed 0.1 --markdown serving.md
    python benchmarks/serving.py models/demo --device cpu --requests 50 --pictures benchmarks/results

It starts the service in a process of its own, on a free port of this machine, and ends it with SIGTERM. Each of
CONCURRENCY clients sends one request after another (one class, one seed, the model's own settings) over a connection of
its own; a share of them is nonsense, which must come back as 400, 413 or 422. `--pictures` also writes what a browser
shows of the page (needs Chromium).
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from browser import Browser
from common import add_output_options, describe, machine, markdown_table, write_results

#: Bodies that are none, and the statuses that say so.
NONSENSE: tuple[bytes, ...] = (
    b"", b"{", b"[]", b'{"classes": -1}', b'{"classes": 0, "top_p": NaN}', b'{"classes": 0, "count": 1e9}',
    b'{"classes": 0, "colour": "red"}', b"\xff\x00\xfe", b'{"classes":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b" " * 11_000_000,
)  # fmt: skip
REFUSALS = (400, 413, 422)


@dataclass(frozen=True)
class Load:
    """What one load came to; times in milliseconds, of good requests alone."""

    concurrency: int
    requests: int
    malformed: int
    failures: int
    p50: float
    p95: float
    p99: float
    images_per_second: float
    mean_batch: float


@contextmanager
def service(model: Path, *options: str) -> Iterator[str]:
    """The address of a running service; RuntimeError when it does not start, or does not end with status 0."""
    command = [sys.executable, "-m", "hmar_mega", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"at (http://\S+?)/ ", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"{' '.join(command)} did not start; run it by hand to see why")
        _wait_until_it_answers(found[1])
        yield found[1]
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RuntimeError(f"the service ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(address: str) -> None:
    for _ in range(600):
        try:
            httpx.get(f"{address}/healthz")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the service did not answer within a minute")


def load(address: str, concurrency: int, requests: int, malformed: float, seed: int = 0) -> tuple[Load, Counter[str]]:
    """Send `requests` requests from `concurrency` threads; the load, and how often each status came."""
    chance = random.Random(seed)
    bodies = [None if chance.random() >= malformed else chance.choice(NONSENSE) for _ in range(requests)]
    classes = httpx.get(f"{address}/v1/model").json()["num_classes"]
    todo, times, statuses, failures = iter(enumerate(bodies)), [], Counter[str](), 0
    lock = threading.Lock()

    def client() -> None:
        nonlocal failures
        with httpx.Client(base_url=address, timeout=120) as connection:
            while True:
                with lock:
                    number, body = next(todo, (None, None))
                if number is None:
                    return
                started = time.perf_counter()
                answer = _ask(connection, number, body, classes)
                taken = 1e3 * (time.perf_counter() - started)
                with lock:
                    statuses[str(answer)] += 1
                    if body is None and answer == 200:
                        times.append(taken)
                    elif body is None or answer not in REFUSALS:
                        failures += 1

    before, began = _batches(address), time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    images, batches = (after - then for after, then in zip(_batches(address), before, strict=True))
    nonsense = sum(body is not None for body in bodies)
    p50, p95, p99 = (percentile(times, share) for share in (0.5, 0.95, 0.99))
    rate, mean = images / seconds, images / max(1, batches)
    return Load(concurrency, requests, nonsense, failures, p50, p95, p99, rate, mean), statuses


def _ask(connection: httpx.Client, number: int, body: bytes | None, classes: int) -> int | str:
    """The status, or the name of what went wrong on the way."""
    try:
        if body is None:
            return connection.post("/v1/images", json={"classes": number % classes, "seed": number}).status_code
        headers = {"content-type": "application/json"}
        return connection.post("/v1/images", content=body, headers=headers).status_code
    except httpx.TransportError as err:
        return type(err).__name__


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie, by nearest rank; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else float("nan")


def _batches(address: str) -> tuple[float, float]:
    """Images and batches so far."""
    text = httpx.get(f"{address}/metrics").text
    found = [re.search(rf"^hmar_mega_batch_images_{name} (\S+)$", text, re.MULTILINE) for name in ("sum", "count")]
    images, batches = (float(match[1]) if match else 0.0 for match in found)
    return images, batches


def take_pictures(address: str, folder: Path) -> None:
    """What a browser shows: generated pictures, an edit under way, the edited pictures in the dark, a narrow window."""
    with Browser.launch(width=1280, height=920) as page:
        page.resize(1280, 920)
        page.open(f"{address}/")
        page.wait("document.querySelectorAll('#class option').length > 0")
        page.run("document.querySelector('#class').value = 3; document.querySelector('#count').value = 8")
        page.run("document.querySelector('details').open = true")
        page.click("#go")
        page.wait("/pictures in/.test(document.querySelector('#status').textContent)")
        page.run("scrollTo(0, 0)")
        page.screenshot(folder / "serving_generate.png")
        page.run("document.querySelector('details').open = false")
        page.click("figure button")
        left, top, side = page.run(
            "(() => { scrollTo(0, 0); const b = document.querySelector('#canvas').getBoundingClientRect();"
            " return [b.x, b.y, b.width]; })()"
        )
        page.drag([(left + x * side, top + y * side) for x, y in ((0.25, 0.62), (0.25, 0.75))])
        page.run("document.querySelector('#edit-class').value = 8")
        page.screenshot(folder / "serving_paint.png")
        page.media(prefers_color_scheme="dark")
        page.click("#edit-go")
        page.wait("/kept pixels/.test(document.querySelector('#status').textContent)")
        page.run("scrollTo(0, 0)")
        page.screenshot(folder / "serving_edit_dark.png")
        page.media(prefers_color_scheme="light")
        page.resize(390, 844)
        page.run("scrollTo(0, 0)")
        page.screenshot(folder / "serving_narrow.png")
        unexpected = page.complaints
    if unexpected:
        raise RuntimeError(f"the page's console has {unexpected}")


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    header = [
        "clients",
        "requests",
        "malformed",
        "failures",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "images/s",
        "images a batch",
    ]
    rows = [
        [
            str(one["concurrency"]), str(one["requests"]), str(one["malformed"]), str(one["failures"]),
            *(f"{one[name]:.0f}" for name in ("p50", "p95", "p99")), f"{one['images_per_second']:.1f}",
            f"{one['mean_batch']:.1f}",
        ]
        for one in results["loads"]
    ]  # fmt: skip
    lines = [
        "# The service under load",
        "",
        f"{results['machine']}; {results['options']}",
        "",
        markdown_table(header, rows),
    ]
    lines += ["", f"Statuses: {', '.join(f'{n} × {status}' for status, n in sorted(results['statuses'].items()))}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported model, or run directory")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--concurrency", default="1,4,16", help="clients at once, a list (default: 1,4,16)")
    parser.add_argument("--requests", type=int, default=200, help="each (default: 200)")
    parser.add_argument("--malformed", type=float, default=0.1, help="share of nonsense (default: 0.1)")
    parser.add_argument("--max-batch", default="16", help="of the service (default: 16)")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also write screenshots of the page")
    add_output_options(parser)
    args = parser.parse_args(argv)
    options = ["--max-batch", args.max_batch, *(["--device", args.device] if args.device else [])]
    loads, statuses = [], Counter[str]()
    with service(args.model, *options) as address:
        load(address, 2, 8, 0.0)  # the first requests of a process are slower
        for clients in (int(part) for part in args.concurrency.split(",")):
            one, came = load(address, clients, args.requests, args.malformed)
            loads.append(one)
            statuses.update(came)
            print(one)
        if args.pictures is not None:
            take_pictures(address, args.pictures)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results = {
        "machine": describe(machine(device)), "options": " ".join(options),
        "loads": [asdict(one) for one in loads], "statuses": dict(statuses),
    }  # fmt: skip
    text = page(results)
    print(text)
    write_results(args, results, text)


if __name__ == "__main__":
    main()
