"""Time and memory of `hmar-mega convert`: a random composite file of a published size, in and out again.

    python benchmarks/convert_memory.py --depth 30 [--folder /scratch]

Each way runs in a process of its own, whose peak resident memory is printed beside the size of the file: `anonymous`
is what the process allocated, `peak` also counts pages of mapped files, which the system takes back when it needs them.
Needs three times the file on the disk (d30: 31 GB), and removes all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from hmar_mega.checkpoint.published import ModelShape, layout, mask_buffer
from hmar_mega.checkpoint.published_files import check_space
from hmar_mega.config import TokenizerConfig
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE

SCHEDULE = ScaleSchedule(PATCH_NUMS[256])


def main() -> None:
    """Make, convert, convert back, compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16, help="16, 20, 24 or 30 (default: 16)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    shape = ModelShape(args.depth, 1000, 4096, 32, SCHEDULE.patch_nums, False, 8)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-") as name:
        folder = Path(name)
        source, back = folder / "hmar.pth", folder / "back.pth"
        check_space(source, 3 * sum(4 * torch.Size(e.shape).numel() for e in layout("nvlabs-hmar", shape).values()))
        make(shape, source)
        MultiScaleVQVAE(TokenizerConfig(), SCHEDULE).save(folder / "vae")
        size = source.stat().st_size
        print(f"d{args.depth}: {size / 1e9:.2f} GB, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"{'':18} {'seconds':>8} {'MB/s':>6} {'anonymous GB':>13} {'peak GB':>8} {'peak/file':>10}")
        for what, given in (
            ("file → folder", [source, folder / "ours", "--tokenizer", folder / "vae"]),
            ("folder → file", [folder / "ours", back]),
        ):
            seconds, anonymous, peak = measure([str(a) for a in given])
            print(
                f"{what:18} {seconds:8.1f} {size / 1e6 / seconds:6.0f} {anonymous / 1e9:13.2f} {peak / 1e9:8.2f} "
                f"{peak / size:10.2f}",
                flush=True,
            )
        print("bitwise the same:", same(source, back))


def make(shape: ModelShape, path: Path) -> None:
    """A random composite file."""
    torch.manual_seed(0)
    tensors = {}
    for name, entry in layout("nvlabs-hmar", shape).items():
        tensors[name] = torch.randn(entry.shape) * 0.02
    tensors["lvl_1L"] = SCHEDULE.level_ids()[None]
    tensors["attn_bias_for_masking"] = mask_buffer(SCHEDULE, "block_diagonal")
    for name in tensors:
        if name.endswith("zero_k_bias"):
            tensors[name].zero_()
    torch.save(tensors, path)


def measure(arguments: list[str]) -> tuple[float, int, int]:
    """Seconds, most anonymous memory and most resident memory in bytes of one conversion."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hmar_mega", "convert", *arguments], stdout=subprocess.DEVNULL)
    anonymous = peak = 0

    def watch() -> None:
        nonlocal anonymous, peak
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = watched.memory_info()
            except psutil.NoSuchProcess:
                return
            anonymous = max(anonymous, memory.rss - memory.shared)
            peak = max(peak, memory.rss)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    watcher.join()
    if status:
        raise SystemExit(f"the conversion failed with status {status}")
    return time.perf_counter() - start, anonymous, peak


def same(first: Path, second: Path) -> bool:
    """Names, types, shapes and bytes of all tensors."""
    one, two = (torch.load(path, weights_only=True, mmap=True) for path in (first, second))
    return one.keys() == two.keys() and all(digest(one[name]) == digest(two[name]) for name in one)


def digest(tensor: torch.Tensor) -> str:
    """Of type, shape and bytes."""
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
