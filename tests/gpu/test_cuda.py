"""Training and sampling on a CUDA device, against the same run on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import Inputs, Outcome, make_inputs, tiny_config

from hmar_mega.checkpoint.export import export_run
from hmar_mega.config import Config
from hmar_mega.inference import load_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), codebook=32, classes=4)


def train_on(device: str, config: Config) -> Outcome:
    """Run `hmar-mega train` in a process of its own, which sees the GPU or does not."""
    path = Path(str(config.run.dir)).parent / f"{device}.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else "0"}
    command = [sys.executable, "-m", "hmar_mega", "train", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Outcome.of(Path(str(config.run.dir)))


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_float32_steps_are_those_of_the_cpu(inputs: Inputs, tmp_path: Path, pattern: str) -> None:
    """The same three steps, within the rounding of another order of summation."""
    runs = {
        device: train_on(device, tiny_config(inputs, tmp_path / device, f"model.attention.pattern={pattern}"))
        for device in ("cpu", "cuda")
    }
    assert runs["cuda"].losses == pytest.approx(runs["cpu"].losses, rel=1e-5)
    assert runs["cuda"].norms == pytest.approx(runs["cpu"].norms, rel=1e-4)
    for name, values in runs["cpu"].tensors.items():
        torch.testing.assert_close(runs["cuda"].tensors[name], values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float32(inputs: Inputs, tmp_path: Path, compute: str) -> None:
    """Half precision with float32 masters: losses within its rounding, and a checkpoint of finite float32 numbers."""
    exact = train_on("cuda", tiny_config(inputs, tmp_path / "fp32"))
    rough = train_on("cuda", tiny_config(inputs, tmp_path / compute, f"precision.compute={compute}"))
    assert rough.losses == pytest.approx(exact.losses, rel=2e-2)
    assert all(values.isfinite().all() for values in rough.tensors.values())


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_graphs_and_recomputation_change_nothing(inputs: Inputs, tmp_path: Path, stage: str, recompute: str) -> None:
    """Blocks replayed as CUDA graphs over two micro-batches a step, with the own kernels, against kernel by kernel."""
    settings = [
        "model.depth=4", "model.width=64", "model.heads=2", "data.micro_batch_size=2", f"stage.name={stage}",
        "model.drop_path_rate=0.3", "precision.compute=bf16",
    ]  # fmt: skip
    if stage == "masked":
        train_on("cuda", tiny_config(inputs, tmp_path / "first", *settings, "stage.name=next_scale"))
        settings.append(f"run.init_from={tmp_path / 'first'}")
    plain = train_on("cuda", tiny_config(inputs, tmp_path / "plain", *settings, "parallel.cuda_graphs=false"))
    settings += [f"parallel.recompute={recompute}", "parallel.cuda_graphs=true"]
    replayed = train_on("cuda", tiny_config(inputs, tmp_path / "graphs", *settings))
    # the same kernels; only the gradient of embeddings adds in an order of its own
    assert replayed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert replayed.norms == pytest.approx(plain.norms, rel=1e-3)
    for name, values in plain.tensors.items():
        torch.testing.assert_close(replayed.tensors[name], values, atol=1e-4, rtol=0)


def test_samples_are_those_of_the_cpu(inputs: Inputs, tmp_path: Path) -> None:
    """The random numbers of an image are the same on every device, so in float32 its pixels are."""
    train_on("cuda", tiny_config(inputs, tmp_path / "run"))
    export_run(tmp_path / "run", tmp_path / "model")
    on_gpu = load_model(tmp_path / "model", device="cuda").generate([0, 1, 2, 3], seed=3).cpu()
    on_cpu = load_model(tmp_path / "model", device="cpu").generate([0, 1, 2, 3], seed=3)
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=0)
