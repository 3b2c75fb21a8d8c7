"""The published VQ-VAE file (`vae_ch160v4096z32.pth`, SPEC §2) as our tokenizer, and back; exact inverses.

Encoder and decoder have the same names in both worlds; only the quantizer's differ. The file tells the architecture,
but not the scales: those come from the model it goes with. GroupNorm has 32 groups there, which shapes do not show.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from hmar_mega.checkpoint.key_lists import LISTED, check_keys, listed
from hmar_mega.checkpoint.published import Shape, recognise
from hmar_mega.checkpoint.published_files import read_weights, tell_widened
from hmar_mega.config import TokenizerConfig
from hmar_mega.errors import UserError
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule
from hmar_mega.tokenizer.model import CONFIG_FILE, WEIGHTS_FILE, MultiScaleVQVAE

log = logging.getLogger(__name__)

USAGE = "quantize.ema_vocab_hit_SV"

_RENAMES = (
    (re.compile(r"^quantizer\.phi\.(\d+)\."), r"quantize.quant_resi.qresi_ls.\1."),
    (re.compile(r"^quantizer\.ema_vocab_hit$"), USAGE),
    (re.compile(r"^quantizer\."), "quantize."),
)


def published_name(ours: str) -> str:
    """The published name of one of our tokenizer's tensors."""
    for pattern, replacement in _RENAMES:
        if pattern.match(ours):
            return pattern.sub(replacement, ours)
    return ours


def open_tokenizer(path: Path, patch_nums: tuple[int, ...] | None = None) -> MultiScaleVQVAE:
    """The tokenizer in a folder of ours, or in a published file: a VQ-VAE, or the one of a training checkpoint.

    Args:
        patch_nums: the scales it is to have; None takes the folder's own, or the published ones of 256 px.

    Raises:
        UserError: when it holds no tokenizer, or one that does not go with the scales.
    """
    if path.is_dir():
        found = MultiScaleVQVAE.load(path)
        check_finite(found.state_dict(), path)
        return found if patch_nums is None else with_scales(found, patch_nums)
    file = read_weights(path)
    tensors = file.tokenizer or file.model
    if recognise(tensors, path) != "vqvae":
        raise UserError(f"{path} holds a transformer, not a tokenizer; give a VQ-VAE file or a tokenizer's folder")
    return import_tokenizer(tensors, path, patch_nums)


def is_tokenizer_folder(path: Path) -> bool:
    """Whether our training or `convert` wrote a tokenizer there."""
    return bool((path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file())


def import_tokenizer(
    tensors: Mapping[str, Tensor], where: object, patch_nums: tuple[int, ...] | None
) -> MultiScaleVQVAE:
    """Our tokenizer from the tensors of a published file; raises as `open_tokenizer`."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    config, scales = _infer(shapes, where)
    if patch_nums is None:
        if scales != len(PATCH_NUMS[256]):
            raise UserError(
                f"{where} has {scales} scales, and does not say which; give them, such as --patch-nums 1,2,4"
            )
        patch_nums = PATCH_NUMS[256]
    wanted = _shapes(config, ScaleSchedule(patch_nums))
    wanted[USAGE] = (scales, config.codebook_size)
    check_keys(shapes, wanted, where, "the VQ-VAE that its sizes tell of")
    check_finite(tensors, where)
    tell_widened(tensors.values(), where)
    with torch.device("meta"):
        model = MultiScaleVQVAE(config, ScaleSchedule(patch_nums))
    state = {ours: tensors[published_name(ours)].float() for ours in model.state_dict()}
    state["quantizer.ema_vocab_hit"] = _usage(state["quantizer.ema_vocab_hit"], len(patch_nums), where)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def export_tokenizer(model: MultiScaleVQVAE) -> dict[str, Tensor]:
    """The tensors of a published file."""
    return {published_name(name): t.detach() for name, t in model.state_dict().items()}


def with_scales(model: MultiScaleVQVAE, patch_nums: tuple[int, ...]) -> MultiScaleVQVAE:
    """The same weights for other scales, that is for another image size."""
    if model.schedule.patch_nums == patch_nums:
        return model
    with torch.device("meta"):
        other = MultiScaleVQVAE(model.config, ScaleSchedule(patch_nums))
    state = dict(model.state_dict())
    state["quantizer.ema_vocab_hit"] = _usage(state["quantizer.ema_vocab_hit"], len(patch_nums), "the tokenizer")
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise UserError, with names, when weights are NaN or infinite."""
    refuse_not_finite([name for name, t in tensors.items() if not is_finite(t)], where)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not tensor.is_floating_point() or bool(tensor.sum().isfinite()):  # one pass, and NaN and inf survive a sum
        return True
    return bool(tensor.isfinite().all())


def refuse_not_finite(names: list[str], where: object) -> None:
    """Raise UserError when there are such names."""
    if names:
        raise UserError(
            f"{where} has NaN or infinite values in {len(names)} tensors: {listed(names, where, 'not finite')}; "
            "training had diverged, or the file is damaged"
        )


def _usage(record: Tensor, scales: int, where: object) -> Tensor:
    """How often each scale used each code: a record and no weight, which starts afresh for another number of scales."""
    if record.shape[0] == scales:
        return record
    log.info("%s counts code usage at %d scales: the record starts afresh for %d", where, record.shape[0], scales)
    return record.new_zeros(scales, record.shape[1])


def _infer(shapes: Mapping[str, Shape], where: object) -> tuple[TokenizerConfig, int]:
    """Architecture and number of scales."""

    def size(name: str, dim: int = 0) -> int:
        if name not in shapes or len(shapes[name]) <= dim:
            raise UserError(f"{where} is not a whole VQ-VAE file: it lacks {name}, or holds it in another shape")
        return shapes[name][dim]

    base, levels = size("encoder.conv_in.weight"), _count(r"encoder\.down\.(\d+)\.", shapes)
    widths = [size(f"encoder.down.{i}.block.0.conv1.weight") for i in range(levels)]
    uneven = [w for w in widths if w % base]
    if uneven or not levels:
        raise UserError(f"{where} is no VQ-VAE of this kind: widths {widths} are no multiples of {base}")
    try:
        config = TokenizerConfig(
            base_channels=base,
            channel_mult=tuple(w // base for w in widths),
            encoder_res_blocks=_count(r"encoder\.down\.0\.block\.(\d+)\.", shapes),
            decoder_res_blocks=_count(r"decoder\.up\.0\.block\.(\d+)\.", shapes),
            latent_channels=size("quantize.embedding.weight", 1),
            codebook_size=size("quantize.embedding.weight"),
            num_phi=max(1, _count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.", shapes)),
            attention="encoder.mid.attn_1.norm.weight" in shapes,
        )
    except ValidationError as err:
        faults = "; ".join(str(e["msg"]) for e in err.errors()[:LISTED])
        raise UserError(f"{where} is no VQ-VAE of this kind: {faults}") from None
    return config, size(USAGE)


def _shapes(config: TokenizerConfig, schedule: ScaleSchedule) -> dict[str, Shape]:
    with torch.device("meta"):
        model = MultiScaleVQVAE(config, schedule)
    return {published_name(name): tuple(t.shape) for name, t in model.state_dict().items()}


def _count(pattern: str, names: Iterable[str]) -> int:
    """One more than the highest number that the pattern finds."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
