"""The typed configuration tree of a run: sections, defaults, and what fits together.

`config_io` reads it from YAML files and `key=value` overrides.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hmar_mega.config_base import Section, one_of
from hmar_mega.config_data import DataConfig
from hmar_mega.config_precision import PrecisionConfig
from hmar_mega.config_tokenizer import Beta, TokenizerConfig, TokenizerTrainConfig
from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule, mask_schedule_for

__all__ = ["Config", "TokenizerConfig", "TokenizerTrainConfig"]


class AttentionConfig(Section):
    """How the tokens attend: `block_diagonal` is HMAR, `block_causal` is VAR."""

    pattern: Pattern = Field("block_diagonal", description="block_diagonal: HMAR; block_causal: VAR")
    backend: Literal["auto", "reference", "sdpa", "triton", "te"] = Field(
        "auto", description="auto: the fastest that is valid here; the log says which and why"
    )


class ModelConfig(Section):
    """The transformer. Depth sets everything (width 64·depth, heads = depth) unless overridden."""

    depth: int = Field(16, ge=1, le=128, description="layers")
    width: int | None = Field(None, ge=8, description="default 64·depth")
    heads: int | None = Field(None, ge=1, description="default depth")
    num_classes: int = Field(1000, ge=1, description="the unconditional class not counted")
    ffn_ratio: float = Field(4.0, gt=0, description="hidden width of the feed-forward block, by width")
    shared_aln: bool = Field(False, description="one AdaLN linear for all blocks and a bias for each, as d36-s has")
    drop_path_rate: float | None = Field(None, ge=0, lt=1, description="of the last layer; default 0.1·depth/24")
    gamma_init: float = Field(1e-3, gt=0, description="factor of the initial weights of the gates")
    mask_layers: int | None = Field(None, ge=1, description="default 8, or depth/2 below depth 16")
    attention: AttentionConfig = AttentionConfig()

    @property
    def resolved_width(self) -> int:
        """C."""
        return self.width if self.width is not None else 64 * self.depth

    @property
    def resolved_heads(self) -> int:
        """H."""
        return self.heads if self.heads is not None else self.depth

    @property
    def head_dim(self) -> int:
        """D = C / H."""
        return self.resolved_width // self.resolved_heads

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward block."""
        return int(self.resolved_width * self.ffn_ratio)

    @property
    def resolved_drop_path(self) -> float:
        """Drop-path rate of the last layer; it rises linearly from 0."""
        return self.drop_path_rate if self.drop_path_rate is not None else 0.1 * self.depth / 24

    @property
    def resolved_mask_layers(self) -> int:
        """Blocks of the mask branch."""
        if self.mask_layers is not None:
            return self.mask_layers
        return 8 if self.depth >= 16 else max(1, self.depth // 2)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.resolved_width % self.resolved_heads:
            fits = [h for h in range(1, self.resolved_width + 1) if self.resolved_width % h == 0 and h <= 64]
            raise ValueError(
                f"heads={self.resolved_heads} does not divide width={self.resolved_width}; "
                f"use one of {', '.join(map(str, fits))}"
            )
        if self.resolved_mask_layers > self.depth:
            raise ValueError(
                f"mask_layers={self.resolved_mask_layers} is more than depth={self.depth}; use 1 to {self.depth}"
            )
        return self


class ScheduleConfig(Section):
    """Image size and scales. Published resolutions know their `patch_nums`; others must give them."""

    resolution: int = Field(256, ge=4, description="side of the images in pixels")
    patch_nums: tuple[int, ...] | None = Field(
        None, description="sides of the token maps; default the published ones of the resolution"
    )
    mask_schedule: tuple[tuple[int, ...], ...] | None = Field(
        None, description="tokens kept by each sampling pass, for the first scales; the others take one pass"
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.patch_nums is None and self.resolution not in PATCH_NUMS:
            raise ValueError(
                f"resolution={self.resolution} has no published patch_nums (only {', '.join(map(str, PATCH_NUMS))} "
                "have); give schedule.patch_nums, for example [1, 2, 4]"
            )
        mask_schedule_for(self.scales, self.mask_schedule)
        return self

    @property
    def scales(self) -> ScaleSchedule:
        """The scale schedule; raises ValueError when `patch_nums` is illegal."""
        return ScaleSchedule(self.patch_nums if self.patch_nums is not None else PATCH_NUMS[self.resolution])

    @property
    def resolved_mask_schedule(self) -> tuple[tuple[int, ...], ...]:
        """The sampling passes of every scale."""
        return mask_schedule_for(self.scales, self.mask_schedule)


class StageConfig(Section):
    """What is trained: `next_scale` (stage 1) or `masked` (stage 2, from a stage-1 run in run.init_from)."""

    name: Literal["next_scale", "masked"] = Field(
        "next_scale", description="next_scale: stage 1; masked: stage 2, from run.init_from"
    )
    loss_weights: Literal["lognormal", "uniform"] = Field(
        "lognormal", description="of stage 1: log-normal over scales, as HMAR, or every token alike, as VAR"
    )
    label_drop: float = Field(0.1, ge=0, le=1, description="share of labels that become the unconditional class")
    mask_input: Literal["leak_free", "reference"] = Field(
        "leak_free",
        description="leak_free: masked codes are zeroed before upsampling; reference: as published, they leak",
    )


class OptimConfig(Section):
    """AdamW and its schedule: lr = base_lr · global_batch/256, warm-up, flat, then linear to final_ratio."""

    impl: Literal["auto", "triton", "torch", "te", "apex"] = Field(
        "auto", description="of AdamW; auto: the fastest that goes with precision, ZeRO stage and device"
    )
    base_lr: float = Field(1e-4, gt=0, description="learning rate for a batch of 256")
    epochs: float = Field(200, gt=0, description="that the schedule spans")
    max_steps: int | None = Field(None, ge=1, description="stop earlier; the schedule stays that of `epochs`")
    warmup_epochs: float | None = Field(None, ge=0, description="default epochs/50")
    warmup_start: float = Field(0.005, ge=0, le=1, description="share of the learning rate at the first step")
    flat_fraction: float = Field(0.05, ge=0, le=1, description="of the steps after warm-up, at full lr")
    final_ratio: float = Field(0.1, ge=0, le=1, description="share of the learning rate at the last step")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(
        0.05, ge=0, description="of matrices; biases, other vectors and the tables of positions and levels have none"
    )
    weight_decay_end: float | None = Field(None, ge=0, description="reached along a half cosine over all steps")
    clip: float = Field(2.0, gt=0, description="largest norm of the gradient")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights; 0.9999 is usual; default none"
    )
    max_bad_steps: int = Field(
        10, ge=1, description="stop after this many steps in a row whose gradients are not finite; each is skipped"
    )

    def check_impl(self, compute: str, zero_stage: int) -> None:
        """Raise ValueError where the implementation asked for does not go with precision or ZeRO stage."""
        if self.impl == "triton" and compute != "bf16":
            raise ValueError(f"optim.impl=triton is for precision.compute=bf16, not {compute}; use optim.impl=torch")
        if self.impl == "triton" and zero_stage != 1:
            raise ValueError(f"optim.impl=triton is for parallel.zero_stage=1, not {zero_stage}; use optim.impl=torch")
        if self.impl in ("te", "apex") and zero_stage == 3:
            raise ValueError(
                f"optim.impl={self.impl} counts its updates by call, of which parallel.zero_stage=3 makes several in a "
                "step; use optim.impl=torch"
            )


class ParallelConfig(Section):
    """How the model is spread over processes. The data-parallel size is what remains of the world size."""

    tensor_parallel: int = Field(1, ge=1, description="ranks that share every layer; divides the heads")
    sequence_parallel: bool = Field(False, description="also split activations along the sequence over tensor ranks")
    pipeline_parallel: int = Field(1, ge=1, description="stages, each with a run of the layers; needs zero_stage 1")
    virtual_pipeline_parallel: int = Field(
        1, ge=1, description="runs of layers a pipeline rank holds in turn (interleaved schedule): smaller bubble"
    )
    context_parallel: int = Field(1, ge=1, description="refused above 1")
    zero_stage: int = Field(1, ge=0, le=3, description="1 shards optimizer states, 2 also gradients, 3 also weights")
    cuda_graphs: bool = Field(False, description="replay the blocks as CUDA graphs in training, where they can be")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="in the backward pass: selective: norms, GELU and what attention copies; full: whole blocks"
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.pipeline_parallel > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage={self.zero_stage} cannot be used with pipeline_parallel={self.pipeline_parallel}: "
                "gradients and weights must stay whole between the micro-batches of a pipeline; use zero_stage=1, or "
                "pipeline_parallel=1"
            )
        if self.virtual_pipeline_parallel > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"virtual_pipeline_parallel={self.virtual_pipeline_parallel} interleaves the stages of a pipeline, of "
                "which there is one; set pipeline_parallel ≥ 2, or virtual_pipeline_parallel=1"
            )
        if self.context_parallel != 1:
            raise ValueError(
                f"context_parallel={self.context_parallel} is not supported: every scale attends within itself, so "
                "little is gained. For 1024 px use context_parallel=1 with tensor_parallel ≥ 2, sequence_parallel=true "
                "and recompute=full"
            )
        if self.zero_stage == 0:
            raise ValueError("zero_stage=0 keeps a full optimizer on every process; use zero_stage=1, 2 or 3")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "sequence_parallel=true splits the sequence over tensor-parallel ranks, of which there is one; "
                "set tensor_parallel ≥ 2, or sequence_parallel=false"
            )
        return self


