"""Training of the tokenizer: that it learns, repeats and resumes itself, what it leaves and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hmar_mega.checkpoint.resume import resumable
from hmar_mega.cli import main
from hmar_mega.config import Config, TokenizerTrainConfig
from hmar_mega.config_io import parse_config
from hmar_mega.data.image_loader import ImageLoader
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.shard import image_fields
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import TrainingError, UserError
from hmar_mega.interrupts import Interrupts, Stop
from hmar_mega.metrics import read_metrics
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.objective import TokenizerObjective
from hmar_mega.tokenizer.rate import learning_rate
from hmar_mega.tokenizer.resume import finished_tokenizer
from hmar_mega.tokenizer.sheet import reconstruction_sheet
from hmar_mega.tokenizer.train import train_tokenizer

STEPS = 60


def stripes(count: int, side: int = 8) -> np.ndarray:
    """Images with each half black or white, two bits a picture and easy to learn: (n, side, side, 3) uint8."""
    levels = np.random.RandomState(0).randint(0, 2, (count, 1, 2, 1)).astype(np.uint8) * 255
    return np.broadcast_to(np.repeat(levels, side // 2, axis=2), (count, side, side, 3))


def write_images(folder: Path, images: list[Image.Image]) -> Path:
    with open_shards(folder, "images", ["only"], 64) as writer:
        for number, image in enumerate(images):
            file = io.BytesIO()
            image.save(file, format="PNG")
            writer.write(f"{number:06d}", 0, image_fields("png", file.getvalue(), f"{number}", image.size))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (("train", 40), ("val", 9)):
        write_images(folder / name, [Image.fromarray(np.ascontiguousarray(p)) for p in stripes(count)])
    return folder


def config(shards: Path, **train: object) -> Config:
    settings = {
        "steps": STEPS, "batch_size": 8, "warmup_steps": 5, "lr": 1e-2, "dead_code_steps": 10, "log_interval": 20,
        **train,
    }  # fmt: skip
    small = {
        "base_channels": 8, "channel_mult": [1, 1, 1], "encoder_res_blocks": 1, "decoder_res_blocks": 1,
        "latent_channels": 4, "norm_groups": 4, "attention": False, "codebook_size": 16, "train": settings,
    }  # fmt: skip
    tree = {
        "tokenizer": small,
        "schedule": {"resolution": 8, "patch_nums": [1, 2]},
        "data": {
            "images": str(shards / "train"), "images_val": str(shards / "val"), "augment": "none", "workers": 0,
        },
        "precision": {"compute": "fp32"},
        "checkpoint": {"interval": 1000, "asynchronous": False},
        "logging": {"tensorboard": False},
        "run": {"seed": 3},
    }  # fmt: skip
    return parse_config(tree)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("run") / "tokenizer"
    metrics = train_tokenizer(config(shards), out)
    assert metrics is not None
    return out, metrics


def train_rows(out: Path) -> list[dict]:
    return [row for row in read_metrics(out) if row["kind"] == "train"]


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
    lines = train_rows(out)
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["l2"] < lines[0]["l2"]
    assert metrics["val_psnr"] > 6  # 0 dB is the best that an image which knows nothing can do


def test_each_line_of_metrics_says_what_the_codebook_does(trained):
    line = train_rows(trained[0])[-1]
    assert {"loss", "l1", "l2", "vq", "psnr", "lr", "grad_norm", "renewed_codes", "images_per_second"} < set(line)
    assert len(line["usage"]) == len(line["perplexity"]) == 2
    assert all(0 < u <= 1 for u in line["usage"])
    assert all(1 <= p <= 16 for p in line["perplexity"])
    assert line["images"] == STEPS * 8


def test_the_folder_holds_a_run_and_a_tokenizer_that_loads(trained):
    out, metrics = trained
    model = MultiScaleVQVAE.load(out)
    assert model.fingerprint == metrics["fingerprint"]
    assert model.quantizer.ema_vocab_hit.sum() > 0
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "config.json", "config.yaml", "grids", "metrics.json", "metrics.jsonl", "reconstructions.png",
        "tokenizer.safetensors", "versions.json",
    ]  # fmt: skip
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size == (9 * 64, 3 * 64)


def test_checkpoints_of_a_tokenizer_are_listed_and_verified_as_others(trained, capsys):
    assert main(["checkpoint", "list", str(trained[0])]) == 0
    assert "step-00000060" in capsys.readouterr().out
    assert main(["checkpoint", "show", str(trained[0]), "--tensors"]) == 0
    assert "usage.hits" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(trained[0])]) == 0


def test_a_finished_run_started_again_gives_the_same_tokenizer(trained, shards):
    out, metrics = trained
    again = train_tokenizer(config(shards), out)
    assert again["fingerprint"] == metrics["fingerprint"]
    assert again["val_psnr"] == metrics["val_psnr"]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(shards, tmp_path: Path, monkeypatch):
    """With everything that has a state: moments, a moving average, the discriminator, usage of codes, truncation."""
    adversarial = {"weight": 0.1, "channels": 8, "layers": 1, "start": 4}
    settings = {
        "steps": 24, "ema_decay": 0.9, "adversarial": adversarial, "truncate_prob": 0.5, "entropy_weight": 0.1,
        "dead_code_steps": 4, "log_interval": 1, "micro_batch_size": 4,
    }  # fmt: skip
    whole = train_tokenizer(config(shards, **settings), tmp_path / "whole")
    cut = config(shards, **settings)
    interrupts = Interrupts()

    real = TokenizerObjective.training

    def at_step_ten(self, forward, batch):
        if self.step == 10:
            interrupts.requested = Stop.REQUEUE
        return real(self, forward, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerObjective, "training", at_step_ten)
        assert train_tokenizer(cut, tmp_path / "cut", interrupts) is None
    assert interrupts.status == 75
    assert not (tmp_path / "cut" / "metrics.json").exists()
    last = train_rows(tmp_path / "cut")[-1]["step"]
    assert last in (11, 12)  # a wish that comes in the middle of a step counts at once alone, else the next time
    resumed = train_tokenizer(cut, tmp_path / "cut")
    different = {"seconds"}
    assert {k: v for k, v in resumed.items() if k not in different} == {
        k: v for k, v in whole.items() if k not in different
    }
    losses = [[row["loss"] for row in train_rows(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert any(row["renewed_codes"] for row in train_rows(tmp_path / "cut")[last:])
    assert "discriminator" in train_rows(tmp_path / "cut")[-1]


def test_the_finished_tokenizer_is_the_moving_average(shards, tmp_path: Path):
    train_tokenizer(config(shards, steps=12, ema_decay=0.9), tmp_path)
    average = finished_tokenizer(tmp_path / "checkpoints" / "step-00000012")
    assert average.fingerprint == MultiScaleVQVAE.load(tmp_path).fingerprint
    train_tokenizer(config(shards, steps=12), tmp_path / "plain")
    assert average.fingerprint != MultiScaleVQVAE.load(tmp_path / "plain").fingerprint


def test_training_repeats_itself_and_follows_the_seed(shards, tmp_path: Path):
    torch.manual_seed(1)
    first = train_tokenizer(config(shards, steps=12), tmp_path / "a")
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    second = train_tokenizer(config(shards, steps=12, micro_batch_size=8), tmp_path / "b")
    assert torch.equal(torch.rand(3), expected)  # the random state of the caller is left alone
    assert first["fingerprint"] == second["fingerprint"]
    other = config(shards, steps=12)
    other = other.model_copy(update={"run": other.run.model_copy(update={"seed": 4})})
    assert train_tokenizer(other, tmp_path / "c")["fingerprint"] != first["fingerprint"]


@torch.no_grad()
def test_the_sheet_shows_originals_reconstructions_errors_and_partial_sums(trained):
    model = MultiScaleVQVAE.load(trained[0])
    images = torch.from_numpy(stripes(5).copy()).permute(0, 3, 1, 2) / 127.5 - 1
    sheet = reconstruction_sheet(model, images)
    assert sheet.shape == (3 * 8, 5 * 8, 3)

    def cell(row: int, column: int) -> Tensor:
        return sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(2, 0, 1)

    def bytes_of(picture: Tensor) -> Tensor:
        return ((picture + 1) * 127.5).round().to(torch.uint8)

    tokens = model.encode(images)
    rebuilt = model.decode_tokens(tokens)
    assert torch.equal(cell(0, 4), bytes_of(images[4]))
    assert torch.equal(cell(1, 2), bytes_of(rebuilt[2]))
    assert torch.equal(cell(2, 3), bytes_of(model.decode(model.quantizer.scale_features(0, tokens[:, :1]))[3]))
    sheet = reconstruction_sheet(model, images, error=True)
    assert torch.equal(cell(2, 1), bytes_of((rebuilt - images).abs()[1] - 1))


def test_codes_are_renewed_early_and_not_late(tmp_path: Path):
    one = write_images(tmp_path / "train", [Image.fromarray(np.ascontiguousarray(stripes(1)[0]))] * 4)
    settings = config(one.parent, steps=24, dead_code_steps=5, restart_until=0.5, log_interval=1)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"images_val": None})})
    metrics = train_tokenizer(settings, tmp_path / "run")
    assert metrics["val_psnr"] is None
    renewed = [line["renewed_codes"] for line in train_rows(tmp_path / "run")]
    assert sum(renewed[:12]) > 0
    assert sum(renewed[12:]) == 0
    never = config(one.parent, steps=24, dead_code_steps=0)
    never = never.model_copy(update={"data": never.data.model_copy(update={"images_val": None})})
    train_tokenizer(never, tmp_path / "never")
    assert sum(line["renewed_codes"] for line in train_rows(tmp_path / "never")) == 0


def test_collapse_of_a_scale_is_logged_once(tmp_path: Path, caplog):
    grey = write_images(tmp_path / "train", [Image.new("RGB", (8, 8), "grey")] * 4)
    settings = config(grey.parent, steps=115, dead_code_steps=0, batch_size=2, log_interval=5)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"images_val": None})})
    with caplog.at_level(logging.WARNING):
        metrics = train_tokenizer(settings, tmp_path / "run")
    assert metrics["collapsed_scales"][0] == 1
    warnings = [
        r.getMessage() for r in caplog.records if "scale 1 (1×1 tokens) uses few of the codes" in r.getMessage()
    ]
    assert len(warnings) == 1


def test_steps_that_are_not_finite_are_skipped_and_end_training_when_there_are_many(shards, tmp_path, monkeypatch):
    real = TokenizerObjective.training

    def broken(self, forward, batch):
        scores = real(self, forward, batch)
        return (
            scores
            if self.step not in bad
            else type(scores)(
                scores.loss * float("nan"), scores.quantized, scores.images, scores.reconstruction, scores.parts
            )
        )

    monkeypatch.setattr(TokenizerObjective, "training", broken)
    bad = {2, 3}
    metrics = train_tokenizer(config(shards, steps=8, log_interval=1), tmp_path / "a")
    assert metrics["skipped_steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "a" / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4]
    assert rows[0]["positions"] == list(range(16, 24))
    assert all(p.isfinite().all() for p in MultiScaleVQVAE.load(tmp_path / "a").parameters())
    bad = set(range(2, 60))
    with pytest.raises(TrainingError, match=r"10 steps in a row up to step 12 .* Lower tokenizer\.train\.lr"):
        train_tokenizer(config(shards), tmp_path / "b")
    assert not (tmp_path / "b" / "metrics.json").exists()


CHANGES = {
    "tokenizer.base_channels": {"tokenizer.base_channels": 16},
    "tokenizer.codebook_size": {"tokenizer.codebook_size": 8},
    "tokenizer.train.batch_size": {"tokenizer.train.batch_size": 4},
    "tokenizer.train.adversarial.weight": {
        "tokenizer.train.adversarial.weight": 0.1,
        "tokenizer.train.adversarial.layers": 1,
    },
    "run.seed": {"run.seed": 5},
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_run_does_not_go_on_as_another(trained, shards, key: str):
    tree = config(shards).model_dump(mode="json")
    for dotted, value in CHANGES[key].items():
        *parents, last = dotted.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(UserError, match=f"was started with {key}=.*another run.*--overwrite"):
        train_tokenizer(parse_config(tree), trained[0])


def test_a_transformer_does_not_go_on_from_a_tokenizer(trained, shards):
    with pytest.raises(UserError, match=f"run.dir={trained[0]} holds the run of a tokenizer; choose another run.dir"):
        resumable(config(shards), trained[0], "0" * 64)


def test_a_damaged_checkpoint_names_the_one_before(trained, shards, tmp_path: Path):
    out = tmp_path / "copy"
    shutil.copytree(trained[0], out)
    last = out / "checkpoints" / "step-00000060"
    (last / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json.*(go on from it with run\.resume_from|no earlier checkpoint)"):
        train_tokenizer(config(shards), out)


def test_overwriting_starts_anew_and_strange_folders_are_left_alone(trained, shards, tmp_path: Path):
    out = tmp_path / "copy"
    shutil.copytree(trained[0], out)
    metrics = train_tokenizer(config(shards, steps=3), out, overwrite=True)
    assert [row["step"] for row in train_rows(out)] == [3]
    assert metrics["steps"] == 3
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty \(to_mother\.txt\)"):
        train_tokenizer(config(shards), tmp_path / "letters")


def changed(settings: Config, section: str, **values: object) -> Config:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def test_what_cannot_be_trained_on_is_refused(shards, tmp_path: Path):
    def refused(settings: Config, message: str) -> None:
        with pytest.raises(UserError, match=message):
            train_tokenizer(settings, tmp_path / "run")
        assert not (tmp_path / "run" / "metrics.json").exists()

    plain = config(shards)
    refused(changed(plain, "data", images=None), "data.images is not set")
    refused(changed(plain, "tokenizer", codebook_size=4096), r"4096 is more than the 40 images .* at most 200 codes")
    refused(changed(plain, "precision", compute="fp16"), "without loss scaling")
    refused(config(shards, adversarial={"weight": 1, "layers": 2}), "layers=2 needs images of at least 12 px")
    refused(changed(plain, "parallel", zero_stage=3), "zero_stage=1 or 2")
    small = write_images(tmp_path / "small", [Image.new("RGB", (6, 9))] * 8)
    refused(changed(plain, "data", images=str(small)), r"sample 00000\d is 6×9 px, smaller than .*allow_upscaling=true")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        train_tokenizer(plain, tmp_path / "file" / "below")


def loader(folder: Path, **settings: object) -> ImageLoader:
    reader = ShardReader(folder, "images")
    given = {"batch_size": 4, "micro_batch_size": 2, "workers": 0, **settings}
    return ImageLoader(reader, SampleOrder(len(reader), 1), 8, "none", 1, **given)


def test_grey_and_transparent_images_become_rgb_and_that_is_told_once(tmp_path: Path, caplog):
    folder = write_images(
        tmp_path / "odd", [Image.new("L", (8, 8), 7)] * 3 + [Image.new("RGBA", (8, 8), (0, 0, 0, 0))] * 3
    )
    with caplog.at_level(logging.INFO):
        pixels = torch.cat([b.pixels for _, bs in zip(range(3), loader(folder), strict=False) for b in bs])
    assert set(pixels.flatten().tolist()) == {7, 255}
    told = [r.getMessage() for r in caplog.records]
    assert sum("is grey, and becomes RGB" in m for m in told) == 1
    assert sum("transparency, which becomes white" in m for m in told) == 1


def test_the_stream_of_images_is_the_same_on_any_number_of_ranks_with_and_without_a_cache(shards):
    def first_steps(**settings: object) -> list[list[tuple[int, str, int]]]:
        stream = loader(shards / "train", **settings)
        steps = [next(stream) for _ in range(25)]  # two and a half epochs
        return [
            [(int(p), k, int(x.sum())) for b in batches for p, k, x in zip(b.positions, b.keys, b.pixels, strict=True)]
            for batches in steps
        ]

    alone = first_steps()
    assert [p for step in alone for p, *_ in step] == list(range(100))
    assert first_steps(cache_bytes=1 << 20, workers=2) == alone
    ranks = [first_steps(dp_rank=r, dp_size=2, micro_batch_size=1) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    assert first_steps(start_position=40)[0] == alone[10]


def test_truncation_decodes_the_share_of_images_asked_for_from_the_first_scales(shards):
    settings = config(shards, truncate_prob=0.5)
    objective = TokenizerObjective(settings, _tokenizer(settings).quantizer, torch.device("cpu"))
    batch = next(loader(shards / "train", batch_size=400, micro_batch_size=400))[0]
    kept = objective._kept(batch)
    assert set(kept.tolist()) == {1, 2}
    assert 0.18 < float((kept == 1).float().mean()) < 0.32  # half of the half that is cut


@torch.no_grad()
def test_an_image_decoded_from_its_first_scales_is_the_partial_sum(shards):
    model = _tokenizer(config(shards))
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    rebuilt, quantized = model(images, torch.tensor([1, 2, 1]))
    whole, full = model(images)
    first = model.quantizer.scale_features(0, quantized.tokens[:, :1])
    torch.testing.assert_close(quantized.f_hat[[0, 2]], first[[0, 2]])
    torch.testing.assert_close(rebuilt[1], whole[1])
    assert torch.equal(quantized.loss, full.loss)


def _tokenizer(settings: Config) -> MultiScaleVQVAE:
    torch.manual_seed(0)
    return MultiScaleVQVAE(settings.tokenizer, settings.schedule.scales)


def test_bf16_convolutions_leave_weights_and_quantization_in_float32(shards, tmp_path: Path):
    settings = changed(config(shards, steps=4, truncate_prob=0.5), "precision", compute="bf16")
    metrics = train_tokenizer(settings, tmp_path)
    assert metrics["skipped_steps"] == 0
    objective = TokenizerObjective(settings, _tokenizer(settings).quantizer, torch.device("cpu"))
    seen = []

    def forward(images: Tensor, kept: Tensor | None):
        model = _tokenizer(settings)
        model.decoder.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
        return model(images, kept)

    scores = objective.training(forward, next(loader(shards / "train"))[0])
    assert seen == [torch.bfloat16]
    assert scores.quantized.f_hat.dtype == scores.loss.dtype == torch.float32
    assert {p.dtype for p in MultiScaleVQVAE.load(tmp_path).parameters()} == {torch.float32}
