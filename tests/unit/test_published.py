"""Published files in and out: exact inverses for every layout, and bad files refused by name.

The files are random, made by `published_makers` from SPEC §2 and §7 alone.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_hmar, tiny_tokenizer, write_export
from PIL import Image
from published_makers import Tensors, make_pair, make_transformer, make_vqvae
from safetensors.torch import load_file, save_file

from hmar_mega.checkpoint import published_files
from hmar_mega.checkpoint.convert import convert
from hmar_mega.checkpoint.published import ModelShape, layout, scales_of
from hmar_mega.checkpoint.published_files import read_weights
from hmar_mega.cli import main
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model
from hmar_mega.model.hmar import HMAR
from hmar_mega.scales import PATCH_NUMS
from hmar_mega.tokenizer.model import MultiScaleVQVAE

BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")

CASES: dict[str, dict[str, Any]] = {
    "hmar": {"kind": "nvlabs-hmar"},
    "hmar_deep": {"kind": "nvlabs-hmar", "depth": 4, "mask_layers": 2, "classes": 11},
    "hmar_shared": {"kind": "nvlabs-hmar", "shared": True},
    "hmar_other_split": {"kind": "nvlabs-hmar", "depth": 4, "mask_layers": 3},
    "next_scale": {"kind": "nvlabs-next-scale"},
    "next_scale_512": {"kind": "nvlabs-next-scale", "patch_nums": PATCH_NUMS[512]},
    "next_scale_other": {"kind": "nvlabs-next-scale", "patch_nums": (1, 2, 3, 4, 6, 8), "classes": 1, "codes": 17},
    "var": {"kind": "var"},
    "var_shared_512": {"kind": "var", "shared": True, "patch_nums": PATCH_NUMS[512]},
}


def same(first: Tensors, second: Tensors) -> bool:
    """Bitwise: names, dtypes, shapes and bytes."""
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        for a, b in ((first[name], second[name]) for name in first)
    )


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, tensors: Any) -> Path:
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def vae(save) -> Path:
    return save("vae.pth", make_vqvae())


def matching_vae(save, tensors: Tensors) -> Path:
    codes = tensors.get("head.weight", tensors.get("ns_head.weight")).shape[0]
    return save("vae.pth", make_vqvae(codes=codes, scales=len(tensors["lvl_embed.weight"])))


def folder_tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------- names and counts

SIZES = {
    16: (310.28, 467.69),
    20: (600.92, 845.52),
    24: (1033.40, 1384.33),
    30: (2010.02, 2556.32),
}


def published_shapes(kind: str, depth: int, **sizes: Any) -> dict[str, tuple[int, ...]]:
    made = make_transformer(
        kind, depth, 1000, 4096, 32, PATCH_NUMS[256], mask_layers=8, device="meta", **sizes
    )  # fmt: skip
    return {name: tuple(t.shape) for name, t in made.items()}


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("kind", "column"), [("nvlabs-next-scale", 0), ("var", 0), ("nvlabs-hmar", 1)])
def test_a_published_model_has_as_many_parameters_as_its_table_says(depth: int, kind: str, column: int):
    shapes = published_shapes(kind, depth)
    count = sum(torch.Size(s).numel() for name, s in shapes.items() if not name.endswith(BUFFERS))
    assert round(count / 1e6, 2) == SIZES[depth][column]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["nvlabs-hmar", "nvlabs-next-scale", "nvlabs-masked", "var"])
def test_the_layout_has_the_keys_and_shapes_of_the_specification(kind: str, shared: bool):
    wanted = published_shapes(kind, 16, shared=shared)
    shape = ModelShape(16, 1000, 4096, 32, PATCH_NUMS[256], shared, 8)
    assert {name: entry.shape for name, entry in layout(kind, shape).items()} == wanted


def test_the_composite_of_depth_16_has_329_keys():
    assert len(published_shapes("nvlabs-hmar", 16)) == 329


def test_the_published_tokenizer_has_as_many_parameters_as_it_should():
    made = make_vqvae(160, (1, 1, 2, 2, 4), 4096, 32, 10, device="meta")
    assert sum(t.numel() for name, t in made.items() if name != "quantize.ema_vocab_hit_SV") == 108_948_355


@pytest.mark.parametrize("name", ["train/d16-256", "train/d36-s-512"])
@pytest.mark.parametrize("kind", ["nvlabs-hmar", "nvlabs-next-scale"])
def test_every_parameter_of_ours_has_a_place_in_the_layout(name: str, kind: str):
    config = load_config(name, [])
    with torch.device("meta"):
        model = HMAR(config.model, config.schedule.scales, 4096, 32, mask_branch=kind == "nvlabs-hmar")
    patch_nums = config.schedule.scales.patch_nums
    shape = ModelShape(config.model.depth, 1000, 4096, 32, patch_nums, config.model.shared_aln, 8)
    entries = layout(kind, shape).values()
    ours = {entry.ours: entry.our_shape for entry in entries if entry.ours is not None}
    assert ours == {n: tuple(p.shape) for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("case", CASES)
def test_published_to_ours_and_back_is_bitwise_the_same(case: str, save, tmp_path: Path):
    tensors = make_transformer(**CASES[case])
    source = save("source.pth", tensors)
    done = convert(source, tmp_path / "ours", tokenizer=matching_vae(save, tensors))
    assert done.source == CASES[case]["kind"]
    back = convert(tmp_path / "ours", tmp_path / "back.pth")
    assert back.target == CASES[case]["kind"]
    found = torch.load(tmp_path / "back.pth", weights_only=True)
    assert type(found) is dict
    assert same(found, tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())
    assert same(torch.load(source, weights_only=True), tensors)


@pytest.mark.parametrize("case", CASES)
def test_ours_to_published_and_back_is_bitwise_the_same(case: str, save, tmp_path: Path):
    tensors = make_transformer(**CASES[case], seed=3)
    vae = matching_vae(save, tensors)
    convert(save("source.pth", tensors), tmp_path / "ours", tokenizer=vae)
    convert(tmp_path / "ours", tmp_path / "there.pth")
    convert(tmp_path / "there.pth", tmp_path / "again", tokenizer=vae)
    assert same(folder_tensors(tmp_path / "again"), folder_tensors(tmp_path / "ours"))
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again"))
    assert {**first, "published": None} == {**second, "published": None}


def test_a_model_trained_here_survives_the_way_out_and_in(tmp_path: Path, save):
    """From weights that no import made, here with the demo's number of scales."""
    config = tiny_config(width=128)
    tokenizer = tiny_tokenizer(config)
    tokenizer.save(tmp_path / "vae")
    folder = write_export(tmp_path / "ours", config, tiny_hmar(config), tokenizer)
    assert convert(folder, tmp_path / "out.pth").target == "nvlabs-hmar"
    convert(tmp_path / "out.pth", tmp_path / "again", tokenizer=tmp_path / "vae")
    assert same(folder_tensors(tmp_path / "again"), folder_tensors(folder))


