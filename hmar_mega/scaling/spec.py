"""SWEEP.yaml: what a sweep trains, validated. Its keys and what they mean; `cells.py` makes the runs of it.

    name: digits                           # default: the file's name
    dir: runs/digits-sweep                 # everything the sweep writes
    base: train/d8-256                     # configuration (file beside this one, path, or packaged name)
    settings: {data: {train: …, val: …}}   # win over the base
    sizes: [{depth: 2}, {depth: 4}, {depth: 6, width: 256, heads: 8}]
    budgets:                               # one or more; a cell that two of them ask for is trained once
      iso_data: {images: [20000, 80000]}                                    # every size sees so many images
      iso_flop: {flops: [1.0e15, 4.0e15]}                                   # every size gets so much compute
      iso_parameters: {parameters: [1.0e6], images: [5000, 20000, 80000]}   # the size nearest to it, more and more data
    learning_rate: {rule: width_power, reference_width: 256, exponent: 1.0}
    batch: {rule: fixed}
    seeds: [0, 1]

Paths in `settings` are relative to the working directory, as in `hmar-mega train`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from hmar_mega.config import Config
from hmar_mega.config_base import Section
from hmar_mega.config_io import load_config, parse_config
from hmar_mega.errors import UserError


class Size(Section):
    """A model size; what is not given follows from the depth (width 64·depth, heads = depth)."""

    depth: int = Field(ge=1, le=128)
    width: int | None = Field(None, ge=8)
    heads: int | None = Field(None, ge=1)


class IsoData(Section):
    """Every size sees the same numbers of images."""

    images: tuple[float, ...] = Field(min_length=1, description="trained on, each counted as often as it is seen")


class IsoFlop(Section):
    """Every size gets the same training compute: images = flops / (FLOPs of the size for one image)."""

    flops: tuple[float, ...] = Field(min_length=1, description="of a run, forward and backward passes")


class IsoParameters(Section):
    """Of `sizes`, the ones nearest to these numbers of non-embedding parameters, on several numbers of images."""

    parameters: tuple[float, ...] = Field(min_length=1, description="of the blocks")
    images: tuple[float, ...] = Field(min_length=1)


class Budgets(Section):
    """Which sizes are trained for how long; the grid is the union of these."""

    iso_data: IsoData | None = None
    iso_flop: IsoFlop | None = None
    iso_parameters: IsoParameters | None = None

    @model_validator(mode="after")
    def _check(self) -> Budgets:
        kinds = [self.iso_data, self.iso_flop, self.iso_parameters]
        if not any(kinds):
            raise ValueError("give at least one of iso_data, iso_flop and iso_parameters")
        for kind in filter(None, kinds):
            for name, values in kind:
                if min(values) <= 0:
                    raise ValueError(f"{name}={list(values)} must all be above 0")
        return self


class LearningRateRule(Section):
    """optim.base_lr of every size.

    `fixed`: that of the configuration. `width_power`: base_lr · (width / reference_width)^−exponent, the transfer of
    μP-like parametrisations at exponent 1 (Yang et al., arXiv 2203.03466) and of many published families near 0.5.
    """

    rule: Literal["fixed", "width_power"] = "fixed"
    base_lr: float | None = Field(None, gt=0, description="at the reference width; default that of the configuration")
    reference_width: int | None = Field(None, ge=1, description="at which base_lr was tuned")
    exponent: float = Field(1.0, description="a of (width / reference_width)^−a")
    by_depth: dict[int, float] = Field({}, description="wins over the rule: depth → base_lr")

    @model_validator(mode="after")
    def _check(self) -> LearningRateRule:
        if self.rule == "width_power" and self.reference_width is None:
            raise ValueError("rule=width_power needs reference_width, the width at which base_lr was tuned")
        return self

    def base_lr_of(self, depth: int, width: int, default: float) -> float:
        """optim.base_lr of a size, to six significant digits (it is a part of what identifies a cell)."""
        value = self.base_lr if self.base_lr is not None else default
        if self.rule == "width_power":
            value *= (width / float(self.reference_width or width)) ** -self.exponent
        return float(f"{self.by_depth.get(depth, value):.6g}")


class BatchRule(Section):
    """data.global_batch_size of every cell.

    `fixed`: that of the configuration. `images_power`: size · (images / reference_images)^exponent, rounded to a
    multiple of `multiple_of`: longer runs bear larger batches.
    """

    rule: Literal["fixed", "images_power"] = "fixed"
    size: int | None = Field(None, ge=1, description="default that of the configuration")
    reference_images: float | None = Field(None, gt=0)
    exponent: float = 0.5
    multiple_of: int = Field(8, ge=1)
    by_depth: dict[int, int] = Field({}, description="wins over the rule: depth → global batch size")

    @model_validator(mode="after")
    def _check(self) -> BatchRule:
        if self.rule == "images_power" and self.reference_images is None:
            raise ValueError("rule=images_power needs reference_images, the run length at which `size` was tuned")
        return self

    def batch_of(self, depth: int, images: float, default: int) -> int:
        """Images of a step."""
        size = self.size if self.size is not None else default
        if depth in self.by_depth:
            return self.by_depth[depth]
        if self.rule == "fixed":
            return size
        wanted = size * (images / float(self.reference_images or images)) ** self.exponent
        return max(1, round(float(wanted) / self.multiple_of)) * self.multiple_of


class SweepSpec(Section):
    """The whole file; see the head of this module for an example."""

    name: str = ""
    dir: str = Field(description="folder of everything the sweep writes")
    base: str = Field(description="configuration that every cell starts from")
    settings: dict[str, Any] = Field({}, description="sections of settings that win over the base")
    sizes: tuple[Size, ...] = Field(min_length=1)
    budgets: Budgets
    learning_rate: LearningRateRule = LearningRateRule()
    batch: BatchRule = BatchRule()
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    warmup_fraction: float = Field(0.02, ge=0, le=1, description="of the steps of a cell; the paper has 1/50")
    dataset_images: int | None = Field(None, ge=1, description="size of data.train where it is not at hand to look at")
    cluster: str = Field("h100", description="as in `hmar-mega plan --cluster`")
    processes: int = Field(1, ge=1, description="GPUs (or CPU processes) of a cell")
    layout: Literal["plan", "config"] = Field("plan", description="plan: the planner's best layout of each cell")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="for the cost column; no currency is assumed")
    max_attempts: int = Field(3, ge=1, description="after which a failing cell is given up")


def load_sweep(path: str | Path) -> tuple[SweepSpec, Config]:
    """Read a SWEEP.yaml.

    Returns:
        The sweep, and the configuration that its cells start from.

    Raises:
        UserError: for a file, key or value that cannot be used; unknown keys name the nearest known one.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise UserError(f"cannot read the sweep {path}: {err}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping with dir, base, sizes and budgets, not {type(tree).__name__}")
    try:
        spec = SweepSpec.model_validate({"name": path.stem, **_numbers(tree)})
    except ValidationError as err:
        raise UserError("\n".join(f"{path.name}: {_explain(e)}" for e in err.errors())) from None
    return spec, _base_config(spec, path)


