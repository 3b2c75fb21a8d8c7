"""Set-up of a training run: folders, data, tokenizer, model, engine, resume. Then `loop.train`.

hmar-mega train configs/demo.yaml run.dir=runs/demo
torchrun --nproc-per-node 2 -m hmar_mega train demo parallel.tensor_parallel=2 run.dir=runs/demo
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hmar_mega import loop
from hmar_mega.checkpoint.canonical import load_optimizer, load_weights
from hmar_mega.checkpoint.folders import step_of
from hmar_mega.checkpoint.resume import (
    check_origin,
    last_checkpoint_name,
    resumable,
    resumable_together,
    verify_together,
)
from hmar_mega.checkpoint.saver import CheckpointSaver
from hmar_mega.checkpoint.sources import (
    BEST,
    CheckpointReader,
    ExportReader,
    WeightSource,
    find_checkpoint,
    open_weights,
)
from hmar_mega.config import Config
from hmar_mega.config_io import config_to_yaml
from hmar_mega.damage_report import DAMAGED_FILE, DamageReport
from hmar_mega.engine import Engine
from hmar_mega.errors import UserError
from hmar_mega.files import check_writable, write_atomic
from hmar_mega.fp8_attention import choose_fp8_attention
from hmar_mega.inference.grid import GridSampler
from hmar_mega.interrupts import Interrupts
from hmar_mega.metrics import MetricsLog, drop_rows_after, read_metrics, require_wandb
from hmar_mega.model.hmar import HMAR, mask_branch_names
from hmar_mega.model.layers_mcore import McoreLayers
from hmar_mega.model.stage import Stage, split_layers
from hmar_mega.objective import Objective
from hmar_mega.parallel.agreement import Agreement
from hmar_mega.parallel.dims import ParallelDims, parallel_world
from hmar_mega.parallel.hang import StepWatch
from hmar_mega.parallel.liveness import watch_peers
from hmar_mega.parallel.pipeline import PipelineModel
from hmar_mega.probe import format_checks, require_kernels
from hmar_mega.run_lock import run_lock
from hmar_mega.schedules import Schedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.training_data import TrainingData, Validation, open_data, require_training_data, run_loader
from hmar_mega.versions import check_versions, git_revision, installed_versions

log = logging.getLogger(__name__)


def train_from_config(config: Config, interrupts: Interrupts | None = None) -> Path:
    """Train as `config` says, in every process that torchrun started.

    Args:
        interrupts: signals that ask the run to save and stop; its `status` then says how. Default none.

    Returns:
        The run directory.

    Raises:
        UserError: for input that cannot be used, before anything is written.
        TrainingError: when training cannot go on.
    """
    folder = _check_paths(config)
    tokenizer = MultiScaleVQVAE.load(Path(str(config.tokenizer.path)))
    check_resolution(config, tokenizer)
    data = open_data(config, tokenizer)
    config = with_resolved(config, tokenizer)
    if resumable(config, folder, tokenizer.fingerprint) is None:
        check_origin(config, tokenizer.fingerprint)
    with (
        parallel_world(config) as dims,
        watch_peers(dims, config.run.peer_timeout, lambda: last_checkpoint_name(folder)) as report_hang,
        run_lock(folder, dims),
        StepWatch(config.run.hang_factor, config.run.hang_floor, report_hang) as watch,
    ):
        # again, now that nobody else writes there
        reader = resumable_together(config, folder, tokenizer.fingerprint, dims)
        schedule = Schedule.of(config, data.num_samples)
        plan = config.data.batch_plan
        last_step = plan.steps_for(schedule.total_steps * plan.full)
        last_step = min(last_step, config.optim.max_steps or last_step)
        tokenizer = tokenizer.to(dims.device)
        checks = require_kernels(config)
        if checks and dims.is_main:
            log.info("kernels on fixed samples, against float32:\n%s", format_checks(checks))
        if reader is not None and config.checkpoint.verify:
            verify_together(reader.folder, dims)
        engine, start, best = _build_engine(config, folder, dims, schedule, reader)
        agreement = Agreement(interrupts or Interrupts(), dims)
        run = _assemble(config, folder, dims, engine, tokenizer, data, last_step, agreement, watch)
        run.progress.best_loss = _best_so_far(run, best)
        run.saver.failed_saves = int(reader.state.get("failed_saves", 0)) if reader is not None else 0
        if dims.is_main and engine.step < last_step:
            _write_run_files(config, folder, run.state)
        if dims.is_main:
            run.metrics = MetricsLog(folder, config, start)
            drop_rows_after(folder / loop.SKIPPED_FILE, start)
            drop_rows_after(folder / DAMAGED_FILE, start)
        if reader is not None:
            run.progress.saved_step = start
            run.progress.evaluation_due = _evaluation_due(run, reader)
        choose_fp8_attention(engine)
        dist.barrier()
        with contextlib.closing(run.metrics) if run.metrics is not None else contextlib.nullcontext():
            if engine.step >= last_step and dims.is_main:
                log.info("run %s is already finished at step %d", folder, engine.step)
            try:
                loop.train(run)
            finally:
                run.saver.close()
                run.loader.close()
    return folder


def _best_so_far(run: loop.Run, best: float) -> float:
    """The best validation loss of the run: the checkpoint's own, or that of an evaluation made up for after it."""
    found = [best]
    if run.dims.is_main and (pointed := find_checkpoint(run.folder, BEST)) is not None:
        rows = read_metrics(run.folder)
        losses = [row["all_scales"] for row in rows if row["kind"] == "val" and row["step"] == step_of(pointed)]
        found = [min([best, *losses])]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _evaluation_due(run: loop.Run, reader: CheckpointReader) -> bool:
    """Whether the evaluation of the checkpoint's step was put off and not made up for; the same on all ranks."""
    if not reader.state.get("evaluation_due"):
        return False
    due = [False]
    if run.dims.is_main and run.validation is not None:
        rows = read_metrics(run.folder)
        due = [not any(row["kind"] == "val" and row["step"] == run.engine.step for row in rows)]
    elif run.dims.is_main and run.sampler is not None:
        due = [not loop.grid_path(run).exists()]
    dist.broadcast_object_list(due, src=0)
    return due[0]


