"""From a run's checkpoint to an exported model, and the files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PASSES, tiny_config, tiny_hmar, tiny_tokenizer
from safetensors.torch import load_file, save_file

from hmar_mega.checkpoint.export import export_run
from hmar_mega.checkpoint.layout import Box
from hmar_mega.checkpoint.sources import CheckpointReader, ExportReader, check_shapes, find_checkpoint, open_weights
from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder, write_atomic
from hmar_mega.inference import load_model
from hmar_mega.model.hmar import HMAR

# ------------------------------------------------------------------------------------------------------------ runs


def write_step(run: Path, step: int, config: Config, model: HMAR, **state: Any) -> None:
    """One process's checkpoint of a model: weights of every tensor, moments of none."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    tensors, entries = {}, []
    for name, parameter in model.named_parameters():
        shape, key = list(parameter.shape), f"weight/{name}/0"
        tensors[key] = parameter.detach().flatten().contiguous()
        entries.append(
            {"name": name, "kind": "weight", "file": "rank-00000.safetensors", "key": key, "global_shape": shape,
             "offset": [0] * len(shape), "shape": shape, "start": 0, "stop": parameter.numel()}
        )  # fmt: skip
    save_file(tensors, folder / "rank-00000.safetensors")
    (folder / "index.json").write_text(json.dumps({"format": 1, "entries": entries}))
    about = {"step": step, "finished": True, "last_step": 20, "config": config.model_dump(mode="json"), **state}
    (folder / "state.json").write_text(json.dumps(about))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, HMAR]:
    """A finished run of stage 2 with its tokenizer, checkpoints 10 and 20, the best of them 10."""
    tokenizer = tiny_tokenizer(tiny_config())
    tokenizer.save(tmp_path / "vae")
    config = tiny_config()
    config = config.model_copy(
        update={"tokenizer": config.tokenizer.model_copy(update={"path": str(tmp_path / "vae")})}
    )
    run, model = tmp_path / "run", tiny_hmar(config)
    state = {
        "tokenizer_fingerprint": tokenizer.fingerprint, "classes": ["a", "b", "c", "d", "e"], "images_seen": 640,
        "revision": "abc", "versions": {"torch": "2"},
    }  # fmt: skip
    write_step(run, 10, config, tiny_hmar(config, seed=1), finished=False, **{k: v for k, v in state.items()})
    write_step(run, 20, config, model, **state)
    (run / "checkpoints" / "latest").write_text("step-00000020\n")
    (run / "checkpoints" / "best").write_text("step-00000010\n")
    return run, model


def edit_state(run: Path, **changes: Any) -> None:
    path = run / "checkpoints" / "step-00000020" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_export_holds_every_weight_and_loads_without_the_run(trained: tuple[Path, HMAR], tmp_path: Path):
    run, model = trained
    export_run(run, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = dict(model.named_parameters())
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)
    (tmp_path / "vae").rename(tmp_path / "gone")
    loaded = load_model(tmp_path / "out", "cpu")
    assert all(torch.equal(p, expected[n]) for n, p in loaded.model.named_parameters())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer"]


def test_the_exported_settings_say_what_was_trained_and_how_to_sample(trained: tuple[Path, HMAR], tmp_path: Path):
    settings = export_run(trained[0], tmp_path / "out")
    assert settings == json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["patch_nums"] == [1, 2, 4]
    assert settings["resolution"] == 16
    assert settings["mask_branch"] is True
    assert settings["mask_input"] == "leak_free"
    assert settings["classes"] == ["a", "b", "c", "d", "e"]
    assert settings["sampling"] == {
        "cfg_scale": 1.5, "top_k": 0, "top_p": 0.9, "mask_cfg_ratio": 0.0, "mask_schedule": [list(p) for p in PASSES],
    }  # fmt: skip
    assert settings["trained"] == {"step": 20, "images_seen": 640, "revision": "abc", "versions": {"torch": "2"}}


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_exports_in_half_precision(trained: tuple[Path, HMAR], tmp_path: Path, dtype: str, wanted: torch.dtype):
    run, model = trained
    export_run(run, tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith("log_scale")} == {wanted}
    weight = model.head.linear.weight.detach()
    assert torch.equal(tensors["head.linear.weight"], weight.to(wanted))
    assert load_model(tmp_path / "out", "cpu").model.head.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("which", ["best", "step-00000010"])
def test_another_checkpoint_can_be_exported(trained: tuple[Path, HMAR], tmp_path: Path, which: str):
    run, _ = trained
    assert export_run(run, tmp_path / "out", which)["trained"]["step"] == 10
    expected = tiny_hmar(tiny_config(), seed=1).mask_embed
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mask_embed"], expected)


