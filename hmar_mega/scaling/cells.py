"""The cells of a sweep: one training run each, with a stable identity that follows from its settings.

A cell's key says where it stands in the grid (size, images, seed); its digest is a hash of every setting that can
change its result, and of the contents of data and tokenizer. A key that comes back with another digest is a changed
experiment, which `state.py` refuses to mix with the old one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hmar_mega.config import Config, TokenizerConfig
from hmar_mega.config_io import parse_config
from hmar_mega.data.index import read_index
from hmar_mega.errors import UserError
from hmar_mega.flops import train_flops_per_image
from hmar_mega.planning.tensors import rank_parameters
from hmar_mega.planning.workload import Workload, with_tokenizer
from hmar_mega.scaling.contents import contents_of
from hmar_mega.scaling.spec import Size, SweepSpec

#: Settings that change where and how fast a run computes, not what: a cell may be moved to other machines. Folders of
#: data and tokenizer count by their contents.
NOT_IDENTITY = (
    "parallel", "checkpoint", "logging", "data.workers", "data.worker_kind", "data.prefetch", "data.pin_memory",
    "data.micro_batch_size", "data.read_timeout", "data.read_retries", "data.cache", "data.cache_gb", "run.dir",
    "run.resume", "run.resume_from", "run.peer_timeout", "tokenizer", "data.train", "data.val", "data.images",
    "data.images_val",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        key: size, images and seed, such as `d4-w256-n51200-s0`.
        digest: 8 hexadecimal digits, of the identity.
        groups: the budgets that ask for it, such as `images=50000` or `flops=1e15`.
        config: the whole configuration but run.dir, with the layout still open.
        planned: the same with the architecture of the tokenizer it names, for the planner.
        contents: fingerprints of data and tokenizer, None for what is not here.
        parameters, non_embedding: of the model, and of its blocks alone (VAR's N = 18·width²·depth, and small change).
        images, steps: that it trains on and for.
        flops: of training.
    """

    key: str
    digest: str
    groups: tuple[str, ...]
    config: Config = field(repr=False)
    planned: Config = field(repr=False)
    contents: dict[str, str | None] = field(repr=False)
    parameters: int
    non_embedding: int
    images: int
    steps: int
    flops: float

    @property
    def name(self) -> str:
        """Of its folder, and what it is called everywhere."""
        return f"{self.key}-{self.digest}"

    @property
    def identity(self) -> dict[str, Any]:
        """All that makes it what it is, as dotted keys."""
        return identity(self.config, self.contents)


def expand(spec: SweepSpec, base: Config) -> list[Cell]:
    """The cells of a sweep, smaller models and shorter runs first, each once.

    Raises:
        UserError: for sizes or budgets that make no run, or when the size of the training set is not known.
    """
    dataset, tokenizer = dataset_images(spec, base), with_tokenizer(base).tokenizer
    contents = contents_of(base.model_dump(mode="json"))
    cells: dict[str, Cell] = {}
    for size, images, group in _grid(spec, base, tokenizer):
        for seed in spec.seeds:
            cell = make_cell(spec, base, tokenizer, contents, size, images, seed, dataset, group)
            known = cells.get(cell.name)
            groups = () if known is None else known.groups
            cells[cell.name] = replace(cell, groups=tuple(dict.fromkeys((*groups, group))))
    return sorted(cells.values(), key=lambda c: (c.flops, c.key))


def dataset_images(spec: SweepSpec, base: Config) -> int:
    """Images of the training set, by its index or by `dataset_images`."""
    folder = base.data.train
    if folder is not None and (Path(folder) / "index.json").is_file():
        found = int(read_index(Path(folder)).samples)
        if spec.dataset_images not in (None, found):
            raise UserError(f"dataset_images={spec.dataset_images}, but {folder} has {found}; remove dataset_images")
        return found
    if spec.dataset_images is None:
        raise UserError(
            f"data.train={folder} is not here to be counted; set dataset_images in the sweep to plan without it"
        )
    return spec.dataset_images


