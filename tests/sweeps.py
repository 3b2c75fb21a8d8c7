"""Sweeps for tests: a SWEEP.yaml, the data and tokenizer it names, and what finished cells leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hmar_mega.config import TokenizerConfig
from hmar_mega.data.index import ShardEntry, ShardIndex, TokenFormat, write_index
from hmar_mega.scales import ScaleSchedule
from hmar_mega.scaling import record, state
from hmar_mega.scaling.cells import Cell, expand
from hmar_mega.scaling.plan import plan_cells
from hmar_mega.scaling.spec import load_sweep
from hmar_mega.tokenizer.model import MultiScaleVQVAE

WIDTHS = (16, 32, 48, 64, 96)
IMAGES = 6400


def write_spec(tmp_path: Path, **changes: Any) -> Path:
    """SWEEP.yaml of five widths; `settings` are added to those that name the data."""
    data = {"train": str(tmp_path / "tokens" / "train"), "val": str(tmp_path / "tokens" / "val")}
    tree: dict[str, Any] = {
        "dir": str(tmp_path / "sweep"),
        "base": "demo",
        "settings": {"data": data, "tokenizer": {"path": str(tmp_path / "vae")}, "parallel": {"tensor_parallel": 1}},
        "sizes": [{"depth": 2, "width": w, "heads": 2} for w in WIDTHS],
        "budgets": {"iso_data": {"images": [IMAGES]}},
        "dataset_images": 1000,
        "cluster": "local-cpu",
        "layout": "config",
        **changes,
    }
    path = tmp_path / "SWEEP.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_data(tmp_path: Path, version: str = "a") -> None:
    """What `write_spec` names: a small tokenizer, and indices of shards that are not there."""
    config = TokenizerConfig(
        base_channels=8, channel_mult=(1, 1, 1), encoder_res_blocks=1, decoder_res_blocks=1, latent_channels=8,
        norm_groups=4, attention=False, codebook_size=64,
    )  # fmt: skip
    if not (tmp_path / "vae").exists():
        MultiScaleVQVAE(config, ScaleSchedule((1, 2, 4))).save(tmp_path / "vae")
    tokens = TokenFormat(patch_nums=(1, 2, 4), codebook_size=64, fingerprint="f", resolution=16)
    for part in ("train", "val"):
        shard = ShardEntry(name="shard-000000.tar", samples=1000, bytes=10, sha256=version * 64)
        (tmp_path / "tokens" / part).mkdir(parents=True, exist_ok=True)
        index = ShardIndex(kind="tokens", samples=1000, classes=("x",), tokens=tokens, shards=(shard,))
        write_index(tmp_path / "tokens" / part, index)


def cells_of(path: Path) -> list[Cell]:
    """The cells of a SWEEP.yaml."""
    return expand(*load_sweep(path))


def enter(path: Path, accept_changed_data: bool = False) -> list[str]:
    """Enter the cells of a SWEEP.yaml into its folder, as `sweep submit` does; their names."""
    if not (path.parent / "vae").exists():
        write_data(path.parent)
    spec, base = load_sweep(path)
    planned = plan_cells(spec, expand(spec, base))
    entries, _ = state.write_sweep(Path(spec.dir), spec, base, planned, accept_changed_data)
    return [entry["cell"] for entry in entries]


def finish(folder: Path, name: str, loss: float) -> None:
    """What a finished attempt leaves behind, checkpoints aside."""
    path = record.cell_folder(folder, name)
    (path / "run").mkdir()
    steps = next(entry["steps"] for entry in state.read_sweep(folder) if entry["cell"] == name)
    (path / "run" / "metrics.jsonl").write_text(json.dumps(validation(steps, loss)) + "\n")
    record.record(path, "start", number=1)
    record.write_result(folder, name, steps)
    record.record(path, "end", outcome="finished", status=0)


def validation(steps: int, loss: float) -> dict[str, Any]:
    """A row of metrics.jsonl with a loss over two scales."""
    row: dict[str, Any] = {
        "kind": "val",
        "step": steps,
        "scale_loss": [loss, loss / 2],
        "scale_error": [None, loss / 2],
    }
    for kind in ("", "_error"):
        row |= {f"all_scales{kind}": loss, f"last_scale{kind}": loss / 2}
    return row
