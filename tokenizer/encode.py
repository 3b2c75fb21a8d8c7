"""From image shards to token shards: every image through the tokenizer once, so that training needs no pixels.

A token sample holds the ids of one or several crops of an image (`hmar_mega.data.tokens`): the K maps of integers, each
row-major, one after the other in the order of the scales. `patch_nums` in the folder's index says where to split;
`split_scales` does it. A shard of the output is a range of the input's samples, and is made whole by one process: any
number of them share the work, and a second start goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from hmar_mega.data.assembly import (
    WHOLE,
    Assembly,
    ShardJob,
    ShardRecord,
    gather,
    is_complete,
    open_assembly,
    plan_hash,
)
from hmar_mega.data.images import Augment, decode_sample, image_crops
from hmar_mega.data.index import ShardIndex, TokenFormat, read_index
from hmar_mega.data.reader import ImageSample, ShardReader
from hmar_mega.data.tars import Sample, write_shard
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.tokens import Storage, TokenCodec, bits_for
from hmar_mega.errors import UserError
from hmar_mega.progress import Tally, track
from hmar_mega.rng import Purpose, uniform
from hmar_mega.scales import ScaleSchedule

log = logging.getLogger(__name__)


class ImageTokenizer(Protocol):
    """What encoding needs of a tokenizer; `MultiScaleVQVAE` is one."""

    schedule: ScaleSchedule
    config: Any  #: has `codebook_size` and `downsample`

    @property
    def fingerprint(self) -> str:
        """Identifies the weights and settings that decide the tokens."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) float32 in [−1, 1] → tokens (B, N) int64."""
        ...


