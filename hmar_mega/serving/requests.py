"""What requests may say, and what it means: JSON bodies checked and turned into items for the runner."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from hmar_mega.errors import UserError
from hmar_mega.inference.canvas import SIDES, Canvas, Side, boxed_canvas, masked_canvas, outpaint_canvas
from hmar_mega.inference.editing import check_feather
from hmar_mega.inference.options import ClassNames, parse_mask_schedule
from hmar_mega.inference.pipeline import ImageModel, image_seeds
from hmar_mega.inference.sampler import SampleSettings
from hmar_mega.serving.pictures import decode_picture
from hmar_mega.serving.runner import Item

#: Passes of a mask schedule that one request may ask for beyond the model's own: each costs a run of the transformer.
SPARE_PASSES = 32

#: Characters of a wrong value that an error shows.
SHOWN = 60

Strength = Annotated[float, Field(ge=0, le=1000)]
Guidance = Strength | Annotated[list[Strength], Field(max_length=64)]
Class = int | Annotated[str, Field(max_length=200)]
#: Whether a seed fits is for `pipeline.image_seeds` to say.
Seeds = int | Annotated[list[int], Field(max_length=4096)]


class Sampling(BaseModel):
    """How to sample; what is left out is the model's own. See `sampler.SampleSettings`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: Annotated[Seeds, Field(description="one number s, image i having s + i, or one for each image")] = 0
    cfg: Annotated[Guidance | None, Field(description="guidance at the last scale, or at every scale")] = None
    mask_cfg: Annotated[Guidance | None, Field(description="guidance of the mask passes")] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31 - 1, description="0 keeps all tokens")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    mask_schedule: Annotated[
        Annotated[str, Field(max_length=2000)] | Annotated[list[list[int]], Field(max_length=64)] | None,
        Field(description="tokens that each pass keeps: '1;1,3;…' or [[1], [1, 3]]"),
    ] = None
    negative_class: Annotated[Class | None, Field(description="class to guide away from")] = None
    more_smooth: Annotated[bool, Field(description="mix codes: prettier, not for measuring")] = False


class ImagesRequest(Sampling):
    """Images of classes, `count` of each."""

    classes: Annotated[
        Class | Annotated[list[Class], Field(min_length=1, max_length=4096)],
        Field(description="a class, by number or name, or a list of them"),
    ]
    count: Annotated[int, Field(ge=1, description="images of each class")] = 1


class EditRequest(Sampling):
    """Part of a picture anew; exactly one of mask, box and outpaint says which."""

    image: Annotated[str, Field(description="PNG, JPEG or WebP in base64")]
    mask: Annotated[str | None, Field(description="a picture in base64: white is generated, black is kept")] = None
    box: Annotated[list[int] | None, Field(description="left, top, right, bottom in pixels of the model")] = None
    outpaint: Annotated[dict[str, int] | None, Field(description="side → pixels to generate there")] = None
    label: Annotated[Class, Field(alias="class", description="class of the result")]
    count: Annotated[int, Field(ge=1, description="versions")] = 1
    feather: Annotated[int, Field(ge=0, le=256, description="pixels over which pasting fades")] = 0
    paste: Annotated[bool, Field(description="put the kept pixels back as they were")] = True


#: The bodies of the endpoints.
BODIES: dict[str, type[Sampling]] = {
    "/v1/images": ImagesRequest,
    "/v1/images/stream": ImagesRequest,
    "/v1/edits": EditRequest,
}


