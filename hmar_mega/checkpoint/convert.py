"""`hmar-mega convert`: published HMAR, VAR and VQ-VAE files into model folders of ours, and back.

    hmar-mega convert hmar-d16.pth models/d16 --tokenizer vae_ch160v4096z32.pth
    hmar-mega convert models/d16 hmar-d16.pth

Both ways are exact inverses. Nothing is held in memory whole: sources are mapped, and tensors written one by one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from hmar_mega.checkpoint import published
from hmar_mega.checkpoint.conversion import (
    Model,
    as_published,
    default_kind,
    merge,
    our_settings,
    read_checkpoint,
    read_export,
    read_published,
    rescale,
)
from hmar_mega.checkpoint.published import KINDS, Kind
from hmar_mega.checkpoint.published_files import (
    TOKENIZER_PREFIX,
    check_new,
    check_space,
    read_weights,
    tell_widened,
    write_pth,
)
from hmar_mega.checkpoint.published_tokenizer import (
    export_tokenizer,
    import_tokenizer,
    is_finite,
    is_tokenizer_folder,
    open_tokenizer,
    refuse_not_finite,
    with_scales,
)
from hmar_mega.checkpoint.shards import write_shard
from hmar_mega.checkpoint.sources import JSON_FILES, LATEST, complete_checkpoints, find_checkpoint
from hmar_mega.errors import UserError, refuse_options
from hmar_mega.files import new_folder
from hmar_mega.progress import track
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE

log = logging.getLogger(__name__)

OURS = "ours"
SUFFIXES = (".pth", ".pt")

#: Below so many bytes no bar is shown.
LARGE = 200_000_000


@dataclass(frozen=True)
class Converted:
    """What was done: from and to which layout, and what the model is."""

    source: str
    target: str
    keys: int
    parameters: int
    about: str


def convert(
    src: Path,
    out: Path,
    to: str | None = None,
    tokenizer: Path | None = None,
    masked: Path | None = None,
    patch_nums: tuple[int, ...] | None = None,
    kind: Kind | None = None,
    checkpoint: str | None = None,
    ema: bool = False,
) -> Converted:
    """Convert a model or a tokenizer.

    Args:
        src: a published file (a training checkpoint too), a model folder, a tokenizer's folder, a run or a checkpoint.
        out: new folder for `ours`, else new file. `src` is never changed.
        to: `ours`, or a published kind; default `ours` unless `out` ends in .pth, and then the kind that holds all.
        tokenizer: published VQ-VAE, training checkpoint or tokenizer's folder that a model of `ours` goes with.
        masked: a masked model to merge into the next-scale model `src`.
        patch_nums: another schedule to resize the model to.
        kind: what the file `src` is, where its keys and its attention mask would say otherwise.
        checkpoint: of a run: `latest` (default), `best`, or a name.
        ema: of a run or checkpoint: take the moving average of the weights.

    Raises:
        UserError: for bad input, options that would do nothing, a full disk and outputs that exist.
    """
    target = to or (None if out.suffix in SUFFIXES else OURS)
    if target == OURS and out.suffix in SUFFIXES:
        raise UserError(f"{out} looks like a file, and a model of ours is a folder; give a folder, or a --to")
    if patch_nums is not None:
        try:
            ScaleSchedule(patch_nums)
        except ValueError as err:
            raise UserError(f"--{str(err).replace('patch_nums=', 'patch-nums ')}") from None
    if not src.exists():
        raise UserError(f"{src} does not exist")
    if target != OURS:
        check_new(out)
    with ExitStack() as stack:
        embedded: dict[str, Tensor] = {}
        model: Model | MultiScaleVQVAE
        if src.is_dir():
            model = _open_folder(src, out, patch_nums, checkpoint, ema, stack)
        else:
            refuse_options(f"{src} is a file, with one set of weights", checkpoint=checkpoint, ema=ema)
            file = read_weights(src)
            if published.recognise(file.model, src) == "vqvae":
                model = import_tokenizer(file.model, src, patch_nums)
            else:
                model, embedded = read_published(file, kind), file.tokenizer
                if embedded and (target != OURS or tokenizer is not None):
                    why = "a published file of a model holds none" if target != OURS else f"{tokenizer} is taken"
                    log.info("the tokenizer in %s of %s is left out: %s", TOKENIZER_PREFIX[:-1], src, why)
        if isinstance(model, MultiScaleVQVAE):
            refuse_options(
                f"{src} is a tokenizer, and these are about models", tokenizer=tokenizer, masked=masked, kind=kind
            )
            return _write_tokenizer(model, "tokenizer folder" if src.is_dir() else "vqvae", out, target)
        if src.is_dir():
            refuse_options(f"{src} is a folder of ours, which says itself how its model attends", kind=kind)
        if target != OURS:
            why = f"{out} is to be a published file, which holds no tokenizer; convert that into a file of its own"
            refuse_options(why, tokenizer=tokenizer)
        if masked is not None:
            model = merge(model, read_published(read_weights(masked)))
        source = model.kind if model.settings is None and model.kind is not None else OURS
        own_scales = model.patch_nums
        if patch_nums is not None:
            model = rescale(model, patch_nums)
        if target == OURS:
            written = _write_ours(model, partial(_tokenizer_of, model, tokenizer, embedded, own_scales), out)
        else:
            target = _kind(target or default_kind(model))
            written = _write_published(model, target, out)
        return Converted(source, target, written, model.parameters, _describe(model))


def _describe(model: Model) -> str:
    classes, codes, _ = model.sizes
    scales = " ".join(map(str, model.patch_nums))
    return f"depth {model.depth}, {classes} classes, {codes} codes, patch_nums {scales}"


def _kind(name: str) -> Kind:
    for kind in KINDS:
        if kind == name:
            return kind
    raise UserError(f"{name!r} is no layout; use {OURS}, {', '.join(KINDS)}")


def _open_folder(
    src: Path,
    out: Path,
    patch_nums: tuple[int, ...] | None,
    checkpoint: str | None,
    ema: bool,
    stack: ExitStack,
) -> Model | MultiScaleVQVAE:
    """What a folder of ours holds; `stack` ends the life of its temporary files."""
    if is_tokenizer_folder(src):
        refuse_options(f"{src} is a tokenizer, with one set of weights", checkpoint=checkpoint, ema=ema)
        return open_tokenizer(src, patch_nums)
    if (src / "model.safetensors").is_file():
        why = f"{src} is an exported model, with one set of weights; name the run instead"
        refuse_options(why, checkpoint=checkpoint, ema=ema)
        return read_export(src)
    found: Path | None = src
    if all((src / name).is_file() for name in JSON_FILES):
        refuse_options(f"{src} is one checkpoint", checkpoint=checkpoint)
    else:
        found = find_checkpoint(src, checkpoint or LATEST)
    if found is None and complete_checkpoints(src):
        raise UserError(f"run {src} has no checkpoint {checkpoint!r}; see hmar-mega checkpoint list {src}")
    if found is None:
        raise UserError(f"{src} is no exported model, tokenizer, run or checkpoint: there is nothing to convert")
    return stack.enter_context(read_checkpoint(found, out, ema))


def _tokenizer_of(
    model: Model, given: Path | None, embedded: dict[str, Tensor], own_scales: tuple[int, ...]
) -> MultiScaleVQVAE:
    """The tokenizer a model folder gets, at the model's scales.

    Args:
        given: by the person; else it is the one `embedded` in a training checkpoint, or that the model names.
        own_scales: of the model as it was read.

    Raises:
        UserError: when there is none, or it is not the model's.
    """
    if given is None and model.tokenizer is not None and model.tokenizer.is_dir():
        given = model.tokenizer
    if given is not None:
        name, found = str(given), open_tokenizer(given, own_scales)
    elif embedded:
        name, found = f"its {TOKENIZER_PREFIX[:-1]}", import_tokenizer(embedded, model.where, own_scales)
    else:
        moved = f", and {model.tokenizer} is not there" if model.tokenizer is not None else ""
        raise UserError(
            f"{model.where} comes without its tokenizer{moved}; give it: --tokenizer vae_ch160v4096z32.pth, or a folder"
        )
    _, codes, channels = model.sizes
    if (found.config.codebook_size, found.config.latent_channels) != (codes, channels):
        raise UserError(
            f"{name} is not the tokenizer of {model.where}: it has {found.config.codebook_size} codes of "
            f"{found.config.latent_channels} channels, the model {codes} of {channels}"
        )
    known = (model.settings or {}).get("tokenizer_fingerprint")
    if known is not None and known != found.fingerprint:
        raise UserError(
            f"{name} is not the tokenizer of {model.where}: fingerprint {found.fingerprint}, expected {known}"
        )
    return with_scales(found, model.patch_nums)


def _write_tokenizer(model: MultiScaleVQVAE, source: str, out: Path, target: str | None) -> Converted:
    if target not in (None, OURS):
        raise UserError(f"a tokenizer cannot be written as {target}; leave --to away")
    tensors = export_tokenizer(model)
    parameters = sum(p.numel() for p in model.parameters())
    check_space(out, sum(t.nbytes for t in tensors.values()))
    if target == OURS:
        with new_folder(out) as temporary:
            model.save(temporary)
    else:
        write_pth(out, tensors, lambda count: None)
    config = model.config
    about = (
        f"{config.codebook_size} codes of {config.latent_channels} channels, downsample {config.downsample}, "
        f"patch_nums {' '.join(map(str, model.schedule.patch_nums))}"
    )
    return Converted(source, "tokenizer folder" if target == OURS else "vqvae", len(tensors), parameters, about)


def _write_ours(model: Model, make_tokenizer: Callable[[], MultiScaleVQVAE], out: Path) -> int:
    if not model.next_branch:
        raise UserError(
            f"{model.where} has a mask branch alone, and sampling needs both: convert the next-scale model it was "
            f"trained from, with this one beside it: hmar-mega convert NEXT_SCALE.pth OUT --masked {model.where.name}"
        )
    tell_widened(model.tensors.values(), model.where)
    size = 4 * model.parameters
    with new_folder(out) as temporary:
        tokenizer = make_tokenizer()
        check_space(out, size + sum(t.nbytes for t in tokenizer.state_dict().values()))
        settings = our_settings(model, tokenizer.config.downsample, tokenizer.fingerprint)
        tokenizer.save(temporary / "tokenizer")
        del tokenizer  # its memory is free for the model's
        with _progress(out, size) as advance:
            pieces = [(name, tuple(t.shape)) for name, t in model.tensors.items()]
            write_shard(temporary / "model.safetensors", pieces, _checked(model, advance))
        (temporary / "config.json").write_text(json.dumps(settings, indent=1))
    return len(model.tensors)


def _write_published(model: Model, kind: Kind, out: Path) -> int:
    tensors = as_published(model, kind)
    refuse_not_finite([model.names.get(n, n) for n, t in model.tensors.items() if not is_finite(t)], model.where)
    size = sum(t.nbytes for t in tensors.values())
    check_space(out, size)
    with _progress(out, size) as advance:
        write_pth(out, tensors, advance)
    return len(tensors)


def _checked(model: Model, advance: Callable[[int], None]) -> Iterator[Tensor]:
    """The model's tensors in float32, one after the other; UserError at the end when some are not finite."""
    broken = []
    for name, tensor in model.tensors.items():
        if not is_finite(tensor):
            broken.append(model.names.get(name, name))
        yield tensor.float().contiguous()
        advance(4 * tensor.numel())
    refuse_not_finite(broken, model.where)


@contextmanager
def _progress(out: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A bar in megabytes for large files; gives what is to be told of the bytes written."""
    with track(f"writing {out.name}, MB", size // 1_000_000, enabled=size >= LARGE) as tally:
        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            tally.advance(written // 1_000_000 - tally.done)

        yield advance
