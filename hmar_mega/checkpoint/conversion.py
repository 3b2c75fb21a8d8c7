"""A model on its way between layouts: read from any of them under our names, merged, resized, and given settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hmar_mega.checkpoint import published
from hmar_mega.checkpoint.export import export_settings, portable
from hmar_mega.checkpoint.key_lists import check_keys, listed
from hmar_mega.checkpoint.published import Kind, ModelShape
from hmar_mega.checkpoint.published_files import WeightFile, check_space, map_safetensors
from hmar_mega.checkpoint.resize import resize_levels, resize_positions
from hmar_mega.checkpoint.shards import write_shard
from hmar_mega.checkpoint.sources import EMA, CheckpointReader, refuse_quantized
from hmar_mega.config import EvalConfig, ModelConfig
from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.files import cannot_write
from hmar_mega.model.hmar import HMAR
from hmar_mega.scales import Pattern, ScaleSchedule, mask_schedule_for

log = logging.getLogger(__name__)

#: Guidance, top-k and top-p of the published evaluations of HMAR, by depth (SPEC §6).
EVALUATION = {
    16: (1.7, 1000, 0.99),
    20: (1.9, 950, 0.99),
    24: (2.1, 900, 0.99),
    30: (1.6, 650, 0.99),
}

#: The published code runs its mask passes at this part of the guidance scale.
REFERENCE_MASK_CFG = 1e-6

#: No learned logarithm of a scale gets there: gradients end at ln 100 ≈ 4.6.
PLAUSIBLE_LOG_SCALE = 10


@dataclass(frozen=True)
class Model:
    """A transformer under our names.

    Attributes:
        where: the file or folder it comes from.
        tensors: mapped from files.
        shape: its sizes as a published model has them; None when they are other ones.
        patch_nums: the scales.
        pattern: how it attends.
        kind: published kind it was read from, or was imported from earlier; None for a model trained here.
        buffer: pattern of the attention mask in the published file, which for HMAR need not be how it attends.
        settings: config.json of a model of ours.
        tokenizer: folder where a model of ours says that its tokenizer is.
        names: what the file calls the tensors, where that differs from our names.
    """

    where: Path
    tensors: dict[str, Tensor]
    shape: ModelShape | None
    patch_nums: tuple[int, ...]
    pattern: Pattern
    kind: Kind | None = None
    buffer: Pattern | None = None
    settings: dict[str, Any] | None = None
    tokenizer: Path | None = None
    names: dict[str, str] = field(default_factory=dict)

    @property
    def next_branch(self) -> bool:
        """Whether it can predict the next scale."""
        return "head.linear.weight" in self.tensors

    @property
    def mask_branch(self) -> bool:
        """Whether it can predict masked tokens."""
        return "mask_embed" in self.tensors

    @property
    def parameters(self) -> int:
        """How many numbers it learned."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Classes, codebook size, latent channels."""
        head = self.tensors["head.linear.weight" if self.next_branch else "mask_head.linear.weight"]
        return (
            self.tensors["class_embed.weight"].shape[0] - 1,
            head.shape[0],
            self.tensors["word_embed.weight"].shape[1],
        )

    @property
    def depth(self) -> int:
        """Layers."""
        return 1 + max(int(n.split(".")[1]) for n in self.tensors if n.startswith(("blocks.", "mask_blocks.")))


