"""The command line on bad input: exit status 2, one message that names the value, what is allowed and what to do, and
nothing left on disk. And on good input: help with examples that parse, settings anywhere, configurations printed whole.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import PATCH_NUMS, tiny_config, tiny_hmar, tiny_tokenizer, write_export
from PIL import Image
from torch.distributed.run import get_args_parser

from hmar_mega import __version__
from hmar_mega.cli import build_parser, main, parse
from hmar_mega.config_io import config_to_yaml, load_config, packaged_configs, parse_config
from hmar_mega.data.index import TokenFormat
from hmar_mega.data.reader import TOKEN_FIELD, npy_bytes
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError

# Where commands are run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What commands read, made once: tokenizers, shards, images, a next-scale model, unfinished and empty runs."""
    folder = tmp_path_factory.mktemp("inputs")
    config = tiny_config("next_scale")
    tokenizer = tiny_tokenizer(config)
    tokenizer.save(folder / "tokenizer")
    tiny_tokenizer(config, seed=1).save(folder / "other_tokenizer")
    write_tokens(folder / "tokens", PATCH_NUMS, tokenizer.fingerprint)
    write_export(folder / "model", config, tiny_hmar(config), tokenizer)
    for name, size in (("image", (16, 16)), ("mask", (16, 16)), ("small", (8, 16))):
        Image.new("RGB", size, "white").save(folder / f"{name}.png")
    (folder / "text.png").write_text("no picture")
    with open_shards(folder / "shards", "images", ("ant", "bee"), 4) as writer:
        writer.write("0", 0, {"png": (folder / "image.png").read_bytes()})
    (folder / "pictures" / "ant").mkdir(parents=True)
    shutil.copy(folder / "image.png", folder / "pictures" / "ant")
    (folder / "empty" / "class").mkdir(parents=True)
    (folder / "a_file").write_text("in the way")
    write_unfinished_run(folder / "unfinished")
    (folder / "empty_run").mkdir()
    return folder


def write_tokens(folder: Path, patch_nums: tuple[int, ...], fingerprint: str) -> None:
    """Four samples of two classes."""
    count = sum(p * p for p in patch_nums)
    tokens = TokenFormat(patch_nums=patch_nums, codebook_size=32, fingerprint=fingerprint, resolution=16)
    with open_shards(folder, "tokens", ("ant", "bee"), 4, tokens) as writer:
        for number in range(4):
            writer.write(str(number), number % 2, {TOKEN_FIELD: npy_bytes(np.full(count, number, "<u2"))})


def write_unfinished_run(folder: Path) -> None:
    """What an interrupted run has of a checkpoint, without its tensors."""
    checkpoint = folder / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    state = {"step": 40, "last_step": 100, "finished": False}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "index.json").write_text(json.dumps({"format": 1, "entries": []}))
    (folder / "checkpoints" / "latest").write_text("step-00000040\n")


