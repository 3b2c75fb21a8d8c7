"""`hmar-mega tokenizer eval`: what a tokenizer makes of held-out images, in figures and as a grid to look at.

Axes: B images, R image side, K scales, V codes.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmar_mega.data.image_loader import ImageLoader
from hmar_mega.data.images import Augment
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.progress import track
from hmar_mega.tokenizer.measures import (
    FeatureMoments,
    bits_per_pixel,
    entropy_bits_per_pixel,
    frechet_distance,
    psnr_of_each,
    ssim_of_each,
)
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.objective import to_device
from hmar_mega.tokenizer.perceptual import EfficientNetFeatures, PerceptualDistance, enlarged, load_efficientnet
from hmar_mega.tokenizer.sheet import SHOWN_IMAGES, partial_reconstructions, png, reconstruction_sheet

log = logging.getLogger(__name__)

#: Images (B, 3, R, R) in [−1, 1] → features (B, D).
Features = Callable[[Tensor], Tensor]


def load_features(name: str, network: EfficientNetFeatures | None) -> Features | None:
    """What the Fréchet distance is taken in: `efficientnet`, `none`, or `package.module:function`.

    Args:
        name: the function is called once, without arguments, and must give a `Features`.
        network: EfficientNet-lite0 where it is loaded.

    Raises:
        UserError: when there is no such function.
    """
    if name == "none":
        return None
    if name == "efficientnet":
        model = network if network is not None else load_efficientnet()
        return lambda images: model.pooled(enlarged(images))
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ValueError("no colon")
        made: Features = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as err:
        raise UserError(
            f"--features {name}: {err}; use efficientnet, none, or package.module:function, a function that gives "
            "another one from images (B, 3, R, R) in [−1, 1] to features (B, D)"
        ) from None
    return made


@torch.no_grad()
def evaluate_tokenizer(
    model: MultiScaleVQVAE,
    images: Callable[[], Iterator[Tensor]],
    perceptual: nn.Module | None,
    features: Features | None,
    advance: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """All figures of one tokenizer.

    Args:
        model: in evaluation mode.
        images: gives batches (B, 3, R, R) in [−1, 1] on the model's device.
        perceptual: distance of two batches; None: no `perceptual`.
        features: None: no `rfid`.

    Returns:
        images, psnr and ssim (means over images), perceptual, rfid, psnr_by_scales (of the first 1 … K scales), usage,
        perplexity (a number a scale), usage_any, bits_per_pixel, entropy_bits_per_pixel, fingerprint, parameters.
    """
    schedule, codes = model.schedule, model.config.codebook_size
    counts = torch.zeros(schedule.num_scales, codes, device=model.quantizer.ema_vocab_hit.device)
    sums: dict[str, float] = {"ssim": 0.0, "perceptual": 0.0}
    partial_sums = torch.zeros(schedule.num_scales, dtype=torch.float64)
    real, fake, seen = FeatureMoments(), FeatureMoments(), 0
    for batch in images():
        tokens = model.encode(batch)
        partial = partial_reconstructions(model, tokens)
        rebuilt = partial[-1]
        partial_sums += torch.stack([psnr_of_each(p, batch).sum().cpu() for p in partial])
        sums["ssim"] += float(ssim_of_each(rebuilt, batch).sum())
        if perceptual is not None:
            sums["perceptual"] += float(perceptual(rebuilt, batch).sum())
        if features is not None:
            real.add(features(batch))
            fake.add(features(rebuilt))
        for k in range(schedule.num_scales):
            counts[k] += torch.bincount(tokens[:, schedule.span(k)].flatten(), minlength=codes)
        seen += len(batch)
        advance(len(batch))
    share = counts / counts.sum(1, keepdim=True)
    psnrs = [round(float(p), 3) for p in partial_sums / seen]
    result: dict[str, Any] = {
        "images": seen, "psnr": psnrs[-1], "ssim": round(sums["ssim"] / seen, 4),
        "perceptual": round(sums["perceptual"] / seen, 4) if perceptual is not None else None,
        "rfid": round(frechet_distance(real.moments(), fake.moments()), 3) if features is not None else None,
        "psnr_by_scales": psnrs, "patch_nums": list(schedule.patch_nums),
        "usage": [round(float(u), 4) for u in (counts > 0).float().mean(1)],
        "usage_any": round(float((counts > 0).any(0).float().mean()), 4),
        "perplexity": [round(float(p), 1) for p in torch.special.entr(share).sum(1).exp()],
        "bits_per_pixel": round(bits_per_pixel(schedule, codes, model.resolution), 4),
        "entropy_bits_per_pixel": round(entropy_bits_per_pixel(schedule, counts, model.resolution), 4),
        "codebook_size": codes, "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": model.fingerprint,
    }  # fmt: skip
    dims = real.moments()[0].numel() if features is not None else 0
    if seen <= dims:
        log.warning(
            "rFID of %d images in %d features is far too high in absolute terms (covariances of fewer images than "
            "features); compare it only with figures of the same images", seen, dims,
        )  # fmt: skip
    return result


def evaluate_folder(
    tokenizers: dict[str, Path],
    shards: Path,
    out: Path,
    count: int | None = None,
    batch_size: int = 32,
    augment: Augment = "none",
    device: torch.device | str = "cpu",
    perceptual: str = "efficientnet",
    features: str = "efficientnet",
    allow_upscaling: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluate tokenizers on the same image shards; write eval.json, eval.md and a grid a tokenizer into `out`.

    Args:
        tokenizers: folders by the name they are shown under.
        count: of the images, in stored order; default all.
        perceptual: `efficientnet` or `none`.
        features: see `load_features`.

    Raises:
        UserError: for folders that hold no tokenizer or no images, tokenizers of different resolutions, and images
            that cannot be used.
    """
    device = torch.device(device)
    models = {name: MultiScaleVQVAE.load(folder, device) for name, folder in tokenizers.items()}
    sides = {name: model.resolution for name, model in models.items()}
    if len(set(sides.values())) > 1:
        raise UserError(f"tokenizers of different resolutions cannot be compared on the same images: {sides}")
    reader = ShardReader(Path(shards), "images")
    total = min(count or len(reader), len(reader))
    loader = ImageLoader(
        reader, SampleOrder(len(reader), 0, shuffle=False), next(iter(sides.values())), augment, 0, 1, 1,
        workers=0, allow_upscaling=allow_upscaling,
    )  # fmt: skip
    needs_network = "efficientnet" in (perceptual, features)
    network = load_efficientnet().to(device) if needs_network else None
    distance = PerceptualDistance(network) if network is not None and perceptual == "efficientnet" else None
    found = load_features(features, network)

    def images() -> Iterator[Tensor]:
        for at in range(0, total, batch_size):
            yield to_device(loader.read(at, min(batch_size, total - at)), device)

    results = {}
    with track("evaluate", total * len(models), progress) as tally:
        for name, model in models.items():
            results[name] = evaluate_tokenizer(model, images, distance, found, tally.advance)
            shown = to_device(loader.read(0, min(SHOWN_IMAGES, total)), device)
            sheet = reconstruction_sheet(model, shown, error=True)
            write_atomic(out / f"grid-{name}.png", png(sheet, model.resolution))
    write_atomic(out / "eval.json", json.dumps(results, indent=1) + "\n")
    write_atomic(out / "eval.md", table(results) + "\n")
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown: a row a tokenizer, and a table of its scales each."""
    heads = [
        "tokenizer",
        "images",
        "PSNR dB",
        "SSIM",
        "perceptual",
        "rFID",
        "codes used",
        "bits/pixel",
        "entropy bits/pixel",
    ]
    keys = ["images", "psnr", "ssim", "perceptual", "rfid", "usage_any", "bits_per_pixel", "entropy_bits_per_pixel"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, result in results.items():
        cells = [
            "–" if result[key] is None else f"{result[key]:.1%}" if key == "usage_any" else str(result[key])
            for key in keys
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    for name, result in results.items():
        scales = [f"{p}×{p}" for p in result["patch_nums"]]
        lines += ["", f"| {name}: scales up to | {' | '.join(scales)} |", "|---" * (len(scales) + 1) + "|"]
        lines.append(f"| PSNR dB | {' | '.join(map(str, result['psnr_by_scales']))} |")
        lines.append(f"| codes used at it | {' | '.join(f'{u:.1%}' for u in result['usage'])} |")
        lines.append(f"| perplexity | {' | '.join(map(str, result['perplexity']))} |")
    return "\n".join(lines)
