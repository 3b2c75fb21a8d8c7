"""The same run on any layout: losses, gradient norms and parameters of 3 steps agree with one process, and that one
process agrees with a plain torch loop that knows neither Megatron-core nor DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from runs import BATCH, LAYOUTS, Inputs, Outcome, largest_difference, tiny_config, train
from tables import record
from torch import Tensor

from hmar_mega import sequence
from hmar_mega.config import Config
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.model.hmar import HMAR
from hmar_mega.scales import token_weights
from hmar_mega.schedules import Schedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE

pytestmark = pytest.mark.dist

#: In nats for losses, absolute for norms and parameters, which are of order 1.
TOLERANCE = 1e-6

#: Of Adam's moments, relative to the largest element of their tensor: small gradients must agree as large ones do.
MOMENT_TOLERANCE = 1e-5

CASES: dict[str, tuple[str, ...]] = {
    "block_diagonal": (),
    "block_causal": ("model.attention.pattern=block_causal", "stage.loss_weights=uniform"),
    "shared_aln": ("model.shared_aln=true",),
    "causal_shared_aln": (
        "model.attention.pattern=block_causal", "stage.loss_weights=uniform", "model.shared_aln=true",
    ),
    "dropping": ("model.drop_path_rate=0.4", "stage.label_drop=0.5"),
    "uneven": (),
    "masked": ("stage.name=masked", "model.drop_path_rate=0.4"),
}  # fmt: skip

#: Four layers, two of them in the mask branch: of four stages, the first two train nothing but the mask embedding.
DEEP = ("model.depth=4", "model.mask_layers=2")
DEEP_CASES: dict[str, tuple[str, ...]] = {
    "deep": (*DEEP, "model.drop_path_rate=0.4", "stage.label_drop=0.5"),
    "deep_causal_shared_aln": (*DEEP, *CASES["causal_shared_aln"]),
    "deep_masked": (*DEEP, "stage.name=masked", "model.drop_path_rate=0.4"),
}

#: The next-scale run that a masked one starts from.
ORIGINS = {"masked": "block_diagonal", "deep_masked": "deep"}

#: Parameters without weight decay, by the end of their name; what has one dimension has none either.
TABLES = ("pos_start", "pos_embed", "level_embed", "ada_gss")


class Runs:
    """Runs of the cases in one process, each made when first asked for."""

    def __init__(self, folder: Path, inputs: Inputs, uneven: Inputs) -> None:
        self.folder, self._inputs, self._uneven = folder, inputs, uneven
        self._made: dict[str, Outcome] = {}

    def inputs(self, case: str) -> Inputs:
        return self._uneven if case == "uneven" else self._inputs

    def settings(self, case: str) -> tuple[str, ...]:
        """What the case sets; the masked stage starts from another run."""
        settings = (CASES | DEEP_CASES)[case]
        if case not in ORIGINS:
            return settings
        self.one_process(ORIGINS[case])
        return (*settings, f"run.init_from={self.folder / ORIGINS[case]}")

    def one_process(self, case: str) -> Outcome:
        if case not in self._made:
            settings = self.settings(case)
            self._made[case] = train(self.inputs(case), self.folder / case, "single", *settings)
        return self._made[case]

    def config(self, case: str) -> Config:
        return tiny_config(self.inputs(case), self.folder / case, *self.settings(case))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, inputs, uneven_inputs) -> Runs:
    return Runs(tmp_path_factory.mktemp("parity"), inputs, uneven_inputs)


def starting_model(config: Config) -> HMAR:
    """The model of plain torch layers before the first step; in the masked stage filled from stage 1."""
    scales, masked = config.schedule.scales, config.stage.name == "masked"
    tokenizer = MultiScaleVQVAE.load(str(config.tokenizer.path)).config
    model = HMAR(
        config.model, scales, tokenizer.codebook_size, tokenizer.latent_channels,
        mask_branch=masked, seed=config.run.seed,
    )  # fmt: skip
    if masked:
        first_stage = Outcome.of(Path(str(config.run.init_from))).weights
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "mask_embed":  # which stage 1 does not have, and which keeps its own first values
                    parameter.copy_(first_stage[name.removeprefix("mask_")])
    return model


def plain_torch(config: Config) -> Outcome:
    """The run of `config` by torch alone."""
    tokenizer, model = MultiScaleVQVAE.load(str(config.tokenizer.path)), starting_model(config)
    trained = {n: p for n, p in model.named_parameters() if not model.has_mask_branch or n.startswith("mask_")}
    matrices = [p for n, p in trained.items() if p.ndim > 1 and not n.endswith(TABLES)]
    others = [p for n, p in trained.items() if p.ndim <= 1 or n.endswith(TABLES)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "decays": 1.0}, {"params": others, "decays": 0.0}],
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    reader = ShardReader(Path(str(config.data.train)), "tokens")
    order, schedule = SampleOrder(len(reader), config.run.seed), Schedule.of(config, len(reader))
    losses, norms = [], []
    for step in range(config.optim.max_steps or 0):
        samples = [reader.read_tokens(int(i)) for i in order.sample_indices(step * BATCH, BATCH)]
        loss = batch_loss(
            model, tokenizer, config, torch.from_numpy(np.stack([s.tokens for s in samples])),
            torch.tensor([s.label for s in samples]), torch.arange(step * BATCH, (step + 1) * BATCH),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.clip)))
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
            group["weight_decay"] = schedule.decay(step) * group["decays"]
        optimizer.step()
        losses.append(loss.item())
    tensors = {(name, "weight"): p.detach() for name, p in model.named_parameters()}
    for name, p in trained.items():
        tensors |= {(name, kind): optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return Outcome(losses, norms, tensors)


def batch_loss(
    model: HMAR, tokenizer: MultiScaleVQVAE, config: Config, tokens: Tensor, labels: Tensor, positions: Tensor
) -> Tensor:
    """SPEC §4 and §5 of one batch; masked losses sample by sample."""
    scales, seed, codes = tokenizer.schedule, config.run.seed, tokenizer.quantizer
    labels = sequence.drop_labels(labels, positions, seed, config.stage.label_drop, config.model.num_classes)
    rate = config.model.resolved_drop_path
    drop_path = sequence.drop_path_factors(positions, seed, config.model.depth, rate) if rate else None
    given = sequence.teacher_input(tokens, codes, scales)
    if config.stage.name == "next_scale":
        logits = model(labels, given, drop_path=drop_path).permute(1, 2, 0)
        cross_entropy = F.cross_entropy(logits, tokens, reduction="none")
        return (cross_entropy * token_weights(scales, config.stage.loss_weights)).sum(1).mean()
    mask = sequence.draw_masks(positions, seed, scales)
    features = sequence.token_features(tokens, mask, codes, scales, config.stage.mask_input)
    logits = model(labels, given, features, mask, branch="masked", drop_path=drop_path).transpose(0, 1)[:, 1:]
    return torch.stack([F.cross_entropy(logits[i, mask[i]], tokens[i, 1:][mask[i]]) for i in range(len(tokens))]).mean()


def assert_same_run(ours: Outcome, theirs: Outcome, **labels: str) -> None:
    """Losses, norms, parameters and moments agree; `labels` name the row of $HMAR_TABLES/parity.jsonl."""
    moments, worst = 0.0, ""
    for (name, kind), expected in theirs.tensors.items():
        if kind != "weight":
            difference = float((ours.tensors[name, kind] - expected).abs().max()) / float(expected.abs().max())
            moments, worst = max((moments, worst), (difference, f"{kind} of {name}"))
    record(
        "parity", **labels, weights=largest_difference(ours.weights, theirs.weights), moments=moments,
        losses=max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)),
        norms=max(abs(a - b) for a, b in zip(ours.norms, theirs.norms, strict=True)),
    )  # fmt: skip
    assert ours.losses == pytest.approx(theirs.losses, rel=0, abs=TOLERANCE)
    assert ours.norms == pytest.approx(theirs.norms, rel=0, abs=TOLERANCE)
    assert largest_difference(ours.weights, theirs.weights) <= TOLERANCE
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert moments <= MOMENT_TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_plain_torch(runs, case):
    assert_same_run(runs.one_process(case), plain_torch(runs.config(case)))


#: Every layout trains the two stages with all their draws; the other cases, what could differ for them. What attends to
#: what and who shares AdaLN meet in no tensor of a rank, so one case has both; alone they are tested in one process.
FLAT_CASES = ("causal_shared_aln", "dropping", "uneven", "masked")
FLAT = (
    "accumulated", "tensor2", "data2", "tensor2_data2", "sequence2", "sequence2_data2_zero3", "data2_zero2",
    "data2_zero3", "tensor2_data2_zero2", "recompute", "sequence2_selective",
)  # fmt: skip
FLAT_FEW = ("tensor2_data2", "sequence2_data2_zero3", "data2_zero2", "sequence2_selective")
PIPELINES = (
    "pipeline2", "pipeline4", "pipeline2_virtual2", "pipeline2_tensor2", "pipeline2_sequence2_recompute",
    "pipeline2_data2", "pipeline2_virtual2_sequence2_data2",
)  # fmt: skip
PIPELINES_FEW = ("pipeline2_virtual2", "pipeline2_tensor2", "pipeline2_sequence2_recompute")


def pairs(cases, thorough, layouts, few):
    return [(case, layout) for case in cases for layout in (layouts if case in thorough else few)]


@pytest.mark.parametrize(("case", "layout"), pairs(FLAT_CASES, ("dropping", "masked"), FLAT, FLAT_FEW))
def test_layout_gives_the_run_of_one_process(runs, tmp_path, case, layout):
    outcome = train(runs.inputs(case), tmp_path / "run", layout, *runs.settings(case))
    assert_same_run(outcome, runs.one_process(case), case=case, layout=layout)


@pytest.mark.parametrize(("case", "layout"), pairs(DEEP_CASES, ("deep", "deep_masked"), PIPELINES, PIPELINES_FEW))
def test_a_pipeline_gives_the_run_of_one_process(runs, tmp_path, case, layout):
    outcome = train(runs.inputs(case), tmp_path / "run", layout, *runs.settings(case))
    assert_same_run(outcome, runs.one_process(case), case=case, layout=layout)


def chunked_rank(config: Config) -> int:
    """Train with cross-entropy a few rows of logits at a time; how many chunks the largest call took."""
    from runs import train_rank

    from hmar_mega.model import hmar

    hmar.LOGITS_CHUNK_BYTES, honest, chunks = 1500, hmar.checkpoint, []

    def counted(function, *given, **settings):
        chunks.append(getattr(function, "__name__", ""))
        return honest(function, *given, **settings)

    hmar.checkpoint = counted
    train_rank(config)
    return chunks.count("chunk")


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("uneven", "single"), ("uneven", "tensor2"), ("masked", "sequence2"), ("uneven", "data2_zero3"),
        ("masked", "pipeline2_sequence2_recompute"),
    ],
)  # fmt: skip
def test_cross_entropy_in_chunks_changes_nothing(runs, tmp_path, case, layout):
    world, settings = LAYOUTS[layout]
    config = tiny_config(runs.inputs(case), tmp_path / "run", *settings, *runs.settings(case))
    assert max(run_ranks(world, chunked_rank, config)) > 2 * 3, "chunks in each of three steps"
    assert_same_run(Outcome.of(tmp_path / "run"), runs.one_process(case))


def test_padded_tables_on_four_tensor_ranks_of_which_the_last_holds_no_class(runs, tmp_path):
    inputs = runs.inputs("uneven")
    assert inputs.classes + 1 == 5  # two rows a rank: 2, 2, 1 and 0 of them are real
    outcome = train(inputs, tmp_path / "run", "tensor4")
    assert_same_run(outcome, runs.one_process("uneven"))
    assert outcome.weights["class_embed.weight"].shape == (5, 32)
    assert outcome.weights["head.linear.weight"].shape == (inputs.codebook, 32)
    assert outcome.weights["head.linear.bias"].shape == (inputs.codebook,)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_clip_and_move_every_trained_tensor(runs, case):
    """Without this, agreement would say little: a gradient that is missing everywhere agrees everywhere."""
    config, outcome = runs.config(case), runs.one_process(case)
    assert min(outcome.norms) > config.optim.clip
    before = dict(starting_model(config).named_parameters())
    for (name, kind), moment in outcome.tensors.items():
        if kind == "exp_avg":
            assert float(moment.abs().max()) > 1e-7, name
            moved = outcome.weights[name] - before[name].detach()
            assert float(moved.abs().max()) > 10 * TOLERANCE, name


@pytest.mark.parametrize("layout", ["single", "tensor2_data2"])
def test_the_masked_stage_leaves_frozen_parameters_and_gives_them_no_optimizer_state(runs, tmp_path, layout):
    outcome = train(runs.inputs("masked"), tmp_path / "run", layout, *runs.settings("masked"))
    for name, weight in runs.one_process("block_diagonal").weights.items():
        assert torch.equal(outcome.weights[name], weight), name
    for kind in ("exp_avg", "exp_avg_sq"):
        with_state = {name for name, stored in outcome.tensors if stored == kind}
        assert with_state == {name for name in outcome.weights if name.startswith("mask_")}


@pytest.mark.parametrize("case", ["dropping", "masked"])
def test_label_drop_and_drop_path_are_on_where_the_case_says_so(runs, tmp_path, case):
    settings = (*runs.settings(case), "model.drop_path_rate=0", "stage.label_drop=0")
    outcome = train(runs.inputs(case), tmp_path / "run", "single", *settings)
    difference = torch.tensor(outcome.losses) - torch.tensor(runs.one_process(case).losses)
    assert float(difference.abs().max()) > 100 * TOLERANCE
