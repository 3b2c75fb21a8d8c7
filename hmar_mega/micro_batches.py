"""How a step's batch is cut into micro-batches for so many ranks, and which sizes can be. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hmar_mega.config import Config
from hmar_mega.errors import UserError

#: Largest micro-batch that is chosen where none is configured.
LARGEST = 32

#: Micro-batches a pipeline stage is given where none are configured and the batch allows: a bubble of at most a fifth.
PER_STAGE = 4


def micro_batch_size(config: Config, data_parallel: int) -> int:
    """Samples a data-parallel rank runs at once: as configured, else the largest that fits, up to 32.

    On a pipeline the largest that leaves `PER_STAGE` micro-batches a stage, or as many as can be.

    Raises:
        UserError: when a batch of the run cannot be divided evenly; the sizes that can are named.
    """
    ranks, sizes, micro = data_parallel, config.data.batch_plan.sizes, config.data.micro_batch_size
    stages, virtual = config.parallel.pipeline_parallel, config.parallel.virtual_pipeline_parallel

    def fits(micro: int) -> bool:
        return all(s % (ranks * micro) == 0 and batches_fit(s // (ranks * micro), stages, virtual) for s in sizes)

    if micro is None:
        micro = _largest((m for m in range(1, LARGEST + 1) if fits(m)), min(sizes) // ranks, stages)
    for size in sizes:
        try:
            check_batch_sizes(size, micro, ranks)
        except UserError as err:
            if len(sizes) == 1:
                raise
            unit = micro * ranks
            raise UserError(
                f"data.batch_ramp has steps of {', '.join(map(str, sizes))} images, and {size} do not divide into "
                f"micro-batches of {micro} on {ranks} data-parallel ranks; use a start and an increment that are "
                f"multiples of {unit}" + ("" if micro == 1 else ", or a smaller micro_batch_size")
            ) from err
    if not fits(micro):
        share = math.gcd(*sizes) // ranks
        good = [m for m in range(1, share + 1) if fits(m)]
        raise UserError(
            f"micro_batch_size={micro} makes {[s // (ranks * micro) for s in sizes]} micro-batches a step, and "
            f"virtual_pipeline_parallel={virtual} needs a multiple of the {stages} pipeline stages; use "
            + (f"micro_batch_size={', '.join(map(str, good))}" if good else "virtual_pipeline_parallel=1")
        )
    return micro


def batches_fit(micro_batches: int, pipeline: int, virtual: int) -> bool:
    """Whether mcore's schedule takes so many micro-batches a step: interleaved, it wants a multiple of the stages."""
    return virtual == 1 or micro_batches % pipeline == 0


def _largest(fitting: Iterable[int], share: int, stages: int) -> int:
    """The largest micro-batch that keeps the stages of a pipeline busy, or else the one that comes nearest to it."""
    sizes = list(fitting) or [1]
    if stages == 1:
        return max(sizes)
    busy = [m for m in sizes if share // m >= PER_STAGE * stages]
    return max(busy) if busy else min(sizes)


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raise UserError, naming sizes that fit, unless `global_batch_size` divides into whole micro-batches a rank."""
    unit = dp_size * micro_batch_size
    if min(global_batch_size, unit) >= 1 and global_batch_size % unit == 0:
        return
    given = (
        f"global_batch_size={global_batch_size} does not divide into micro-batches of {micro_batch_size} "
        f"on {dp_size} data-parallel ranks"
    )
    if global_batch_size < 1 or micro_batch_size < 1:
        raise UserError(f"{given}; both sizes must be at least 1")
    micro_batches, cut = divmod(global_batch_size, micro_batch_size)
    ranks = [] if cut else [d for d in range(1, micro_batches + 1) if micro_batches % d == 0]
    near = [*[d for d in ranks if d < dp_size][-2:], *[d for d in ranks if d > dp_size][:2]]
    if near:
        given += f" ({' or '.join(map(str, near))} would fit)"
    below = global_batch_size // unit * unit
    fits = f"global_batch_size={f'{below} or ' if below else ''}{below + unit}"
    if global_batch_size % dp_size == 0:
        rank_size = global_batch_size // dp_size
        micro = [size for size in range(1, rank_size + 1) if rank_size % size == 0]
        fits += f", or micro_batch_size={', '.join(map(str, micro))}"
    raise UserError(f"{given}; use {fits}")