def test_an_attention_mask_that_hmar_does_not_use_comes_back_as_it_was(save, vae: Path, tmp_path: Path):
    """A composite attends block-diagonally whatever its unused mask buffer says."""
    tensors = make_transformer("nvlabs-hmar")
    tensors["attn_bias_for_masking"] = make_transformer("var")["attn_bias_for_masking"]
    convert(save("source.pth", tensors), tmp_path / "ours", tokenizer=vae)
    assert load_model(tmp_path / "ours", "cpu").model.config.attention.pattern == "block_diagonal"
    convert(tmp_path / "ours", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), tensors)


@pytest.mark.parametrize("said", ["nvlabs-next-scale", "var"])
def test_what_the_person_says_wins_over_the_attention_mask(save, vae: Path, tmp_path: Path, said: str):
    convert(save("source.pth", make_transformer("var")), tmp_path / "ours", tokenizer=vae, kind=said)
    pattern = load_model(tmp_path / "ours", "cpu").model.config.attention.pattern
    assert pattern == ("block_causal" if said == "var" else "block_diagonal")


@pytest.mark.parametrize("scales", [10, 3])
def test_the_tokenizer_comes_and_goes_bitwise(save, tmp_path: Path, scales: int):
    tensors = make_vqvae(scales=scales)
    given = None if scales == 10 else (1, 2, 4)
    convert(save("vae.pth", tensors), tmp_path / "ours", patch_nums=given)
    loaded = MultiScaleVQVAE.load(tmp_path / "ours")
    assert loaded.schedule.patch_nums == (given or PATCH_NUMS[256])
    assert loaded.config.channel_mult == (1, 1, 2)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), tensors)


