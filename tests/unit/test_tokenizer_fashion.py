"""A small tokenizer learns real images on a CPU: Fashion-MNIST at 32 px, where Debian's package is installed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from hmar_mega.config_io import load_config
from hmar_mega.data.demo_sets import FASHION_FOLDER, load_set
from hmar_mega.data.shard import image_fields
from hmar_mega.data.writer import open_shards
from hmar_mega.tokenizer.train import train_tokenizer

SOURCE = Path(os.environ.get("FASHION_MNIST", FASHION_FOLDER))

#: Held-out PSNR in dB that so short a training must reach; a grey image has about 9.
DEMANDED_PSNR = 16.0


@pytest.mark.slow
@pytest.mark.skipif(
    not (SOURCE / "train-images-idx3-ubyte.gz").is_file(),
    reason=f"no {SOURCE}: apt-get install dataset-fashion-mnist, or name the folder of its files in FASHION_MNIST",
)
def test_fashion_mnist_is_reconstructed_with_every_code_in_use(tmp_path: Path):
    images = load_set("fashion-mnist", SOURCE, None)
    for name, numbers in (("train", range(2000)), ("val", range(60_000, 60_256))):
        with open_shards(tmp_path / name, "images", images.classes, 2000) as writer:
            for number in numbers:
                file = io.BytesIO()
                picture = images.load(number).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
                picture.save(file, format="PNG")
                fields = image_fields("png", file.getvalue(), str(number), (32, 32))
                writer.write(f"{number:08d}", int(images.labels[number]), fields)
    config = load_config(
        "tokenizer/fashion-32",
        [
            f"data.images={tmp_path / 'train'}", f"data.images_val={tmp_path / 'val'}", "tokenizer.base_channels=16",
            "tokenizer.codebook_size=256", "tokenizer.train.steps=150", "tokenizer.train.batch_size=16",
            "tokenizer.train.init_images=64", "tokenizer.train.lr=4e-3", "tokenizer.train.dead_code_steps=25",
            "eval.num_samples=256", "eval.grid_count=0",
        ],
    )  # fmt: skip
    metrics = train_tokenizer(config, tmp_path / "vae")
    assert metrics is not None
    assert metrics["val_psnr"] > DEMANDED_PSNR
    assert metrics["usage_any"] > 0.95
    assert metrics["collapsed_scales"] == []