def read_published(file: WeightFile, said: Kind | None = None) -> Model:
    """The model of a published file.

    Args:
        said: the kind that the person says it is.

    Raises:
        UserError: when it is none of the kinds, or not a whole one.
    """
    where, shapes = file.path, file.shapes
    found = published.recognise(shapes, where)
    if found == "vqvae":
        raise UserError(f"{where} holds a tokenizer, where a transformer is needed; give it as --tokenizer")
    next_scale = ("nvlabs-next-scale", "var")
    if said is not None and (said not in next_scale if found == "next-scale" else said != found):
        fits = " or ".join(next_scale) if found == "next-scale" else found
        raise UserError(f"{where} is not {said}: its keys are those of {fits}")
    kind: Kind = said if said is not None else "var" if found == "next-scale" else found  # type: ignore[assignment]
    shape = published.infer_shape(kind, shapes, file.model.get(published.LEVELS), where)
    layout = published.layout(kind, shape)
    wanted = {name: entry.shape for name, entry in layout.items()}
    check_keys(shapes, wanted, where, f"a {found} model of depth {shape.depth}")
    buffer = published.pattern_of(file.model[published.MASK_BUFFER], shape.schedule, where)
    if found == "next-scale" and said is None:
        causal = file.wrapper.endswith("var_wo_ddp") or (not file.wrapper and buffer == "block_causal")
        kind = "var" if causal else "nvlabs-next-scale"
    biased = [n for n, t in file.model.items() if n.endswith(published.ZERO_BIAS) and bool(t.ne(0).any())]
    if biased:
        raise UserError(
            f"{where}: {biased[0]} is not zero (or not a number), as the key bias of every published model is; this is "
            "another model, or the file is damaged"
        )
    tensors = published.to_ours(kind, shape, file.model)
    largest = max(float(t.max()) for name, t in tensors.items() if name.endswith(".log_scale"))
    if largest > PLAUSIBLE_LOG_SCALE:
        log.warning(
            "%s: attn.scale_mul_1H11 holds values up to %.3g; published files keep logarithms there, of at most about "
            "ln 100 = 4.6: are these linear scales?", where, largest,
        )  # fmt: skip
    pattern: Pattern = "block_causal" if kind == "var" else "block_diagonal"
    names = {entry.ours: name for name, entry in layout.items() if entry.ours is not None}
    return Model(where, tensors, shape, shape.patch_nums, pattern, kind, buffer, names=names)


