"""What `convert` takes besides published files: runs and their averages; and options that it refuses to ignore."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_run
from published_makers import Tensors, make_pair, make_transformer, make_vqvae

from hmar_mega.checkpoint import conversion
from hmar_mega.checkpoint.convert import convert
from hmar_mega.checkpoint.export import export_run
from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model


def saved(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path


def loaded(path: Path) -> Tensors:
    return torch.load(path, weights_only=True)


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, width=128)


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("options", [{}, {"ema": True}, {"checkpoint": "best"}], ids=["latest", "ema", "best"])
def test_a_run_is_converted_as_its_export_is(run: Path, tmp_path: Path, options: dict[str, Any]):
    export_run(run, tmp_path / "export", which=options.get("checkpoint", "latest"), ema=options.get("ema", False))
    convert(tmp_path / "export", tmp_path / "exported.pth")
    assert convert(run, tmp_path / "direct.pth", **options).target == "nvlabs-hmar"
    assert same(loaded(tmp_path / "direct.pth"), loaded(tmp_path / "exported.pth"))
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_the_command_takes_the_average_and_the_tokenizer_that_a_run_names(run: Path, tmp_path: Path):
    assert main(["convert", str(run), str(tmp_path / "ours"), "--ema"]) == 0
    assert main(["convert", str(run), str(tmp_path / "best"), "--checkpoint", "step-00000010"]) == 0
    average, best = (load_model(tmp_path / name, "cpu") for name in ("ours", "best"))
    assert average.settings["trained"]["ema"]
    assert best.settings["trained"]["step"] == 10
    assert not torch.equal(average.model.mask_embed, best.model.mask_embed)


def test_what_a_run_has_not_is_named(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="has no checkpoint 'step-00000099'; see hmar-mega checkpoint list"):
        convert(run, tmp_path / "out.pth", checkpoint="step-00000099")
    with pytest.raises(UserError, match="step-00000010 holds no moving average"):
        convert(run, tmp_path / "out.pth", checkpoint="best", ema=True)
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"comes without its tokenizer, and .*vae is not there; give it: --tokenizer"):
        convert(run, tmp_path / "ours")
    convert(run, tmp_path / "ours", tokenizer=tmp_path / "moved")


def test_a_place_that_takes_nothing_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*file/out\.pth"):
        convert(run, tmp_path / "file" / "out.pth")

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "write_shard", full)
    with pytest.raises(UserError, match=r"cannot write .*out\.pth: No space left on device"):
        convert(run, tmp_path / "out.pth")


# -------------------------------------------------------------------------------------------- options without effect


def test_options_that_would_do_nothing_are_refused(run: Path, tmp_path: Path):
    file = saved(tmp_path / "m.pth", make_transformer("nvlabs-next-scale"))
    vae = saved(tmp_path / "vae.pth", make_vqvae())
    ours, other = tmp_path / "ours", tmp_path / "other.pth"
    convert(file, ours, tokenizer=vae)
    step = run / "checkpoints" / "step-00000020"
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (vae, tmp_path / "v", {"masked": file, "patch_nums": (1, 2, 4)}, "--masked would do nothing"),
        (ours / "tokenizer", other, {"kind": "var", "tokenizer": vae}, "--tokenizer and --kind would do nothing"),
        (ours / "tokenizer", other, {"ema": True}, "--ema would do nothing: .* is a tokenizer"),
        (ours, other, {"kind": "var"}, "--kind would do nothing: .* says itself how its model attends; leave it out"),
        (ours, other, {"ema": True}, "--ema would do nothing: .* is an exported model"),
        (run, other, {"kind": "nvlabs-hmar"}, "--kind would do nothing"),
        (run, other, {"tokenizer": vae}, "--tokenizer would do nothing: .* holds no tokenizer"),
        (step, other, {"checkpoint": "best"}, "--checkpoint would do nothing: .* is one checkpoint"),
        (file, other, {"tokenizer": vae}, "--tokenizer would do nothing: .* holds no tokenizer"),
        (file, other, {"checkpoint": "best", "ema": True}, "--checkpoint and --ema would do nothing: .* them out"),
    ]
    before = sorted(tmp_path.iterdir())
    for src, out, options, message in cases:
        with pytest.raises(UserError, match=message):
            convert(src, out, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_the_tokenizer_within_a_training_checkpoint_must_be_the_models(tmp_path: Path):
    trainer = {"var_wo_ddp": make_transformer("var"), "vae_local": make_vqvae(codes=16)}
    source = saved(tmp_path / "ckpt.pth", {"trainer": trainer})
    with pytest.raises(
        UserError, match=r"its trainer\.vae_local is not .*: it has 16 codes of 8 channels, the model 32"
    ):
        convert(source, tmp_path / "ours")
    convert(source, tmp_path / "ours", tokenizer=saved(tmp_path / "vae.pth", make_vqvae()))


# ------------------------------------------------------------------------------------------------- masked files alone


@pytest.mark.parametrize("shared", [False, True])
def test_a_masked_file_alone_comes_back_bitwise(tmp_path: Path, shared: bool):
    tensors = make_transformer("nvlabs-masked", 4, mask_layers=2, shared=shared)
    done = convert(saved(tmp_path / "masked.pth", tensors), tmp_path / "back.pth")
    assert (done.source, done.target) == ("nvlabs-masked", "nvlabs-masked")
    assert same(loaded(tmp_path / "back.pth"), tensors)


def test_a_masked_file_is_not_written_where_it_could_not_be_read_back(tmp_path: Path):
    """Of depth 4 it is read as two shared blocks and two of the mask branch."""
    source = saved(tmp_path / "m.pth", make_transformer("nvlabs-hmar", 4, mask_layers=3))
    with pytest.raises(UserError, match=r"3 blocks in its mask branch, .* read back with 2; use --to nvlabs-hmar"):
        convert(source, tmp_path / "out.pth", to="nvlabs-masked")
    assert not (tmp_path / "out.pth").exists()


def test_a_nan_is_named_by_the_key_and_the_file_that_it_is_in(tmp_path: Path):
    first, second = make_pair()
    second["blocks.3.attn.proj.weight"][0, 0] = torch.nan
    paths = saved(tmp_path / "next.pth", first), saved(tmp_path / "masked.pth", second)
    with pytest.raises(UserError, match=r"1 tensors: blocks\.3\.attn\.proj\.weight of .*masked\.pth"):
        convert(paths[0], tmp_path / "out.pth", masked=paths[1])
