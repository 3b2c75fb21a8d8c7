"""An exported model with its tokenizer: `load_model(DIR).generate(labels)`. Needs torch and safetensors alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmar_mega.checkpoint.sources import ExportReader, WeightSource
from hmar_mega.devices import pick_device
from hmar_mega.errors import UserError
from hmar_mega.inference.decoding import ImageDecoder
from hmar_mega.inference.graphs import ImageSampler
from hmar_mega.inference.sampler import SampleSettings, generate_tokens, guidance_strengths
from hmar_mega.inference.smooth import Smoothing
from hmar_mega.inference.weights import fill_model, new_model
from hmar_mega.model.hmar import HMAR
from hmar_mega.model.layers_quantized import Format
from hmar_mega.scales import ScaleSchedule, mask_schedule_for
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Formats of config.json: of float weights, and of quantized ones, which versions of before would take for floats.
CONFIG_FORMAT, QUANTIZED_FORMAT = 1, 2

#: What config.json must say.
CONFIG_KEYS = (
    "model", "patch_nums", "codebook_size", "latent_channels", "mask_branch", "mask_input", "sampling",
    "tokenizer_fingerprint",
)  # fmt: skip


class ImageModel:
    """A trained HMAR and its tokenizer on one device.

    Attributes:
        model: the transformer, in evaluation mode.
        tokenizer: the VQ-VAE, float32.
        settings: the export's `config.json`: sampling defaults, class names, where it came from.
        decoder: f̂ to pixels, in `decoder_dtype`.
        sampler: whole batches, on a GPU as CUDA graphs unless `graphs` is False; see `graphs.ImageSampler`.
    """

    def __init__(
        self,
        model: HMAR,
        tokenizer: MultiScaleVQVAE,
        settings: dict[str, Any],
        decoder_dtype: torch.dtype = torch.float32,
        graphs: bool = True,
        compile_decoder: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer.eval()
        self.settings = settings
        self.device = next(model.parameters()).device
        self.decoder = ImageDecoder(self.tokenizer, decoder_dtype, compile_decoder)
        self.sampler = ImageSampler(self.model, self.decoder, graphs)

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for."""
        return self.model.config.num_classes

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales."""
        return self.model.schedule

    @torch.inference_mode()
    def next_scale_logits(self, labels: Tensor, teacher_input: Tensor) -> Tensor:
        """Teacher-forced logits of the next-scale branch.

        Args:
            labels: (B,) int64 in [0, num_classes]; num_classes is the unconditional class.
            teacher_input: (B, N−1, Z), f̂ of the scales before, area-downsampled (`sequence.teacher_input`).

        Returns:
            (B, N, V) float32.
        """
        logits: Tensor = self.model(labels.to(self.device), teacher_input.to(self.device))
        return logits.transpose(0, 1)

    @torch.inference_mode()
    def masked_logits(self, labels: Tensor, teacher_input: Tensor, token_features: Tensor, mask: Tensor) -> Tensor:
        """Logits of the mask branch.

        Args:
            labels, teacher_input: as in `next_scale_logits`.
            token_features: (B, N−1, Z), φ_k(e_k)↓ of the tokens (`sequence.token_features`).
            mask: (B, N−1) bool, True where the token is to be predicted.

        Returns:
            (B, N, V) float32.

        Raises:
            UserError: when the model has no mask branch.
        """
        if not self.model.has_mask_branch:
            raise UserError(
                "this model has no mask branch: it was exported from stage 1; train stage.name=masked on it"
            )
        logits: Tensor = self.model(
            labels.to(self.device),
            teacher_input.to(self.device),
            token_features.to(self.device),
            mask.to(self.device),
            branch="masked",
        )
        return logits.transpose(0, 1)

    def generate(
        self,
        labels: Sequence[int] | Tensor,
        cfg_scale: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_schedule: Iterable[Iterable[int]] | None = None,
        mask_cfg: float | Sequence[float] | None = None,
        seed: int | Sequence[int] | Tensor = 0,
        batch_invariant: bool = False,
        negative_class: int | None = None,
        more_smooth: bool | Smoothing = False,
    ) -> Tensor:
        """Sample one image for every label.

        Args:
            labels: classes, one an image.
            cfg_scale, top_k, top_p, mask_cfg, negative_class: see `SampleSettings`; None takes the model's own.
            mask_schedule: tokens kept by each pass, for the first scales, the others being one pass. None takes the
                model's own; a model without mask branch always takes one pass a scale.
            seed: one number s, which gives image i the seed s + i, or one for each image. The random numbers of an
                image depend on its seed alone, not on its batch.
            batch_invariant: run every image alone, so that rounding cannot depend on the batch either; costs the
                whole gain of batching.
            more_smooth: mix codes, for pictures to look at; see `smooth.gumbel_codes`.

        Returns:
            (B, 3, H, W) float32 in [0, 1].

        Raises:
            UserError: for classes, seeds or schedules that do not exist.
        """
        chosen = self.sample_settings(cfg_scale, top_k, top_p, mask_schedule, mask_cfg, negative_class, more_smooth)
        classes = self.check_labels(labels)
        seeds = image_seeds(seed, len(classes))
        step = 1 if batch_invariant else max(1, len(classes))
        images = []
        for start in range(0, len(classes), step):
            own, own_seeds = classes[start : start + step], seeds[start : start + step].to(self.device)
            images.append(self.sampler(own, own_seeds, chosen)[1])
        return torch.cat(images)

    def generate_scales(
        self,
        labels: Sequence[int] | Tensor,
        seed: int | Sequence[int] | Tensor = 0,
        settings: SampleSettings | None = None,
    ) -> Tensor:
        """Images as they look after each scale: f̂ so far, decoded; the last is what `generate` gives.

        Args:
            labels, seed: as in `generate`.
            settings: default the model's own.

        Returns:
            (K, B, 3, H, W) float32 in [0, 1].
        """
        classes = self.check_labels(labels)
        seeds = image_seeds(seed, len(classes)).to(self.device)
        chosen = settings if settings is not None else self.sample_settings()
        features: list[Tensor] = []
        self.sampler.say_plain("the images after each scale were asked for, and a graph gives the last alone")
        generate_tokens(self.model, self.tokenizer.quantizer, classes, seeds, chosen, on_features=features.append)
        return torch.stack([self.to_images(f_hat) for f_hat in features])

    def sample_settings(
        self,
        cfg_scale: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_schedule: Iterable[Iterable[int]] | None = None,
        mask_cfg: float | Sequence[float] | None = None,
        negative_class: int | None = None,
        more_smooth: bool | Smoothing = False,
    ) -> SampleSettings:
        """Fill what is None from the model's own defaults, and check all of it; mask_cfg follows cfg_scale."""
        defaults = self.settings["sampling"]
        cfg_scale = defaults["cfg_scale"] if cfg_scale is None else cfg_scale
        top_k = defaults["top_k"] if top_k is None else top_k
        top_p = defaults["top_p"] if top_p is None else top_p
        cfg_scale = self._check_strengths("cfg_scale", cfg_scale)
        own_mask_cfg = mask_cfg is None
        mask_cfg = _mask_cfg(defaults, cfg_scale) if mask_cfg is None else self._check_strengths("mask_cfg", mask_cfg)
        strengths = [t for given in (cfg_scale, mask_cfg) for t in (given if isinstance(given, tuple) else (given,))]
        if not all(math.isfinite(t) for t in strengths) or min(*strengths, top_k) < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"cfg_scale={cfg_scale}, mask_cfg={mask_cfg}, top_k={top_k}, top_p={top_p}: allowed are finite "
                "cfg_scale ≥ 0 and mask_cfg ≥ 0, top_k ≥ 0 (0 keeps all) and 0 < top_p ≤ 1"
            )
        if not self.model.has_mask_branch:
            given: Any = [tuple(e) for e in mask_schedule] if mask_schedule is not None else []
            if any(len(e) > 1 for e in given):
                raise UserError("this model has no mask branch, so a mask_schedule with several passes cannot be run")
            if any(guidance_strengths(mask_cfg, self.schedule.num_scales)):
                raise UserError(f"this model has no mask branch, so mask_cfg={mask_cfg} guides nothing; leave it out")
        else:
            given = [tuple(e) for e in mask_schedule] if mask_schedule is not None else defaults["mask_schedule"]
        try:
            passes = mask_schedule_for(self.schedule, given)
        except ValueError as err:
            raise UserError(str(err)) from None
        if negative_class is not None:
            self.check_classes([negative_class])
        smoothing = more_smooth if isinstance(more_smooth, Smoothing) else Smoothing() if more_smooth else None
        settings = SampleSettings(
            cfg_scale, top_k, top_p, passes, mask_cfg, self.settings["mask_input"], negative_class, smoothing
        )
        _refuse_idle(settings, own_mask_cfg)
        return settings

    def _check_strengths(self, name: str, given: float | Sequence[float]) -> float | tuple[float, ...]:
        if not isinstance(given, Iterable):
            return given
        strengths = tuple(float(t) for t in given)
        if len(strengths) != self.schedule.num_scales:
            raise UserError(
                f"{name} has {len(strengths)} numbers for {self.schedule.num_scales} scales: give one number, which "
                f"rises from 0 at the first scale to {name} at the last, or the strength at every scale"
            )
        return strengths

    def check_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """Labels as (B,) int64 on the model's device; UserError for classes that do not exist."""
        return self.check_classes(labels).to(self.device)

    def check_classes(self, labels: Sequence[int] | Tensor) -> Tensor:
        """As `check_labels`, but left where they are: it does not touch the device."""
        classes = torch.as_tensor(labels, dtype=torch.int64).flatten()
        if not len(classes):
            raise UserError("no labels were given: give the class of at least one image")
        wrong = sorted({int(c) for c in classes if not 0 <= int(c) < self.num_classes})
        if wrong:
            raise UserError(
                f"class {', '.join(map(str, wrong))} is out of range: this model has {self.num_classes} classes, "
                f"0 to {self.num_classes - 1}"
            )
        return classes

    def to_images(self, f_hat: Tensor) -> Tensor:
        """Decode f̂ (B, Z, h, w) to images (B, 3, H, W) in [0, 1]."""
        return self.decoder(f_hat)


