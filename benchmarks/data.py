"""Reading shards: ours beside webdataset, wids, torchdata and energon on the same tars, each in a process of its own.

    python benchmarks/data.py --folder /tmp/data --json data.json --markdown data.md

Every reader gives batches of the same decoded samples: images as (64, 3, 256, 256) uint8, tokens as (64, 680) int64.
The shards are made in `--folder` where they are missing. A reader whose library is not installed says so, and the rest
goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import add_output_options, choices, markdown_table, reason, write_results
from data_rivals import BATCH, RESOLUTION, RIVALS, Sizes, images_of

from hmar_mega.data.index import TokenFormat, read_index
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.samples import SampleSet
from hmar_mega.data.stream import StreamLoader, WorkerKind
from hmar_mega.data.tokens import TokenCodec
from hmar_mega.data.writer import open_shards
from hmar_mega.scales import PATCH_NUMS

KINDS = ("tokens", "images")
READERS = ("ours, threads", "ours, processes", *RIVALS)

#: What `hmar-mega train` reads of d16 on one H100, in images/s, to be well above.
NEEDED = 600

PACKED = TokenFormat(
    patch_nums=PATCH_NUMS[256], codebook_size=4096, fingerprint="benchmark", resolution=256, storage="packed", bits=12
)

TOKENS = sum(p * p for p in PACKED.patch_nums)

#: Resuming is measured with so many workers alone: rivals replay their stream for it.
RESUME_WORKERS = 2


def make_shards(folder: Path, kind: str, sizes: Sizes) -> Path:
    """Shards of noise, as JPEG files of 400 × 300 pixels or as packed tokens; kept for the next time."""
    out = folder / kind
    if out.exists():
        return out
    noise = np.random.RandomState(0)
    if kind == "tokens":
        codec = TokenCodec(PACKED)
        with open_shards(out, "tokens", ["0"], 4096, PACKED) as writer:
            for number in range(sizes.tokens):
                ids = noise.randint(0, 4096, (1, TOKENS))
                writer.write(f"{number:08d}", 0, {codec.field: codec.encode(ids)})
        return out
    from PIL import Image

    with open_shards(out, "images", ["0"], 256) as writer:
        for number in range(sizes.images):
            rough = Image.fromarray(noise.randint(0, 256, (75, 100, 3), dtype=np.uint8))
            file = io.BytesIO()
            rough.resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=88)
            writer.write(f"{number:08d}", 0, {"jpg": file.getvalue()})
    return out


def open_ours(folder: Path, kind: str, workers: int, worker_kind: WorkerKind, start: int = 0) -> Iterator[np.ndarray]:
    """Our loader, shuffled globally; `start` is the position to go on from."""
    reader = ShardReader(folder, "images" if kind == "images" else "tokens")
    samples = SampleSet([reader], images_of() if kind == "images" else None)
    loader = StreamLoader(
        samples, SampleOrder(len(reader), 0), BATCH, BATCH, 0, 1, start, workers, worker_kind, max(4, 2 * workers)
    )
    try:
        while True:
            (batch,) = next(loader)
            yield batch.pixels if kind == "images" else batch.tokens
    finally:
        loader.close()


def measure(name: str, folder: Path, kind: str, workers: int, seconds: float) -> dict[str, Any]:
    """Rates of one reader in this process: samples/s, MB/s of stored samples, first batch, resuming, memory, CPU."""
    index = read_index(folder)
    begin = time.perf_counter()
    open_reader: Callable[[int], Iterator[Any]]
    if name.startswith("ours"):
        worker_kind: WorkerKind = "threads" if name.endswith("threads") else "processes"

        def open_reader(start: int) -> Iterator[Any]:
            return open_ours(folder, kind, workers, worker_kind, start)
    else:
        open_rival = RIVALS[name]

        def open_reader(start: int) -> Iterator[Any]:
            return open_rival(folder, kind, workers, PACKED, start)

    batches = open_reader(0)
    shape = tuple(next(batches).shape)
    first = time.perf_counter() - begin
    expected = (
        (BATCH, 3, RESOLUTION, RESOLUTION) if kind == "images" else (BATCH, sum(p * p for p in PACKED.patch_nums))
    )
    if shape != expected:
        raise RuntimeError(f"{name} gave {shape}, {expected} were expected")
    for _ in range(2 * workers):  # what was read ahead while nobody was counting
        next(batches)
    process = psutil.Process()
    processor, begin, count = _processor(process), time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += BATCH
    took = time.perf_counter() - begin
    found = {
        "samples_per_second": count / took,
        "mb_per_second": count / took * sum(shard.bytes for shard in index.shards) / index.samples / 1e6,
        "first_batch_seconds": first,
        "memory_mb": _memory(process) / 1e6,
        "cpu_ms_per_sample": 1e3 * (_processor(process) - processor) / count,
    }
    batches.close()  # type: ignore[attr-defined]  # every reader is a generator
    if workers == RESUME_WORKERS:
        begin = time.perf_counter()
        next(open_reader(index.samples * 9 // 10 // BATCH * BATCH))
        found["resume_seconds"] = time.perf_counter() - begin
    return found


def _processor(process: psutil.Process) -> float:
    """CPU seconds of this process and of those it started."""
    return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])


def _memory(process: psutil.Process) -> int:
    """Bytes of this process and of those it started, what they share counted once (proportional set size)."""
    return sum(p.memory_full_info().pss for p in [process, *process.children(recursive=True)])


def run_apart(arguments: list[str], limit: float) -> dict[str, Any]:
    """`measure` in a fresh Python, or why it could not."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env={**os.environ})
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(lines[-1])


