"""`hmar-mega report RUN…`: one page about a run, or about several beside each other.

Curves of all scales and of each, sample grids over training, evaluations, throughput, memory, what their configurations
have different and where they ran. The page needs no network and no script: images and curves are inside it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmar_mega import report_plots
from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.metrics import read_metrics
from hmar_mega.report import memory
from hmar_mega.report_page import comparison, element, page, picture, wrap

log = logging.getLogger(__name__)

#: Sample grids of a run on the page, over training, when it is alone and beside others.
GRIDS_ALONE, GRIDS_BESIDE = 8, 4

#: Runs whose names stand in the heading too.
NAMED = 3

#: Settings that name places, which differ between any two runs and say nothing.
PLACES = ("run.dir", "run.resume_from")

NOTHING = "–"


@dataclass(frozen=True)
class RunRecord:
    """What a run directory tells.

    Attributes:
        name: on the page.
        rows: of metrics.jsonl.
        environment: of versions.json; empty for a run that has not begun.
        parameters, step: of the newest checkpoint; None without one.
        finished: whether that checkpoint is the last step's.
        grids: step → file of the sample grid.
        evaluations: results of `hmar-mega evaluate` in the run directory.
    """

    folder: Path
    name: str
    config: Config
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    parameters: int | None
    step: int | None
    finished: bool
    grids: dict[int, Path]
    evaluations: list[dict[str, Any]]

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Side of each scale's token map."""
        return self.config.schedule.scales.patch_nums

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `train` or of `val`."""
        return [row for row in self.rows if row["kind"] == kind]


def report(folders: Sequence[Path], out: Path, names: Sequence[str] = ()) -> Path:
    """Write the page about these run directories, also of runs that still train.

    Args:
        out: the page.
        names: of the runs on the page; default their folders', with as much of the path as tells them apart.

    Returns:
        `out`.

    Raises:
        UserError: when one is no run directory, has recorded nothing, or cannot be read; or names do not fit.
    """
    if names and len(names) != len(folders):
        raise UserError(f"{len(names)} names for {len(folders)} runs: give one for each, or none")
    if len(set(names or folders)) != len(folders):
        raise UserError("the same run or name is given twice; name each once")
    runs = [read_run(f, n) for f, n in zip(folders, names or _short_names(folders), strict=True)]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        element("h1", f"{title}: {', '.join(run.name for run in runs)}" if 1 < len(runs) <= NAMED else title),
        element("p", _lead(runs), "lead"),
        element("h2", "Figures"),
        _table(["", *(run.name for run in runs)], _figures(runs)),
        *_evaluations(runs),
        *_curves(runs),
        *_grids(runs),
        *_configurations(runs),
        *_environments(runs),
    ]
    write_atomic(out, page(f"{title} · hmar_mega", sections))
    return out


def read_run(folder: Path, name: str) -> RunRecord:
    """Read a run directory; of its checkpoint only the index.

    Raises:
        UserError: when it is none, or a part of it is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run directory (no config.yaml); give one that `hmar-mega train` made")
    try:
        rows = [row for row in read_metrics(folder) if row["kind"] in ("train", "val")]
    except OSError as err:
        raise UserError(f"{folder}/metrics.jsonl cannot be read ({err.strerror}); nothing to report yet") from None
    if not rows:
        raise UserError(f"{folder}/metrics.jsonl has no rows: the run has not logged its first step yet")
    checkpoint = find_checkpoint(folder)
    reader = CheckpointReader(checkpoint) if checkpoint is not None else None
    return RunRecord(
        folder=folder,
        name=name,
        config=load_config(folder / "config.yaml"),
        rows=rows,
        environment=_read_json(folder / "versions.json") if (folder / "versions.json").is_file() else {},
        parameters=sum(math.prod(shape) for shape in reader.shapes.values()) if reader is not None else None,
        step=int(reader.state["step"]) if reader is not None and "step" in reader.state else None,
        finished=bool(reader is not None and reader.state.get("finished")),
        grids={int(path.stem.split("-")[1]): path for path in sorted((folder / "grids").glob("step-*.png"))},
        evaluations=[_read_json(path) for path in _evaluation_files(folder)],
    )


