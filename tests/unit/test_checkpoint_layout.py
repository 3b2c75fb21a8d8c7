"""Boxes of global tensors: whatever way a tensor is cut over processes, pasting the pieces gives it back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from hmar_mega.checkpoint.layout import Box, fragments, paste, placement, whole
from hmar_mega.checkpoint.sources import CheckpointReader
from hmar_mega.errors import UserError


def numbered(*shape: int) -> Tensor:
    """A tensor in which every element is its own flat index."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def local_part(full: Tensor, rank: int, size: int, dim: int, stride: int) -> nn.Parameter:
    """What tensor-parallel rank `rank` holds, its share of each of `stride` stacked matrices, marked as by mcore."""
    stacked = [matrix.chunk(size, dim)[rank] for matrix in full.chunk(stride, dim)]
    parameter = nn.Parameter(torch.cat(stacked, dim).clone())
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride
    return parameter


@st.composite
def sharded(draw: st.DrawFn) -> tuple[Tensor, list[nn.Parameter]]:
    """A global tensor without padding, and the parameter of every tensor-parallel rank."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    kind = draw(st.sampled_from(["replicated", "rows", "columns", "stacked", "padded", "vector"]))
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    if kind == "replicated":
        full = numbered(n, m)
        return full, [nn.Parameter(full.clone()) for _ in range(size)]
    if kind == "padded":
        rows = draw(st.integers(1, n * size))
        padded = torch.cat([numbered(rows, m), torch.full((n * size - rows, m), float("nan"))])
        parts = [local_part(padded, r, size, 0, 1) for r in range(size)]
        for part in parts:
            part.unpadded_rows = rows
        return numbered(rows, m), parts
    if kind == "vector":
        full = numbered(n * size)
        return full, [local_part(full, r, size, 0, 1) for r in range(size)]
    stride = draw(st.integers(2, 3)) if kind == "stacked" else 1
    dim = 1 if kind == "columns" else 0
    full = numbered(m, n * size) if dim == 1 else numbered(n * size * stride, m)
    return full, [local_part(full, r, size, dim, stride) for r in range(size)]


def cuts(numel: int, ways: int) -> list[tuple[int, int]]:
    """Flat ranges of ZeRO's data-parallel ranks; some may be empty."""
    step = -(-numel // ways)
    return [(min(i * step, numel), min((i + 1) * step, numel)) for i in range(ways)]


@given(case=sharded(), ways=st.integers(1, 5))
def test_a_tensor_cut_over_ranks_and_flat_ranges_pastes_back_whole(case: tuple[Tensor, list[nn.Parameter]], ways: int):
    full, parts = case
    result, written = torch.full_like(full, float("nan")), 0
    for rank, parameter in enumerate(parts):
        place = placement(parameter, rank, len(parts))
        assert place.global_shape == tuple(full.shape)
        if place.replicated and rank > 0:
            continue
        blocks = {box: torch.full((box.numel,), float("nan")) for box in place.boxes}
        for start, stop in cuts(parameter.numel(), ways):
            owned = parameter.detach().flatten()[start:stop]
            for box, first, last, at in fragments(place, start, stop):
                blocks[box][first:last] = owned[at : at + last - first]
        for box, values in blocks.items():
            written += paste(result, whole(full.shape), values.view(box.shape), box)
    assert torch.equal(result, full)
    assert written == full.numel()


@given(case=sharded())
def test_placement_says_where_every_local_element_comes_from(case: tuple[Tensor, list[nn.Parameter]]):
    full, parts = case
    for rank, parameter in enumerate(parts):
        place = placement(parameter, rank, len(parts))
        held = [full[box.slices_in(whole(full.shape))].flatten() for box in place.boxes]
        local = parameter.detach().flatten()
        real = torch.cat(held) if held else local[:0]
        assert torch.equal(local[: len(real)], real)
        assert local[len(real) :].isnan().all()


def test_packed_qkv_is_three_boxes_a_rank():
    place = placement(local_part(numbered(12, 2), 1, 2, 0, 3), 1, 2)
    assert [(b.offset, b.shape) for b in place.boxes] == [((2, 0), (2, 2)), ((6, 0), (2, 2)), ((10, 0), (2, 2))]
    assert not place.replicated


def test_a_rank_of_nothing_but_padding_has_no_box():
    part = local_part(numbered(8, 2), 3, 4, 0, 1)
    part.unpadded_rows = 5
    place = placement(part, 3, 4)
    assert place.boxes == ()
    assert place.global_shape == (5, 2)
    assert fragments(place, 0, part.numel()) == []


def test_a_scalar_has_one_box():
    place = placement(nn.Parameter(torch.tensor(3.0)), 0, 1)
    assert place.boxes == (Box((), ()),)
    target = torch.zeros(())
    assert paste(target, whole(()), torch.tensor(3.0), place.boxes[0]) == 1
    assert target == 3.0


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    offset = draw(st.tuples(*[st.integers(0, 5)] * 2))
    return Box(offset, draw(st.tuples(*[st.integers(1, 5)] * 2)))


@given(a=boxes(), b=boxes())
def test_intersection_is_the_set_of_common_elements(a: Box, b: Box):
    def members(box: Box | None) -> set[tuple[int, int]]:
        if box is None:
            return set()
        return {(i, j) for i in range(box.offset[0], box.offset[0] + box.shape[0])
                for j in range(box.offset[1], box.offset[1] + box.shape[1])}  # fmt: skip

    common = a.intersect(b)
    assert members(common) == members(a) & members(b)
    assert common == b.intersect(a)
    full = numbered(10, 10)
    target = torch.zeros(a.shape)
    copied = paste(target, a, full[b.slices_in(whole(full.shape))], b)
    assert copied == (common.numel if common else 0)
    if common:
        assert torch.equal(target[common.slices_in(a)], full[common.slices_in(whole(full.shape))])


# -------------------------------------------------------------------------------------------- reading a checkpoint


def write_checkpoint(folder: Path, parts: list[nn.Parameter], ways: int, kinds: tuple[str, ...] = ("weight",)) -> None:
    """A checkpoint of one tensor `w`, as tensor × data-parallel processes write it."""
    folder.mkdir()
    entries = []
    for rank, parameter in enumerate(parts):
        place = placement(parameter, rank, len(parts))
        if place.replicated and rank > 0:
            continue
        for way, (start, stop) in enumerate(cuts(parameter.numel(), ways)):
            file, tensors = f"rank-{rank}-{way}.safetensors", {}
            for box, first, last, at in fragments(place, start, stop):
                for number, kind in enumerate(kinds):
                    key = f"{kind}/w/{'-'.join(map(str, box.offset))}/{first}"
                    tensors[key] = parameter.detach().flatten()[start + at : start + at + last - first] + 1000 * number
                    entries.append(
                        {"name": "w", "kind": kind, "file": file, "key": key, "global_shape": place.global_shape,
                         "offset": box.offset, "shape": box.shape, "start": first, "stop": last}
                    )  # fmt: skip
            if tensors:
                save_file(tensors, folder / file)
    (folder / "index.json").write_text(json.dumps({"format": 1, "entries": entries}))
    (folder / "state.json").write_text(json.dumps({"step": 3}))


@given(case=sharded(), ways=st.integers(1, 3), data=st.data())
def test_any_box_reads_back_from_any_layout(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Tensor, list[nn.Parameter]], ways: int, data: st.DataObject
):
    full, parts = case
    folder = tmp_path_factory.mktemp("checkpoint") / "step"
    write_checkpoint(folder, parts, ways, ("weight", "exp_avg"))
    reader = CheckpointReader(folder)
    assert reader.shapes == {"w": tuple(full.shape)}
    assert reader.kinds("w") == {"weight", "exp_avg"}
    assert torch.equal(reader.read("w"), full)
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in full.shape)
    box = Box(offset, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(full.shape, offset, strict=True)))
    assert torch.equal(reader.read("w", box, "exp_avg"), full[box.slices_in(whole(full.shape))] + 1000)