def read_export(folder: Path) -> Model:
    """A model folder of ours."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as err:
        raise UserError(f"{folder} is not an exported model ({err})") from None
    refuse_quantized(folder, settings)
    return _ours(folder, map_safetensors(folder / "model.safetensors"), settings, folder / "tokenizer")


@contextmanager
def read_checkpoint(folder: Path, beside: Path, ema: bool = False) -> Iterator[Model]:
    """A canonical checkpoint, gathered in a temporary file beside the output so that memory never holds it.

    Args:
        beside: the output.
        ema: take the moving average of the weights; what was not trained has none and stays as it is.

    Raises:
        UserError: when it is damaged, has no moving average, or there is no room beside the output.
    """
    reader = CheckpointReader(folder)
    reader.verify()
    averaged = reader.averaged() if ema else set()
    config = parse_config(reader.state["config"])
    settings = export_settings(config, reader.state)
    settings["trained"]["ema"] = ema
    log.info(
        "%s of step %s of %s%s", "moving average" if ema else "weights", reader.state["step"], folder.parent.parent,
        "" if reader.state.get("finished", True) else ", which is unfinished",
    )  # fmt: skip
    where = beside.absolute().parent
    with ExitStack() as stack:
        try:
            where.mkdir(parents=True, exist_ok=True)
            # the temporary and what is written from it
            check_space(beside, 2 * 4 * sum(torch.Size(shape).numel() for shape in reader.shapes.values()))
            temporary = TemporaryDirectory(dir=where, prefix=f".{beside.name}.", ignore_cleanup_errors=True)
            path = Path(stack.enter_context(temporary)) / "model.safetensors"
            tensors = (
                reader.read(name, kind=EMA if name in averaged else "weight").contiguous() for name in reader.shapes
            )
            write_shard(path, list(reader.shapes.items()), tensors)
        except OSError as err:
            raise cannot_write(beside, err) from None
        tokenizer = Path(config.tokenizer.path) if config.tokenizer.path is not None else None
        yield _ours(folder, map_safetensors(path), settings, tokenizer)


def _check_folder(
    where: Path, tensors: dict[str, Tensor], config: ModelConfig, settings: dict[str, Any], patch_nums: tuple[int, ...]
) -> None:
    """Raise UserError unless the tensors of a folder are those of the model that its config.json describes."""
    with torch.device("meta"):
        model = HMAR(
            config, ScaleSchedule(patch_nums), settings["codebook_size"], settings["latent_channels"],
            mask_branch=bool(settings.get("mask_branch")),
        )  # fmt: skip
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    check_keys(found, wanted, where, f"the model of its config.json, depth {config.depth}")


def _ours(where: Path, tensors: dict[str, Tensor], settings: dict[str, Any], tokenizer: Path | None) -> Model:
    try:
        config = ModelConfig.model_validate(settings["model"])
        patch_nums = ScaleSchedule(tuple(settings["patch_nums"])).patch_nums
        standard = (
            config.resolved_width == 64 * config.depth
            and config.resolved_heads == config.depth
            and config.ffn_ratio == 4
        )
        shape = ModelShape(
            config.depth, config.num_classes, settings["codebook_size"], settings["latent_channels"], patch_nums,
            config.shared_aln, config.resolved_mask_layers,
        )  # fmt: skip
    except (ValidationError, KeyError, TypeError, ValueError) as err:
        raise UserError(f"{where}: its config.json is damaged ({err}); export the model again") from None
    settings = {**settings, "model": portable(config).model_dump(mode="json")}
    _check_folder(where, tensors, config, settings, patch_nums)
    origin = settings.get("published", {})
    return Model(
        where, tensors, shape if standard else None, patch_nums, config.attention.pattern,
        origin.get("kind"), origin.get("mask_buffer"), settings, tokenizer,
    )  # fmt: skip


def merge(next_scale: Model, masked: Model) -> Model:
    """A next-scale model and the masked one that was trained from it, as one with both branches.

    Raises:
        UserError: when they are not such a pair: what they share was frozen, so it must be the same.
    """
    pair = f"{next_scale.where} and {masked.where}"
    if next_scale.kind != "nvlabs-next-scale" or masked.kind != "nvlabs-masked":
        raise UserError(
            f"{pair} are {next_scale.kind} and {masked.kind}: a composite is made of nvlabs-next-scale and, as "
            "--masked, nvlabs-masked"
        )
    if next_scale.shape != masked.shape:
        raise UserError(f"{pair} are of different sizes: {next_scale.shape} and {masked.shape}")
    shared = next_scale.tensors.keys() & masked.tensors.keys()
    changed = sorted(n for n in shared if not torch.equal(next_scale.tensors[n], masked.tensors[n]))
    if changed:
        raise UserError(
            f"{pair} do not belong together: {len(changed)} of the {len(shared)} tensors that stage 2 leaves as they "
            f"were differ: {listed(changed, masked.where, 'changed')}"
        )
    theirs = {name: f"{key} of {masked.where}" for name, key in masked.names.items()}
    return replace(
        next_scale,
        tensors={**next_scale.tensors, **masked.tensors},
        kind="nvlabs-hmar",
        names={**theirs, **next_scale.names},
    )


def rescale(model: Model, patch_nums: tuple[int, ...]) -> Model:
    """The model for another schedule: positions and levels as `resize` says, all else as it was."""
    old, new = ScaleSchedule(model.patch_nums), ScaleSchedule(patch_nums)
    if old == new:
        return model
    tensors = dict(model.tensors)
    tensors["pos_embed"] = resize_positions(tensors["pos_embed"], old, new)
    tensors["level_embed"] = resize_levels(tensors["level_embed"], old, new)
    shape = None if model.shape is None else replace(model.shape, patch_nums=patch_nums)
    return replace(model, tensors=tensors, shape=shape, patch_nums=patch_nums)


def as_published(model: Model, kind: Kind) -> dict[str, Tensor]:
    """The tensors of a published file of that kind.

    Raises:
        UserError: when the model is of another kind.
    """
    if model.shape is None:
        raise UserError(
            f"{model.where} cannot be written as {kind}: published models have width 64·depth, `depth` heads and "
            "ffn_ratio 4, and this one has not"
        )
    wanted: Pattern = "block_causal" if kind == "var" else "block_diagonal"
    if model.pattern != wanted:
        raise UserError(
            f"{model.where} attends {model.pattern}, and {kind} models {wanted}: the same weights would mean another "
            f"model; use --to {default_kind(model)}"
        )
    if kind in ("nvlabs-hmar", "nvlabs-masked") and not model.mask_branch:
        raise UserError(f"{model.where} has no mask branch, which {kind} has; use --to nvlabs-next-scale")
    if kind != "nvlabs-masked" and not model.next_branch:
        raise UserError(f"{model.where} has a mask branch alone; give its next-scale model, and this one as --masked")
    own, usual = model.shape.mask_layers, published.default_mask_layers(model.shape.depth)
    if kind == "nvlabs-masked" and own != usual:
        raise UserError(
            f"{model.where} has {own} blocks in its mask branch, and an nvlabs-masked file does not "
            f"tell: of depth {model.shape.depth} it would be read back with {usual}; use --to nvlabs-hmar, which tells"
        )
    if kind in ("nvlabs-hmar", "nvlabs-masked") and (model.settings or {}).get("mask_input") == "leak_free":
        log.warning(
            "%s was trained with mask_input=leak_free; the published code feeds its mask passes the reference input",
            model.where,
        )
    buffer = model.buffer if model.buffer is not None else wanted
    wanted_names = {e.ours for e in published.layout(kind, model.shape).values() if e.ours is not None}
    missing = sorted(wanted_names - model.tensors.keys())
    if missing:
        raise UserError(
            f"{model.where} lacks {len(missing)} tensors of a {kind} model: {listed(missing, model.where, 'missing')}"
        )
    return published.to_published(kind, model.shape, model.tensors, buffer)


def default_kind(model: Model) -> Kind:
    """The published kind that holds all of the model."""
    if model.pattern == "block_causal":
        return "var"
    if not model.mask_branch:
        return "nvlabs-next-scale"
    return "nvlabs-hmar" if model.next_branch else "nvlabs-masked"


def our_settings(model: Model, downsample: int, fingerprint: str) -> dict[str, Any]:
    """config.json: of an imported model what SPEC §5 and §6 say of published ones, otherwise its own.

    Args:
        downsample: of the tokenizer.
        fingerprint: of the tokenizer.
    """
    schedule = ScaleSchedule(model.patch_nums)
    settings = dict(model.settings) if model.settings is not None else _imported_settings(model)
    if settings["patch_nums"] != list(model.patch_nums):
        passes = _passes(schedule, model.mask_branch)
        settings["sampling"] = {**settings["sampling"], "mask_schedule": passes}
    settings["patch_nums"] = list(model.patch_nums)
    settings["resolution"] = schedule.grid * downsample
    settings["tokenizer_fingerprint"] = fingerprint
    return settings


def _imported_settings(model: Model) -> dict[str, Any]:
    assert model.shape is not None
    shape = model.shape
    published_eval = None if model.kind == "var" else EVALUATION.get(shape.depth)
    usual = EvalConfig()
    cfg, top_k, top_p = published_eval or (usual.cfg_scale, usual.top_k, usual.top_p)
    other = shape.mask_layers != published.default_mask_layers(shape.depth)
    config = ModelConfig.model_validate(
        {
            "depth": shape.depth,
            "num_classes": shape.num_classes,
            "shared_aln": shape.shared_aln,
            "mask_layers": shape.mask_layers if other else None,
            "attention": {"pattern": model.pattern},
        }
    )
    return {
        "format": 1,
        "library": "hmar_mega",
        "model": config.model_dump(mode="json"),
        "patch_nums": list(model.patch_nums),
        "codebook_size": shape.codebook_size,
        "latent_channels": shape.latent_channels,
        "mask_branch": model.mask_branch,
        "mask_input": "reference",
        "sampling": {
            "cfg_scale": cfg,
            "top_k": top_k,
            "top_p": top_p,
            "mask_cfg_ratio": REFERENCE_MASK_CFG if model.mask_branch else 0.0,
            "mask_schedule": _passes(shape.schedule, model.mask_branch),
        },
        "classes": None,
        "trained": {},
        "published": {"kind": model.kind, "mask_buffer": model.buffer, "file": model.where.name},
    }


def _passes(schedule: ScaleSchedule, mask_branch: bool) -> list[list[int]]:
    """The published mask schedule, or one pass a scale."""
    return [list(entry) for entry in mask_schedule_for(schedule, None if mask_branch else [])]
