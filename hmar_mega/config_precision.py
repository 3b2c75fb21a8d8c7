"""The `precision` section of the configuration: number formats of training, and which models FP8 can compute.

What the machine at hand can compute is another question, which `probe` answers by trying.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hmar_mega.config_base import Section

#: What cuBLAS asks of every side of an FP8 product: a multiple of so many. Of rows (tokens) too, by which the product
#: for the weight's gradient strides.
FP8_MULTIPLE = 16

#: Largest learned scale of the queries at which attention is computed in FP8: where the probe has looked, and where the
#: relative error of the output is about 0.08.
FP8_MAX_Q_SCALE = 20.0

#: The head dim at which cuDNN trains FP8 attention on Hopper.
FP8_HEAD_DIM = 128


class PrecisionConfig(Section):
    """Number formats of training. Evaluation, sampling and all of AdaLN, norms and heads stay in `compute`."""

    compute: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="fp16, for GPUs without bf16, scales the loss dynamically"
    )
    fp8: Literal["none", "linears", "linears_and_attention"] = Field(
        "none",
        description="linears: qkv, proj, fc1, fc2; attention: also the larger scales, in layers of small q_scale",
    )
    fp8_recipe: Literal["delayed", "current"] = Field(
        "delayed", description="a tensor's FP8 scale: of the largest values of earlier steps, or of this very tensor"
    )
    fp8_amax_history: int = Field(1024, ge=1, le=8192, description="delayed: steps whose largest value sets the scale")
    fp8_margin: int = Field(0, ge=0, le=8, description="delayed: powers of two left free above the largest value")
    fp8_pad_head_dim: bool = Field(
        False, description="attention at a head dim below 128 zero-padded to it: twice the matrix work at 64"
    )

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        if self.fp8 != "none" and self.compute != "bf16":
            raise ValueError(
                f"fp8={self.fp8} keeps weights and everything outside its products in bf16, not "
                f"compute={self.compute}; set precision.compute=bf16, or precision.fp8=none"
            )
        return self

    def check_model(
        self, *, width: int, hidden: int, head_dim: int, tensor_parallel: int, pattern: str, backend: str
    ) -> None:
        """Raise ValueError, saying what to change, where FP8 cannot compute a model of these sizes.

        Args:
            width: C.
            hidden: of the feed-forward block.
            head_dim: D.
            pattern, backend: of `model.attention`.
        """
        if self.fp8 == "none":
            return
        for what, size in (("width", width), ("feed-forward width", hidden)):
            if size % (FP8_MULTIPLE * tensor_parallel):
                raise ValueError(
                    f"fp8={self.fp8} needs a {what} that is a multiple of {FP8_MULTIPLE} on each of the "
                    f"{tensor_parallel} tensor-parallel ranks, not {size}; change it or parallel.tensor_parallel, or "
                    "set precision.fp8=none"
                )
        if self.fp8 == "linears" or backend == "triton":  # the own kernels take every pattern and their head dims
            return
        if pattern != "block_diagonal":
            raise ValueError(
                f"fp8={self.fp8}: Transformer Engine's FP8 attention is for attention.pattern=block_diagonal, not "
                f"{pattern}; set model.attention.backend=triton, or precision.fp8=linears"
            )
        if backend not in ("auto", "te"):
            raise ValueError(
                f"fp8={self.fp8} is attention.backend=te or triton, not {backend}; set model.attention.backend to one "
                "of them, or precision.fp8=linears"
            )
        if head_dim > FP8_HEAD_DIM or (head_dim != FP8_HEAD_DIM and not self.fp8_pad_head_dim):
            way = "model.heads to width/128 (such a model cannot load the published weights)"
            if head_dim < FP8_HEAD_DIM:
                way = f"precision.fp8_pad_head_dim=true (zero-padded, at the cost of the padding), or {way}"
            raise ValueError(
                f"fp8={self.fp8}: cuDNN trains FP8 attention at head_dim {FP8_HEAD_DIM}, and this model has "
                f"{head_dim}; set {way}, or model.attention.backend=triton (own kernels), or precision.fp8=linears"
            )