def test_an_unfinished_run_is_exported_only_on_demand(trained: tuple[Path, HMAR], tmp_path: Path):
    run, _ = trained
    edit_state(run, finished=False, last_step=40)
    with pytest.raises(UserError, match=r"unfinished: step 20 of 40.*--allow-unfinished"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_run(run, tmp_path / "out", allow_unfinished=True)["trained"]["step"] == 20


def test_missing_runs_and_checkpoints_are_named(trained: tuple[Path, HMAR], tmp_path: Path):
    run, _ = trained
    with pytest.raises(UserError, match=r"no checkpoint 'step-00000099' \(only step-00000010, step-00000020\)"):
        export_run(run, tmp_path / "out", "step-00000099")
    with pytest.raises(UserError, match="nothing: it does not exist"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint 'latest' \(no checkpoint\); train it first"):
        export_run(tmp_path / "empty", tmp_path / "out")


def test_another_tokenizer_in_the_old_place_is_refused(trained: tuple[Path, HMAR], tmp_path: Path):
    run, _ = trained
    tiny_tokenizer(tiny_config(), seed=8).save(tmp_path / "vae")
    with pytest.raises(UserError, match=r"is not the tokenizer of run .* give the one it was trained with"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(trained: tuple[Path, HMAR], tmp_path: Path):
    run, _ = trained
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export_run(run, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_damage_found_while_exporting_leaves_nothing_behind(trained: tuple[Path, HMAR], tmp_path: Path):
    run, _ = trained
    (run / "checkpoints" / "step-00000020" / "rank-00000.safetensors").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be read"):
        export_run(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@contextlib.contextmanager
def full_disk(room: int = 16 * 1024) -> Iterator[None]:
    """No file can grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_for_the_person(trained: tuple[Path, HMAR], tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write"), full_disk():
        export_run(trained[0], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------------ weights by name


def test_weights_are_found_in_runs_checkpoints_and_exports(trained: tuple[Path, HMAR], tmp_path: Path):
    run, model = trained
    export_run(run, tmp_path / "out")
    for path in (run, run / "checkpoints" / "step-00000020", tmp_path / "out"):
        source = open_weights(path)
        assert source.shapes == {n: tuple(p.shape) for n, p in model.named_parameters()}
        box = Box((3, 1), (2, 4))
        assert torch.equal(source.read("head.linear.weight", box), model.head.linear.weight[3:5, 1:5])
        assert torch.equal(source.read("mask_embed"), model.mask_embed)
    with pytest.raises(UserError, match=r"holds no weights: expected a run directory"):
        open_weights(tmp_path)


def test_pointers_name_checkpoints(trained: tuple[Path, HMAR]):
    run, _ = trained
    assert find_checkpoint(run).name == "step-00000020"
    assert find_checkpoint(run, "best").name == "step-00000010"
    assert find_checkpoint(run, "step-00000010").name == "step-00000010"
    assert find_checkpoint(run, "step-00000011") is None
    (run / "checkpoints" / "best").write_text("step-00000099\n")
    assert find_checkpoint(run, "best") is None


def test_shapes_are_checked_by_name(trained: tuple[Path, HMAR]):
    source = CheckpointReader(trained[0] / "checkpoints" / "step-00000020")
    check_shapes(source, {"mask_embed": (1, 32)}, "here")
    with pytest.raises(UserError, match=r"here lacks 1 of the model's 2 tensors, the first blocks\.9"):
        check_shapes(source, {"mask_embed": (1, 32), "blocks.9": (3,)}, "here")
    with pytest.raises(UserError, match=r"here holds mask_embed with shape \(1, 32\), the model wants \(1, 64\)"):
        check_shapes(source, {"mask_embed": (1, 64)}, "here")


def test_a_damaged_export_is_no_source(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="is not an exported model"):
        ExportReader(tmp_path)


# ----------------------------------------------------------------------------------------------------------- files


def test_write_atomic_replaces_whole_files(tmp_path: Path):
    target = tmp_path / "deep" / "file.json"
    write_atomic(target, "old")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in target.parent.iterdir()] == ["file.json"]


def test_write_atomic_keeps_the_old_file_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "file.json"
    write_atomic(target, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hmar_mega.files.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*file\.json: No space left on device"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_write_atomic_says_when_the_folder_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "inside", "x")


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path):
    out = tmp_path / "a" / "out"
    with new_folder(out) as temporary:
        (temporary / "file").write_text("x")
        assert not out.exists()
        assert temporary.parent == out.parent
    assert (out / "file").read_text() == "x"
    assert out.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_new_folder_may_take_the_place_of_an_empty_one(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()


def fail_half_way(out: Path, error: Exception) -> None:
    with new_folder(out) as temporary:
        (temporary / "file").write_text("x")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt("half way")])
def test_an_error_inside_leaves_no_folder(tmp_path: Path, error: Exception):
    with pytest.raises(type(error), match="half way"):
        fail_half_way(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "filled folder", "below a file"])
def test_a_folder_that_cannot_be_new_is_refused(tmp_path: Path, kind: str):
    out = tmp_path / "out"
    if kind == "filled folder":
        out.mkdir()
        (out / "file").write_text("")
    else:
        out.write_text("")
    with pytest.raises(UserError, match=r"exists and is not an empty folder|cannot write"):
        fail_half_way(out / "sub" if kind == "below a file" else out, AssertionError("the block was entered"))
    assert out.exists()


def test_temperatures_stay_float32_in_a_bf16_export(trained: tuple[Path, HMAR], tmp_path: Path):
    run, _ = trained
    export_run(run, tmp_path / "out", dtype="bf16")
    stored = ExportReader(tmp_path / "out")
    kinds = {name: stored.read(name).dtype for name in stored.shapes}
    assert {n for n, kind in kinds.items() if kind == torch.float32} == {n for n in kinds if n.endswith("log_scale")}
