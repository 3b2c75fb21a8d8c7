"""The data of the comparison in a few files that can be carried: tokens, held-out images and the tokenizer.

    FOLDER/tokens.npz    train, val (n, N) uint16; train_labels, val_labels (n,) uint16; classes
    FOLDER/images.npz    held_out (m, R, R, C) uint8, C = 1 where all are grey
    FOLDER/tokenizer/    as `hmar-mega tokenizer train` leaves it, without its checkpoints

At 32 px and 60 000 images that is about 20 MB. Training reads token shards, which are written from it.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import torch

from hmar_mega.data.image_loader import ImageLoader
from hmar_mega.data.index import TokenFormat
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.tokens import TokenCodec, bits_for
from hmar_mega.data.writer import open_shards
from hmar_mega.files import open_atomic
from hmar_mega.tokenizer.model import CONFIG_FILE, WEIGHTS_FILE, MultiScaleVQVAE
from hmar_mega.tokenizer.objective import to_device

log = logging.getLogger("comparison")

TOKENS, IMAGES, TOKENIZER = "tokens.npz", "images.npz", "tokenizer"

#: Images encoded at once.
BATCH = 256


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds what `prepare` makes."""
    return all((folder / name).exists() for name in (TOKENS, IMAGES, TOKENIZER))


def prepare(shards: Path, tokenizer: Path, out: Path, device: torch.device, limit: int | None) -> None:
    """Encode image shards, `shards`/train and `shards`/val, into the folder `out`; what is there already stays.

    Args:
        tokenizer: folder of the trained tokenizer.
        limit: of training images, and of held-out ones; None: all.
    """
    if is_prepared(out):
        return
    model = MultiScaleVQVAE.load(tokenizer, device)
    (out / TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(tokenizer / name, out / TOKENIZER / name)
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "val"):
        reader = ShardReader(shards / part, "images")
        arrays["classes"] = np.array(reader.index.classes)
        tokens, labels, images = _encode(reader, model, device, limit, keep=part == "val")
        arrays[part], arrays[f"{part}_labels"] = tokens, labels
        if part == "val":
            _write(out / IMAGES, {"held_out": images})
        log.info("%s: %d images of %d tokens", part, len(tokens), tokens.shape[1])
    _write(out / TOKENS, arrays)


def _encode(
    reader: ShardReader, model: MultiScaleVQVAE, device: torch.device, limit: int | None, keep: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (n, N), labels (n,) and, if they are kept, pixels (n, R, R, C) uint8 as the tokenizer saw them."""
    order = SampleOrder(len(reader), 0, shuffle=limit is not None)  # a part of them has all classes
    loader = ImageLoader(reader, order, model.resolution, "none", 0, 1, 1, workers=0)
    total = min(limit or len(reader), len(reader))
    tokens, images = [], []
    for at in range(0, total, BATCH):
        batch = loader.read(at, min(BATCH, total - at))
        with torch.inference_mode():
            tokens.append(model.encode(to_device(batch, device)).cpu().numpy().astype(np.uint16))
        if keep:
            images.append(batch.pixels.permute(0, 2, 3, 1).numpy())
    labels = np.array([reader.read_image(i).label for i in order.sample_indices(0, total).tolist()], np.uint16)
    kept = np.concatenate(images) if images else np.empty((0, 0, 0, 3), np.uint8)
    if len(kept) and (kept == kept[..., :1]).all():
        kept = kept[..., :1]
    return np.concatenate(tokens), labels, kept


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open_atomic(path) as file:
        np.savez_compressed(file, **arrays)


def write_shards(prepared: Path, out: Path) -> None:
    """Token shards `out`/train and `out`/val, unless they are there."""
    model = MultiScaleVQVAE.load(prepared / TOKENIZER, torch.device("cpu"))
    described = TokenFormat(
        patch_nums=model.schedule.patch_nums, codebook_size=model.config.codebook_size, fingerprint=model.fingerprint,
        resolution=model.resolution, storage="packed", bits=bits_for(model.config.codebook_size), augment="none",
    )  # fmt: skip
    codec = TokenCodec(described)
    with np.load(prepared / TOKENS) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for part in ("train", "val"):
        if (out / part / "index.json").is_file():
            continue
        with open_shards(out / part, "tokens", arrays["classes"].tolist(), 16384, described) as writer:
            for number, (ids, label) in enumerate(zip(arrays[part], arrays[f"{part}_labels"], strict=True)):
                writer.write(f"{number:08d}", int(label), {codec.field: codec.encode(ids[None])})


def held_out(prepared: Path) -> np.ndarray:
    """The real images that samples are compared with, (m, R, R, 3) uint8."""
    with np.load(prepared / IMAGES) as stored:
        images = stored["held_out"]
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