def load_model(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    decoder_dtype: torch.dtype = torch.float32,
    graphs: bool = True,
    compile_decoder: bool = False,
    quantize: Format | None = None,
) -> ImageModel:
    """Load an exported model (`hmar-mega export`, `hmar-mega quantize`).

    Args:
        folder: with model.safetensors, config.json and tokenizer/.
        device: default the first GPU, else the CPU.
        dtype: of the transformer. f̂ and the draws of tokens are float32 in any case.
        decoder_dtype: of the tokenizer's decoder.
        graphs: on a GPU, sample each batch size as one CUDA graph; see `graphs.ImageSampler`.
        compile_decoder: run the decoder through torch.compile.
        quantize: make weights of 8 bits of those of a float model, `int8` or `fp8`, the latter after drawing a few
            images to measure activations; see `quantize.quantized`. A model that was quantized stays so by itself.

    Raises:
        UserError: when the folder is no exported model, does not fit its own config, or is quantized already.
    """
    folder = Path(folder)
    device = pick_device(device)
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise UserError(
            f"{folder} is not an exported model ({err}); make one with: hmar-mega export RUN {folder}"
        ) from None
    if settings.get("format") != (QUANTIZED_FORMAT if "quantization" in settings else CONFIG_FORMAT):
        raise UserError(
            f"{folder}/config.json has format {settings.get('format')}; this version reads {CONFIG_FORMAT}, and "
            f"{QUANTIZED_FORMAT} of quantized models"
        )
    missing = [key for key in CONFIG_KEYS if key not in settings]
    if missing:
        raise UserError(f"{folder}/config.json lacks {', '.join(missing)}; export the model again")
    weights = ExportReader(folder)
    given = (settings, weights, folder, folder / "tokenizer", device, dtype, decoder_dtype, graphs, compile_decoder)
    model = build_model(*given)
    if quantize is None:
        return model
    from hmar_mega.inference.quantize import quantized

    return quantized(model, quantize)