@dataclass(frozen=True)
class Asked:
    """What a request comes to.

    Attributes:
        changes: sentences on what was done to a picture's pixels to fit the model.
    """

    items: list[Item]
    settings: SampleSettings
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Turns checked bodies into items for one model.

    Attributes:
        max_count: images that a request may ask for.
    """

    model: ImageModel
    names: ClassNames
    max_count: int

    def images(self, body: ImagesRequest) -> Asked:
        """Items of `POST /v1/images`; UserError for classes, seeds or settings that do not exist."""
        given = body.classes if isinstance(body.classes, list) else [body.classes]
        self._check_count(len(given) * body.count)
        labels = [label for label in self._numbers(given) for _ in range(body.count)]
        seeds = image_seeds(body.seed, len(labels)).tolist()
        items = [Item(label, seed) for label, seed in zip(labels, seeds, strict=True)]
        return Asked(items, self._settings(body))

    def edits(self, body: EditRequest) -> Asked:
        """Items of `POST /v1/edits`; UserError also for pictures and regions that do not fit. Decodes: takes time."""
        self._check_count(body.count)
        check_feather(body.paste, body.feather)
        label = self._numbers([body.label])[0]
        seeds = image_seeds(body.seed, body.count).tolist()
        settings, canvas = self._settings(body), self._canvas(body)
        return Asked([Item(label, seed, canvas.image, canvas.mask) for seed in seeds], settings, canvas.changes)

    def _check_count(self, count: int) -> None:
        if count > self.max_count:
            raise UserError(f"{count} images were asked for; a request may have {self.max_count}: send several")

    def _numbers(self, given: Sequence[int | str]) -> list[int]:
        numbers = [self.names.number(one) if isinstance(one, str) else one for one in given]
        checked: list[int] = self.model.check_classes(_within_int64(numbers)).tolist()
        return checked

    def _settings(self, body: Sampling) -> SampleSettings:
        passes = body.mask_schedule
        if isinstance(passes, str):
            passes = parse_mask_schedule(passes, "mask_schedule")
        own = self.model.sample_settings().mask_schedule
        allowed = sum(map(len, own)) + SPARE_PASSES
        if passes is not None and sum(map(len, passes)) > allowed:
            raise UserError(f"mask_schedule has {sum(map(len, passes))} passes; allowed are {allowed}")
        negative = None if body.negative_class is None else self._numbers([body.negative_class])[0]
        return self.model.sample_settings(
            body.cfg, body.top_k, body.top_p, passes, body.mask_cfg, negative, body.more_smooth
        )

    def _canvas(self, body: EditRequest) -> Canvas:
        given = [name for name in ("mask", "box", "outpaint") if getattr(body, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"{' and '.join(given) or 'nothing'} was given to say what to edit: give one of mask, box, outpaint"
            )
        resolution = self.model.schedule.grid * self.model.tokenizer.config.downsample
        image = decode_picture(body.image, "image")
        if body.mask is not None:
            return masked_canvas(image, decode_picture(body.mask, "mask", "L"), resolution)
        if body.box is not None:
            if len(body.box) != 4:
                raise UserError(f"box has {len(body.box)} numbers: give left, top, right, bottom")
            left, top, right, bottom = body.box
            return boxed_canvas(image, (left, top, right, bottom), resolution)
        return outpaint_canvas(image, _room(body.outpaint or {}), resolution)


def _room(given: dict[str, int]) -> dict[Side, int]:
    room: dict[Side, int] = {side: given[side] for side in SIDES if side in given}
    if len(room) < len(given):
        wrong = next(name for name in given if name not in SIDES)
        raise UserError(f"outpaint names the side {shorten(wrong)}: allowed are {', '.join(SIDES)}")
    return room


def _within_int64(numbers: Sequence[int]) -> list[int]:
    """The numbers; those that no tensor can hold as −1, which no class is."""
    limits = torch.iinfo(torch.int64)
    return [number if limits.min <= number <= limits.max else -1 for number in numbers]


def explain(path: str, errors: Sequence[Any]) -> str:
    """One sentence for each field of a body that pydantic found wrong: what was given, what is allowed.

    Args:
        path: of the endpoint.
        errors: as pydantic gives them, with locations that begin with "body".
    """
    body = BODIES[path]
    allowed = [field.alias or name for name, field in body.model_fields.items()]
    found: dict[str, list[str]] = {}
    for error in errors:
        where = [str(part) for part in error["loc"] if part != "body"]
        name, kind = where[0] if where else "", error["type"]
        if kind == "json_invalid":
            return f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}"
        if kind == "extra_forbidden":
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(allowed)}"
            found.setdefault(f"{shorten(name)} is no field of this request", [hint])
        elif kind == "missing":
            found.setdefault(f"{name or 'a JSON body, sent as application/json,'} is required", [])
        elif not name:
            found.setdefault("the body must be a JSON object, sent as application/json", [])
        else:
            said = error["msg"].removeprefix("Input ").replace("Value error, ", "")
            told = found.setdefault(f"{name} cannot be {shorten(error.get('input'))}", [])
            if said not in told:
                told.append(said)
    return "; ".join(f"{head}: {' or '.join(told)}" if told else head for head, told in found.items())


def shorten(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