def two_ranks() -> list[nn.Parameter]:
    return [local_part(numbered(4, 3), r, 2, 0, 1) for r in range(2)]


def test_a_missing_file_is_named(tmp_path: Path):
    write_checkpoint(tmp_path / "step", two_ranks(), 2)
    (tmp_path / "step" / "rank-1-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank-1-0\.safetensors cannot be read"):
        CheckpointReader(tmp_path / "step").read("w")


def test_a_truncated_file_is_named(tmp_path: Path):
    write_checkpoint(tmp_path / "step", two_ranks(), 2)
    file = tmp_path / "step" / "rank-0-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"rank-0-1\.safetensors cannot be read"):
        CheckpointReader(tmp_path / "step").read("w")


@pytest.mark.parametrize("lost", [slice(0, 1), slice(0, 2)], ids=["half a box", "a box"])
def test_values_that_nobody_wrote_are_damage(tmp_path: Path, lost: slice):
    write_checkpoint(tmp_path / "step", two_ranks(), 2)
    path = tmp_path / "step" / "index.json"
    index = json.loads(path.read_text())
    del index["entries"][lost]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="damaged"):
        CheckpointReader(tmp_path / "step").read("w")


def test_moments_that_were_not_saved_are_damage_and_leave_no_trace(tmp_path: Path):
    write_checkpoint(tmp_path / "step", two_ranks(), 1)
    reader = CheckpointReader(tmp_path / "step")
    with pytest.raises(UserError, match="0 of the 12 values of exp_avg w"):
        reader.read("w", kind="exp_avg")
    assert reader.kinds("w") == {"weight"}


@pytest.mark.parametrize("name", ["index.json", "state.json"])
@pytest.mark.parametrize("content", [None, '{"entries": [{'], ids=["missing", "cut short"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, name: str, content: str | None):
    write_checkpoint(tmp_path / "step", two_ranks(), 1)
    (tmp_path / "step" / name).unlink()
    if content:
        (tmp_path / "step" / name).write_text(content)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        CheckpointReader(tmp_path / "step")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path / "step", two_ranks(), 1)
    (tmp_path / "step" / "index.json").write_text(json.dumps({"format": 3, "tensors": {}}))
    with pytest.raises(UserError, match="format"):
        CheckpointReader(tmp_path / "step")
