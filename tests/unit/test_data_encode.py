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
from hmar_mega.data.shares import share_of_work
from hmar_mega.data.tars import read_comment
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.rng import Purpose, uniform
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


# Crops, shares and resuming


def test_stored_crops_are_those_of_the_places_drawn_and_the_same_whatever_their_number(images, tmp_path):
    three, two = (EncodeSettings(augment="crop", crops=k, crop_seed=5, batch_size=4) for k in (3, 2))
    encode_shards(images, MeanTokenizer(), tmp_path / "three", three, progress=False)
    encode_shards(images, MeanTokenizer(), tmp_path / "two", two, progress=False)
    more, fewer = (ShardReader(tmp_path / name, "tokens") for name in ("three", "two"))
    assert (more.index.tokens.crops, more.index.tokens.crop_seed) == (3, 5)
    image = decode_sample(ShardReader(images, "images").read_image(9))
    drawn = uniform(torch.tensor(5), torch.tensor([9]), Purpose.STORED_CROP, 6)[0].reshape(3, 2).tolist()
    found = []
    for crop, place in enumerate(drawn):
        with torch.no_grad():
            expected = MeanTokenizer().encode(image_to_tensor(image, 16, "crop", tuple(place))[None])[0]
        found.append(more.read_tokens(9, crop).tokens.tolist())
        assert found[crop] == expected.tolist()
    assert [fewer.read_tokens(9, crop).tokens.tolist() for crop in range(2)] == found[:2]
    assert len({tuple(ids) for ids in found}) > 1


def test_crops_without_augmentation_are_refused(images, tmp_path):
    with pytest.raises(UserError, match="crops=2 with augment='none'"):
        encode_shards(images, MeanTokenizer(), tmp_path / "out", EncodeSettings(crops=2), progress=False)


def test_processes_share_the_work_and_the_last_one_puts_it_together(images, tmp_path):
    settings = EncodeSettings(samples_per_shard=2)
    encode_shards(images, MeanTokenizer(), tmp_path / "alone", settings, progress=False)
    out = tmp_path / "out"
    results = [
        encode_shards(images, MeanTokenizer(), out, settings, progress=False, part=part, parts=3) for part in (2, 0, 1)
    ]
    assert [result is None for result in results] == [True, True, False]
    assert content(out) == content(tmp_path / "alone")
    again = encode_shards(images, MeanTokenizer(), out, settings, progress=False, part=0, parts=3)
    assert again == results[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "images", "out"]


def test_a_stopped_run_goes_on_with_what_is_missing(images, tmp_path):
    class Stopping(MeanTokenizer):
        calls = 0

        def encode(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().encode(images)

    settings = EncodeSettings(samples_per_shard=2, batch_size=2, workers=0)
    encode_shards(images, MeanTokenizer(), tmp_path / "undisturbed", settings, progress=False)
    stopped, out = Stopping(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_shards(images, stopped, out, settings, progress=False)
    assert not out.exists()
    assert sorted(path.name for path in (tmp_path / "out.partial").glob("*.tar")) == [
        f"shard-{number:06d}.tar" for number in range(3)
    ]
    encode_shards(images, stopped, out, settings, progress=False)
    assert stopped.calls == 4 + 3  # shards 3, 4 and 5
    assert content(out) == content(tmp_path / "undisturbed")


def test_another_tokenizer_does_not_go_on_with_the_work_of_the_first(images, tmp_path):
    settings = EncodeSettings(samples_per_shard=2)
    encode_shards(images, MeanTokenizer(), tmp_path / "two", settings, progress=False, part=0, parts=2)
    other = MeanTokenizer()
    other.fingerprint = "mean-2"
    with pytest.raises(UserError, match="holds part of other shards"):
        encode_shards(images, other, tmp_path / "two", settings, progress=False, part=1, parts=2)


def test_each_tar_names_the_tokenizer(images, tmp_path):
    encode_shards(images, MeanTokenizer(), tmp_path / "out", progress=False)
    comment = read_comment(tmp_path / "out" / "shard-000000.tar")
    assert (comment["fingerprint"], comment["patch_nums"], comment["bits"]) == ("mean-1", [1, 2, 4], 9)


def test_damaged_images_can_be_skipped_and_are_listed(tmp_path):
    with open_shards(tmp_path / "images", "images", ("a",), 4) as writer:
        writer.write("7", 0, {"png": b"no image"})
        file = io.BytesIO()
        Image.new("RGB", (20, 20)).save(file, format="PNG")
        writer.write("8", 0, {"png": file.getvalue()})
    settings = EncodeSettings(damaged="skip")
    index = encode_shards(tmp_path / "images", MeanTokenizer(), tmp_path / "out", settings, progress=False)
    assert index.samples == 1
    assert "sample 7" in index.skipped[0].source
    assert "not an image" in index.skipped[0].reason


def test_bf16_and_compiled_convolutions_are_chosen_and_recorded(images, tmp_path):
    from hmar_mega.config import TokenizerConfig
    from hmar_mega.tokenizer.model import MultiScaleVQVAE

    torch.manual_seed(0)
    small = {"base_channels": 8, "channel_mult": [1, 1, 1], "encoder_res_blocks": 1, "decoder_res_blocks": 1}
    config = TokenizerConfig(**small, latent_channels=4, norm_groups=4, attention=False, codebook_size=300)
    tokenizer = MultiScaleVQVAE(config, MeanTokenizer.schedule).eval()
    for name, compute in (("full", "fp32"), ("half", "bf16")):
        settings = EncodeSettings(compute=compute)
        index = encode_shards(images, tokenizer, tmp_path / name, settings, progress=False)
        assert index.tokens.compute == compute
    full, half = (ShardReader(tmp_path / name, "tokens") for name in ("full", "half"))
    same = [np.mean(full.read_tokens(n).tokens == half.read_tokens(n).tokens) for n in range(11)]
    assert 0.5 < np.mean(same) <= 1.0


# Shares


def share(monkeypatch: pytest.MonkeyPatch, text: str | None = None, **environment: int) -> tuple[int, int]:
    for name in ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "COUNT", "MIN", "MAX"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return share_of_work(text)


def array(number: int, count: int, low: int, high: int) -> dict[str, int]:
    return {
        f"SLURM_ARRAY_TASK_{name}": value
        for name, value in (("ID", number), ("COUNT", count), ("MIN", low), ("MAX", high))
    }


def test_shares_follow_from_option_array_and_ranks(monkeypatch):
    assert share(monkeypatch) == (0, 1)
    assert share(monkeypatch, "2/4", RANK=3, WORLD_SIZE=8) == (1, 4)
    assert share(monkeypatch, RANK=3, WORLD_SIZE=8) == (3, 8)
    assert share(monkeypatch, **array(7, 3, 3, 7)) == (2, 3)
    assert share(monkeypatch, RANK=1, WORLD_SIZE=2, **array(1, 4, 0, 3)) == (3, 8)
    assert share(monkeypatch, **array(5, 1, 5, 5)) == (0, 1)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0"])
def test_share_that_is_none(monkeypatch, text):
    with pytest.raises(UserError, match="is no share of work"):
        share(monkeypatch, text)


def test_irregular_array_is_refused(monkeypatch):
    with pytest.raises(UserError, match="at no regular step; use --array=0-2"):
        share(monkeypatch, **array(3, 3, 3, 12))