def test_the_usage_record_starts_afresh_for_another_number_of_scales(save, tmp_path: Path):
    convert(save("vae.pth", make_vqvae(scales=10)), tmp_path / "ours", patch_nums=(1, 2, 4))
    assert not MultiScaleVQVAE.load(tmp_path / "ours").quantizer.ema_vocab_hit.any()


def test_safetensors_are_read_like_pth(vae: Path, tmp_path: Path):
    tensors = make_transformer("nvlabs-hmar")
    save_file(tensors, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / "ours", tokenizer=vae)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), tensors)


def test_the_old_format_of_torch_is_read_too(vae: Path, tmp_path: Path):
    tensors = make_transformer("var")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pth", tmp_path / "ours", tokenizer=vae)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), tensors)


def test_half_precision_is_widened_exactly(save, vae: Path, tmp_path: Path):
    tensors = make_transformer("nvlabs-hmar")
    half = {n: t.half() if t.is_floating_point() and not n.endswith(BUFFERS) else t for n, t in tensors.items()}
    convert(save("source.pth", half), tmp_path / "ours", tokenizer=vae)
    found = folder_tensors(tmp_path / "ours")["word_embed.weight"]
    assert torch.equal(found, half["word_embed.weight"].float())


# ------------------------------------------------------------------------------------ merging, training checkpoints


def test_a_composite_is_made_of_two_checkpoints_and_gives_both_back(save, vae: Path, tmp_path: Path):
    first, second = make_pair()
    next_scale, masked = save("next.pth", first), save("masked.pth", second)
    convert(next_scale, tmp_path / "ours", masked=masked, tokenizer=vae)
    convert(next_scale, tmp_path / "direct.pth", masked=masked)
    for kind, wanted in (("nvlabs-next-scale", first), ("nvlabs-masked", second)):
        convert(tmp_path / "ours", tmp_path / f"{kind}.pth", to=kind)
        assert same(torch.load(tmp_path / f"{kind}.pth", weights_only=True), wanted)
        convert(tmp_path / "direct.pth", tmp_path / f"direct-{kind}.pth", to=kind)
        assert same(torch.load(tmp_path / f"direct-{kind}.pth", weights_only=True), wanted)
    convert(tmp_path / "ours", tmp_path / "composite.pth")
    composite = torch.load(tmp_path / "composite.pth", weights_only=True)
    assert same(composite, torch.load(tmp_path / "direct.pth", weights_only=True))
    assert composite.keys() == make_transformer("nvlabs-hmar", 4, mask_layers=2).keys()
    assert torch.equal(composite["ns_blocks.1.ffn.fc1.weight"], first["blocks.3.ffn.fc1.weight"])
    assert torch.equal(composite["mask_blocks.0.ffn.fc1.weight"], second["blocks.2.ffn.fc1.weight"])
    assert load_model(tmp_path / "ours", "cpu").generate([0, 1]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("blocks.1.attn.q_bias", ["do not belong together", "blocks.1.attn.q_bias"]), ("word_embed_bias", ["word_embed"])],
)
def test_two_checkpoints_of_different_models_are_not_merged(save, vae: Path, tmp_path: Path, name: str, parts):
    first, second = make_pair()
    second[name] = second[name] + 1
    paths = save("next.pth", first), save("masked.pth", second)
    with pytest.raises(UserError) as refusal:
        convert(paths[0], tmp_path / "ours", masked=paths[1], tokenizer=vae)
    assert all(part in str(refusal.value) for part in parts)


