"""Samples of a folder of shards to look at: a contact sheet (PNG), or a page that needs nothing beside it (HTML)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hmar_mega.data.images import decode_sample, tensor_to_image
from hmar_mega.data.index import ShardIndex, load_offsets, read_index
from hmar_mega.data.order import permutation
from hmar_mega.data.reader import ShardReader, check_fingerprint
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.rng import Purpose

if TYPE_CHECKING:
    from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Tokens decoded at once.
BATCH = 16

GAP, CAPTION = 8, 16
INK, PAPER, RED = "#1d2330", "#ffffff", "#c0392b"


@dataclass(frozen=True)
class Picture:
    """A sample to show: its image, or None and what is wrong with it, under its class and its origin."""

    image: Image.Image | None
    name: str
    origin: str
    problem: str = ""


def write_view(
    folder: Path,
    out: Path,
    count: int = 64,
    classes: Sequence[str] = (),
    tokenizer: MultiScaleVQVAE | None = None,
    crop: int = 0,
    seed: int = 0,
    side: int = 128,
) -> int:
    """Write a sheet or page of samples drawn at random, always the same ones for the same seed; gives how many.

    Args:
        out: `.png` for a contact sheet, `.html` for a page.
        classes: names or numbers to choose from; empty: all.
        tokenizer: needed for token shards; the one that made them.
        crop: which of the stored crops of token shards.
        side: of the pictures on a sheet, in pixels.

    Raises:
        UserError: when the folder, a class or the tokenizer does not fit, or `out` has another ending.
    """
    if out.suffix not in (".png", ".html"):
        raise UserError(f"{out}: give a name that ends in .png (a contact sheet) or .html (a page)")
    if count < 1 or side < 16:
        raise UserError(f"count={count}, side={side}: use at least 1 image, of at least 16 pixels")
    index = read_index(folder)
    labels = np.concatenate([load_offsets(folder, shard).labels for shard in index.shards])
    wanted = [_class_number(name, index) for name in classes]
    candidates = np.flatnonzero(np.isin(labels, wanted)) if wanted else np.arange(len(labels))
    if not len(candidates):
        raise UserError(f"{folder} has no sample of {', '.join(classes)}; choose another class")
    chosen = candidates[permutation(len(candidates), seed, 0, Purpose.SAMPLE_VIEW)[:count]].tolist()
    if index.kind == "images":
        pictures = _images(ShardReader(folder, "images"), chosen, index)
    else:
        pictures = _decoded(ShardReader(folder, "tokens"), chosen, index, tokenizer, crop)
    facts = _facts(folder, index, len(chosen), crop)
    if out.suffix == ".png":
        file = io.BytesIO()
        contact_sheet(pictures, side, facts).save(file, format="PNG")
        write_atomic(out, file.getvalue())
    else:
        write_atomic(out, page(pictures, facts))
    return len(pictures)


def _class_number(text: str, index: ShardIndex) -> int:
    if text in index.classes:
        return index.classes.index(text)
    if text.isdigit() and int(text) < len(index.classes):
        return int(text)
    raise UserError(f"class {text!r} is none of the {len(index.classes)}: {', '.join(index.classes[:10])} …")


def _images(reader: ShardReader, chosen: Sequence[int], index: ShardIndex) -> list[Picture]:
    pictures = []
    for number in chosen:
        sample = reader.read_image(number)
        name, origin = index.classes[sample.label], f"{_shard_of(sample.where)} {sample.key}"
        try:
            image = decode_sample(sample)
        except UserError as err:
            pictures.append(Picture(None, name, origin, str(err)))
        else:
            pictures.append(Picture(image, name, f"{origin}, {image.width}×{image.height}"))
    return pictures


def _decoded(
    reader: ShardReader, chosen: Sequence[int], index: ShardIndex, tokenizer: MultiScaleVQVAE | None, crop: int
) -> list[Picture]:
    assert index.tokens is not None
    if tokenizer is None:
        raise UserError(f"{reader.folder} holds tokens: give the tokenizer that made them, --tokenizer DIR")
    check_fingerprint(index, tokenizer.fingerprint)
    if not 0 <= crop < index.tokens.crops:
        raise UserError(f"--crop {crop}: {reader.folder} has the crops 0 … {index.tokens.crops - 1}")
    pictures = []
    for first in range(0, len(chosen), BATCH):
        samples = [reader.read_tokens(number, crop) for number in chosen[first : first + BATCH]]
        with torch.no_grad():
            images = tokenizer.decode_tokens(torch.from_numpy(np.stack([sample.tokens for sample in samples])))
        for sample, image in zip(samples, images, strict=True):
            origin = f"{_shard_of(sample.where)} {sample.key}"
            pictures.append(Picture(tensor_to_image(image, (-1, 1)), index.classes[sample.label], origin))
    return pictures


def _shard_of(where: str) -> str:
    return Path(where.split(": sample")[0]).stem


def _facts(folder: Path, index: ShardIndex, shown: int, crop: int) -> str:
    text = f"{folder}: {shown} of {index.samples:,} samples, {len(index.classes)} classes, {len(index.shards):,} shards"
    if index.tokens is not None:
        text += f"; decoded from {sum(p * p for p in index.tokens.patch_nums)} tokens at {index.tokens.resolution} px"
        text += f", crop {crop} of {index.tokens.crops}" if index.tokens.crops > 1 else ""
    return text


def contact_sheet(pictures: Sequence[Picture], side: int, facts: str) -> Image.Image:
    """Pictures in a grid as square as may be, each in a square of `side` pixels over its class."""
    columns = min(len(pictures), max(1, round(len(pictures) ** 0.5 * 1.25)))
    rows = -(-len(pictures) // columns)
    cell, head = side + GAP, 26
    sheet = Image.new("RGB", (columns * cell + GAP, head + rows * (cell + CAPTION) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw.text((GAP, 7), _fit(facts, sheet.width - 2 * GAP, font), INK, font)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = GAP + column * cell, head + row * (cell + CAPTION)
        if picture.image is None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=RED)
            draw.text((left + 4, top + 4), "cannot be decoded", RED, font)
        else:
            shown = _scaled(picture.image, side)
            sheet.paste(shown, (left + (side - shown.width) // 2, top + (side - shown.height) // 2))
        draw.text((left, top + side + 1), _fit(picture.name, side, font), INK, font)
    return sheet


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """As large as fits the square; small images by whole factors, so that their pixels stay pixels."""
    if max(image.size) * 2 <= side:
        factor = side // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; }}
h1 {{ font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
figure div {{ aspect-ratio: 1; display: grid; place-items: center; background: #8882; border-radius: 4px; }}
img {{ width: 100%; height: 100%; object-fit: contain; }}
img.small {{ image-rendering: pixelated; }}
figcaption {{ margin-top: .3rem; overflow-wrap: anywhere; }}
figcaption small {{ display: block; opacity: .65; font-size: .75rem; }}
.bad {{ color: #c0392b; padding: .5rem; font-size: .75rem; overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""


def page(pictures: Sequence[Picture], facts: str) -> str:
    """The same as a page of HTML with the pictures inside, at most 512 pixels wide or high, as PNG."""
    figures = []
    for picture in pictures:
        if picture.image is None:
            inner = f'<span class="bad">{html.escape(picture.problem)}</span>'
        else:
            file = io.BytesIO()
            image = picture.image.copy()
            image.thumbnail((512, 512), Image.Resampling.LANCZOS)
            image.save(file, format="PNG")
            data = base64.b64encode(file.getvalue()).decode()
            small = ' class="small"' if max(image.size) <= 64 else ""
            inner = f'<img{small} alt="{html.escape(picture.name)}" src="data:image/png;base64,{data}">'
        caption = f"{html.escape(picture.name)}<small>{html.escape(picture.origin)}</small>"
        figures.append(f"<figure><div>{inner}</div><figcaption>{caption}</figcaption></figure>")
    return PAGE.format(title=html.escape(facts), figures="\n".join(figures))
