"""Published files in and out, and what imported models compute: the tables of `benchmarks/results/published.md`.

    PYTHONPATH=tests/dist:tests/unit python benchmarks/published_tables.py > benchmarks/results/published.md

The files are random ones of exactly the published layouts, made by the tests, and so is the yardstick: the formulas in
float64 under the published names. With the files of depth 16 it takes some minutes, 12 GB of memory and 8 GB of disk;
--small leaves them out, --folder says where.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published_makers import Tensors, make_pair, make_transformer, make_vqvae
from safetensors.torch import load_file
from test_published import CASES, same
from test_published_parity import BRANCHES, TOLERANCE, Case, logit_errors, tokenizer_errors

from hmar_mega.checkpoint.convert import convert
from hmar_mega.scales import PATCH_NUMS
from hmar_mega.tokenizer.model import WEIGHTS_FILE

#: Sizes of the published files: those of the models at depth 16, and of the VQ-VAE.
SIZES = {"codes": 4096, "channels": 32}
MODEL = {"depth": 16, "classes": 1000, "patch_nums": PATCH_NUMS[256], "mask_layers": 8, **SIZES}
VQVAE = {"base": 160, "mult": (1, 1, 2, 2, 4)}


@dataclass(frozen=True)
class File:
    """A published file to bring in and out.

    Attributes:
        make: its tensors, or nested ones as training checkpoints have them.
        vae: the VQ-VAE that goes with it; None where it cannot become a model folder, or brings its own.
        inner: the tensors that must come back.
    """

    name: str
    make: Callable[[], Any]
    vae: Callable[[], Tensors] | None
    inner: Callable[[Any], Tensors] = lambda made: made
    folder: bool = True


def files(small: bool) -> Iterator[File]:
    """All kinds, small ones of every variant and those of depth 16."""
    for name, sizes in CASES.items():
        made = make_transformer(**sizes)
        codes = made.get("head.weight", made.get("ns_head.weight")).shape[0]
        vae = {"codes": codes, "scales": len(made["lvl_embed.weight"])}
        yield File(name, lambda s=sizes: make_transformer(**s), lambda v=vae: make_vqvae(**v))
    yield File("masked, alone", lambda: make_pair()[1], None, folder=False)
    for wrapper, kind in (("transformer_wo_ddp", "nvlabs-next-scale"), ("var_wo_ddp", "var")):
        yield File(
            f"training checkpoint, trainer.{wrapper}",
            lambda w=wrapper, k=kind: {"epoch": 3, "trainer": {w: make_transformer(k), "vae_local": make_vqvae()}},
            None,
            lambda made, w=wrapper: made["trainer"][w],
        )
    if not small:
        for kind in ("nvlabs-hmar", "nvlabs-next-scale", "nvlabs-masked", "var"):
            alone = kind == "nvlabs-masked"
            vae_sizes = {**VQVAE, **SIZES, "scales": 10}
            vae_maker = None if alone else lambda s=vae_sizes: make_vqvae(**s)
            yield File(f"depth 16, {kind}", lambda k=kind: make_transformer(k, **MODEL), vae_maker, folder=not alone)


def round_trip(file: File, folder: Path) -> str:
    """A row: in and out, and the other way round."""
    source, made = folder / "source.pth", file.make()
    torch.save(made, source)
    vae = None
    if file.vae is not None:
        vae = folder / "vae.pth"
        torch.save(file.vae(), vae)
    wanted = file.inner(made)
    between = folder / "ours"
    kind = convert(source, between, tokenizer=vae).source if file.folder else "nvlabs-masked"
    convert(between if file.folder else source, folder / "back.pth")
    there = same(torch.load(folder / "back.pth", weights_only=True, mmap=True), wanted)
    again = "through no folder"
    if file.folder:
        source.unlink()
        convert(folder / "back.pth", folder / "again", tokenizer=vae or between / "tokenizer")
        again = said(same(*(load_file(folder / name / "model.safetensors") for name in ("again", "ours"))))
    count = sum(t.numel() for t in wanted.values()) / 1e6
    return f"| {file.name} | `{kind}` | {len(wanted)} | {count:,.2f} | {said(there)} | {again} |"


def vqvae_trip(name: str, sizes: dict[str, Any], folder: Path) -> str:
    """The row of a VQ-VAE."""
    made = make_vqvae(**sizes, scales=10)
    torch.save(made, folder / "vae.pth")
    for first, second in (("vae.pth", "ours"), ("ours", "back.pth"), ("back.pth", "again")):
        convert(folder / first, folder / second)
    there = same(torch.load(folder / "back.pth", weights_only=True), made)
    again = same(*(load_file(folder / which / WEIGHTS_FILE) for which in ("again", "ours")))
    count = sum(t.numel() for t in made.values()) / 1e6
    return f"| {name} | `vqvae` | {len(made)} | {count:,.2f} | {said(there)} | {said(again)} |"


def said(yes: bool) -> str:
    """A cell."""
    return "yes" if yes else "**no**"


def parity_rows(small: bool, scratch: Callable[[], Path]) -> Iterator[str]:
    """Errors of transformers, then of tokenizers."""
    cases = dict(BRANCHES)
    if not small:
        for kind in ("nvlabs-hmar", "var"):
            # 0.03 is about the initial sqrt(1/3C) and more; 0.3, of the small ones, would saturate a width of 1024
            own = {"classes": 1000, "std": 0.03}
            cases[f"depth 16, {kind}"] = Case(kind, False, 10, 16, 8, SIZES, own)
    names = ("teacher-forced input", "next-scale logits", "masked logits")
    yield from ("| file | " + " | ".join(names) + " |", "|---" * 4 + "|")
    for name, case in cases.items():
        errors = logit_errors(case, scratch())
        yield f"| {name} | " + " | ".join(f"{errors[n]:.1e}" if n in errors else "" for n in names) + " |"
    yield ""
    names = ("encode indices", "latent", "f̂", "decoded image", "decoded image, worst pixel")
    yield from ("| VQ-VAE | " + " | ".join(names) + " |", "|---" * 6 + "|")
    tokenizers = {"3 scales, 16 px": (Case("", scales=3), 2), "10 scales, 64 px": (Case("", scales=10), 2)}
    if not small:
        tokenizers["published size, 256 px"] = (Case("", scales=10, sizes=SIZES, vqvae=VQVAE), 1)
    for name, (case, count) in tokenizers.items():
        errors = tokenizer_errors(case, scratch(), count)
        differ = errors.pop("encode indices")
        yield f"| {name} | {differ:.2%} differ | " + " | ".join(f"{errors[n]:.1e}" for n in names[1:]) + " |"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--small", action="store_true", help="leave out the files of depth 16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="published-") as name:
        folder = Path(name) / "scratch"

        def scratch() -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

        print("# Published files in and out\n")
        print(
            "Written by `python benchmarks/published_tables.py`, "
            f"torch {torch.__version__} on the CPU, from random files of exactly the\npublished layouts: the files "
            "themselves were not at hand.\n"
        )
        print("## Round trips\n\nNames, types, shapes and bytes of every tensor, buffers too.\n")
        print("| file | kind | keys | M numbers | published → ours → published | ours → published → ours |")
        print("|---|---|---|---|---|---|", flush=True)
        for file in files(args.small):
            print(round_trip(file, scratch()), flush=True)
        print(vqvae_trip("VQ-VAE", {}, scratch()))
        if not args.small:
            print(vqvae_trip("VQ-VAE of the published size", {**VQVAE, **SIZES}, scratch()))
        print(
            "\n## Parity\n\nImported models in float32 against the same formulas in float64 under the published names\n"
            "(`tests/unit/test_published_parity.py`). Allowed is what the tests allow, on the small files.\n\n"
            "| figure | what it is | allowed |\n|---|---|---|\n"
            "| input, logits, latent, f̂ | maximum norm: largest difference of the tensor over its largest value "
            f"| {TOLERANCE:.0e} |\n"
            "| encode indices | share of indices that differ | 0 |\n"
            f"| decoded image | 2-norm of the difference over the 2-norm of the image | {TOLERANCE:.0e} |\n"
            "| decoded image, worst pixel | largest difference of a pixel value, absolute: values are in [−1, 1], so "
            f"half of it is the share of their range | {3 * TOLERANCE:.0e} ({1.5 * TOLERANCE:.1e} of the range) |\n",
            flush=True,
        )
        for row in parity_rows(args.small, scratch):
            print(row, flush=True)


if __name__ == "__main__":
    main()