def test_a_masked_model_alone_says_what_it_lacks(save, vae: Path, tmp_path: Path):
    source = save("masked.pth", make_transformer("nvlabs-masked"))
    with pytest.raises(UserError, match=r"--masked masked\.pth"):
        convert(source, tmp_path / "ours", tokenizer=vae)
    with pytest.raises(UserError, match="a composite is made of"):
        convert(source, tmp_path / "ours", tokenizer=vae, masked=source)


@pytest.mark.parametrize(("wrapper", "kind"), [("transformer_wo_ddp", "nvlabs-next-scale"), ("var_wo_ddp", "var")])
def test_training_checkpoints_are_unwrapped_and_bring_their_tokenizer(save, tmp_path: Path, wrapper: str, kind: str):
    tensors, vae = make_transformer(kind), make_vqvae()
    state = {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}
    trainer = {wrapper: tensors, "vae_local": vae, "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]}}
    source = save("ckpt-last.pth", {"epoch": 3, "iter": 7, "trainer": trainer, "args": {"depth": 2}})
    assert convert(source, tmp_path / "ours").source == kind
    assert load_model(tmp_path / "ours", "cpu").generate([4]).shape == (1, 3, 16, 16)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    convert(tmp_path / "ours" / "tokenizer", tmp_path / "vae.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), tensors)
    assert same(torch.load(tmp_path / "vae.pth", weights_only=True), vae)


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(("depth", "cfg", "top_k"), [(16, 1.7, 1000), (20, 1.9, 950), (24, 2.1, 900), (30, 1.6, 650)])
def test_imported_models_sample_as_they_were_evaluated(depth: int, cfg: float, top_k: int):
    from hmar_mega.checkpoint.conversion import Model, our_settings

    shape = ModelShape(depth, 1000, 4096, 32, PATCH_NUMS[256], False, 8)
    tensors = {"mask_embed": torch.empty(0), "head.linear.weight": torch.empty(0)}
    model = Model(Path("hmar.pth"), tensors, shape, shape.patch_nums, "block_diagonal", "nvlabs-hmar", "block_diagonal")
    settings = our_settings(model, 16, "f")
    assert settings["sampling"] == {
        "cfg_scale": cfg, "top_k": top_k, "top_p": 0.99, "mask_cfg_ratio": 1e-6,
        "mask_schedule": [[1], [1, 3], [1, 1, 2, 5], *[[p * p] for p in PATCH_NUMS[256][3:]]],
    }  # fmt: skip
    assert settings["mask_input"] == "reference"
    assert settings["resolution"] == 256
    assert settings["model"]["mask_layers"] is None


def test_var_is_block_causal_and_takes_one_pass_a_scale(save, vae: Path, tmp_path: Path):
    convert(save("var.pth", make_transformer("var")), tmp_path / "ours", tokenizer=vae)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["model"]["attention"]["pattern"] == "block_causal"
    assert settings["mask_branch"] is False
    assert settings["sampling"]["mask_schedule"] == [[1], [4], [16]]


def test_convert_sample_and_edit_from_the_command_line(save, vae: Path, tmp_path: Path, capsys):
    source = save("hmar-d2.pth", make_transformer("nvlabs-hmar"))
    assert main(["convert", str(source), str(tmp_path / "m"), "--tokenizer", str(vae)]) == 0
    out = capsys.readouterr().out
    assert "nvlabs-hmar" in out
    assert "depth 2, 5 classes, 32 codes, patch_nums 1 2 4" in out
    command = ["sample", str(tmp_path / "m"), "--classes", "0,4", "--count", "2", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "grid.png")]) == 0
    Image.new("RGB", (16, 16), "red").save(tmp_path / "photo.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    command = ["edit", str(tmp_path / "m"), str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    assert main([*command, "--class", "3", "--device", "cpu", "--out", str(tmp_path / "edited.png")]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "back.pth")]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "back.pth")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "n"), "--patch-nums", "1,x"]) == 2


# -------------------------------------------------------------------------------------------------------- bad input


def refusal(save, vae: Path, tmp_path: Path, tensors: Any) -> str:
    """The message; nothing must be left of the attempt."""
    source = save("bad.pth", tensors)
    with pytest.raises(UserError) as refused:
        convert(source, tmp_path / "ours", tokenizer=vae)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth", "vae.pth"]
    return str(refused.value)


def without(name: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        del tensors[name]

    return remove


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name].clone())

    return change


