"""Training of the tokenizer: its schedule, that it learns, repeats itself, and what it leaves in the folder."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from hmar_mega.config import Config, TokenizerTrainConfig
from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.train import learning_rate, reconstruction_sheet, train_tokenizer

STEPS = 60


def config(**train: object) -> Config:
    settings = {"steps": STEPS, "warmup_steps": 5, "lr": 1e-2, "dead_code_steps": 10, "log_interval": 20, **train}
    small = {
        "base_channels": 8,
        "channel_mult": [1, 1, 1],
        "encoder_res_blocks": 1,
        "decoder_res_blocks": 1,
        "latent_channels": 4,
        "norm_groups": 4,
        "attention": False,
        "codebook_size": 16,
        "train": settings,
    }
    return parse_config({"tokenizer": small, "schedule": {"resolution": 8, "patch_nums": [1, 2]}, "run": {"seed": 3}})


def stripes(step: int, batch: int = 8) -> Tensor:
    """Images with each half black or white: two bits a picture, easy to learn."""
    levels = torch.randint(2, (batch, 1, 1, 2), generator=torch.Generator().manual_seed(step)) * 2.0 - 1
    return levels.repeat_interleave(4, dim=-1).expand(batch, 3, 8, 8).contiguous()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("run") / "tokenizer"
    return out, train_tokenizer(config(), stripes, out, validation=stripes(10_000, 32), progress=False)


def test_the_learning_rate_warms_up_and_falls_to_one_percent():
    train = TokenizerTrainConfig(steps=101, warmup_steps=10, lr=1.0)
    rates = [learning_rate(step, train) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx((1 + 0.01) / 2)
    assert rates[100] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_a_warm_up_as_long_as_training_is_legal():
    train = TokenizerTrainConfig(steps=4, warmup_steps=4, lr=1.0)
    assert [learning_rate(step, train) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_training_learns_to_reconstruct(trained):
    out, metrics = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["l2"] < lines[0]["l2"]
    grey = 10 * torch.log10(torch.tensor(4.0)).item()  # the best an image that knows nothing can do
    assert metrics["val_psnr"] > grey + 6


def test_each_line_of_metrics_says_what_the_codebook_does(trained):
    line = json.loads((trained[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "l1", "l2", "vq", "psnr", "lr", "grad_norm", "renewed_codes", "images_per_second"} < set(line)
    assert len(line["usage"]) == len(line["perplexity"]) == 2
    assert all(0 < u <= 1 for u in line["usage"])
    assert all(1 <= p <= 16 for p in line["perplexity"])
    assert line["num_images_seen"] == STEPS * 8


def test_the_folder_holds_a_tokenizer_that_loads(trained):
    out, metrics = trained
    model = MultiScaleVQVAE.load(out)
    assert model.fingerprint == metrics["fingerprint"]
    assert model.quantizer.ema_vocab_hit.sum() > 0
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "metrics.json",
        "metrics.jsonl",
        "reconstructions.png",
        "tokenizer.safetensors",
    ]
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size == (12 * 64, 3 * 64)


def test_training_repeats_itself_and_follows_the_seed(tmp_path: Path):
    torch.manual_seed(1)
    first = train_tokenizer(config(steps=12), stripes, tmp_path / "a", progress=False)
    torch.manual_seed(2)
    second = train_tokenizer(config(steps=12), stripes, tmp_path / "b", progress=False)
    assert first["fingerprint"] == second["fingerprint"]
    other = config(steps=12).model_copy(update={"run": config().run.model_copy(update={"seed": 4})})
    third = train_tokenizer(other, stripes, tmp_path / "c", progress=False)
    assert third["fingerprint"] != first["fingerprint"]


def test_training_leaves_the_random_state_of_its_caller_alone(tmp_path: Path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_tokenizer(config(steps=2), stripes, tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_the_sheet_shows_originals_reconstructions_and_partial_sums(trained):
    model, images = MultiScaleVQVAE.load(trained[0]), stripes(7, 5)
    sheet = reconstruction_sheet(model, images)
    assert sheet.shape == (3 * 8, 5 * 8, 3)

    def cell(row: int, column: int) -> Tensor:
        return sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(2, 0, 1)

    def bytes_of(picture: Tensor) -> Tensor:
        return ((picture + 1) * 127.5).round().to(torch.uint8)

    tokens = model.encode(images)
    assert torch.equal(cell(0, 4), bytes_of(images[4]))
    assert torch.equal(cell(1, 2), bytes_of(model.decode_tokens(tokens)[2]))
    assert torch.equal(cell(2, 3), bytes_of(model.decode(model.quantizer.scale_features(0, tokens[:, :1]))[3]))


def test_codes_are_renewed_early_and_not_late(tmp_path: Path):
    one_image = stripes(0)
    train_tokenizer(
        config(steps=24, dead_code_steps=5, restart_until=0.5, log_interval=1),
        lambda _: one_image,
        tmp_path,
        progress=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    renewed = [line["renewed_codes"] for line in lines]
    assert sum(renewed[:12]) > 0
    assert sum(renewed[12:]) == 0


def test_codes_are_never_renewed_when_that_is_off(tmp_path: Path):
    train_tokenizer(config(dead_code_steps=0, steps=20), lambda _: stripes(0), tmp_path, progress=False)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["renewed_codes"] == 0


def test_collapse_of_a_scale_is_logged_once(tmp_path: Path, caplog):
    grey = torch.zeros(4, 3, 8, 8)
    with caplog.at_level(logging.WARNING):
        metrics = train_tokenizer(config(steps=140, dead_code_steps=0), lambda _: grey, tmp_path, progress=False)
    assert metrics["collapsed_scales"][0] == 1
    warnings = [
        r.getMessage() for r in caplog.records if "scale 1 (1×1 tokens) uses few of the codes" in r.getMessage()
    ]
    assert len(warnings) == 1


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 3, 8, 8), 255.0)])
def test_images_not_scaled_are_refused(tmp_path: Path, images: Tensor):
    with pytest.raises(UserError, match=r"x / 127.5 − 1"):
        train_tokenizer(config(), lambda _: images, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_divergence_stops_training_and_saves_no_tokenizer(tmp_path: Path):
    def broken(step: int) -> Tensor:
        return stripes(step) if step < 3 else torch.full((8, 3, 8, 8), float("nan"))

    (tmp_path / "metrics.json").write_text("of an earlier run")
    with pytest.raises(UserError, match="diverged: loss nan at step 20"):
        train_tokenizer(config(), broken, tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to"):
        train_tokenizer(config(), stripes, tmp_path / "file", progress=False)


def test_the_progress_bar_shows_loss_and_rate(tmp_path: Path, capsys):
    train_tokenizer(config(steps=20), stripes, tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "psnr" in shown
    assert "images/s" in shown
