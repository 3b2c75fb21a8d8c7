"""The `tokenizer` section of the configuration: the multi-scale residual VQ-VAE and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hmar_mega.config_base import Section

#: A decay rate of Adam's moving averages.
Beta = Annotated[float, Field(ge=0, lt=1)]


class PerceptualConfig(Section):
    """Distance of reconstructions in the features of a network that was trained on ImageNet."""

    weight: float = Field(0.0, ge=0, description="0: no network is loaded")
    network: Literal["efficientnet", "lpips", "none"] = Field(
        "efficientnet", description="efficientnet: lite0, of the extra `perceptual`; lpips: VGG16, whose files you give"
    )
    vgg: str | None = Field(None, description="lpips: file of VGG16's weights (`features.0.weight` …)")
    lpips: str | None = Field(None, description="lpips: file of the linear weights; default all channels alike")

    @model_validator(mode="after")
    def _check(self) -> PerceptualConfig:
        if self.weight and self.network == "none":
            raise ValueError(f"perceptual.weight={self.weight} has no network; set network=efficientnet or weight=0")
        if self.weight and self.network == "lpips" and self.vgg is None:
            raise ValueError(
                "perceptual.network=lpips needs VGG16's weights, which are not part of this package: give their file "
                "as perceptual.vgg, or set network=efficientnet"
            )
        return self


class AdversarialConfig(Section):
    """A patch discriminator (PatchGAN, hinge loss) that learns beside the tokenizer."""

    weight: float = Field(0.0, ge=0, description="0: no discriminator")
    start: int = Field(0, ge=0, description="step from which the tokenizer sees it; it learns from half of that on")
    adaptive: bool = Field(True, description="scale the weight by the ratio of gradients at the reconstruction")
    channels: int = Field(64, ge=8, description="of the first layer; a multiple of 8")
    layers: int = Field(3, ge=1, le=5, description="that halve the map: a patch sees 16, 34, 70, 142 or 286 px")
    lr: float | None = Field(None, gt=0, description="default that of the tokenizer")
    regularisation: Literal["none", "r1", "lecam"] = Field("lecam", description="of the discriminator")
    regularisation_weight: float = Field(0.01, ge=0, description="r1: of ½·|∇D|² at real images, 10 is usual")

    @model_validator(mode="after")
    def _check(self) -> AdversarialConfig:
        if self.channels % 8:
            raise ValueError(f"adversarial.channels={self.channels} is no multiple of 8, the groups of its norms")
        return self


class TokenizerTrainConfig(Section):
    """Training of the multi-scale VQ-VAE on image shards."""

    steps: int = Field(2000, ge=1, lt=2**24, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="images of a step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="per process; default as large as fits, up to 32")
    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up; from there half a cosine down to 1 % of it")
    warmup_steps: int = Field(50, ge=0, description="over which the learning rate rises linearly")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights; the finished tokenizer is that average"
    )
    l1_weight: float = Field(0.2, ge=0, description="of the mean absolute error of pixels")
    l2_weight: float = Field(1.0, ge=0, description="of the mean squared error of pixels")
    vq_weight: float = Field(1.0, ge=0, description="of commitment and codebook, a mean over scales")
    entropy_weight: float = Field(0.0, ge=0, description="rewards codes that are chosen evenly at every scale")
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    truncate_prob: float = Field(
        0.0, ge=0, le=1, description="share of images that are decoded from a random number of the first scales"
    )
    codebook_init: Literal["samples", "kmeans"] = Field(
        "samples", description="the first codes: residuals of the first images, or their k-means centres"
    )
    init_images: int | None = Field(None, ge=1, description="images that the codebook starts from; default one batch")
    dead_code_steps: int = Field(100, ge=0, description="restart codes unused for this many steps; 0 never")
    restart_until: float = Field(0.8, ge=0, le=1, description="fraction of training after which no code is restarted")
    compile: bool = Field(False, description="torch.compile of encoder and decoder")
    channels_last: bool = Field(False, description="lay images out channels last, which convolutions of a GPU like")
    cache_mib: int = Field(2048, ge=0, description="keep decoded images in memory where all of them fit (augment none)")
    allow_upscaling: bool = Field(False, description="take images smaller than the resolution, enlarged")
    log_interval: int = Field(20, ge=1, description="steps between lines")


class TokenizerConfig(Section):
    """The multi-scale residual VQ-VAE (VQGAN convolutions, shared codebook, shared φ)."""

    path: str | None = Field(None, description="folder of a trained tokenizer")
    base_channels: int = Field(160, ge=1, description="of the first level")
    channel_mult: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4), description="channels of each level, by base_channels; each after the first halves the image"
    )
    encoder_res_blocks: int = Field(2, ge=1, description="residual blocks of a level")
    decoder_res_blocks: int = Field(3, ge=1, description="residual blocks of a level")
    latent_channels: int = Field(32, ge=1, description="Z, numbers of a latent cell")
    norm_groups: int = Field(32, ge=1, description="of GroupNorm")
    attention: bool = Field(True, description="self-attention at the lowest resolution and in the middle")
    codebook_size: int = Field(4096, ge=2, le=65536, description="V, number of codes")
    code_channels: int | None = Field(
        None, ge=1, description="factorised codebook: codes of so many numbers, spread linearly over latent_channels"
    )
    num_phi: int = Field(4, ge=1, description="convolutions φ that the scales share")
    phi_ratio: float = Field(0.5, ge=0, le=1, description="share r of the convolution: φ(x) = (1 − r)·x + r·conv(x)")
    using_znorm: bool = Field(False, description="cosine instead of L2 nearest neighbour")
    beta: float = Field(0.25, gt=0, description="weight of the commitment within the quantization loss")
    train: TokenizerTrainConfig = TokenizerTrainConfig()

    @property
    def downsample(self) -> int:
        """Pixels per latent cell: 2 for every level after the first."""
        return 1 << (len(self.channel_mult) - 1)

    @property
    def architecture(self) -> dict[str, object]:
        """What decides the tokens besides the weights; what has its default of later versions is left out."""
        tree = self.model_dump(mode="json", exclude={"train", "path"})
        if self.code_channels is None:
            del tree["code_channels"]
        return tree

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        bad = [self.base_channels * m for m in self.channel_mult if self.base_channels * m % self.norm_groups]
        if bad:
            raise ValueError(
                f"base_channels={self.base_channels} × channel_mult={self.channel_mult} gives {bad[0]} channels, which "
                f"norm_groups={self.norm_groups} does not divide; change one of the three"
            )
        if self.downsample not in (4, 8, 16):
            raise ValueError(
                f"channel_mult has {len(self.channel_mult)} levels (downsample {self.downsample}); use 3, "
                "4 or 5 levels for downsample 4, 8 or 16"
            )
        if self.code_channels is not None and self.code_channels >= self.latent_channels:
            raise ValueError(
                f"code_channels={self.code_channels} factorises nothing at latent_channels={self.latent_channels}; use "
                "fewer, or leave it out"
            )
        return self