def surplus(tensors: Tensors) -> None:
    for i in range(6):
        tensors[f"adapter.{i}"] = torch.zeros(1)


BAD: dict[str, tuple[Callable[[Tensors], None], list[str]]] = {
    "missing": (without("ns_blocks.0.ffn.fc1.bias"), ["1 missing: ns_blocks.0.ffn.fc1.bias"]),
    "missing_buffer": (without("mask_blocks.0.attn.zero_k_bias"), ["mask_blocks.0.attn.zero_k_bias"]),
    "no_levels": (without("lvl_1L"), ["lacks lvl_1L"]),
    "surplus": (surplus, ["6 surplus: adapter.0, adapter.1, adapter.2, adapter.3, … 2 more"]),
    "shape": (changed("ns_head.weight", lambda t: t[:, :64]), ["ns_head.weight (32, 64) instead of (32, 128)"]),
    "codes": (changed("mask_head.weight", lambda t: t[:16]), ["mask_head.weight (16, 128) instead of (32, 128)"]),
    "depth": (changed("class_emb.weight", lambda t: t[:, :64]), ["2 blocks, but width 64, that of depth 1"]),
    "no_level_numbers": (changed("lvl_1L", lambda t: t * 10**15), ["lvl_1L holds what are no scale numbers"]),
    "levels": (changed("lvl_1L", lambda t: t.clamp(max=1)), ["lvl_1L", "[1, 20]"]),
    "mask": (changed("attn_bias_for_masking", torch.zeros_like), ["neither the block-diagonal"]),
    "nan": (
        changed("base_blocks.0.attn.proj.weight", lambda t: t.index_fill_(0, torch.tensor(3), torch.nan)),
        ["NaN or infinite", "1 tensors: base_blocks.0.attn.proj.weight"],
    ),
    "infinite": (changed("pos_1LC", lambda t: t / 0), ["1 tensors: pos_1LC;"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_named(save, vae: Path, tmp_path: Path, case: str):
    spoil, parts = BAD[case]
    tensors = make_transformer("nvlabs-hmar")
    spoil(tensors)
    message = refusal(save, vae, tmp_path, tensors)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("left", "named"), [(3, "blocks.3.* missing"), (1, "blocks.1.* to blocks.3.* missing")])
def test_missing_blocks_are_named_by_the_depth_of_their_width(save, vae: Path, tmp_path: Path, left: int, named: str):
    gone = tuple(f"blocks.{i}." for i in range(left, 4))
    tensors = {n: t for n, t in make_transformer("var", 4).items() if not n.startswith(gone)}
    message = refusal(save, vae, tmp_path, tensors)
    assert f"{left} blocks, but width 256, that of depth 4" in message
    assert named in message


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"conv1.weight": torch.zeros(3)}, "its 1 keys (conv1.weight) are of another model"),
        ({}, "no tensors"),
        ([torch.zeros(3)], "holds a list"),
        (make_vqvae(seed=1), "--patch-nums"),
    ],
    ids=["other", "empty", "list", "scales"],
)
def test_other_models_are_refused(save, vae: Path, tmp_path: Path, tensors: Any, part: str):
    assert part in refusal(save, vae, tmp_path, tensors)