def _grid(spec: SweepSpec, base: Config, tokenizer: TokenizerConfig) -> Iterator[tuple[Size, float, str]]:
    """(size, images, budget) of every run before batches are rounded."""
    budgets = spec.budgets
    if budgets.iso_data is not None:
        for images in budgets.iso_data.images:
            yield from ((size, images, f"images={images:.6g}") for size in spec.sizes)
    if budgets.iso_flop is not None:
        for flops in budgets.iso_flop.flops:
            for size in spec.sizes:
                yield size, flops / train_flops_per_image(sized(base, size, tokenizer)), f"flops={flops:.6g}"
    if budgets.iso_parameters is not None:
        counts = {size: count_parameters(sized(base, size, tokenizer))[1] for size in spec.sizes}
        for wanted in budgets.iso_parameters.parameters:
            nearest = min(counts, key=lambda size: abs(math.log(counts[size] / wanted)))
            for images in budgets.iso_parameters.images:
                yield nearest, images, f"parameters={wanted:.6g}"


def make_cell(
    spec: SweepSpec, base: Config, tokenizer: TokenizerConfig, contents: dict[str, str | None], size: Size,
    images: float, seed: int, dataset: int, group: str = "",
) -> Cell:  # fmt: skip
    """One cell; `images` is rounded up to whole steps.

    Args:
        tokenizer: its architecture.
        contents: fingerprints of data and tokenizer.
        dataset: images of the training set.
    """
    config = sized(base, size)
    depth, width = config.model.depth, config.model.resolved_width
    batch = spec.batch.batch_of(depth, images, base.data.global_batch_size)
    steps = max(1, math.ceil(images / batch - 1e-9))
    tree = config.model_dump(mode="json")
    tree["data"]["global_batch_size"] = batch
    # half a step less, so that rounding epochs up to whole steps gives `steps` whatever the floating-point error
    epochs = (steps - 0.5) * batch / dataset
    tree["optim"].update(
        base_lr=spec.learning_rate.base_lr_of(depth, width, base.optim.base_lr),
        epochs=epochs,
        warmup_epochs=spec.warmup_fraction * epochs,
        max_steps=None,
    )
    tree["run"].update(seed=seed, dir=None)
    config = parse_config(tree)
    planned = config.model_copy(update={"tokenizer": tokenizer})
    total, blocks = count_parameters(planned)
    return Cell(
        key=f"d{depth}-w{width}-n{steps * batch}-s{seed}",
        digest=digest_of(config, contents),
        groups=(group,),
        config=config,
        planned=planned,
        contents=contents,
        parameters=total,
        non_embedding=blocks,
        images=steps * batch,
        steps=steps,
        flops=train_flops_per_image(planned) * steps * batch,
    )


def sized(base: Config, size: Size, tokenizer: TokenizerConfig | None = None) -> Config:
    """The base configuration in another size; mask layers and drop-path follow the depth unless configured.

    Args:
        tokenizer: its architecture, where it matters.
    """
    tree = base.model_dump(mode="json")
    tree["model"].update(depth=size.depth, width=size.width, heads=size.heads)
    config = parse_config(tree)
    return config if tokenizer is None else config.model_copy(update={"tokenizer": tokenizer})


def count_parameters(config: Config) -> tuple[int, int]:
    """(all parameters, those of the blocks), of a configuration with its tokenizer's architecture."""
    parameters = rank_parameters(Workload.of(config, "cpu"))
    blocks = sum(p.numel for p in parameters if p.name.startswith(("blocks.", "mask_blocks.")))
    return sum(p.numel for p in parameters), blocks


def identity(config: Config, contents: Mapping[str, str | None]) -> dict[str, Any]:
    """The settings and contents that make a cell what it is, as dotted keys."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    settings = {
        key: value
        for key, value in flat.items()
        if not any(key == left_out or key.startswith(f"{left_out}.") for left_out in NOT_IDENTITY)
    }
    return {**settings, **contents}


def digest_of(config: Config, contents: Mapping[str, str | None]) -> str:
    """8 hexadecimal digits of `identity`."""
    return hashlib.sha256(json.dumps(identity(config, contents), sort_keys=True).encode()).hexdigest()[:8]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