class CheckpointConfig(Section):
    """When to save; every save is complete and atomic."""

    interval: int = Field(1000, ge=1, description="optimizer steps")
    keep_last: int = Field(2, ge=1, description="checkpoints that stay, besides the best")
    keep_every: int | None = Field(None, ge=1, description="checkpoints at multiples of so many steps stay for good")
    asynchronous: bool = Field(True, description="train on while a copy is written; the next save waits for it")
    verify: bool = Field(True, description="hash every file of the checkpoint that training goes on from")


class EvalConfig(Section):
    """Validation loss and sample grids during training."""

    interval: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="per data-parallel rank")
    num_samples: int | None = Field(None, ge=1, description="validation samples; default all, at most 50 000")
    grid_count: int = Field(16, ge=0, description="images of the sample grid; 0 draws none")
    cfg_scale: float = Field(1.5, ge=0, description="guidance of samples; exported models keep it, top_k and top_p")
    top_k: int = Field(900, ge=0, description="0 keeps all")
    top_p: float = Field(0.96, gt=0, le=1, description="keep tokens up to this probability")


class LoggingConfig(Section):
    """Where figures go."""

    interval: int = Field(10, ge=1, description="optimizer steps between lines")
    tensorboard: bool = Field(True, description="write events into RUN/tensorboard")
    wandb: Literal["off", "offline", "online"] = Field("off", description="offline: into RUN/wandb; online: also sent")
    wandb_project: str = Field("hmar-mega", description="project at wandb")

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false