def build_model(config: Config, layers: Any, stage: Stage | None = None) -> HMAR:
    """The model of `config`, or a stage of it; in training stage 2 with the mask branch, everything else frozen."""
    model = HMAR(
        config.model, config.schedule.scales, config.tokenizer.codebook_size, config.tokenizer.latent_channels,
        mask_branch=config.stage.name == "masked", layers=layers, seed=config.run.seed, stage=stage,
    )  # fmt: skip
    model.set_recompute(config.parallel.recompute)
    if config.precision.fp8 == "linears_and_attention":
        model.training_backend = "triton_fp8" if config.model.attention.backend == "triton" else "te_fp8"
    if config.stage.name == "masked":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("mask_"))
    return model


def build_parallel_model(config: Config, dims: ParallelDims) -> HMAR | PipelineModel:
    """This rank's part of the model of `config`."""
    layers = _parallel_layers(config)
    if dims.pipeline_parallel == 1:
        return build_model(config, layers)
    virtual = config.parallel.virtual_pipeline_parallel
    stages = split_layers(config.model.depth, dims.pipeline_parallel * virtual)
    model = PipelineModel([build_model(config, layers, s) for s in stages[dims.pp_rank :: dims.pipeline_parallel]])
    model.add_ballast()
    return model


def _parallel_layers(config: Config) -> McoreLayers:
    if config.precision.fp8 == "none":
        return McoreLayers(config.parallel.sequence_parallel)
    check_versions("transformer-engine")
    from hmar_mega.model.layers_te import TELayers  # needs CUDA to be imported

    return TELayers(config.precision, config.parallel.sequence_parallel)


def _build_engine(
    config: Config, folder: Path, dims: ParallelDims, schedule: Schedule, reader: CheckpointReader | None
) -> tuple[Engine, int, float]:
    """Model with its starting weights, the engine around it, the step it stands at and the best loss so far."""
    model = build_parallel_model(config, dims)
    if reader is not None:
        load_weights(model, reader, dims, folder)
    elif config.run.init_from is not None:
        initialise(model, config, dims)
    if dims.is_main:
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("model: %.2f M parameters on this rank, %.2f M trained", total / 1e6, trained / 1e6)
    model = model.to(dims.device)
    engine = Engine(model, config, dims, schedule)
    if reader is None:
        return engine, 0, float("inf")
    load_optimizer(engine, reader)
    if dims.is_main:
        log.info("resumed %s at step %d", folder, engine.step)
    best = reader.state.get("best_loss")
    return engine, engine.step, float("inf") if best is None else float(best)


def initialise(model: HMAR | PipelineModel, config: Config, dims: ParallelDims) -> None:
    """Weights from another run; the mask branch of a next-scale model starts from its last blocks and head."""
    path = str(config.run.init_from)
    source = open_weights(path, verify=False)
    if config.checkpoint.verify and isinstance(source, CheckpointReader):
        verify_together(source.folder, dims)
    if dims.is_main:
        _warn_of_other_semantics(config, source)
    renames: dict[str, str] = {}
    if model.has_mask_branch and "mask_embed" not in source.shapes:
        renames = {**mask_branch_names(n for n, _ in model.named_parameters()), "mask_embed": ""}
    if config.run.new_classes:
        renames["class_embed.weight"] = ""
    load_weights(model, source, dims, path, renames)
    if dims.is_main:
        branch = "; the mask branch starts from the next-scale branch" if "mask_embed" in renames else ""
        classes = "; the class table starts afresh" if config.run.new_classes else ""
        log.info("weights from %s%s%s", path, branch, classes)