def test_a_safetensors_file_of_another_model_is_refused(vae: Path, tmp_path: Path):
    save_file({"conv1.weight": torch.zeros(3), "conv1.bias": torch.zeros(1)}, tmp_path / "other.safetensors")
    for options in ({"tokenizer": vae}, {"to": "var"}):
        with pytest.raises(UserError, match=r"its 2 keys \(conv1\.bias, conv1\.weight\) are of another model"):
            convert(tmp_path / "other.safetensors", tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


def test_a_pickle_with_code_is_refused_and_does_not_run(vae: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for protocol in (2, 4):
        (tmp_path / f"{protocol}.pth").write_bytes(pickle.dumps({"pos_start": Evil()}, protocol))
    torch.save({"pos_start": Evil()}, tmp_path / "zipped.pth")
    for name, part in (("2.pth", r"\(getattr\)"), ("4.pth", "pickle that may run"), ("zipped.pth", r"\(getattr\)")):
        with pytest.raises(UserError, match=part):
            convert(tmp_path / name, tmp_path / "ours", tokenizer=vae)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_a_download_is_refused(save, vae: Path, tmp_path: Path, share: float, suffix: str):
    tensors, path = make_transformer("nvlabs-hmar"), tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"cut short|no weight file|damaged"):
        convert(path, tmp_path / "ours", tokenizer=vae)
    assert not (tmp_path / "ours").exists()


def test_a_web_page_instead_of_a_file_is_refused(vae: Path, tmp_path: Path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(UserError, match="download it again"):
        convert(tmp_path / "page.pth", tmp_path / "ours", tokenizer=vae)


@pytest.mark.parametrize("sizes", [{"codes": 16}, {"channels": 4}])
def test_the_wrong_tokenizer_is_refused_with_both_sizes(save, tmp_path: Path, sizes: dict[str, int]):
    wrong = save("vae.pth", make_vqvae(**sizes))
    with pytest.raises(UserError, match=r"has \d+ codes of \d channels, the model 32 of 8"):
        convert(save("m.pth", make_transformer("nvlabs-hmar")), tmp_path / "ours", tokenizer=wrong)


def test_no_tokenizer_and_a_transformer_as_tokenizer_are_refused(save, tmp_path: Path):
    source = save("m.pth", make_transformer("nvlabs-hmar"))
    with pytest.raises(UserError, match="--tokenizer"):
        convert(source, tmp_path / "ours")
    with pytest.raises(UserError, match="not a tokenizer"):
        convert(source, tmp_path / "ours", tokenizer=source)


@pytest.mark.parametrize(
    ("tensors", "to", "part"),
    [
        ("nvlabs-next-scale", "nvlabs-hmar", "no mask branch"),
        ("nvlabs-next-scale", "var", "block_causal"),
        ("var", "nvlabs-next-scale", "use --to var"),
    ],
)
def test_a_model_is_not_written_as_what_it_is_not(save, vae: Path, tmp_path: Path, tensors: str, to: str, part: str):
    convert(save("m.pth", make_transformer(tensors)), tmp_path / "ours", tokenizer=vae)
    with pytest.raises(UserError, match=part):
        convert(tmp_path / "ours", tmp_path / "out.pth", to=to)
    assert not (tmp_path / "out.pth").exists()


def test_a_model_of_other_proportions_has_no_published_layout(tmp_path: Path):
    config = tiny_config()
    folder = write_export(tmp_path / "ours", config, tiny_hmar(config), tiny_tokenizer(config))
    with pytest.raises(UserError, match="width 64·depth"):
        convert(folder, tmp_path / "out.pth")


def test_a_full_disk_is_told_before_anything_is_written(save, vae: Path, tmp_path: Path, monkeypatch):
    source = save("m.pth", make_transformer("nvlabs-hmar"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(published_files.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"needs 0\.\d\d GB, and .* has 0.00 GB left"):
        convert(source, tmp_path / "ours", tokenizer=vae)
    assert not (tmp_path / "ours").exists()


def test_scales_are_counted_from_level_ids():
    assert scales_of(torch.tensor([[0, *[1] * 4, *[2] * 9]]), "x") == (1, 2, 3)


def test_a_cut_file_of_the_old_format_is_refused_wherever_it_is_cut(tmp_path: Path):
    torch.save({"pos_start": torch.ones(1, 1, 128)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pth").read_bytes()
    for size in range(1, min(len(content), 700), 7):
        (tmp_path / "cut.pth").write_bytes(content[:size])
        with pytest.raises(UserError):
            read_weights(tmp_path / "cut.pth")