class RunConfig(Section):
    """The run directory, its seed and what it starts from."""

    dir: str | None = Field(None, description="the run directory")
    seed: int = Field(0, ge=0, lt=2**31, description="of initialisation, of the order of data and of every draw")
    init_from: str | None = Field(None, description="run, checkpoint or exported model whose weights to start from")
    new_classes: bool = Field(False, description="start the class table afresh: fine-tuning on other classes")
    resume_from: str | None = Field(None, description="a checkpoint's name, such as step-00001000; default the latest")
    peer_timeout: float = Field(
        60, ge=0, description="seconds without a sign of life after which a process is given up as lost; 0 never"
    )
    hang_factor: float = Field(
        20, ge=0, description="a step that takes so many times the median of the last ones hangs: all end; 0 never"
    )
    hang_floor: float = Field(300, gt=0, description="seconds that a step may always take")
    resume: bool = Field(True, description="continue when the run directory already has a checkpoint")


class Config(Section):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    stage: StageConfig = StageConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.tokenizer.path is None:  # a trained tokenizer brings its own architecture
            self.schedule.scales.check_fits(self.schedule.resolution, self.tokenizer.downsample)
        if self.stage.name == "masked" and self.model.attention.pattern != "block_diagonal":
            raise ValueError(
                "stage.name=masked needs model.attention.pattern=block_diagonal: the mask branch predicts the tokens "
                "of a scale from that scale alone; a block_causal (VAR) model has stage next_scale only"
            )
        heads, tp = self.model.resolved_heads, self.parallel.tensor_parallel
        if heads % tp:
            raise ValueError(
                f"tensor_parallel={tp} does not divide the {heads} heads of depth {self.model.depth}; "
                f"use {one_of(d for d in range(1, heads + 1) if heads % d == 0)}"
            )
        if self.model.ffn_width % tp:
            raise ValueError(f"tensor_parallel={tp} does not divide the feed-forward width {self.model.ffn_width}")
        pp, vpp, depth = self.parallel.pipeline_parallel, self.parallel.virtual_pipeline_parallel, self.model.depth
        if pp * vpp > depth:
            raise ValueError(
                f"pipeline_parallel={pp} with virtual_pipeline_parallel={vpp} makes {pp * vpp} runs of layers of the "
                f"{depth} layers there are; use at most pipeline_parallel={max(1, depth // vpp)}"
                + (f" or virtual_pipeline_parallel={depth // pp}" if vpp > 1 and depth >= pp else "")
            )
        attention = self.model.attention
        if attention.backend == "te" and attention.pattern != "block_diagonal":
            raise ValueError(
                "model.attention.backend=te attends block-diagonally alone: Transformer Engine has no kernel for the "
                f"mask of {attention.pattern}; use another backend, such as sdpa"
            )
        self.optim.check_impl(self.precision.compute, self.parallel.zero_stage)
        self.precision.check_model(
            width=self.model.resolved_width, hidden=self.model.ffn_width, head_dim=self.model.head_dim,
            tensor_parallel=tp, pattern=attention.pattern, backend=attention.backend,
        )  # fmt: skip
        return self