def _evaluation_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("evaluation.json"), *folder.glob("*/evaluation.json")])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(f"{path} is damaged ({err}); remove it or make it anew") from None
    return tree


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is given twice; name each once")


def _lead(runs: Sequence[RunRecord]) -> str:
    texts = []
    for run in runs:
        model, schedule = run.config.model, run.config.schedule
        stage = "masked prediction" if run.config.stage.name == "masked" else "next-scale prediction"
        kind = "VAR" if model.attention.pattern == "block_causal" else "HMAR"
        texts.append(
            f"{kind}, {model.depth} blocks of width {model.resolved_width}, {schedule.resolution} × "
            f"{schedule.resolution} px, {stage}"
        )
    same = list(dict.fromkeys(texts))
    return f"{'; '.join(same)}." if len(same) <= 3 else f"{len(same)} kinds of runs; see the configurations below."


def _figures(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    columns = [_figures_of(run) for run in runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return {name: values for name, values in rows.items() if set(values) != {NOTHING}}


def _figures_of(run: RunRecord) -> dict[str, str]:
    train, val = run.of_kind("train"), run.of_kind("val")
    best = min(val, key=lambda row: row["all_scales"], default=None)
    rates = [row["images_per_second"] for row in train[1:] or train]
    masked = " (masked tokens)" if run.config.stage.name == "masked" else ""
    held = [row["peak_memory_bytes"] for row in train if "peak_memory_bytes" in row]
    utilisation = [row["mfu"] for row in train if "mfu" in row]
    waits = [row["data_wait"] for row in train if "data_wait" in row]
    step = run.rows[-1]["step"]
    return {
        "state": "finished" if run.finished else f"at step {step:,}, not finished",
        "parameters": NOTHING if run.parameters is None else f"{run.parameters:,}",
        "optimizer steps": f"{step:,}, of {run.config.data.global_batch_size:,} images each",
        "last training loss": f"{train[-1]['loss']:.4f}" if train else NOTHING,
        "best validation loss": NOTHING
        if best is None
        else f"{best['all_scales']:.4f} at step {best['step']:,}{masked}",
        "last validation loss": f"{val[-1]['all_scales']:.4f}{masked}" if val else NOTHING,
        **_scale_figures(run, val),
        "throughput, median": f"{statistics.median(rates):,.0f} images/s" if rates else NOTHING,
        "share of the GPU's peak": f"{statistics.median(utilisation):.1%}" if utilisation else NOTHING,
        "wait for data, median": f"{statistics.median(waits):.1%}" if waits else NOTHING,
        "peak memory of the first process": memory(max(held)) if held else NOTHING,
        "skipped steps": str(train[-1].get("skipped_steps", NOTHING)) if train else NOTHING,
    }


def _scale_figures(run: RunRecord, val: list[dict[str, Any]]) -> dict[str, str]:
    """The last validation losses by scale, nats per token."""
    if not val:
        return {"… of each scale": NOTHING}
    losses = " ".join(NOTHING if loss is None else f"{loss:.2f}" for loss in val[-1]["scale_loss"])
    return {"… of each scale": losses}


def _evaluations(runs: Sequence[RunRecord]) -> list[str]:
    """A table for each feature network, since figures of two networks cannot be compared."""
    by_network: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for found in run.evaluations:
            if "measures" in found:
                key = f"{found['network']} ({found['network_digest']}), reference {found['reference']}"
                by_network.setdefault(key, {})[run.name] = found
    if not by_network:
        return []
    markup = [element("h2", "Samples beside real images")]
    for network, found in by_network.items():
        rows: dict[str, list[str]] = {"images": [f"{one['images']:,}" for one in found.values()]}
        for name in dict.fromkeys(m["name"] for one in found.values() for m in one["measures"]):
            rows[name] = [_measure(one, name) for one in found.values()]
        markup += [element("p", f"Features of {network}; in brackets the 95 % interval.", "note")]
        markup += [_table(["", *found], rows)]
    return markup


def _measure(evaluation: Mapping[str, Any], name: str) -> str:
    found = [m for m in evaluation["measures"] if m["name"] == name and m["value"] is not None]
    if not found:
        return NOTHING
    value, low, high = (found[0][key] for key in ("value", "low", "high"))
    digits = 5 if name == "KID" else 2 if abs(value) >= 10 else 3
    interval = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{interval}"


def _curves(runs: Sequence[RunRecord]) -> list[str]:
    markup = [element("h2", "Learning curves")]
    if len(runs) == 1:
        run = runs[0]
        weights = run.config.stage.loss_weights
        label = "training, mean of tokens" if weights == "uniform" else "training, scales weighted"
        if run.config.stage.name == "masked":
            label = "training, mean of samples"
        markup.append(_plot(report_plots.stage_curves(run.rows, run.patch_nums, run.name, label)))
    elif len({run.patch_nums for run in runs}) > 1:
        markup.append(element("p", "The runs have different scales: their losses are not drawn together.", "note"))
    else:
        masked = [run.name for run in runs if run.config.stage.name == "masked"]
        rows = {run.name: run.rows for run in runs}
        markup.append(_plot(report_plots.comparison_curves(rows, runs[0].patch_nums, masked)))
        markup.append(
            element(
                "p",
                "Validation; of a run without one, training. Dashed: masked prediction, whose loss is that of masked "
                "tokens with others of their scale known, and not to be compared with next-scale prediction.",
                "note",
            )
        )
    markup += [element("h2", "Speed, memory, optimizer")]
    return [*markup, _plot(report_plots.resource_curves({run.name: run.rows for run in runs}))]


def _grids(runs: Sequence[RunRecord]) -> list[str]:
    if not any(run.grids for run in runs):
        return []
    markup = [element("h2", "Samples over training, of the same classes and seeds")]
    for run in runs:
        steps = _spaced(sorted(run.grids), GRIDS_ALONE if len(runs) == 1 else GRIDS_BESIDE)
        if len(runs) > 1:
            markup.append(element("h3", run.name if steps else f"{run.name}: none"))
        shown = "\n".join(picture(run.grids[step], f"step {step:,}") for step in steps)
        markup.append(wrap("div", shown, "grids"))
    return markup


def _spaced(steps: list[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced, the first and the last among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _configurations(runs: Sequence[RunRecord]) -> list[str]:
    """What differs between the runs; of a single one, from the defaults."""
    flat = [_flat(run.config.model_dump(mode="json")) for run in runs]
    names = [run.name for run in runs]
    title = "What the configurations have different"
    if len(runs) == 1:
        flat.append(_flat(Config().model_dump(mode="json")))
        names, title = ["this run", "default"], "Settings that are not the default"
    keys = [key for key in dict.fromkeys(k for tree in flat for k in tree) if key not in PLACES]
    rows = {key: [tree.get(key, NOTHING) for tree in flat] for key in keys}
    rows = {key: values for key, values in rows.items() if len(set(values)) > 1}
    if not rows:
        return [element("h2", title), element("p", "Nothing.")]
    return [element("h2", title), _table(["", *names], rows)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key → value as text."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            plain = float(f"{value:.6g}") if isinstance(value, float) else value
            found[prefix + key] = value if isinstance(value, str) else json.dumps(plain)
    return found


def _environments(runs: Sequence[RunRecord]) -> list[str]:
    columns = []
    for run in runs:
        about = run.environment
        packages = {name: str(version) for name, version in about.get("versions", {}).items()}
        parallel = run.config.parallel
        columns.append(
            {
                "device": str(about.get("device", NOTHING)),
                "processes": str(about.get("world_size", NOTHING)),
                "tensor × pipeline parallel": f"{parallel.tensor_parallel} × {parallel.pipeline_parallel}",
                "precision": run.config.precision.compute,
                "source revision": str(about.get("revision", NOTHING)),
                **packages,
            }
        )
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = {key: [column.get(key, NOTHING) for column in columns] for key in keys}
    folders = {"folder": [os.fspath(run.folder) for run in runs]}
    return [element("h2", "Environment"), _table(["", *(run.name for run in runs)], rows | folders)]


def _plot(svg: str) -> str:
    """A plot that scrolls by itself where the page is too narrow to read it."""
    return wrap("div", svg, "wide")


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    return wrap("div", comparison(heads[1:], rows), "wide")
