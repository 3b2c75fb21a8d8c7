"""What is drawn for a sample (label drop, mask, drop-path) is the same on every layout, on every rank that uses it."""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_ranks
from runs import LAYOUTS, TRAIN_SAMPLES, Inputs, tiny_config, train, train_rank

from hmar_mega.config import Config

pytestmark = pytest.mark.dist

STEPS = 5  # 40 images: over the edge of an epoch
SETTINGS = ("model.depth=4", "model.mask_layers=2", "model.drop_path_rate=0.4", "stage.label_drop=0.5")


def draws_rank(config: Config) -> list[tuple[int, str, tuple[Any, ...]]]:
    """Train; (position, kind, what was drawn) of every draw that this rank's model was given."""
    from hmar_mega.objective import Objective

    honest, seen = Objective.inputs, []

    def inputs(self, batch, *, training, stage=None):
        given = honest(self, batch, training=training, stage=stage)
        for row, position in enumerate(batch.positions.tolist() if training else ()):
            if "labels_B" in given:
                seen.append((position, "label", int(given["labels_B"][row])))
            if batch.keys[row]:  # a model-parallel rank that was sent its samples does not know them
                seen.append((position, "key", batch.keys[row]))
            if "mask_BN" in given:
                seen.append((position, "mask", tuple(given["mask_BN"][row].tolist())))
            seen.append((position, "drop_path", tuple(given["drop_path"][:, :, row].flatten().tolist())))
        return given

    Objective.inputs = inputs
    train_rank(config)
    return seen


def draws(inputs: Inputs, folder, layout: str, *settings: str) -> dict[tuple[int, str], set[tuple[Any, ...]]]:
    """Everything drawn, by position and kind; more than one value where ranks disagree."""
    world, own = LAYOUTS[layout]
    config = tiny_config(inputs, folder, *own, *SETTINGS, f"optim.max_steps={STEPS}", *settings)
    found: dict[tuple[int, str], set[tuple[Any, ...]]] = {}
    for rank in run_ranks(world, draws_rank, config):
        for position, kind, value in rank:
            found.setdefault((position, kind), set()).add(value)
    return found


@pytest.fixture(scope="module", params=["next_scale", "masked"])
def case(request, tmp_path_factory, inputs):
    """Settings of a stage, and its draws in one process."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = (f"stage.name={request.param}",)
    if request.param == "masked":
        train(inputs, folder / "first", "single", *SETTINGS, "optim.max_steps=1")
        settings = (*settings, f"run.init_from={folder / 'first'}")
    return settings, draws(inputs, folder / "run", "single", *settings)


def test_one_process_draws_for_every_position_and_differently(case):
    settings, alone = case
    kinds = {"key", "label", "drop_path"} | ({"mask"} if "stage.name=masked" in settings else set())
    assert alone.keys() == {(p, kind) for p in range(STEPS * 8) for kind in kinds}
    assert all(len(values) == 1 for values in alone.values())
    for kind in kinds:
        drawn = [(position, value) for (position, k), values in alone.items() if k == kind for value in values]
        if kind == "label":  # of which there are few: with the sample that has it, or has it dropped
            drawn = [(position, (alone[position, "key"], value)) for position, value in drawn]
        assert len({str(value) for _, value in drawn}) > TRAIN_SAMPLES / 3, kind


#: A layout decides who uses a draw, a stage what is drawn: the masked stage draws all that there is, on every layout.
LAYOUTS_OF = {
    "masked": (
        "accumulated", "data2", "tensor2_data2", "sequence2_data2_zero3", "pipeline4", "pipeline2_data2",
        "pipeline2_virtual2_sequence2_data2",
    ),
    "next_scale": ("accumulated", "sequence2_data2_zero3", "pipeline2_data2"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "layout"), [(stage, name) for stage, names in LAYOUTS_OF.items() for name in names], indirect=["case"]
)
def test_every_layout_draws_the_same(inputs, tmp_path, case, layout):
    settings, alone = case
    assert draws(inputs, tmp_path / "run", layout, *settings) == alone