def page(results: list[dict[str, Any]], about: str) -> str:
    """The tables as Markdown."""
    parts = [f"Machine: {about}"]
    for kind in KINDS:
        found = [r for r in results if r["kind"] == kind]
        if not found:
            continue
        rows = []
        for r in found:
            if "error" in r:
                rows.append((r["reader"], str(r["workers"]), r["error"], *[""] * 5))
                continue
            keys = "samples_per_second", "mb_per_second", "first_batch_seconds", "resume_seconds", "memory_mb"
            figures = (f"{r[key]:,.{2 if 'seconds' in key else 0}f}" if key in r else "" for key in keys)
            rows.append((r["reader"], str(r["workers"]), *figures, f"{r['cpu_ms_per_sample']:.3f}"))
        header = ("reader", "workers", "samples/s", "MB/s", "first batch s", "resume s", "memory MB", "CPU ms/sample")
        parts.append(f"## {kind.capitalize()}\n\n{markdown_table(header, rows)}")
        best = max((r for r in found if r["reader"].startswith("ours") and "error" not in r), default=None,
                   key=lambda r: r["samples_per_second"])  # fmt: skip
        if best is not None and kind == "tokens":
            rate = best["samples_per_second"]
            parts.append(
                f"An H100 that trains d16 at {NEEDED} images/s is fed {rate / NEEDED:.0f} times over "
                f"({best['reader']}, {best['workers']} workers)."
            )
    return "\n\n".join(parts)


def main() -> None:
    """Measure, or with `--one` be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the shards are, or are made")
    parser.add_argument("--readers", default="all", help=f"comma-separated words of: {'; '.join(READERS)}")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--workers", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_output_options(parser)
    args = parser.parse_args()
    if args.one is not None:
        name, kind, workers = json.loads(args.one)
        try:
            print(json.dumps(measure(name, args.folder / kind, kind, workers, args.seconds)), flush=True)
        except Exception as err:
            print(json.dumps({"error": reason(err)}), flush=True)
        os._exit(0)  # readers leave threads and processes behind that may not end
    sizes = Sizes(args.images, args.tokens)
    results = []
    load = psutil.getloadavg()[0]
    about = (
        f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 1e9:.0f} GB, page cache warm; "
        f"{sizes.images:,} images, {sizes.tokens:,} token samples; load average {load:.1f} at the start"
    )
    wanted = [r for r in READERS if args.readers == "all" or any(w.strip() in r for w in args.readers.split(","))]
    for kind in choices(args.kinds, KINDS, "--kinds", parser):
        make_shards(args.folder, kind, sizes)
        for name in wanted:
            for workers in map(int, args.workers.split(",")):
                arguments = ["--folder", str(args.folder), "--seconds", str(args.seconds)]
                found = run_apart([*arguments, "--one", json.dumps([name, kind, workers])], 60 + 20 * args.seconds)
                results.append({"reader": name, "kind": kind, "workers": workers, **found})
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    text = page(results, about)
    print(text)
    write_results(args, {"machine": about, "results": results}, text)


if __name__ == "__main__":
    main()
