"""A configuration as the planner computes with it: plain numbers, resolved once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from hmar_mega.config import Config, TokenizerConfig
from hmar_mega.flops import train_flops_per_image
from hmar_mega.kernels import HEAD_DIMS
from hmar_mega.model.graphs import why_not_model
from hmar_mega.scales import ScaleSchedule

log = logging.getLogger(__name__)

#: Bytes of an element in each compute format.
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Workload:
    """What parameters, activations and work depend on, the layout apart.

    Attributes:
        width, hidden, heads: C, F and H.
        rows: of the class table, the unconditional class included.
        tokens, scales, pairs: N, K and attended pairs of a sample and head.
        vocabulary, latents: V and Z.
        masked: stage 2: only the mask branch is trained.
        backend: of attention; never `auto`.
        fused: blocks, head and cross-entropy run on the project's own kernels.
        graphs: blocks are replayed as CUDA graphs where the layout allows it.
        single_pass: under ZeRO 1, AdamW is the own one, in one pass.
        element: bytes of the compute format.
        fp8: the four large linears of a block are computed in FP8.
        tokenizer: parameters of the VQ-VAE, which every rank holds in float32.
        flops_per_image: of forward and backward pass, recomputation not counted.
    """

    depth: int
    width: int
    hidden: int
    heads: int
    rows: int
    shared_aln: bool
    mask_layers: int
    tokens: int
    scales: int
    pairs: int
    vocabulary: int
    latents: int
    masked: bool
    backend: str
    fused: bool
    graphs: bool
    single_pass: bool
    compute: str
    element: int
    ema: bool
    fp8: bool
    tokenizer: int
    flops_per_image: float

    @classmethod
    def of(cls, config: Config, device: str = "cuda") -> Workload:
        """Of a configuration.

        Args:
            device: "cuda" for GPUs with Triton, on which the own kernels are taken as the model takes them, or "cpu".
        """
        model, scales, tokenizer = config.model, config.schedule.scales, config.tokenizer
        fused, backend = device == "cuda", model.attention.backend
        if backend == "auto":  # as `model.attention.chosen_backend`, which takes tensors
            backend = "triton" if fused and model.head_dim in HEAD_DIMS else "sdpa"
        return cls(
            depth=model.depth,
            width=model.resolved_width,
            hidden=model.ffn_width,
            heads=model.resolved_heads,
            rows=model.num_classes + 1,
            shared_aln=model.shared_aln,
            mask_layers=model.resolved_mask_layers,
            tokens=scales.num_tokens,
            scales=scales.num_scales,
            pairs=scales.attended_pairs(model.attention.pattern),
            vocabulary=tokenizer.codebook_size,
            latents=tokenizer.latent_channels,
            masked=config.stage.name == "masked",
            backend=backend,
            fused=fused,
            graphs=why_not_model(config, device) is None,
            single_pass=fused and config.precision.compute == "bf16" and config.optim.impl in ("auto", "triton"),
            compute=config.precision.compute,
            element=ELEMENT[config.precision.compute],
            ema=getattr(config.optim, "ema_decay", None) is not None,
            fp8=config.precision.fp8 != "none",
            tokenizer=tokenizer_elements(tokenizer, scales),
            flops_per_image=train_flops_per_image(config),
        )

    @property
    def first_trained(self) -> int:
        """Number of the first layer with weight gradients."""
        return self.depth - self.mask_layers if self.masked else 0


def with_tokenizer(config: Config) -> Config:
    """The configuration with the architecture of the trained tokenizer it names, as training takes it.

    Planning does without the tokenizer where it is not at hand: then the sizes written in the configuration count.
    """
    path = config.tokenizer.path
    if path is None:
        return config
    if not Path(path).is_dir():
        log.warning("tokenizer.path=%s is not here: planning with the tokenizer sizes of the configuration", path)
        return config
    from hmar_mega.tokenizer.model import MultiScaleVQVAE

    trained = MultiScaleVQVAE.load(Path(path)).config
    return config.model_copy(update={"tokenizer": trained.model_copy(update={"path": path})})


@cache
def tokenizer_elements(config: TokenizerConfig, scales: ScaleSchedule) -> int:
    """Parameters of the whole VQ-VAE, built without memory."""
    from hmar_mega.tokenizer.model import MultiScaleVQVAE

    with torch.device("meta"):
        return sum(p.numel() for p in MultiScaleVQVAE(config, scales).parameters())