def _base_config(spec: SweepSpec, path: Path) -> Config:
    beside = path.parent / spec.base
    base = load_config(beside if beside.is_file() else spec.base)
    tree = base.model_dump(mode="json")
    _merge(tree, spec.settings)
    config = parse_config(tree)
    if config.data.batch_ramp is not None:
        raise UserError("a sweep has no data.batch_ramp: the images of a cell follow from its steps; remove it")
    if config.data.val is None:
        raise UserError("data.val is not set: a sweep fits validation losses; give a folder of token shards")
    return config if spec.layout == "config" else without_layout(config)


def without_layout(config: Config) -> Config:
    """The configuration on one process, for sizes that its own layout may not divide; the planner chooses anew."""
    one = {"tensor_parallel": 1, "sequence_parallel": False, "pipeline_parallel": 1, "virtual_pipeline_parallel": 1}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=one),
            "data": config.data.model_copy(update={"micro_batch_size": None}),
        }
    )


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _numbers(tree: Any) -> Any:
    """YAML 1.1 reads 1e15 as a string; users mean a number."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    if isinstance(tree, str) and "e" in tree.lower():
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    if error["type"] == "extra_forbidden":
        known = list(_known_keys(SweepSpec))
        same = [k for k in known if k.rsplit(".", 1)[-1] == str(error["loc"][-1])]
        near = same or difflib.get_close_matches(key, known, n=1, cutoff=0.3) or known
        return f"unknown key {key}; did you mean {near[0]}?"
    if error["type"] == "missing":
        return f"{key} is missing; see the example at the head of hmar_mega/scaling/spec.py"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *(get_args(field.annotation) or ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.")