def build_model(
    settings: dict[str, Any],
    source: WeightSource,
    folder: Path,
    tokenizer_folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    decoder_dtype: torch.dtype = torch.float32,
    graphs: bool = True,
    compile_decoder: bool = False,
) -> ImageModel:
    """The model that `settings`, an export's config.json, describes, with the weights of `source`.

    Args:
        folder: where it came from, for messages.
        decoder_dtype, graphs, compile_decoder: as in `load_model`.

    Raises:
        UserError: when tokenizer, settings and weights do not fit each other.
    """
    tokenizer = MultiScaleVQVAE.load(tokenizer_folder, device=str(device))
    if tokenizer.fingerprint != settings["tokenizer_fingerprint"]:
        raise UserError(
            f"{tokenizer_folder} has fingerprint {tokenizer.fingerprint}, but the model was trained on tokens of "
            f"{settings['tokenizer_fingerprint']}; put the tokenizer it was trained with back"
        )
    model = new_model(settings, folder)
    fill_model(model, source, folder, device, dtype)
    return ImageModel(model, tokenizer, settings, decoder_dtype, graphs, compile_decoder)


def _mask_cfg(defaults: dict[str, Any], cfg_scale: float | tuple[float, ...]) -> float | tuple[float, ...]:
    """The guidance of mask passes that goes with a guidance: `mask_cfg_ratio` of it.

    Exports of before that key hold `mask_cfg`, the product with their own cfg_scale.
    """
    ratio = defaults.get("mask_cfg_ratio")
    if ratio is None:
        product, own_cfg = defaults["mask_cfg"], defaults["cfg_scale"]
        if product and not own_cfg:
            return float(product)
        ratio = product / own_cfg if product else 0.0
    return tuple(ratio * t for t in cfg_scale) if isinstance(cfg_scale, tuple) else ratio * cfg_scale


