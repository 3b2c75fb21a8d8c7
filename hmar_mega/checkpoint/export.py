"""From a run to what one GPU loads without mcore or DeepSpeed: `model.safetensors`, `config.json`, `tokenizer/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hmar_mega.checkpoint.sources import EMA, LATEST, CheckpointReader, find_checkpoint
from hmar_mega.config import Config, ModelConfig
from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Number formats an export can be written in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(
    run: Path,
    out: Path,
    which: str = LATEST,
    dtype: str = "fp32",
    allow_unfinished: bool = False,
    tokenizer_folder: Path | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Write the model of a run's checkpoint.

    Args:
        run: run directory.
        out: new folder.
        which: `latest`, `best`, or a checkpoint's name.
        dtype: `fp32`, `bf16` or `fp16`.
        allow_unfinished: export even if training has not reached its last step.
        tokenizer_folder: of the run's tokenizer; default where the run found it.
        ema: take the moving average of the weights; what was not trained has none and stays as it is.

    Returns:
        The exported config.json.

    Raises:
        UserError: for a run that is missing or unfinished, and an output that exists or cannot be written.
    """
    folder = find_checkpoint(run, which)
    if folder is None:
        have = sorted(p.name for p in (run / "checkpoints").glob("step-*")) if run.is_dir() else []
        what = f"only {', '.join(have)}" if have else "no checkpoint" if run.is_dir() else "nothing: it does not exist"
        raise UserError(
            f"run {run} has no checkpoint {which!r} ({what}); train it first: hmar-mega train CONFIG run.dir={run}"
        )
    reader = CheckpointReader(folder)
    reader.verify()
    state = reader.state
    latest = reader if which == LATEST else CheckpointReader(find_checkpoint(run) or folder)
    if not latest.state["finished"] and not allow_unfinished:
        raise UserError(
            f"run {run} is unfinished: step {latest.state['step']} of {state['last_step']}; continue it, or export "
            "what is there with --allow-unfinished"
        )
    config = parse_config(state["config"])
    tokenizer_folder = tokenizer_folder or Path(str(config.tokenizer.path))
    tokenizer = MultiScaleVQVAE.load(tokenizer_folder)
    if tokenizer.fingerprint != state["tokenizer_fingerprint"]:
        raise UserError(
            f"{tokenizer_folder} is not the tokenizer of run {run}: fingerprint {tokenizer.fingerprint}, expected "
            f"{state['tokenizer_fingerprint']}; give the one it was trained with: --tokenizer FOLDER"
        )
    averaged = reader.averaged() if ema else set()
    settings = export_settings(config, state)
    if ema:
        settings["trained"]["ema"] = True
    with new_folder(out) as temporary:
        tensors = {
            # a head's temperature would change by up to 1 % in bf16
            name: reader.read(name, kind=EMA if name in averaged else "weight")
            .to(torch.float32 if name.endswith("log_scale") else DTYPES[dtype])
            .contiguous()
            for name in reader.shapes
        }
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as err:
            raise UserError(f"cannot write {out}: {err}; choose a folder with space left") from None
        tokenizer.save(temporary / "tokenizer")
        (temporary / "config.json").write_text(json.dumps(settings, indent=1))
    return settings


def export_settings(config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an export, which does not tie it to the machine that trained it."""
    return {
        "format": 1,
        "library": "hmar_mega",
        "model": portable(config.model).model_dump(mode="json"),
        "patch_nums": list(config.schedule.scales.patch_nums),
        "resolution": config.schedule.resolution,
        "codebook_size": config.tokenizer.codebook_size,
        "latent_channels": config.tokenizer.latent_channels,
        "mask_branch": config.stage.name == "masked",
        "mask_input": config.stage.mask_input,
        "sampling": {
            "cfg_scale": config.eval.cfg_scale,
            "top_k": config.eval.top_k,
            "top_p": config.eval.top_p,
            "mask_cfg_ratio": 0.0,
            "mask_schedule": [list(e) for e in config.schedule.resolved_mask_schedule],
        },
        "classes": state.get("classes"),
        "tokenizer_fingerprint": state["tokenizer_fingerprint"],
        "trained": {key: state[key] for key in ("step", "images_seen", "revision", "versions") if key in state},
    }


def portable(model: ModelConfig) -> ModelConfig:
    """The same model with the attention backend that is fastest wherever it runs."""
    return model.model_copy(update={"attention": model.attention.model_copy(update={"backend": "auto"})})
