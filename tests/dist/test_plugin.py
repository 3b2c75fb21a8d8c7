"""The plugin: other people's loops over our model give the run of `hmar-mega train`, and mcore's own checkpoints of the
model and of its distributed optimizer go from any layout to any other."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import build_module
from runs import Inputs, Outcome, tiny_config, train
from torch import Tensor

from hmar_mega import plugin
from hmar_mega.checkpoint.layout import Box, Placement, placement
from hmar_mega.config import Config
from hmar_mega.config_io import config_to_yaml
from hmar_mega.model.attention import SequenceAttention
from hmar_mega.model.initialize import Initializer
from hmar_mega.tokenizer.model import MultiScaleVQVAE

pytestmark = pytest.mark.dist

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

#: In nats for losses, absolute for gradient norms; also after the first updates.
TOLERANCE = 1e-6

TENSOR2 = "parallel.tensor_parallel=2"
PIPELINE2 = "parallel.pipeline_parallel=2"
MICRO2 = "data.micro_batch_size=2"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, uneven_inputs) -> Outcome:
    """The run of one process; classes and codes divide by no tensor-parallel size."""
    return train(uneven_inputs, tmp_path_factory.mktemp("reference") / "run", "single")


def write_config(inputs: Inputs, folder: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(config_to_yaml(tiny_config(inputs, folder / "run", *overrides)))
    return path


def allow_children() -> None:
    """mcore's checkpoint writer starts processes, which multiprocessing forbids to the harness's daemonic ones.

    One of them keeps results, and would import torch and mcore anew in every rank; here it is a copy of the rank.
    """
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def example_rank(name: str, config: Path) -> str:
    """What an example prints on this rank."""
    allow_children()
    sys.argv = [name, str(config)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def assert_same_losses(printed: str, expected: Outcome) -> None:
    rows = re.findall(r"^step (\d+) loss (\S+) grad (\S+)$", printed, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [1, 2, 3], printed
    assert [float(loss) for _, loss, _ in rows] == pytest.approx(expected.losses, rel=0, abs=TOLERANCE)
    assert [float(norm) for *_, norm in rows] == pytest.approx(expected.norms, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["megatron_loop.py", "deepspeed_script.py"])
def test_an_example_run_as_a_program_gives_the_losses_of_train(tmp_path, uneven_inputs, reference, name):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, write_config(uneven_inputs, tmp_path, MICRO2)],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_losses(done.stdout, reference)


@pytest.mark.parametrize(
    ("name", "world", "settings"),
    [
        ("megatron_loop.py", 2, (TENSOR2,)),
        ("megatron_loop.py", 2, (TENSOR2, "parallel.sequence_parallel=true")),
        ("megatron_loop.py", 2, ()),
        ("megatron_loop.py", 2, (PIPELINE2, MICRO2)),
        ("megatron_loop.py", 4, (PIPELINE2, TENSOR2, MICRO2)),
        ("deepspeed_script.py", 2, ()),
        ("deepspeed_script.py", 2, ("parallel.zero_stage=2", MICRO2)),
        ("deepspeed_script.py", 2, (TENSOR2,)),
    ],
)
def test_an_example_on_several_processes_gives_the_losses_of_train(
    tmp_path, uneven_inputs, reference, name, world, settings
):
    config = write_config(uneven_inputs, tmp_path, *settings)
    printed = run_ranks(world, example_rank, name, config)
    assert_same_losses("".join(printed), reference)


@pytest.fixture(scope="module")
def masked(tmp_path_factory, uneven_inputs) -> tuple[tuple[str, ...], Outcome]:
    """Settings of the second stage of training, and its run in one process."""
    folder = tmp_path_factory.mktemp("masked")
    train(uneven_inputs, folder / "first", "single")
    settings = ("stage.name=masked", "model.drop_path_rate=0.4", f"run.init_from={folder / 'first'}")
    return settings, train(uneven_inputs, folder / "run", "single", *settings)


@pytest.mark.parametrize(
    ("name", "settings"), [("megatron_loop.py", (PIPELINE2, MICRO2)), ("deepspeed_script.py", (TENSOR2,))]
)
def test_the_masked_stage_starts_from_the_run_it_is_told_to(tmp_path, uneven_inputs, masked, name, settings):
    given, expected = masked
    config = write_config(uneven_inputs, tmp_path, *given, *settings)
    assert_same_losses("".join(run_ranks(2, example_rank, name, config)), expected)


def interleaved_rank(config: Config) -> list[float]:
    """Losses of a step's micro-batches over two chunks of layers a rank, through mcore's interleaved schedule."""
    with plugin.parallel_world(config), plugin.mcore_on_cpu():
        setup = Setup(config)
        streams = [plugin.batch_iterator(config) for _ in setup.stages]
        figures = get_forward_backward_func()(
            forward_step_func=plugin.forward_step, data_iterator=streams, model=setup.models,
            num_microbatches=plugin.num_micro_batches(config), seq_length=setup.stages[0].sequence_length,
            micro_batch_size=streams[0].micro_batch_size,
        )  # fmt: skip
        return [float(figure["lm loss"]) for figure in figures]


def test_virtual_stages_go_through_the_interleaved_schedule(tmp_path, uneven_inputs):
    deep = ("model.depth=4", MICRO2)
    expected = train(uneven_inputs, tmp_path / "single", "single", *deep).losses[0]
    settings = (PIPELINE2, "parallel.virtual_pipeline_parallel=2")
    first, last = run_ranks(2, interleaved_rank, tiny_config(uneven_inputs, tmp_path / "run", *deep, *settings))
    assert first == []
    assert len(last) == 4
    assert sum(last) / 4 == pytest.approx(expected, rel=0, abs=TOLERANCE)


#: How mcore's checkpoints are written and read here.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "tensor2": (2, (TENSOR2,)),
    "tensor4": (4, ("parallel.tensor_parallel=4",)),
    "data2": (2, ()),
    "pipeline2": (2, (PIPELINE2,)),
    "pipeline2_virtual2": (2, (PIPELINE2, "parallel.virtual_pipeline_parallel=2")),
    "tensor2_data2": (4, (TENSOR2,)),
}

#: mcore's form of the distributed optimizer's state that any layout reads.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

#: A tensor's part on a rank: its global shape, the part's place, its values.
Part = tuple[tuple[int, ...], Box, Tensor]

#: (kind, name) → parts; kinds are `weight` and those of mcore's optimizer.
Parts = dict[tuple[str, str], list[Part]]


class Setup:
    """Model chunks of this rank and mcore's distributed optimizer over its DistributedDataParallel."""

    def __init__(self, config: Config) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        virtual = config.parallel.virtual_pipeline_parallel
        self.stages = [self._stage(config, n) for n in (range(virtual) if virtual > 1 else (None,))]
        sharing = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.models = [DistributedDataParallel(stage.config, sharing, stage) for stage in self.stages]
        settings = OptimizerConfig(
            optimizer="adam", lr=0.1, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(settings, self.models, plugin.no_decay_overrides())

    @staticmethod
    def _stage(config: Config, number: int | None) -> plugin.StageModel:
        place = {"ignore_virtual": False, "vp_stage": number}
        first, last = parallel_state.is_pipeline_first_stage(**place), parallel_state.is_pipeline_last_stage(**place)
        return plugin.model_provider(config, first, last, number)

    def update(self) -> None:
        """One step along gradients that are a function of a parameter's name alone, whatever the layout."""
        for name, parameter in self.parameters():
            place = local_placement(parameter)
            whole = torch.empty(place.global_shape)
            Initializer(7, 1.0).normal(name)(whole)
            parts = [whole[box.slices_in(Box((0,) * whole.ndim, whole.shape))].flatten() for box in place.boxes]
            gradient = torch.cat([*parts, torch.zeros(parameter.numel() - sum(p.numel() for p in parts))])
            parameter.main_grad.copy_(gradient.view_as(parameter))
        self.optimizer.step()

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for stage in self.stages:
            yield from stage.model.named_parameters()

    def state(self, *, is_loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {f"model{n}": stage.sharded_state_dict() for n, stage in enumerate(self.stages)}
        optimizer = self.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=METADATA)
        return {**state, "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        plugin.prepare_to_load(self.optimizer)
        loaded = dist_checkpointing.load(self.state(is_loading=True), str(folder))
        for n, stage in enumerate(self.stages):
            stage.load_state_dict(loaded[f"model{n}"])
        plugin.load_optimizer_state(self.optimizer, loaded["optimizer"])

    def parts(self) -> Parts:
        """Weights, masters and moments as this rank holds them."""
        entries = self.state(is_loading=False)["optimizer"]["param_state"].values()
        held = {entry.key: entry.data for kinds in entries for entry in kinds.values()}
        found: Parts = {}
        for name, parameter in self.parameters():
            place = local_placement(parameter)
            kinds = {kind: held[f"optimizer.state.{kind}.{name}"] for kind in ("param", "exp_avg", "exp_avg_sq")}
            for kind, tensor in {"weight": parameter, **kinds}.items():
                flat, at = tensor.detach().flatten(), 0
                for box in place.boxes:
                    part = flat[at : at + box.numel].view(box.shape).clone()
                    found.setdefault((kind, name), []).append((place.global_shape, box, part))
                    at += box.numel
        return found


def local_placement(parameter: Tensor) -> Placement:
    rank = parallel_state.get_tensor_model_parallel_rank()
    return placement(parameter, rank, parallel_state.get_tensor_model_parallel_world_size())


def save_rank(config: Config, folder: Path) -> tuple[Parts, Parts]:
    """What a layout saves after one update; and what it holds after another."""
    allow_children()
    with plugin.parallel_world(config), plugin.mcore_on_cpu():
        setup = Setup(config)
        setup.update()
        dist_checkpointing.save(setup.state(is_loading=False), str(folder), content_metadata=METADATA)
        saved = setup.parts()
        setup.update()
        return saved, setup.parts()


def load_rank(config: Config, folder: Path) -> tuple[Parts, Parts]:
    """What a layout holds after loading into other weights; and after one more update."""
    allow_children()
    with plugin.parallel_world(config), plugin.mcore_on_cpu():
        setup = Setup(config)
        setup.load(folder)
        loaded = setup.parts()
        setup.update()
        return loaded, setup.parts()


def whole_tensors(ranks: Sequence[Parts]) -> dict[tuple[str, str], Tensor]:
    """The global tensors, of which every element must be held by some rank, and by all that hold it alike."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for key, parts in ((key, parts) for rank in ranks for key, parts in rank.items()):
        for shape, box, part in parts:
            tensor = tensors.setdefault(key, torch.full(shape, float("nan")))
            there = tensor[box.slices_in(Box((0,) * len(shape), shape))]
            assert torch.equal(torch.where(there.isnan(), part, there), part), key
            there.copy_(part)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tensor2", "single"), ("tensor2", "pipeline2"), ("single", "tensor4"), ("tensor4", "tensor2_data2"),
        ("pipeline2", "tensor2"), ("pipeline2_virtual2", "data2"), ("tensor2_data2", "pipeline2_virtual2"),
    ],
)  # fmt: skip
def test_mcore_checkpoints_of_model_and_optimizer_load_on_another_layout(tmp_path, uneven_inputs, source, target):
    def run(layout: str, function: Callable[..., Any], seed: int) -> list[Any]:
        world, settings = LAYOUTS[layout]
        deep = ("model.depth=4", f"run.seed={seed}", *settings)
        return run_ranks(world, function, tiny_config(uneven_inputs, tmp_path / "run", *deep), tmp_path)

    written, read = run(source, save_rank, 0), run(target, load_rank, 99)
    for moment in (0, 1):  # as saved, and after one more update
        theirs, ours = (whole_tensors([rank[moment] for rank in ranks]) for ranks in (written, read))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert tensor.abs().max() > 0, key
            assert torch.equal(ours[key], tensor), key


def test_mcore_names_the_tensors_of_a_checkpoint_as_ours_do(tmp_path, uneven_inputs, reference):
    (names,) = run_ranks(1, checkpoint_names_rank, tiny_config(uneven_inputs, tmp_path / "run"))
    assert set(names) == set(reference.weights)


def checkpoint_names_rank(config: Config) -> list[str]:
    with plugin.parallel_world(config):
        return [entry.key for entry in plugin.model_provider(config).sharded_state_dict().values()]


def layer_rank(config: Config, impl: str) -> float:
    """Largest difference between mcore's TransformerBlock of our layers and our model's own run of blocks."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

    with plugin.parallel_world(config), torch.no_grad():
        stage = plugin.model_provider(config)
        spec = plugin.layer_spec(impl, config)
        depth = config.model.depth
        block = TransformerBlock(
            stage.config, TransformerBlockSubmodules(layer_specs=[spec] * depth), post_layer_norm=False
        )
        model = stage.model
        torch.manual_seed(0)
        x, cond = torch.randn(model.schedule.num_tokens, 3, 32), torch.randn(3, 32)
        attend = SequenceAttention(model.schedule, config.model.attention.pattern)
        hidden = model.enter(x, cond)
        given = cond if hidden.shared is None else hidden.shared
        ours = model.run_blocks(hidden, "next_scale", attend, len(x)).x
        # mcore's block forks a random state that without CUDA does not exist; nothing here draws from it
        with unittest.mock.patch.object(get_cuda_rng_tracker(), "fork", contextlib.nullcontext):
            theirs = block(hidden.x, attention_mask=None, context=given)
        assert (ours - hidden.x).abs().max() > 0.1
        alone = build_module(spec, config=stage.config, layer_number=2)
        alone.block.load_state_dict(dict(model.blocks["1"].named_parameters()), strict=False)
        x_alone, _ = alone(hidden.x, context=given)
        expected = model.blocks["1"](hidden.x, cond, hidden.shared, attend, len(x))
        return max(float((theirs - ours).abs().max()), float((x_alone - expected).abs().max()))


@pytest.mark.parametrize(
    ("world", "impl", "settings"),
    [
        (1, "torch", ()),
        (1, "mcore", ("model.attention.pattern=block_causal", "model.shared_aln=true")),
        (2, "mcore", (TENSOR2,)),
        (2, "mcore", (TENSOR2, "parallel.sequence_parallel=true")),
    ],
)
def test_layers_built_by_mcore_from_the_spec_are_the_blocks_of_the_model(
    tmp_path, uneven_inputs, world, impl, settings
):
    config = tiny_config(uneven_inputs, tmp_path / "run", *settings)
    assert max(run_ranks(world, layer_rank, config, impl)) <= 1e-6


def provider_rank(config: Config) -> str:
    with plugin.parallel_world(config):
        try:
            plugin.model_provider(config)
        except ValueError as err:
            return str(err)
    return ""


def test_a_stage_asked_for_embeddings_and_heads_that_it_has_not_is_refused(tmp_path, uneven_inputs):
    messages = run_ranks(2, provider_rank, tiny_config(uneven_inputs, tmp_path / "run", PIPELINE2))
    assert "has pre_process=True, post_process=False" in messages[0]
    assert "has pre_process=False, post_process=True" in messages[1]


def streams_rank(config: Config) -> tuple[list[list[int]], list[list[str]]]:
    """Stream positions of two steps, and names of the validation samples of two rounds."""
    with plugin.parallel_world(config):
        streams = plugin.dataset_provider(config, [1000, 100, 100])
        assert streams.test is None
        assert streams.valid is not None
        train = [next(streams.train).positions.tolist() for _ in range(2 * plugin.num_micro_batches(config))]
        return train, [list(next(streams.valid).keys) for _ in range(6)]


def test_streams_are_those_of_the_run_and_validation_gives_every_rank_equally_many(tmp_path, uneven_inputs):
    settings = (MICRO2, f"data.val={uneven_inputs.val}")
    first, second = run_ranks(2, streams_rank, tiny_config(uneven_inputs, tmp_path / "run", *settings))
    assert first[0] == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert second[0] == [[4, 5], [6, 7], [12, 13], [14, 15]]
    for rank in (first[1], second[1]):
        assert all(len(names) == 2 for names in rank)
        assert rank[:3] == rank[3:]
    assert len({name for names in first[1] + second[1] for name in names}) == 12


def evaluation_rank(config: Config) -> list[float]:
    """The model's loss on one batch in evaluation mode, through each way of asking."""
    with plugin.parallel_world(config), torch.no_grad():
        model, batch = plugin.model_provider(config).eval(), next(plugin.batch_iterator(config))
        own = plugin.make_forward_step(config, MultiScaleVQVAE.load(Path(str(config.tokenizer.path))))
        losses = []
        for step in (plugin.forward_step, own):
            output, loss_function = step(iter([batch]), model)
            losses.append(float(loss_function(output)[1]["lm loss"]))
        objective = model.objective
        losses.append(float(objective.evaluation(model, batch).loss.mean()))
        losses.append(float(objective.training(model, batch).loss.mean()))
        return losses


def test_a_model_in_evaluation_mode_is_evaluated_without_drops(tmp_path, uneven_inputs):
    config = tiny_config(uneven_inputs, tmp_path / "run", "stage.label_drop=0.9", "model.drop_path_rate=0.9")
    ((ours, own_tokenizer, evaluation, training),) = run_ranks(1, evaluation_rank, config)
    assert ours == own_tokenizer == evaluation
    assert abs(ours - training) > 1e-5
