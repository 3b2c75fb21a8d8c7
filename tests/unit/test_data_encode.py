"""Encoding image shards into token shards with a tokenizer whose tokens are known."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hmar_mega.data.images import decode_sample, image_to_tensor
from hmar_mega.data.reader import ShardReader, check_fingerprint
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.encode import EncodeSettings, encode_shards, split_scales


class MeanTokenizer:
    """Token = 100 · scale + mean level of red, in eighths, of each cell of the scale's map."""

    schedule = ScaleSchedule((1, 2, 4))
    config = SimpleNamespace(codebook_size=300, downsample=4)
    fingerprint = "mean-1"

    def encode(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        red = images[:, :1]
        maps = [torch.nn.functional.adaptive_avg_pool2d(red, p).flatten(1) for p in self.schedule.patch_nums]
        return torch.cat([100 * k + ((m + 1) * 4).floor().clamp(0, 7).long() for k, m in enumerate(maps)], dim=1)


@pytest.fixture
def images(tmp_path) -> Path:
    noise = np.random.RandomState(0)
    with open_shards(tmp_path / "images", "images", ("a", "b"), 4) as writer:
        for number in range(11):
            file = io.BytesIO()
            Image.fromarray(noise.randint(0, 256, (20, 20 + number, 3), dtype=np.uint8)).save(file, format="PNG")
            writer.write(f"{number:08d}", number % 2, {"png": file.getvalue()})
    return tmp_path / "images"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_becomes_its_tokens_with_key_and_label(images, tmp_path):
    encode_shards(images, MeanTokenizer(), tmp_path / "out", EncodeSettings(batch_size=4), progress=False)
    pixels, tokens = ShardReader(images, "images"), ShardReader(tmp_path / "out", "tokens")
    assert len(tokens) == 11
    for number in range(11):
        image, sample = pixels.read_image(number), tokens.read_tokens(number)
        with torch.no_grad():
            expected = MeanTokenizer().encode(image_to_tensor(decode_sample(image), 16, "none")[None])[0]
        assert (sample.key, sample.label) == (image.key, image.label)
        assert sample.tokens.tolist() == expected.tolist()


def test_index_says_what_the_tokens_are(images, tmp_path):
    index = encode_shards(images, MeanTokenizer(), tmp_path / "out", progress=False)
    assert (index.kind, index.classes) == ("tokens", ("a", "b"))
    assert index.tokens.model_dump() == {
        "patch_nums": (1, 2, 4),
        "codebook_size": 300,
        "fingerprint": "mean-1",
        "resolution": 16,
        "crops": 1,
        "crop_seed": None,
        "storage": "packed",
        "bits": 9,
        "augment": "none",
        "compute": "fp32",
    }
    check_fingerprint(index, MeanTokenizer().fingerprint, MeanTokenizer().schedule.patch_nums)


def test_other_programs_can_read_npy_shards(images, tmp_path):
    import webdataset

    encode_shards(images, MeanTokenizer(), tmp_path / "out", EncodeSettings(storage="npy"), progress=False)
    dataset = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False).decode()
    sample = next(iter(dataset))
    assert (sample["npy"].dtype, sample["npy"].shape, sample["cls"]) == (np.uint16, (21,), 0)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 2), (64, 3)])
def test_batch_size_and_threads_do_not_change_a_byte(images, tmp_path, batch_size, workers):
    one, two = EncodeSettings(samples_per_shard=4), EncodeSettings(batch_size, samples_per_shard=4, workers=workers)
    encode_shards(images, MeanTokenizer(), tmp_path / "one", one, progress=False)
    encode_shards(images, MeanTokenizer(), tmp_path / "two", two, progress=False)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_augment_crop_takes_the_centre_of_the_enlarged_image(images, tmp_path):
    encode_shards(images, MeanTokenizer(), tmp_path / "out", EncodeSettings(augment="crop"), progress=False)
    image = decode_sample(ShardReader(images, "images").read_image(10))
    with torch.no_grad():
        expected = MeanTokenizer().encode(image_to_tensor(image, 16, "crop")[None])[0]
    assert ShardReader(tmp_path / "out", "tokens").read_tokens(10).tokens.tolist() == expected.tolist()


def test_split_scales_gives_back_the_maps(images, tmp_path):
    encode_shards(images, MeanTokenizer(), tmp_path / "out", progress=False)
    tokens = torch.from_numpy(ShardReader(tmp_path / "out", "tokens").read_tokens(0).tokens)
    maps = split_scales(tokens[None], MeanTokenizer.schedule)
    assert [tuple(one.shape) for one in maps] == [(1, 1), (1, 4), (1, 16)]
    assert [one.min().item() // 100 for one in maps] == [0, 1, 2]
    assert torch.equal(torch.cat(maps, dim=1)[0], tokens)


def test_largest_codebook_survives_sixteen_bits(images, tmp_path):
    tokenizer = MeanTokenizer()
    tokenizer.config = SimpleNamespace(codebook_size=65536, downsample=4)
    tokenizer.encode = lambda images: torch.full((len(images), 21), 65535)
    encode_shards(images, tokenizer, tmp_path / "out", progress=False)
    assert ShardReader(tmp_path / "out", "tokens").read_tokens(0).tokens.tolist() == [65535] * 21


def test_token_shards_cannot_be_encoded_again(images, tmp_path):
    encode_shards(images, MeanTokenizer(), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="holds tokens, but images are needed"):
        encode_shards(tmp_path / "out", MeanTokenizer(), tmp_path / "again", progress=False)


def test_damaged_image_stops_with_its_name_and_leaves_nothing(tmp_path):
    with open_shards(tmp_path / "images", "images", ("a",), 4) as writer:
        writer.write("7", 0, {"png": b"no image"})
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample 7 cannot be decoded"):
        encode_shards(tmp_path / "images", MeanTokenizer(), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("tokens", [torch.zeros(11, 20), torch.full((11, 21), 300), torch.full((11, 21), -1)])
def test_tokenizer_that_breaks_its_promise_is_stopped(images, tmp_path, tokens):
    tokenizer = MeanTokenizer()
    tokenizer.encode = lambda _images: tokens
    with pytest.raises(RuntimeError, match=r"\(11, 21\) below 300 were expected"):
        encode_shards(images, tokenizer, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_used_output_and_empty_batches_are_refused(images, tmp_path):
    with pytest.raises(UserError, match="is not an empty folder"):
        encode_shards(images, MeanTokenizer(), images, progress=False)
    with pytest.raises(UserError, match="batch_size=0"):
        encode_shards(images, MeanTokenizer(), tmp_path / "out", EncodeSettings(batch_size=0), progress=False)


def test_closing_line_tells_what_was_written(images, tmp_path, capsys):
    encode_shards(images, MeanTokenizer(), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "11 images as 21 tokens each in 1 shards at" in printed
    assert "24 bytes an image (9 bits a token)" in printed
