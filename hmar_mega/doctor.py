"""`hmar-mega doctor`: what this machine has, what is missing and what that costs, and what its GPU computes rightly."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.specifiers import SpecifierSet

from hmar_mega.doctor_cluster import inspect_cluster
from hmar_mega.doctor_item import Item
from hmar_mega.probe import Check, Machine, check_all, format_checks, look_at_machine
from hmar_mega.versions import SUPPORTED

#: Below this much /dev/shm the loaders and NCCL of one node run short.
ENOUGH_SHARED_MEMORY = 1 << 30

#: Below this much free disk hardly a checkpoint fits.
ENOUGH_DISK = 10 << 30

#: Package → the module to import, and what cannot be done without it.
PACKAGES = {
    "torch": ("torch", "anything"),
    "megatron-core": ("megatron.core", "training"),
    "deepspeed": ("deepspeed", "training"),
    "webdataset": ("webdataset", "writing shards"),
    "transformer-engine": ("transformer_engine.pytorch", "FP8 and attention.backend=te; needs a GPU"),
    "triton": ("triton", "GPU kernels; comes with GPU builds of torch"),
}


def examine(json_wanted: bool = False) -> str:
    """The report on this machine, as tables or as JSON."""
    machine = look_at_machine()
    items = [*inspect_software(), *inspect_hardware(machine), *inspect_cluster()]
    checks = check_all(machine)
    return as_json(machine, items, checks) if json_wanted else as_text(items, checks)


def inspect_software() -> list[Item]:
    """Python and the packages, each imported; what they print and warn of meanwhile is not part of the report."""
    with _silence():
        return [Item("Python", platform.python_version()), *(_package(name) for name in PACKAGES)]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _package(name: str) -> Item:
    module, purpose = PACKAGES[name]
    wanted = SUPPORTED.get(name)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Item(name, "-", "missing", f"without it: no {purpose}")
    try:
        importlib.import_module(module)
    except Exception as err:  # libraries of GPUs raise whatever their loaders raise
        return Item(name, version, "missing", f"cannot be imported ({_first_line(err)}); without it: no {purpose}")
    if wanted is not None and not SpecifierSet(wanted).contains(version.split("+")[0], prereleases=True):
        return Item(name, version, "warning", f"tested is {name}{wanted}")
    return Item(name, version)


def inspect_hardware(machine: Machine) -> list[Item]:
    """GPU, NCCL, cores, disk and shared memory."""
    items = []
    if machine.gpu is None:
        items.append(Item("GPU", "-", "missing", "no CUDA GPU is visible: everything runs on the CPU, small and slow"))
    else:
        assert machine.capability is not None
        memory = torch.cuda.get_device_properties(0).total_memory
        version = ".".join(map(str, machine.capability))
        count = torch.cuda.device_count()
        items.append(Item("GPU", f"{count} × {machine.gpu}, {_size(memory)}, compute capability {version}"))
        items.append(Item("cuDNN", str(machine.cudnn)))
    if dist.is_nccl_available() and torch.cuda.is_available():
        items.append(Item("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        items.append(Item("NCCL", "-", "missing", "several processes talk over gloo, on the CPU"))
    items.append(Item("CPU cores", str(len(os.sched_getaffinity(0)))))
    free = shutil.disk_usage(Path.cwd()).free
    low = free < ENOUGH_DISK
    items.append(
        Item("free disk here", _size(free), "warning" if low else "ok", "checkpoints may not fit" if low else "")
    )
    items.append(_shared_memory(Path("/dev/shm")))
    return items


def _shared_memory(folder: Path) -> Item:
    if not folder.is_dir():
        return Item(str(folder), "-", "missing", "several processes on one machine need it; mount a tmpfs there")
    total = shutil.disk_usage(folder).total
    if total < ENOUGH_SHARED_MEMORY:
        advice = "small for several processes; in a container start it with --shm-size=8g or --ipc=host"
        return Item(str(folder), _size(total), "warning", advice)
    return Item(str(folder), _size(total))


def as_text(items: list[Item], checks: list[Check]) -> str:
    """The two tables."""
    rows = [("", "found", "", "")] + [(item.name, item.value, item.status, item.advice) for item in items]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
    title = "Attention and FP8 kernels, run on fixed samples against float32 (relative errors):"
    return "\n".join([*lines, "", title, format_checks(checks)])


def as_json(machine: Machine, items: list[Item], checks: list[Check]) -> str:
    """The same for programs."""
    tree = {
        "machine": dataclasses.asdict(machine),
        "items": [dataclasses.asdict(item) for item in items],
        "kernels": [dataclasses.asdict(done) for done in checks],
    }
    return json.dumps(tree, indent=1)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).split("\n")[0]
