"""One way to spread a configuration over GPUs, and what follows from it by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import micro_batch_size


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of the grid of ranks, rank = pp_rank·(dp·tp) + dp_rank·tp + tp_rank, and what runs on it.

    Attributes:
        accumulation: micro-batches a step.
    """

    tensor: int
    sequence: bool
    pipeline: int
    virtual: int
    data: int
    zero: int
    recompute: str
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, config: Config, world: int) -> Layout:
        """What `config` asks for on `world` GPUs.

        Raises:
            UserError: when they do not fit together.
        """
        parallel = config.parallel
        tensor, pipeline = parallel.tensor_parallel, parallel.pipeline_parallel
        if world % (tensor * pipeline):
            raise UserError(
                f"tensor_parallel={tensor} × pipeline_parallel={pipeline} does not divide the {world} GPUs; use a "
                f"multiple of {tensor * pipeline} GPUs"
            )
        data = world // (tensor * pipeline)
        micro = micro_batch_size(config, data)
        accumulation = config.data.global_batch_size // (micro * data)
        return cls(
            tensor, parallel.sequence_parallel, pipeline, parallel.virtual_pipeline_parallel, data,
            parallel.zero_stage, parallel.recompute, micro, accumulation,
        )  # fmt: skip

    @property
    def world(self) -> int:
        """GPUs."""
        return self.tensor * self.pipeline * self.data

    @property
    def images(self) -> int:
        """Of a step."""
        return self.micro_batch * self.data * self.accumulation

    @property
    def sequence_parts(self) -> int:
        """Parts that norms and residuals are cut into along the sequence."""
        return self.tensor if self.sequence else 1

    @property
    def overrides(self) -> list[str]:
        """The settings that choose this layout."""
        return [
            f"parallel.tensor_parallel={self.tensor}",
            f"parallel.sequence_parallel={str(self.sequence).lower()}",
            f"parallel.pipeline_parallel={self.pipeline}",
            f"parallel.virtual_pipeline_parallel={self.virtual}",
            f"parallel.zero_stage={self.zero}",
            f"parallel.recompute={self.recompute}",
            f"data.micro_batch_size={self.micro_batch}",
        ]
