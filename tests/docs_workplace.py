"""A folder in which the documentation's commands work: every file they name, tiny, and how one command is run in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from docs_blocks import ROOT, Block

#: `my.yaml` of the guide, for 10 classes of 16 px digits.
CONFIG: dict[str, Any] = {
    "model": {"depth": 2, "mask_layers": 1, "num_classes": 10},
    "schedule": {"resolution": 16, "patch_nums": [1, 2, 4]},
    "tokenizer": {
        "base_channels": 8, "channel_mult": [1, 1, 1], "encoder_res_blocks": 1, "decoder_res_blocks": 1,
        "latent_channels": 8, "norm_groups": 4, "attention": False, "codebook_size": 32,
        "train": {"steps": 3, "batch_size": 16, "log_interval": 1, "warmup_steps": 1},
    },
    "data": {"global_batch_size": 8, "workers": 0},
    "optim": {"epochs": 1, "max_steps": 2, "ema_decay": 0.9},
    "precision": {"compute": "fp32"},
    "checkpoint": {"interval": 1, "keep_last": 3},
    "eval": {"interval": 2, "batch_size": 8, "grid_count": 2, "cfg_scale": 1.5, "top_k": 0, "top_p": 0.95},
    "logging": {"interval": 1, "tensorboard": False},
}  # fmt: skip

SWEEP: dict[str, Any] = {
    "dir": "runs/sweep", "base": "my.yaml", "layout": "config", "cluster": "local-cpu", "dataset_images": 50,
    "settings": {"data": {"train": "tokens/train", "val": "tokens/val"}, "tokenizer": {"path": "vae"}},
    "sizes": [{"depth": 2, "width": 16, "heads": 2}, {"depth": 2, "width": 32, "heads": 2}],
    "budgets": {"iso_data": {"images": [16]}},
}  # fmt: skip


#: What the harness sets as torchrun does; commands here are started by hand.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def furnish(folder: Path) -> None:
    """Make the files that the guide takes for granted: photos, published files, lists, configurations."""
    import torch
    from PIL import Image
    from published_makers import make_pair, make_transformer, make_vqvae
    from sklearn.datasets import load_digits
    from test_data_sources import imagenet

    digits = load_digits()
    seen: dict[int, int] = {}
    pictures = []
    for pixels, label in zip(digits.images, digits.target, strict=True):
        number = seen.get(label, 0)
        if number < 6:
            picture = Image.fromarray((pixels * 15.9).astype("uint8")).resize((16, 16)).convert("RGB")
            target = folder / "photos" / str(label) / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            pictures.append(picture)
            seen[label] = number + 1
    for name, part in (("real_images", pictures[:24]), ("sampled", pictures[24:48])):
        (folder / name).mkdir()
        for number, picture in enumerate(part):
            picture.save(folder / name / f"{number}.png")
    pictures[0].save(folder / "photo.png")
    Image.new("L", (16, 16), 255).crop((0, 0, 16, 16)).save(folder / "mask.png")
    imagenet(folder / "mini_imagenet")
    (folder / "web").mkdir()
    for number in range(2):
        _write_tar(folder / "web" / f"{number:03d}.tar", pictures[number])
    torch.save(make_transformer("nvlabs-hmar", classes=1000), folder / "hmar-d16.pth")
    torch.save(make_vqvae(), folder / "vae_ch160v4096z32.pth")
    for name, tensors in zip(("next-scale", "masked"), make_pair(), strict=True):
        torch.save(tensors, folder / f"{name}.pth")
    names = ["tench", *(f"class {number}" for number in range(1, 1000))]
    (folder / "imagenet.json").write_text(json.dumps(names))
    (folder / "wanted.csv").write_text("3,11\n207,12\n")
    (folder / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "fine.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "SWEEP.yaml").write_text(yaml.safe_dump(SWEEP))


def _write_tar(path: Path, picture: Any) -> None:
    image = io.BytesIO()
    picture.save(image, format="PNG")
    with tarfile.open(path, "w") as archive:
        for name, data in (("0001.png", image.getvalue()), ("0001.cls", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def run_blocks(folder: Path, page_blocks: list[Block]) -> list[str]:
    """Run or parse every block in `folder`, in order; returns what went wrong, in words.

    Called in a process of its own. What an earlier page made is removed when a command of this one makes it anew.
    """
    os.chdir(folder)
    for name in [name for name in os.environ if name in TORCHRUN or name.startswith("TORCHELASTIC")]:
        del os.environ[name]
    os.sched_getaffinity = lambda _: {0}  # type: ignore[assignment]  # workers are asked for where they are tested
    place = Workplace()
    wrong = []
    for block in page_blocks:
        for task in place.tasks(block):
            try:
                task()
            except (Exception, SystemExit):
                wrong.append(f"{block.page}:{block.line}: {task.__doc__}\n{traceback.format_exc(limit=-4)}")
    return wrong


class Workplace:
    """The current folder, with what this page has made in it."""

    def __init__(self) -> None:
        self.made: set[Path] = set()

    def tasks(self, block: Block) -> list[Callable[[], None]]:
        """What is to be done for a block, a command each; their docstrings say what they are."""
        if block.language == "bash":
            return [_named(command, lambda c=command: self.command(c, block.mode)) for command in block.commands()]
        if block.language == "python":
            return [_named("python", lambda: self.python(block))]
        if block.language == "yaml":
            return [_named("yaml", lambda: check_yaml(block.text))]
        assert block.language == "text", f"no test knows what to do with {block.language}"
        return []

    def python(self, block: Block) -> None:
        """Run a block of Python, or compile it."""
        code = compile(block.text, f"{block.page}:{block.line}", "exec")
        if block.mode == "run":
            exec(code, {"__name__": "documentation"})

    def command(self, command: str, mode: str) -> None:
        """Run a command line, or read it as its program would."""
        program, *words = shlex.split(command)
        if program == "make":
            check_make(words)
            assert mode == "parse", "make is not for tests to run: say so above the block"
        elif command == ". .venv/bin/activate":
            pass  # tests run inside it
        elif program == "python":
            assert (ROOT / words[0]).is_file(), words[0]
            assert mode == "parse", "scripts have tests of their own: say so above the block"
        elif program == "pip":
            check_pip(words)
        elif program in ("hmar-mega", "torchrun"):
            self.hmar_mega(words if program == "hmar-mega" else one_process(words), mode)
        else:
            raise AssertionError(f"no test knows how to run {program}")

    def hmar_mega(self, words: list[str], mode: str) -> None:
        """Run `hmar-mega WORDS` in this process; it must end with status 0."""
        from hmar_mega import cli
        from hmar_mega.config_io import load_config

        args = cli.parse(words)
        if hasattr(args, "config"):
            load_config(args.config, args.overrides)
        if getattr(args, "preset", None):
            load_config(args.preset)
        if mode == "parse":
            return
        for target in targets(args):
            if target.exists() and target not in self.made:
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            self.made.add(target)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = cli.main(words)
        assert status == 0, f"exit status {status}: {said.getvalue()[-1000:]}"


def targets(args: Any) -> list[Path]:
    """What a command makes."""
    found = [Path(args.out)] if getattr(args, "out", None) is not None else []
    found += [Path(text.partition("=")[2]) for text in getattr(args, "overrides", []) if text.startswith("run.dir=")]
    return found


def one_process(words: list[str]) -> list[str]:
    """The arguments of `torchrun … -m hmar_mega ARGUMENTS`, with every kind of parallelism at 1."""
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words)
    assert read.training_script == "hmar_mega"
    return [re.sub(r"^(parallel\.\w+_parallel)=\d+$", r"\1=1", word) for word in read.training_script_args]


def check_make(words: list[str]) -> None:
    """The targets exist, and the variables are used."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?= " if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {name}"


def check_pip(words: list[str]) -> None:
    """What is installed is this package with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = re.fullmatch(r"hmar-mega\[(\w+)\]", words[-1])
    assert wanted is not None, words
    assert wanted[1] in extras, wanted[1]


def check_yaml(text: str) -> None:
    """A block of YAML is a sweep, a cluster or a configuration: its first line says which of the first two."""
    from hmar_mega.config_io import load_config
    from hmar_mega.planning.cluster import load_cluster
    from hmar_mega.scaling.spec import load_sweep

    readers = {"# SWEEP.yaml": load_sweep, "# ours.yaml": load_cluster}
    name = next((name for name in readers if text.startswith(name)), "")
    path = Path(name.removeprefix("# ") or "shown.yaml")
    if path.name == "SWEEP.yaml":
        path = Path("shown_sweep.yaml")  # the workplace has a smaller one
    path.write_text(text)
    readers.get(name, load_config)(str(path))


def _named(name: str, task: Callable[[], None]) -> Callable[[], None]:
    task.__doc__ = name
    return task
