"""Raw samples from megatron-energon, an optional dependency that `data.reader=energon` names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from megatron import energon

from hmar_mega.data.damage import Damage


@energon.stateless
def _as_it_is(sample: Any) -> Any:
    return sample


class _AsItIs(energon.DefaultTaskEncoder):  # type: ignore[misc]
    """Gives the fields of a sample as bytes."""

    decoder = None
    cookers = (energon.Cooker(_as_it_is),)

    @energon.stateless
    def encode_sample(self, sample: Any) -> Any:
        """The sample itself."""
        return sample


def energon_samples(
    source: str, draw: random.Random, dp_rank: int, dp_size: int, buffer: int, note: Callable[[Damage, int], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, fields) of samples in energon's own order, without end; this rank's part of the shards.

    Args:
        source: a folder prepared with `energon prepare` as a CrudeWebdataset.
        draw: gives the seed.
        buffer: samples held for shuffling.
        note: told of every sample that energon could not read.
    """
    workers = energon.WorkerConfig(
        rank=dp_rank, world_size=dp_size, num_workers=0, seed_offset=draw.randrange(2**20),
        global_error_handler=lambda err, *_: note(Damage(f"{source}: {err}", "content"), 1),
    )  # fmt: skip
    dataset = energon.get_train_dataset(
        source, worker_config=workers, batch_size=None, max_samples_per_sequence=None, shuffle_buffer_size=buffer,
        task_encoder=_AsItIs(),
    )  # fmt: skip
    for sample in energon.get_loader(dataset):
        yield f"{source}/{sample['__shard__']}", sample
