"""Many images into a folder, by several processes, resumably: `hmar-mega sample MODEL --num 50000 --out samples/`.

The images are cut into chunks; chunk c belongs to part c mod n. Image i is a pure function of (class i, seed i) and of
the batch it is sampled in, and a chunk is always cut into the same batches: a generation that was interrupted, or made
by any number of processes, has the same bytes as one that was not. `OUT/plan.json` holds all that the images depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmar_mega.errors import UserError
from hmar_mega.files import check_writable, create_atomic
from hmar_mega.inference.overlap import ChunkWriter, sample_batches
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.inference.sampler import SampleSettings
from hmar_mega.inference.storage import Chunk, Format, Store, open_store
from hmar_mega.progress import Tally, track

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"

#: Seconds between two lines of the log.
LOG_EVERY = 60.0


@dataclasses.dataclass(frozen=True)
class Request:
    """Which images: classes and seeds, (n,) int64 each."""

    labels: np.ndarray
    seeds: np.ndarray

    @classmethod
    def balanced(cls, num: int, classes: Sequence[int], seed: int) -> Request:
        """Image i of class classes[i mod C] from seed + i: as many of each class as possible, ± 1."""
        numbers = np.arange(num, dtype=np.int64)
        return cls(np.asarray(classes, dtype=np.int64)[numbers % len(classes)], seed + numbers)

    def chunks(self, size: int) -> list[Chunk]:
        """The images in chunks of `size`, the last one what is left."""
        return [
            Chunk(number, start, self.labels[start : start + size], self.seeds[start : start + size])
            for number, start in enumerate(range(0, len(self.labels), size))
        ]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation into a folder.

    Attributes:
        out: folder, new or of the same generation.
        form: of the result.
        chunk_size: images written at once.
        batch_size: images sampled at once.
        part, parts: which share of the chunks this process makes, 0 ≤ part < parts.
        class_names: written into image shards; empty: the model's own, else numbers.
    """

    model: ImageModel
    settings: SampleSettings
    request: Request
    out: Path
    form: Format = "npz"
    chunk_size: int = 500
    batch_size: int = 50
    part: int = 0
    parts: int = 1
    class_names: tuple[str, ...] = ()

    def run(self, show_progress: bool = True) -> str:
        """Make this part's missing chunks, and put everything together once all parts' are there.

        Returns:
            What is there now, in a sentence.

        Raises:
            UserError: when `out` is of another generation or cannot be written, or a chunk is damaged.
        """
        if min(self.chunk_size, self.batch_size) < 1 or not len(self.request.labels):
            raise UserError(
                f"{len(self.request.labels)} images in chunks of {self.chunk_size} and batches of {self.batch_size}: "
                "each must be at least 1"
            )
        self.model.check_labels(self.request.labels.tolist())
        self._agree_on_plan()
        chunks = self.request.chunks(self.chunk_size)
        store = open_store(self.out, self.form, self._class_names(), self._width)
        if store.finished():
            return f"{len(self.request.labels)} images are complete in {store.result}"
        own = chunks[self.part :: self.parts]
        missing = [chunk for chunk in own if not store.complete(chunk)]
        total = sum(len(chunk.labels) for chunk in own)
        done = total - sum(len(chunk.labels) for chunk in missing)
        if done:
            log.info("%d of %d images were there already", done, total)
        with track("sampling", total, show_progress, done) as tally:
            self._make(missing, store, tally, total)
        return self._conclude(chunks, store)

    def _make(self, missing: list[Chunk], store: Store, tally: Tally, total: int) -> None:
        begin, begun, logged = time.perf_counter(), tally.done, time.perf_counter()
        with ChunkWriter(store) as writer:
            for chunk, images in self._images(missing, tally):
                writer.put(chunk, images)
                now = time.perf_counter()
                if now - logged >= LOG_EVERY:
                    rate = (tally.done - begun) / (now - begin)
                    left = (total - tally.done) / rate / 60
                    log.info("images %d/%d | %.1f img/s | %.0f min left", tally.done, total, rate, left)
                    logged = now

    def _images(self, chunks: Sequence[Chunk], tally: Tally) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Each chunk with its images, (n, H, W, 3) uint8."""
        size = self.batch_size
        parts = [(chunk, start) for chunk in chunks for start in range(0, len(chunk.labels), size)]
        batches = ((chunk.labels[i : i + size], chunk.seeds[i : i + size]) for chunk, i in parts)
        done: list[np.ndarray] = []
        for (chunk, start), images in zip(parts, sample_batches(self.model, self.settings, batches), strict=True):
            done.append(images)
            tally.advance(len(images))
            if start + size >= len(chunk.labels):
                yield chunk, np.concatenate(done)
                done = []

    def _conclude(self, chunks: list[Chunk], store: Store) -> str:
        there = sum(store.complete(chunk) for chunk in chunks)
        if there < len(chunks):
            return (
                f"part {self.part + 1} of {self.parts} is complete; of all parts {there} of {len(chunks)} chunks are "
                f"there, and the last part to end puts them together"
            )
        store.finish(chunks)
        return f"{len(self.request.labels)} images in {store.result}"

    def _agree_on_plan(self) -> None:
        """Write `plan.json`, or compare with the one there, also where another part has just written it."""
        path, plan = self.out / PLAN_FILE, self._plan()
        if not path.exists():
            taken = self.out.exists() and (not self.out.is_dir() or any(self._visible()))
            if taken and not path.exists():  # another part writes its plan before anything else
                raise UserError(f"{self.out} exists and holds no generation; choose another --out or remove it first")
            check_writable(self.out)
            if create_atomic(path, json.dumps(plan, indent=1) + "\n"):
                return
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as err:
            raise UserError(f"{path} cannot be read ({err}); remove {self.out} and begin anew") from None
        differing = [key for key in plan if found.get(key) != plan[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"{self.out} is of another generation: {key} was {found.get(key)}, now it is {plan[key]}; use the "
                "settings it was begun with, or choose another --out"
            )

    def _visible(self) -> list[Path]:
        return [path for path in self.out.iterdir() if not path.name.startswith(".")]

    def _plan(self) -> dict[str, Any]:
        plan = {
            "format": self.form,
            "num": len(self.request.labels),
            "chunk_size": self.chunk_size,
            "batch_size": self.batch_size,
            "classes": hashlib.sha256(self.request.labels.tobytes()).hexdigest()[:16],
            "seeds": hashlib.sha256(self.request.seeds.tobytes()).hexdigest()[:16],
            "first_seed": int(self.request.seeds[0]),
            "model": model_digest(self.model),
            "device": device_name(self.model.device),
            **dataclasses.asdict(self.settings),
        }
        # rounding differs from that of the plain path in float32, which older plans mean
        if self.model.sampler.why_not(self.batch_size, self.settings) is None:
            plan["sampler"] = "graphs"
        if self.model.decoder.dtype != torch.float32:
            plan["decoder"] = str(self.model.decoder.dtype)
        if self.form == "shards":  # the only format that has them
            plan["class_names"] = hashlib.sha256(json.dumps(self._class_names()).encode()).hexdigest()[:16]
        comparable: dict[str, Any] = json.loads(json.dumps(plan))
        return comparable

    def _class_names(self) -> list[str]:
        count = self.model.num_classes
        return list(self.class_names or self.model.settings.get("classes") or [str(n) for n in range(count)])

    @property
    def _width(self) -> int:
        return self.model.schedule.grid * self.model.tokenizer.config.downsample


def device_name(device: torch.device) -> str:
    """The kind of device, on which rounding depends."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def model_digest(model: ImageModel) -> str:
    """16 hexadecimal digits that differ when model, number format or tokenizer do: 64 numbers of every weight, hashed.

    Every weight changes in a training step, so that a few numbers of each tell two checkpoints apart.
    """
    digest = hashlib.sha256(model.tokenizer.fingerprint.encode())
    digest.update(model.model.config.model_dump_json().encode())  # the same weights may attend in another way
    digest.update(str(model.model.schedule.patch_nums).encode())
    for name, weight in model.model.state_dict().items():  # quantized weights are buffers
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        few = weight.flatten()[:: max(1, weight.numel() // 64)][:64]
        digest.update(few.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