def _warn_of_other_semantics(config: Config, source: WeightSource) -> None:
    """Say where weights fit a configuration by their shapes but were trained to be used in another way."""
    if isinstance(source, ExportReader):
        settings = source.settings
    elif isinstance(source, CheckpointReader):
        settings = source.state["config"]
    else:
        return
    pattern = settings["model"]["attention"]["pattern"]
    if pattern != config.model.attention.pattern:
        log.warning(
            "the weights of %s were trained with %s attention, this run trains them with %s; set "
            "model.attention.pattern=%s to go on as they were", config.run.init_from, pattern,
            config.model.attention.pattern, pattern,
        )  # fmt: skip
    mask_input = settings.get("mask_input") or settings.get("stage", {}).get("mask_input")
    if config.stage.name == "masked" and "mask_embed" in source.shapes and mask_input != config.stage.mask_input:
        log.warning(
            "the mask branch of %s was trained with mask_input=%s, this run goes on with %s; set stage.mask_input=%s "
            "to go on as it was", config.run.init_from, mask_input, config.stage.mask_input, mask_input,
        )  # fmt: skip


def _assemble(
    config: Config, folder: Path, dims: ParallelDims, engine: Engine, tokenizer: MultiScaleVQVAE,
    data: TrainingData, last_step: int, agreement: Agreement, watch: StepWatch,
) -> loop.Run:  # fmt: skip
    loader = run_loader(config, data, dims, engine.images_seen, tokenizer)
    validation = None if data.validation is None else Validation(config, data.validation, dims, tokenizer)
    model: Any = engine.model
    return loop.Run(
        config=config, folder=folder, dims=dims, engine=engine,
        objective=Objective(config, tokenizer.quantizer, dims.device),
        loader=loader, damage=DamageReport(folder, loader.account, dims), validation=validation,
        validation_rounds=validation.rounds if validation is not None else 0, agreement=agreement, watch=watch,
        sampler=GridSampler(model, tokenizer, config, dims.is_main) if config.eval.grid_count else None,
        last_step=last_step,
        state={
            "last_step": last_step,
            "config": config.model_dump(mode="json"),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "classes": list(data.classes),
            "versions": installed_versions(),
            "revision": git_revision(),
            "layout": {"processes": dims.world_size, **config.parallel.model_dump(mode="json")},
        },
        saver=CheckpointSaver(folder, engine, config.checkpoint),
    )  # fmt: skip


def _check_paths(config: Config) -> Path:
    """What a training configuration must name; returns the run directory."""
    if config.run.dir is None:
        raise UserError("run.dir is not set: say where the run goes, for example run.dir=runs/d16")
    if config.tokenizer.path is None:
        raise UserError("tokenizer.path is not set: give the folder of a trained tokenizer (hmar-mega tokenizer train)")
    require_training_data(config.data)
    if config.stage.name == "masked" and config.run.init_from is None:
        raise UserError(
            "stage.name=masked starts from a trained next-scale model: set run.init_from to its run directory"
        )
    if config.logging.wandb != "off":
        require_wandb(config.logging.wandb)
    folder = Path(config.run.dir)
    check_writable(folder)
    return folder


def check_resolution(config: Config, tokenizer: MultiScaleVQVAE) -> None:
    """Raise UserError unless the tokenizer makes the schedule's largest map of an image of that resolution."""
    try:
        config.schedule.scales.check_fits(config.schedule.resolution, tokenizer.config.downsample)
    except ValueError as err:
        raise UserError(str(err)) from None


def with_resolved(config: Config, tokenizer: MultiScaleVQVAE) -> Config:
    """The tokenizer section as the trained tokenizer has it, with an absolute path."""
    section = tokenizer.config.model_copy(
        update={"path": str(Path(str(config.tokenizer.path)).resolve()), "train": config.tokenizer.train}
    )
    return config.model_copy(update={"tokenizer": section})


def _write_run_files(config: Config, folder: Path, state: dict[str, Any]) -> None:
    write_atomic(folder / "config.yaml", config_to_yaml(config))
    about = {"versions": state["versions"], "revision": state["revision"], "world_size": dist.get_world_size()}
    about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_atomic(folder / "versions.json", json.dumps(about, indent=1))
