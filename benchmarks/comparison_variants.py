"""What the comparison trains: the variants from VAR to leak-free masked prediction, their sizes, and the budget rule.

Every variant spends the same budget, of steps (and so of images) or of minutes. Next-scale variants spend it on one
run; masked variants spend `1 − MASKED_SHARE` of it on stage 1, with a schedule of its own that ends there, and the rest
on stage 2, which trains the mask branch alone; both start from the same stage 1, `base`. The variants `top-…` are the
published recipe, stage 2 after a whole stage 1, and spend `1 + MASKED_SHARE` budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hmar_mega.scales import ScaleSchedule

#: Of a budget: 100 of the 300 epochs that HMAR-d16 is trained for (arXiv 2506.04421) are stage 2.
MASKED_SHARE = 1 / 3

Passes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Variant:
    """One run.

    Attributes:
        label: for the table.
        settings: that differ from the common ones.
        share: of the budget of steps.
        start: the run whose weights it starts from.
        shown: whether it is measured and has a row; else it is only started from.
    """

    label: str
    settings: dict[str, Any]
    share: float = 1.0
    start: str | None = None
    shown: bool = True

    @property
    def masked(self) -> bool:
        """Whether it has a mask branch."""
        return self.settings.get("stage.name") == "masked"


def _masked(label: str, mask_input: str, start: str) -> Variant:
    return Variant(label, {"stage.name": "masked", "stage.mask_input": mask_input}, MASKED_SHARE, start)


#: In the order they are trained: what a shorter time leaves out comes last.
VARIANTS: dict[str, Variant] = {
    "var": Variant("VAR", {"model.attention.pattern": "block_causal", "stage.loss_weights": "uniform"}),
    "markov": Variant("+ Markov", {"stage.loss_weights": "uniform"}),
    "weights": Variant("+ loss weights", {"stage.loss_weights": "lognormal"}),
    "base": Variant("stage 1 of the masked", {"stage.loss_weights": "lognormal"}, 1 - MASKED_SHARE, shown=False),
    "masked-reference": _masked("+ masked, reference input", "reference", "base"),
    "masked-leak-free": _masked("+ masked, leak-free input", "leak_free", "base"),
    "top-reference": _masked("masked on top, reference input", "reference", "weights"),
    "top-leak-free": _masked("masked on top, leak-free input", "leak_free", "weights"),
}

#: Common to all. Batch 256 at depth 8 keeps an H100 busy for longer than the host needs to launch a step: at 130 tokens
#: an image its products take about 25 ms by their FLOPs; at depth 4, or batch 64, the host would set the pace and hide
#: what the variants cost.
GPU: dict[str, Any] = {
    "model.depth": 8, "model.gamma_init": 0.01, "data.global_batch_size": 256, "data.micro_batch_size": 256,
    "optim.base_lr": 5e-4, "precision.compute": "bf16", "data.workers": 4, "eval.batch_size": 250,
}  # fmt: skip
CPU: dict[str, Any] = GPU | {
    "model.depth": 4, "model.width": 128, "model.heads": 4, "data.global_batch_size": 64, "data.micro_batch_size": 64,
    "optim.base_lr": 4e-3, "precision.compute": "fp32", "data.workers": 1, "eval.batch_size": 64,
    "eval.num_samples": 512,
}  # fmt: skip
#: For a look at whether everything runs.
TINY: dict[str, Any] = CPU | {
    "model.depth": 2, "model.width": 32, "model.heads": 2, "data.global_batch_size": 8, "data.micro_batch_size": 8,
    "eval.batch_size": 16, "eval.num_samples": 16, "data.workers": 0,
}  # fmt: skip

#: Guidance of the sweep, the same for every variant; each is then measured at the one that serves it best.
CFG_SCALES = (0.0, 0.75, 1.5, 3.0)
#: Guidance of mask passes in the sweep; 0 is what the others are sampled with.
MASK_CFGS = (0.75, 1.5, 3.0)
TOP_K, TOP_P = 0, 0.96
PUBLISHED = "published"


def mask_schedules(scales: ScaleSchedule) -> dict[str, Passes]:
    """The schedules of the sweep, by name; `published` is [1] [1 3] [1 1 2 5] and one pass for every larger scale."""

    def shares(*parts: int) -> list[tuple[int, ...]]:
        """Every scale in so many passes, in these proportions, where it has tokens enough."""
        whole = sum(parts)
        return [_cut(n, [n * p // whole for p in parts[:-1]]) for n in scales.scale_lengths]

    one = [(n,) for n in scales.scale_lengths]
    early = [_cut(n, given) for n, given in zip(scales.scale_lengths, ([], [1], [1, 1, 2]), strict=False)]
    halves, quarters = shares(1, 3), shares(1, 1, 2, 4)
    last = scales.num_scales - 2
    found = {
        "one pass": one,
        PUBLISHED: early + one[len(early) :],
        "last two scales in two": one[:last] + halves[last:],
        "all in two": halves,
        "all in four": quarters,
    }
    return {name: tuple(passes) for name, passes in found.items()}


def _cut(tokens: int, first: list[int]) -> tuple[int, ...]:
    """Passes that keep `first` and what is left; those that would keep nothing are dropped."""
    kept = [n for n in first if n > 0]
    return (*kept, tokens - sum(kept)) if sum(kept) < tokens else (tokens,)
