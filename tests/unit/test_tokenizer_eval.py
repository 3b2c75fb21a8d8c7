"""`tokenizer eval`: its measures against hand-computed values, and what it writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hmar_mega.cli import main
from hmar_mega.config import TokenizerConfig
from hmar_mega.data.shard import image_fields
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.evaluate import evaluate_folder, load_features
from hmar_mega.tokenizer.measures import (
    FeatureMoments,
    bits_per_pixel,
    entropy_bits_per_pixel,
    frechet_distance,
    psnr_of_each,
    ssim_of_each,
)
from hmar_mega.tokenizer.model import MultiScaleVQVAE

SCHEDULE = ScaleSchedule((1, 2, 4))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pooled():
    """A plug-in for rFID: the mean of each channel."""
    return lambda images: images.mean((2, 3))


def test_psnr_of_each_image():
    images = torch.zeros(2, 3, 4, 4)
    other = images + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert psnr_of_each(images, other).tolist() == pytest.approx([20.0, 40.0])


def test_ssim_is_one_for_equals_and_its_formula_for_constants():
    images = noise(2, 3, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(ssim_of_each(images, images), torch.ones(2))
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.6)  # 0.4 and 0.8 in [0, 1]
    expected = (2 * 0.4 * 0.8 + 1e-4) / (0.4**2 + 0.8**2 + 1e-4)
    assert ssim_of_each(a, b).item() == pytest.approx(expected, rel=1e-3)
    assert ssim_of_each(images, images + 0.5 * noise(2, 3, 16, 16, seed=1)).max() < 0.9
    assert ssim_of_each(images[..., :8, :8], images[..., :8, :8]).tolist() == pytest.approx([1, 1])


def test_the_frechet_distance_of_known_gaussians():
    ours = (torch.zeros(2).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    theirs = (torch.tensor([3.0, 4.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double())
    # 25 + (2 − 1)² + (3 − 4)²
    assert frechet_distance(ours, theirs) == pytest.approx(27.0)
    assert frechet_distance(ours, ours) == pytest.approx(0.0, abs=1e-9)


def test_moments_batch_by_batch_are_those_of_all():
    rows, moments = noise(9, 4), FeatureMoments()
    for part in rows.split(4):
        moments.add(part)
    mean, covariance = moments.moments()
    torch.testing.assert_close(mean, rows.double().mean(0))
    torch.testing.assert_close(covariance, torch.cov(rows.double().T))
    with pytest.raises(UserError, match="at least two images"):
        FeatureMoments().moments()


def test_bits():
    assert bits_per_pixel(SCHEDULE, 16, 8) == pytest.approx(21 * 4 / 64)
    counts = torch.zeros(3, 4)
    counts[0, 0] = 5  # certain: nothing
    counts[1, :2] = 3  # one bit
    counts[2] = 7  # two bits
    assert entropy_bits_per_pixel(SCHEDULE, counts, 8) == pytest.approx((4 * 1 + 16 * 2) / 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    config = TokenizerConfig(
        base_channels=8, channel_mult=(1, 1, 1), encoder_res_blocks=1, decoder_res_blocks=1, latent_channels=4,
        norm_groups=4, attention=False, codebook_size=16,
    )  # fmt: skip
    for seed in (0, 1):
        torch.manual_seed(seed)
        MultiScaleVQVAE(config, SCHEDULE).save(folder / f"vae{seed}")
    torch.manual_seed(0)
    MultiScaleVQVAE(config, ScaleSchedule((1, 2))).save(folder / "small")
    random = np.random.RandomState(0)
    with open_shards(folder / "images", "images", ["only"], 64) as writer:
        for number in range(7):
            file = io.BytesIO()
            Image.fromarray(random.randint(0, 256, (16, 16, 3)).astype(np.uint8)).save(file, format="PNG")
            writer.write(f"{number:06d}", 0, image_fields("png", file.getvalue(), f"{number}", (16, 16)))
    return folder


def test_eval_measures_two_tokenizers_on_the_same_images(folder: Path, tmp_path: Path, capsys):
    options = ["--perceptual", "none", "--features", f"{__name__}:pooled", "--batch-size", "3"]
    command = ["tokenizer", "eval", str(folder / "vae0"), str(folder / "images"), "--out", str(tmp_path / "out")]
    assert main([*command, *options, "--against", str(folder / "vae1")]) == 0
    results = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert set(results) == {"ours", "against"}
    ours = results["ours"]
    assert ours["images"] == 7
    assert ours["perceptual"] is None
    assert ours["rfid"] > 0
    assert ours["psnr"] == ours["psnr_by_scales"][-1]
    assert len(ours["usage"]) == len(ours["perplexity"]) == len(ours["psnr_by_scales"]) == 3
    assert ours["usage_any"] >= max(ours["usage"])
    assert ours["entropy_bits_per_pixel"] < ours["bits_per_pixel"]
    assert ours["fingerprint"] == MultiScaleVQVAE.load(folder / "vae0").fingerprint
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "eval.md").read_text().strip() in printed
    with Image.open(tmp_path / "out" / "grid-ours.png") as picture:
        assert picture.size == (7 * 64, 5 * 64)  # originals, reconstructions, errors, two partial sums

    model = MultiScaleVQVAE.load(folder / "vae0")
    reference = evaluate_folder(
        {"ours": folder / "vae0"}, folder / "images", tmp_path / "again", batch_size=7, perceptual="none",
        features="none", progress=False,
    )["ours"]  # fmt: skip
    assert reference["rfid"] is None
    assert reference["psnr"] == pytest.approx(ours["psnr"], abs=1e-3)
    assert model.resolution == 16


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path):
    names = {"a": folder / "vae0", "b": folder / "small"}
    with pytest.raises(UserError, match="different resolutions"):
        evaluate_folder(names, folder / "images", tmp_path, perceptual="none", features="none", progress=False)
    for name in ("inception", "nowhere:made", f"{__name__}:missing"):
        with pytest.raises(UserError, match=r"package\.module:function"):
            load_features(name, None)