class Workplace:
    """An empty current folder, with links to the inputs under `in/`, in which commands are run."""

    def __init__(self, folder: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._inputs, self._capsys = folder, inputs, capsys

    def files(self) -> dict[str, bytes | None]:
        """Every path below the current folder and the inputs, with the contents of files."""
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for root in (self.folder, self._inputs)
            for path in sorted(root.rglob("*"))
        }

    def run(self, *argv: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of a command."""
        try:
            status = main(list(argv))
        except SystemExit as end:  # how argparse leaves
            status = int(end.code or 0)
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err

    def refusal(self, *argv: str) -> str:
        """The message of a command that must refuse its input and leave everything as it was."""
        before = self.files()
        status, out, err = self.run(*argv)
        assert (status, out) == (2, ""), f"status {status}, stdout {out!r}, stderr {err!r}"
        assert "Traceback" not in err
        assert self.files() == before
        return err


@pytest.fixture
def workplace(tmp_path, inputs, monkeypatch, capsys) -> Workplace:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").symlink_to(inputs)
    return Workplace(tmp_path, inputs, capsys)


def assert_says(message: str, *parts: str) -> None:
    assert message.startswith("hmar-mega: ")
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in {message!r}"


# hmar-mega train: settings

TRAINABLE = ("run.dir=run", "tokenizer.path=in/tokenizer", "data.train=in/tokens")

BAD_SETTINGS = {
    "an unknown key, with the nearest known one": (
        ("optim.base_rl=1e-4",),
        ("unknown key optim.base_rl", "did you mean optim.base_lr?"),
    ),
    "an unknown section": (("optimizer.base_lr=1",), ("unknown key optimizer", "did you mean optim")),
    "a word for a number": (("optim.epochs=many",), ("optim.epochs='many'", "should be a valid number")),
    "a number out of range": (("optim.clip=0",), ("optim.clip=0", "greater than 0")),
    "an unknown choice, with those there are": (
        ("stage.name=second",),
        ("stage.name='second'", "'next_scale' or 'masked'"),
    ),
    "a setting without a value": (("optim.clip",), ("'optim.clip' is not of the form section.key=value",)),
    "tensor parallelism that does not divide the heads": (
        ("parallel.tensor_parallel=3",),
        ("tensor_parallel=3 does not divide the 4 heads", "use 1, 2 or 4"),
    ),
    "pipeline under ZeRO-3": (
        ("parallel.pipeline_parallel=2", "parallel.zero_stage=3"),
        ("zero_stage=3 cannot be used with pipeline_parallel=2", "use"),
    ),
    "ZeRO 0": (("parallel.zero_stage=0",), ("zero_stage=0 keeps a full optimizer", "use zero_stage=1, 2 or 3")),
    "scales that do not end at the resolution": (
        ("schedule.patch_nums=[1, 2, 5]", "schedule.mask_schedule=null"),
        ("patch_nums=(1, 2, 5)", "20 px", "resolution=16", "end patch_nums at 4 or set resolution=20"),
    ),
    "scales that shrink": (("schedule.patch_nums=[1, 4, 2]",), ("patch_nums=(1, 4, 2)", "increase strictly")),
    "a resolution without scales": (
        ("schedule.resolution=32", "schedule.patch_nums=null"),
        ("resolution=32 has no published patch_nums", "give schedule.patch_nums"),
    ),
    "passes that do not add up": (
        ("schedule.mask_schedule=[[1], [1, 2]]",),
        ("mask_schedule entry [1, 2] of scale 2", "sum to 4"),
    ),
}


@pytest.mark.parametrize(("settings", "parts"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_train_refuses(workplace, settings, parts):
    assert_says(workplace.refusal("train", "demo", *TRAINABLE, *settings), *parts)


def test_train_refuses_an_unknown_configuration_with_the_nearest_ones(workplace):
    message = workplace.refusal("train", "train/d16-265", *TRAINABLE)
    assert_says(message, "no config 'train/d16-265'", "train/d16-256")


def test_several_mistakes_are_told_at_once(workplace):
    message = workplace.refusal("train", "demo", *TRAINABLE, "optim.clip=0", "model.dept=3")
    assert_says(message, "optim.clip=0", "unknown key model.dept; did you mean model.depth?")


# hmar-mega train: what it reads and writes

MISSING_KEYS = {
    "run.dir": ("run.dir is not set", "run.dir=runs/"),
    "tokenizer.path": ("tokenizer.path is not set", "hmar-mega tokenizer train"),
    "data.train": ("data.train is not set", "hmar-mega data encode"),
}


@pytest.mark.parametrize("key", MISSING_KEYS)
def test_train_says_which_key_it_lacks_and_where_its_value_comes_from(workplace, key):
    given = [text for text in TRAINABLE if not text.startswith(key)]
    assert_says(workplace.refusal("train", "demo", *given), *MISSING_KEYS[key])


BAD_INPUTS = {
    "a masked stage that starts from nothing": (
        ("stage.name=masked",),
        ("stage.name=masked starts from a trained next-scale model", "set run.init_from"),
    ),
    "weights where there are none": (
        ("run.init_from=in/empty_run",),
        ("in/empty_run holds no weights", "a run directory with checkpoints/"),
    ),
    "a tokenizer that is not there": (
        ("tokenizer.path=nowhere",),
        ("nowhere holds no tokenizer", "give the folder that training wrote"),
    ),
    "token shards that are not there": (
        ("data.train=nowhere",),
        ("nowhere is not a folder of shards", "hmar-mega data demo"),
    ),
    "image shards for token shards": (("data.train=in/shards",), ("in/shards", "images", "hmar-mega data encode")),
    "token shards of another tokenizer": (
        ("tokenizer.path=in/other_tokenizer",),
        ("the token shards were made by tokenizer", "give that tokenizer, or encode the images anew"),
    ),
    "validation shards that are not there": (("data.val=nowhere",), ("nowhere is not a folder of shards",)),
    "scales other than those of the shards": (
        ("schedule.patch_nums=[1, 3, 4]", "schedule.mask_schedule=null"),
        ("[1, 2, 4]", "[1, 3, 4]", "set schedule.patch_nums"),
    ),
    "fewer classes than the shards have": (
        ("model.num_classes=1",),
        ("data.train=in/tokens has 2 classes, model.num_classes=1", "set model.num_classes=2"),
    ),
}


@pytest.mark.parametrize(("settings", "parts"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_train_refuses_as_input(workplace, settings, parts):
    assert_says(workplace.refusal("train", "demo", *TRAINABLE, *settings), *parts)


def test_the_refusal_of_a_foreign_tokenizer_names_both_fingerprints(workplace, inputs):
    message = workplace.refusal("train", "demo", *TRAINABLE, "tokenizer.path=in/other_tokenizer")
    descriptions = [inputs / name / "config.json" for name in ("tokenizer", "other_tokenizer")]
    assert_says(message, *(json.loads(path.read_text())["fingerprint"] for path in descriptions))


# The other commands

EDIT = ("edit", "in/model", "in/image.png", "--mask", "in/mask.png", "--class", "1")
SAMPLE = ("sample", "in/model")

BAD_COMMANDS = {
    "demo: an output that is taken": (
        ("demo", "--out", "in/shards", "--overwrite"),
        ("in/shards exists and was not made by a demo", "choose another --out"),
    ),
    "demo: an output below a file": (
        ("demo", "--out", "in/a_file/demo"),
        ("cannot write in/a_file/demo", "folder you can write to"),
    ),
    "sample: a class that does not exist": (
        (*SAMPLE, "--classes", "0,5", "--out", "grid.png"),
        ("class 5 is out of range", "5 classes, 0 to 4"),
    ),
    "sample: a negative class": ((*SAMPLE, "--classes=-1", "--out", "grid.png"), ("class -1", "0 to 4")),
    "sample: classes that are no numbers": (
        (*SAMPLE, "--classes", "ant", "--out", "grid.png"),
        ("class 'ant' is not a number", "--class-names FILE", "such as 0,3,7"),
    ),
    "sample: no image": ((*SAMPLE, "--classes", "0", "--count", "0", "--out", "grid.png"), ("--count 0", "at least 1")),
    "sample: an impossible top-p": (
        (*SAMPLE, "--classes", "0", "--top-p", "1.5", "--out", "grid.png"),
        ("top_p=1.5", "0 < top_p ≤ 1"),
    ),
    "sample: a folder that is no model": (
        ("sample", "in/empty_run", "--classes", "0", "--out", "grid.png"),
        ("in/empty_run is not an exported model", "hmar-mega export"),
    ),
    "sample: a device that does not exist": (
        (*SAMPLE, "--classes", "0", "--device", "abacus", "--out", "grid.png"),
        ("device 'abacus'", "cpu"),
    ),
    "sample: an output below a file": (
        (*SAMPLE, "--classes", "0", "--out", "in/a_file/grid.png"),
        ("cannot write in/a_file/grid.png", "choose a folder you can write to"),
    ),
    "edit: a mask of another size": (
        ("edit", "in/model", "in/image.png", "--mask", "in/small.png", "--class", "1", "--out", "new.png"),
        ("the mask is 8×16 px", "16×16 px", "resize the mask"),
    ),
    "edit: an image of another size": (
        (
            "edit",
            "in/model",
            "in/small.png",
            "--mask",
            "in/mask.png",
            "--class",
            "1",
            "--out",
            "new.png",
            "--fit",
            "exact",
        ),
        ("the image is 8×16 px", "16×16 px", "resize the image"),
    ),
    "edit: an image that is none": (
        ("edit", "in/model", "in/text.png", "--mask", "in/mask.png", "--class", "1", "--out", "new.png"),
        ("cannot read in/text.png as an image",),
    ),
    "edit: a class that does not exist": (
        ("edit", "in/model", "in/image.png", "--mask", "in/mask.png", "--class", "9", "--out", "new.png"),
        ("class 9 is out of range", "0 to 4"),
    ),
    "edit: a class that is no number": (
        ("edit", "in/model", "in/image.png", "--mask", "in/mask.png", "--class", "ant", "--out", "new.png"),
        ("class 'ant' is not a number", "--class-names FILE"),
    ),
    "edit: a box that leaves the image": (
        ("edit", "in/model", "in/image.png", "--box", "4,4,20,12", "--class", "1", "--out", "new.png"),
        ("box 4,4,20,12 is not within the 16×16 px", "0 ≤ left < right ≤ 16"),
    ),
    "edit: a box that is none": (
        ("edit", "in/model", "in/image.png", "--box", "4,4", "--class", "1", "--out", "new.png"),
        ("--box '4,4' is not left,top,right,bottom",),
    ),
    "edit: an unknown side": (
        ("edit", "in/model", "in/image.png", "--outpaint", "up:4", "--class", "1", "--out", "new.png"),
        ("--outpaint 'up:4' is not SIDE or SIDE:PIXELS", "left, right, top, bottom"),
    ),
    "edit: no room left for the image": (
        ("edit", "in/model", "in/image.png", "--outpaint", "left:8,right:8", "--class", "1", "--out", "new.png"),
        ("outpainting left 8, right 8 px of 16 px", "leave at least 1 px"),
    ),
    "edit: outpainting without moving the picture": (
        (
            "edit",
            "in/model",
            "in/image.png",
            "--outpaint",
            "left",
            "--class",
            "1",
            "--out",
            "new.png",
            "--fit",
            "exact",
        ),
        ("--fit exact goes with --mask and --box",),
    ),
    "edit: a negative feather": (
        (*EDIT, "--feather", "-1", "--out", "new.png"),
        ("feather=-1", "0 for hard edges"),
    ),
    "edit: no version": ((*EDIT, "--count", "0", "--out", "new.png"), ("--count 0", "at least 1")),
    "sample: guidance that is no number": (
        (*SAMPLE, "--classes", "0", "--cfg", "strong", "--out", "grid.png"),
        ("--cfg 'strong'", "one number a scale"),
    ),
    "sample: guidance for other scales": (
        (*SAMPLE, "--classes", "0", "--cfg", "0,1", "--out", "grid.png"),
        ("cfg_scale has 2 numbers for 3 scales",),
    ),
    "sample: a mask schedule of words": (
        (*SAMPLE, "--classes", "0", "--mask-schedule", "1;one", "--out", "grid.png"),
        ("--mask-schedule '1;one'", "'1;1,3;1,1,2,5;16'"),
    ),
    "sample: a mask schedule that does not add up": (
        (*SAMPLE, "--classes", "0", "--mask-schedule", "1;5", "--out", "grid.png"),
        ("mask_schedule entry [5] of scale 2", "sum to 4"),
    ),
    "sample: a negative class that does not exist": (
        (*SAMPLE, "--classes", "0", "--negative-class", "7", "--out", "grid.png"),
        ("class 7 is out of range", "0 to 4"),
    ),
    "sample: a moving average that was not exported": (
        (*SAMPLE, "--classes", "0", "--ema", "--out", "grid.png"),
        ("in/model was exported without its moving average", "--ema"),
    ),
    "sample: class names that are not there": (
        (*SAMPLE, "--classes", "0", "--class-names", "nowhere.txt", "--out", "grid.png"),
        ("cannot read class names from nowhere.txt", "a name a line"),
    ),
    "sample: a list that is not there": (
        (*SAMPLE, "--csv", "nowhere.csv", "--out", "grid.png"),
        ("cannot read nowhere.csv", "class,seed"),
    ),
    "sample: a list and classes": (
        (*SAMPLE, "--csv", "a.csv", "--classes", "0", "--out", "grid.png"),
        ("--csv says which images",),
    ),
    "sample: no image into a folder": ((*SAMPLE, "--num", "0", "--out", "many"), ("--num 0", "at least 1")),
    "sample: many images into a file": (
        (*SAMPLE, "--num", "9", "--out", "many.png"),
        ("--out many.png", "it is a folder", "--format"),
    ),
    "sample: many images into a folder that holds others": (
        (*SAMPLE, "--num", "9", "--out", "in/shards"),
        ("in/shards exists and holds no generation", "another --out"),
    ),
    "sample: many images below a file": (
        (*SAMPLE, "--num", "9", "--out", "in/a_file/many"),
        ("cannot write in/a_file/many", "choose a folder you can write to"),
    ),
    "sample: an animation of many images": (
        (*SAMPLE, "--num", "9", "--out", "many", "--gif", "a.gif"),
        ("--gif and --scales-out show a grid",),
    ),
    "sample: a part of a grid": (
        (*SAMPLE, "--classes", "0", "--part", "1/2", "--out", "grid.png"),
        ("--part is for images into a folder",),
    ),
    "sample: a part beyond the last": (
        (*SAMPLE, "--num", "9", "--out", "many", "--part", "3/2"),
        ("--part '3/2' cannot be used", "1/4, 2/4"),
    ),
    "sample: chunks of nothing": (
        (*SAMPLE, "--num", "9", "--out", "many", "--chunk-size", "0"),
        ("9 images in chunks of 0", "at least 1"),
    ),
    "edit: an output below a file": (
        (*EDIT, "--out", "in/a_file/new.png"),
        ("cannot write in/a_file/new.png", "choose a folder you can write to"),
    ),
    "data shard: a folder without classes": (
        ("data", "shard", "in/empty_run", "shards"),
        ("in/empty_run has no subfolders", "in/empty_run/<class>/"),
    ),
    "data shard: classes without images": (
        ("data", "shard", "in/empty", "shards"),
        ("no images in the 1 subfolders of in/empty", ".jpg"),
    ),
    "data shard: a folder that is not there": (
        ("data", "shard", "nowhere", "shards"),
        ("nowhere cannot be read", "one subfolder a class"),
    ),
    "data shard: an output below a file": (
        ("data", "shard", "in/pictures", "in/a_file/shards"),
        ("cannot write in/a_file/shards", "choose a folder you can write to"),
    ),
    "data shard: an output that is taken": (
        ("data", "shard", "in/pictures", "in/shards"),
        ("in/shards exists", "choose another output or remove it first"),
    ),
    "data demo: an output below a file": (
        ("data", "demo", "digits", "in/a_file/digits"),
        ("cannot write in/a_file/digits", "choose a folder you can write to"),
    ),
    "data encode: tokens for images": (
        ("data", "encode", "in/tokens", "in/tokenizer", "tokens"),
        ("in/tokens", "holds tokens", "give the folder of image shards"),
    ),
    "data encode: a tokenizer that is not there": (
        ("data", "encode", "in/shards", "nowhere", "tokens"),
        ("nowhere holds no tokenizer",),
    ),
    "data encode: a device that does not exist": (
        ("data", "encode", "in/shards", "in/tokenizer", "tokens", "--device", "abacus"),
        ("device 'abacus'", "use cpu, cuda or cuda:0"),
    ),
    "data info: no shards": (("data", "info", "in/empty_run"), ("in/empty_run is not a folder of shards",)),
    "tokenizer train: no images": (
        ("tokenizer", "train", "demo", "--out", "tokenizer"),
        ("data.images is not set", "hmar-mega data shard"),
    ),
    "tokenizer train: no folder": (
        ("tokenizer", "train", "demo", "data.images=in/shards"),
        ("no folder is given for the tokenizer", "--out vae"),
    ),
    "tokenizer train: more codes than tokens": (
        ("tokenizer", "train", "demo", "--out", "vae", "data.images=in/shards"),
        ("tokenizer.codebook_size=256 is more than the 1 images of in/shards", "at most 21 codes"),
    ),
    "tokenizer train: a folder with other things": (
        ("tokenizer", "train", "demo", "--out", "in/shards", "data.images=in/shards", "tokenizer.codebook_size=16"),
        ("in/shards exists and is not empty", "choose another --out", "--overwrite"),
    ),
    "tokenizer eval: no tokenizer": (
        ("tokenizer", "eval", "nowhere", "in/shards", "--out", "eval"),
        ("nowhere holds no tokenizer",),
    ),
    "tokenizer train: an output below a file": (
        ("tokenizer", "train", "demo", "--out", "in/a_file/tokenizer", "data.images=in/shards"),
        ("cannot write in/a_file/tokenizer", "choose a folder you can write to"),
    ),
    "export: a run that is not there": (
        ("export", "nowhere", "model"),
        ("run nowhere has no checkpoint 'latest'", "it does not exist", "hmar-mega train CONFIG run.dir=nowhere"),
    ),
    "export: a run without checkpoints": (
        ("export", "in/empty_run", "model"),
        ("run in/empty_run has no checkpoint", "train it first"),
    ),
    "export: an unfinished run": (
        ("export", "in/unfinished", "model"),
        ("run in/unfinished is unfinished: step 40 of 100", "--allow-unfinished"),
    ),
    "export: a checkpoint that the run does not have": (
        ("export", "in/unfinished", "model", "--checkpoint", "step-00000099"),
        ("no checkpoint 'step-00000099'", "only step-00000040"),
    ),
}


@pytest.mark.parametrize(("argv", "parts"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_refused(workplace, argv, parts):
    assert_says(workplace.refusal(*argv), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "argv",
    [(*SAMPLE, "--classes", "0", "--out", "grid.png"), ("data", "encode", "in/shards", "in/tokenizer", "tokens")],
    ids=["sample", "data encode"],
)
def test_a_gpu_that_is_not_there_is_refused(workplace, argv):
    assert_says(workplace.refusal(*argv, "--device", "cuda"), "device cuda", "no GPU", "cpu")


# What argparse refuses

USAGE_ERRORS = {
    "no command": ((), "the following arguments are required: COMMAND"),
    "an unknown command": (("trian",), "invalid choice: 'trian'"),
    "an unknown option": (("train", "demo", "--tensor-parallel=2"), "unrecognized arguments: --tensor-parallel=2"),
    "a setting where none belongs": (("export", "run", "out", "optim.clip=1"), "unrecognized arguments: optim.clip=1"),
    "a missing option": (("sample", "model", "--out", "grid.png"), "required: --classes"),
    "an unknown number format": (("export", "run", "out", "--dtype", "fp8"), "choose from 'fp32', 'bf16', 'fp16'"),
    "an edit of nowhere": (
        ("edit", "model", "i.png", "--class", "1", "--out", "o.png"),
        "one of the arguments --mask --box --outpaint is required",
    ),
    "an edit of two places": (
        ("edit", "model", "i.png", "--mask", "m.png", "--box", "0,0,1,1", "--class", "1", "--out", "o.png"),
        "not allowed with argument",
    ),
}


@pytest.mark.parametrize(("argv", "part"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_is_told(workplace, argv, part):
    assert part in workplace.refusal(*argv)


# Help


def commands(parser: argparse.ArgumentParser, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command and group of commands as typed, with its help."""
    if name:
        yield name, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from commands(inner, (*name, word))


COMMANDS = dict(commands(build_parser()))


def examples(text: str) -> list[list[str]]:
    """The arguments of each example in a help text, without comments and ellipses."""
    _, _, after = text.partition("example:\n")
    found = []
    for line in after.splitlines():
        arguments = re.split(r"hmar-mega |-m hmar_mega ", line, maxsplit=1)
        if len(arguments) == 2:
            found.append([word for word in shlex.split(arguments[1], comments=True) if word != "…"])
    return found


def test_the_commands_are_those_of_the_pipeline():
    assert {" ".join(name) for name in COMMANDS} >= {
        "demo", "data", "data demo", "data shard", "data encode", "data info", "tokenizer", "tokenizer train",
        "tokenizer eval", "train", "export", "sample", "edit",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_of_every_command_ends_with_an_example_that_runs(workplace, name):
    status, out, err = workplace.run(*name, "--help")
    assert (status, err) == (0, "")
    assert out == COMMANDS[name]
    shown = examples(out)
    assert shown, f"hmar-mega {' '.join(name)} --help has no example"
    for argv in shown:
        args = parse(argv)
        assert argv[: len(name)] == list(name)
        if hasattr(args, "overrides"):
            load_config(args.config, args.overrides)


def test_torchrun_hands_on_the_options_of_every_example():
    """It reads what stands behind the module's name too, and refuses what could be short for two of its own options."""
    root = Path(__file__).parents[2]
    pages = [page.read_text().replace("\\\n", " ") for page in (root / "README.md", *root.glob("docs/*.md"))]
    lines = [line for text in (*pages, *COMMANDS.values()) for line in text.splitlines() if "-m hmar_mega" in line]
    shown = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("torchrun ")]
    assert len(shown) >= 5
    for _, *words in shown:
        read = get_args_parser().parse_args(words)
        assert read.training_script == "hmar_mega"
        assert read.training_script_args == words[words.index("hmar_mega") + 1 :]


def test_general_help_lists_the_commands_with_an_example(workplace):
    status, out, _ = workplace.run("--help")
    assert status == 0
    assert all(name[0] in out for name in COMMANDS)
    assert examples(out)


@pytest.mark.parametrize(
    "code",
    [
        "import hmar_mega.cli as c; c.build_parser()",
        "import hmar_mega.config_io as c; c.load_config('train/d16-256')",
        "import hmar_mega.launchers.status",
    ],
)
def test_help_settings_and_status_need_no_heavy_import(code):
    code += "; import sys; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version(workplace):
    assert workplace.run("--version")[:2] == (0, f"hmar-mega {__version__}\n")


# Settings and printed configurations


@pytest.mark.parametrize("name", packaged_configs())
def test_print_config_is_yaml_that_reads_back_as_the_same_configuration(workplace, name):
    status, out, _ = workplace.run("train", name, "--print-config")
    assert status == 0
    assert parse_config(yaml.safe_load(out)) == load_config(name)


def test_a_printed_configuration_is_a_configuration_file(workplace):
    _, out, _ = workplace.run("train", "demo", "--print-config", "optim.clip=1.5", "run.dir=some where")
    Path("own.yaml").write_text(out)
    assert load_config("own.yaml") == load_config("demo", ["optim.clip=1.5", "run.dir=some where"])
    assert workplace.run("train", "own.yaml", "--print-config")[1] == out


@pytest.mark.parametrize(
    "argv",
    [
        ("train", "demo", "optim.clip=1.5", "run.seed=7", "--print-config"),
        ("train", "demo", "--print-config", "optim.clip=1.5", "run.seed=7"),
        ("train", "demo", "optim.clip=1.5", "--print-config", "run.seed=7"),
        ("train", "--print-config", "demo", "optim.clip=1.5", "run.seed=7"),
        ("tokenizer", "train", "demo", "--out", "x", "optim.clip=1.5", "--print-config", "run.seed=7"),
    ],
    ids=" ".join,
)
def test_settings_may_stand_before_and_behind_options(workplace, argv):
    expected = config_to_yaml(load_config("demo", ["optim.clip=1.5", "run.seed=7"]))
    assert workplace.run(*argv) == (0, expected, "")


def test_printing_a_configuration_writes_nothing(workplace):
    before = workplace.files()
    workplace.run("train", "demo", "--print-config", "run.dir=run")
    assert workplace.files() == before


# Commands that work, and how they end


def test_sample_and_edit_write_their_image(workplace):
    status, out, _ = workplace.run(*SAMPLE, "--classes", "0,4", "--count", "3", "--out", "new/grid.png")
    assert (status, out) == (0, "6 images of 2 classes in new/grid.png\n")
    with Image.open("new/grid.png") as grid:
        assert grid.size == (3 * 18 - 2, 2 * 18 - 2)
    status, out, _ = workplace.run(*EDIT, "--out", "edited.png")
    assert (status, out) == (0, "256 of 256 pixels generated anew in edited.png\n")


def stub_training(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raising(config: object, interrupts: object) -> None:
        raise error

    monkeypatch.setattr("hmar_mega.train.train_from_config", raising)


def test_failed_training_is_status_1_without_a_traceback(workplace, monkeypatch):
    from hmar_mega.engine import TrainingError

    stub_training(monkeypatch, TrainingError("gradient norm is nan at step 3"))
    status, out, err = workplace.run("train", "demo", *TRAINABLE)
    assert (status, out, err) == (1, "", "hmar-mega: gradient norm is nan at step 3\n")


def test_interrupted_training_is_status_130(workplace, monkeypatch):
    stub_training(monkeypatch, KeyboardInterrupt())
    assert workplace.run("train", "demo", *TRAINABLE) == (130, "", "hmar-mega: interrupted\n")


def test_under_torchrun_only_the_first_rank_speaks_but_all_fail(workplace, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert workplace.run("train", "demo", "optim.clip=0") == (2, "", "")


def test_what_goes_wrong_in_one_rank_alone_is_said_by_that_rank(workplace, monkeypatch):
    def fail(config: object, interrupts: object) -> None:
        error = UserError("shard x is damaged")
        error.rank = 1
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("hmar_mega.train.train_from_config", fail)
    assert workplace.run("train", "demo") == (2, "", "hmar-mega: [rank 1] shard x is damaged\n")