@dataclass(frozen=True)
class EncodeSettings:
    """How images are encoded.

    Attributes:
        batch_size: crops encoded at once.
        augment: "crop" takes crops of the image at 1.125 × resolution, "none" the largest centred square.
        crops: 1: the centre; more: that many crops of every image at places drawn from `crop_seed` and the number of
            the image, crop j the same whatever their number.
        storage: see `hmar_mega.data.tokens`.
        compute: of the tokenizer's convolutions; the search in the codebook is always float32.
        compile: compile the convolutions with torch.compile.
        workers: threads that decode images ahead.
        damaged: "stop" at an image that cannot be decoded, or "skip" it and list it in the index.
    """

    batch_size: int = 64
    augment: Augment = "none"
    crops: int = 1
    crop_seed: int = 0
    storage: Storage = "packed"
    compute: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    samples_per_shard: int = 16384
    workers: int = 2
    damaged: Literal["stop", "skip"] = "stop"

    def check(self) -> None:
        """Raise UserError for settings that cannot be."""
        for name in ("batch_size", "crops", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: use at least 1")
        if self.crops > 1 and self.augment == "none":
            raise UserError(f"crops={self.crops} with augment='none': all would be the same; use augment='crop'")


def encode_shards(
    shards: Path,
    tokenizer: ImageTokenizer,
    out: Path,
    settings: EncodeSettings | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    part: int = 0,
    parts: int = 1,
) -> ShardIndex | None:
    """Write the tokens of the image shards in `shards` into token shards in the folder `out`.

    Samples keep their order, keys and labels, whatever the batch size and the number of processes; the output is byte
    for byte reproducible wherever the tokenizer's arithmetic is.

    Args:
        tokenizer: on `device` already and in evaluation mode; a `MultiScaleVQVAE` for bf16 and compilation.
        part, parts: this process makes every `parts`-th shard, from `part` on; whoever is last puts all together.

    Returns:
        The index; None while other processes still have shards to make.

    Raises:
        UserError: when `shards` does not hold images, an image is damaged, or `out` is taken or cannot be written.
    """
    settings, out = settings or EncodeSettings(), Path(out)
    settings.check()
    reader = ShardReader(Path(shards), "images")
    tokens = _describe_tokens(tokenizer, settings)
    jobs = [
        ShardJob("", number, min(settings.samples_per_shard, len(reader) - first))
        for number, first in enumerate(range(0, len(reader), settings.samples_per_shard))
    ]
    sources = [shard.sha256 for shard in reader.index.shards]
    plan = plan_hash([tokens.model_dump(), settings.samples_per_shard, settings.damaged, sources])
    if is_complete(out, plan):
        log.info("%s is complete already", out)
        return read_index(out)
    own = jobs[part::parts]
    name = WHOLE if parts == 1 else f"{part + 1}/{parts}"
    begin = time.perf_counter()
    with track("encode", sum(job.count for job in own), progress) as tally:
        with open_assembly(out, plan, jobs, name) as assembly:
            missing = [job for job in own if assembly.find(job) is None]
            for job in missing:
                assembly.remove_leftovers(job)
            new = sum(job.count for job in missing)
            tally.already(sum(job.count for job in own) - new)
            if len(missing) < len(own):
                log.info("going on: %d of %d shards are there", len(own) - len(missing), len(own))
            work = _Encoding(reader, tokenizer, tokens, settings, device)
            for job in missing:
                work.make(assembly, job, job.number * settings.samples_per_shard, tally)
            complete = assembly.finish(lambda _, records: _index(reader, tokens, plan, records), _class_map(reader))
        rate = new / max(time.perf_counter() - begin, 1e-9)
        index = read_index(out) if complete else None
        tally.summary = _summary(index, out, tokens, tokenizer.schedule, new, rate)
    return index


def _describe_tokens(tokenizer: ImageTokenizer, settings: EncodeSettings) -> TokenFormat:
    codes = tokenizer.config.codebook_size
    return TokenFormat(
        patch_nums=tokenizer.schedule.patch_nums,
        codebook_size=codes,
        fingerprint=tokenizer.fingerprint,
        resolution=tokenizer.schedule.grid * tokenizer.config.downsample,
        crops=settings.crops,
        crop_seed=settings.crop_seed if settings.crops > 1 else None,
        storage=settings.storage,
        bits=bits_for(codes) if settings.storage == "packed" else 16,
        augment=settings.augment,
        compute=settings.compute,
    )


class _Encoding:
    """What the shards of one process have in common."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: ImageTokenizer,
        tokens: TokenFormat,
        settings: EncodeSettings,
        device: torch.device | str,
    ) -> None:
        self._reader, self._tokens, self._settings, self._device = reader, tokens, settings, torch.device(device)
        self._schedule = tokenizer.schedule
        self._images_a_batch = max(1, settings.batch_size // settings.crops)
        self._codec = TokenCodec(tokens)
        self._encode = _encoder(tokenizer, settings, self._device)

    def make(self, assembly: Assembly, job: ShardJob, first: int, tally: Tally) -> None:
        """Encode the samples `first` … `first + job.count − 1` into a shard, and record it."""
        skipped: list[tuple[str, str]] = []
        numbers = range(first, first + job.count)
        size = self._images_a_batch
        with contextlib.closing(map_ahead(self._load, numbers, self._settings.workers, ahead=size)) as loaded:
            samples = self._samples(loaded, size, skipped, tally)
            entry = write_shard(assembly.path(job), samples, tokens=self._tokens.model_dump())
        assembly.record(job, ShardRecord(entry, tuple(skipped)))

    def _samples(
        self,
        loaded: Iterable[tuple[ImageSample, Tensor | str]],
        size: int,
        skipped: list[tuple[str, str]],
        tally: Tally,
    ) -> Iterator[Sample]:
        for batch in _batches(loaded, size):
            skipped += [(sample.where, image) for sample, image in batch if isinstance(image, str)]
            usable = [(sample, image) for sample, image in batch if not isinstance(image, str)]
            if usable:
                ids = self._tokens_of(torch.cat([crops for _, crops in usable]))
                for (sample, _), rows in zip(usable, ids.reshape(len(usable), -1, ids.shape[1]), strict=True):
                    yield sample.key, sample.label, {self._codec.field: self._codec.encode(rows)}
            tally.advance(len(batch))

    def _load(self, number: int) -> tuple[ImageSample, Tensor | str]:
        """An image with its crops (k, 3, R, R), or what is wrong with it."""
        sample = self._reader.read_image(number)
        places = [(0.5, 0.5)]
        if self._settings.crops > 1:
            seed, position = torch.tensor(self._settings.crop_seed), torch.tensor([number])
            drawn = uniform(seed, position, Purpose.STORED_CROP, 2 * self._settings.crops)[0]
            places = [(across, down) for across, down in drawn.reshape(-1, 2).tolist()]
        try:
            image = decode_sample(sample)
        except UserError as err:
            if self._settings.damaged == "stop":
                raise
            log.warning("%s", err)
            return sample, str(err)
        return sample, image_crops(image, self._tokens.resolution, self._settings.augment, places)

    def _tokens_of(self, images: Tensor) -> np.ndarray:
        """Tokens (B, N); RuntimeError when the tokenizer breaks its own promise."""
        padding = 0
        if self._settings.compile:  # one shape: a last, smaller batch would be compiled anew
            padding = self._images_a_batch * self._settings.crops - len(images)
            images = torch.cat([images, images[-1:].expand(padding, -1, -1, -1)])
        with torch.no_grad():
            ids = self._encode(images.to(self._device, non_blocking=True))
        ids = ids[: len(ids) - padding] if padding else ids
        shape, codes = (len(images) - padding, self._schedule.num_tokens), self._tokens.codebook_size
        if tuple(ids.shape) != shape or ids.min() < 0 or ids.max() >= codes:
            raise RuntimeError(f"the tokenizer gave tokens {tuple(ids.shape)}, {shape} below {codes} were expected")
        return ids.cpu().numpy()


def _encoder(tokenizer: Any, settings: EncodeSettings, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, R, R) to tokens (B, N), in the precision asked for."""
    if settings.compute == "fp32" and not settings.compile:
        return tokenizer.encode  # type: ignore[no-any-return]
    from hmar_mega.precision import exact_float32

    latent = torch.compile(tokenizer.latent, dynamic=False) if settings.compile else tokenizer.latent
    lower = settings.compute == "bf16"

    def encode(images: Tensor) -> Tensor:
        with exact_float32(), torch.autocast(device.type, torch.bfloat16, enabled=lower):
            f = latent(images)
        with exact_float32():
            ids: Tensor = tokenizer.quantizer.encode(f.float())
        return ids

    return encode


def _index(reader: ShardReader, tokens: TokenFormat, plan: str, records: list[ShardRecord]) -> ShardIndex:
    shards, skipped, _ = gather(records)
    if not shards:
        raise UserError(f"none of the images in {reader.folder} could be encoded; the first: {skipped[0].reason}")
    samples = sum(shard.samples for shard in shards)
    return ShardIndex(
        kind="tokens",
        samples=samples,
        classes=reader.index.classes,
        tokens=tokens,
        shards=shards,
        skipped=skipped,
        plan=plan,
    )


def _class_map(reader: ShardReader) -> dict[str, str]:
    """The names of the classes go along with the tokens."""
    path = reader.folder / "classes.json"
    return {"classes.json": path.read_text()} if path.is_file() else {}


def _summary(
    index: ShardIndex | None, out: Path, tokens: TokenFormat, schedule: ScaleSchedule, new: int, rate: float
) -> str:
    speed = f"{new} encoded at {rate:,.0f} images/s"
    if index is None:
        return f"{speed}; the other processes are not done yet"
    crops = f"{tokens.crops} crops of " if tokens.crops > 1 else ""
    stored = sum(shard.bytes for shard in index.shards) / index.samples
    skipped = f"; {len(index.skipped)} skipped, listed in {out / 'index.json'}" if index.skipped else ""
    return (
        f"{index.samples} images as {crops}{schedule.num_tokens} tokens each in {len(index.shards)} shards at {out}: "
        f"{TokenCodec(tokens).sample_bytes:,} bytes an image ({tokens.bits} bits a token), {stored:,.0f} with the tar "
        f"around it{skipped}; {speed}"
    )


def split_scales(tokens: Tensor, schedule: ScaleSchedule) -> tuple[Tensor, ...]:
    """Tokens (…, N) → K tensors, that of scale k (…, p_k²)."""
    return torch.split(tokens, list(schedule.scale_lengths), dim=-1)


def _batches(
    items: Iterable[tuple[ImageSample, Tensor | str]], size: int
) -> Iterator[list[tuple[ImageSample, Tensor | str]]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
