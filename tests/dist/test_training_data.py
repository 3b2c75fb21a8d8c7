"""Runs that encode online from a mixture, group shards, and meet a damaged image: counted, and the same on any layout."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from harness import run_ranks
from PIL import Image
from runs import Inputs, make_inputs, tiny_config, train_rank

from hmar_mega.config import Config
from hmar_mega.damage_report import DAMAGED_FILE
from hmar_mega.data.writer import open_shards
from hmar_mega.metrics import read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def write_images(out: Path, count: int, classes: int, seed: int, bad: int | None = None) -> str:
    noise = np.random.RandomState(seed)
    with open_shards(out, "images", [f"class {number}" for number in range(classes)], 5) as writer:
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(noise.randint(0, 256, (20, 18, 3), dtype=np.uint8)).save(file, "PNG")
            data = file.getvalue()
            writer.write(f"{number:04d}", number % classes, {"png": data[:80] if number == bad else data})
    return str(out)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), codebook=32, classes=3)


def config_of(inputs: Inputs, folder: Path, *overrides: str) -> Config:
    shards = folder / "shards"
    if not shards.exists():
        write_images(shards / "a", 12, inputs.classes, 0, bad=3)
        write_images(shards / "b", 6, inputs.classes, 1)
        write_images(shards / "val", 5, inputs.classes, 2)
    mix = f"data.mix=[{{path: {shards / 'a'}, weight: 3}}, {{path: {shards / 'b'}, weight: 1}}]"
    return tiny_config(
        inputs, folder / "run", mix, "data.train=null", "data.encode=online", f"data.images_val={shards / 'val'}",
        "data.shuffle=groups", "data.group_shards=2", "data.max_damaged=0.1", "optim.max_steps=4",
        "logging.interval=2", *overrides,
    )  # fmt: skip


def figures(folder: Path) -> tuple[list[list[float]], list[dict[str, object]]]:
    rows = [row for row in read_metrics(folder) if row["kind"] in ("train", "val")]
    losses = [row["scale_loss"] for row in rows]
    damaged = [json.loads(line) for line in (folder / DAMAGED_FILE).read_text().splitlines()]
    counted = [row["substituted_samples"] for row in rows if row["kind"] == "train"]
    assert counted[-1] == len(damaged)
    return losses, damaged


def test_a_mixture_encoded_online_is_the_same_on_one_process_and_on_tensor_ranks(inputs, tmp_path):
    run_ranks(1, train_rank, config_of(inputs, tmp_path / "alone"))
    run_ranks(2, train_rank, config_of(inputs, tmp_path / "tensor", "parallel.tensor_parallel=2"))
    ours, ours_damaged = figures(tmp_path / "alone" / "run")
    theirs, theirs_damaged = figures(tmp_path / "tensor" / "run")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert {(row["sample"], row["kind"]) for row in ours_damaged} == {(3, "content")}
    assert len(ours_damaged) == 2  # 32 images, 24 of the first set of 12: two epochs
    where = [(row["position"], row["substitute"]) for row in ours_damaged]
    assert where == [(row["position"], row["substitute"]) for row in theirs_damaged]