def _refuse_idle(settings: SampleSettings, own_mask_cfg: bool) -> None:
    """Raise UserError where guidance that was asked for reaches no pass."""
    passes = settings.mask_schedule
    asked = settings.mask_strengths(len(passes))
    masked = [t for t, counts in zip(asked, passes, strict=True) if len(counts) > 1]
    if not own_mask_cfg and any(asked) and not any(masked):
        raise UserError(
            f"mask_cfg={settings.mask_cfg} would do nothing: mask_schedule has no mask pass at the scales it guides; "
            "leave it out, or give those scales several passes"
        )
    if settings.negative_class is not None and not any((*settings.strengths(len(passes)), *masked)):
        raise UserError(
            f"negative_class={settings.negative_class} would do nothing: no pass is guided at "
            f"cfg_scale={settings.cfg_scale}, mask_cfg={settings.mask_cfg}; leave it out, or give a cfg_scale above 0"
        )


def image_seeds(seed: int | Sequence[int] | Tensor, count: int) -> Tensor:
    """(count,) int64: s + i for one number s, or the given ones."""
    one = isinstance(seed, int | np.integer)
    given = [seed] if one else seed.flatten().tolist() if isinstance(seed, Tensor) else list(seed)
    values = [int(s) for s in given]
    wrong = [s for s in values if not 0 <= s < 2**62]
    if wrong:
        raise UserError(f"seed {wrong[0]} is out of range: use 0 to 2**62 − 1")
    if one:
        return torch.arange(count) + values[0]
    if len(values) != count:
        raise UserError(f"{len(values)} seeds for {count} images: give one number, or one for each image")
    return torch.tensor(values, dtype=torch.int64)
