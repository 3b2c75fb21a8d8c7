"""The `data` section of the configuration: what is read, in which order, by whom, and what happens to damage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hmar_mega.batches import BatchPlan
from hmar_mega.config_base import Section, one_of


class BatchRampConfig(Section):
    """Smaller batches at the start of a run: `start` images a step, then `increment` more in each part of `images`."""

    start: int = Field(ge=1, description="images of the first steps")
    increment: int = Field(ge=1, description="divides global_batch_size − start")
    images: int = Field(ge=1, description="length of the ramp")


class MixtureConfig(Section):
    """A data set of several: out of Σ weights images that follow each other, `weight` are of this one."""

    path: str = Field(description="folder of shards")
    weight: int = Field(ge=1, le=1000, description="images of this set out of the sum of all weights")


class DataConfig(Section):
    """Shards and batches. `train`/`val` are folders of token shards; `images`/`images_val` of image shards."""

    train: str | None = Field(None, description="folder of token shards")
    val: str | None = Field(None, description="folder of token shards for validation")
    images: str | None = Field(None, description="folder of image shards: for tokenizers, and for encode=online")
    images_val: str | None = Field(None, description="folder of image shards for validation")
    mix: tuple[MixtureConfig, ...] = Field((), description="several sets in place of train (or images, encoded online)")
    encode: Literal["stored", "online"] = Field(
        "stored", description="online: train on images and images_val, through the tokenizer in every step"
    )
    global_batch_size: int = Field(768, ge=1, description="images of an optimizer step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="per data-parallel rank; default: as large as fits 32")
    batch_ramp: BatchRampConfig | None = None
    shuffle: Literal["global", "groups"] = Field(
        "global", description="groups: within group_shards shards at a time, which the page cache or `cache` can hold"
    )
    group_shards: int = Field(16, ge=1, description="shards of a group, with shuffle=groups")
    reader: Literal["index", "webdataset", "energon"] = Field(
        "index", description="the others are streams: resuming neither repeats nor continues their order"
    )
    stream_samples: int | None = Field(None, ge=1, description="images of an epoch of a stream without an index")
    workers: int = Field(2, ge=0, description="reader threads or processes a rank; 0 reads in the training thread")
    worker_kind: Literal["threads", "processes"] = Field(
        "threads", description="processes: for decoding many images, encoded online"
    )
    prefetch: int | None = Field(None, ge=1, description="steps read ahead; default twice the workers")
    pin_memory: bool | None = Field(None, description="page-locked batches; default where there is a GPU")
    on_damage: Literal["skip", "stop"] = Field(
        "skip", description="skip: another sample in place of one that cannot be read, counted"
    )
    max_damaged: float = Field(0.001, ge=0, le=1, description="skip: stop when more of the samples are damaged")
    read_timeout: float = Field(30, gt=0, description="seconds after which a read is given up as hanging")
    read_retries: int = Field(2, ge=0, description="of reads that hang or fail, with growing pauses")
    cache: str | None = Field(None, description="folder on a local disk for copies of shards from a network disk")
    cache_gb: float = Field(100, gt=0, description="size of that folder at most, in 10⁹ bytes")
    augment: Literal["crop", "none"] = Field(
        "crop",
        description="images: shorter side to 1.125 × resolution and a random crop; none: to resolution, centre crop",
    )

    @property
    def batch_plan(self) -> BatchPlan:
        """Images of every step."""
        ramp = self.batch_ramp
        if ramp is None:
            return BatchPlan.constant(self.global_batch_size)
        return BatchPlan(self.global_batch_size, ramp.start, ramp.increment, ramp.images)

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        single = self.images if self.encode == "online" else self.train
        if self.mix and single is not None:
            name = "images" if self.encode == "online" else "train"
            raise ValueError(f"mix and {name}={single} both say what to train on; leave one of them out")
        if self.reader == "index":
            if self.stream_samples is not None:
                raise ValueError("stream_samples is for reader=webdataset or energon: shards with an index are counted")
            return self
        for what, given, plain in (
            ("mix", self.mix, ()), ("encode", self.encode, "stored"), ("shuffle", self.shuffle, "global"),
            ("cache", self.cache, None),
        ):  # fmt: skip
            if given != plain:
                raise ValueError(f"reader={self.reader} has no {what}; use reader=index, or leave {what} out")
        return self

    @model_validator(mode="after")
    def _check_ramp(self) -> DataConfig:
        ramp = self.batch_ramp
        if ramp is None:
            return self
        missing = self.global_batch_size - ramp.start
        if missing <= 0 or missing % ramp.increment:
            fits = [i for i in range(1, missing + 1) if missing % i == 0]
            raise ValueError(
                f"batch_ramp from {ramp.start} by {ramp.increment} does not reach global_batch_size="
                f"{self.global_batch_size}; use a start below it"
                + (f" and an increment of {one_of(fits[-8:])}" if fits else "")
            )
        return self
