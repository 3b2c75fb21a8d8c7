"""What this GPU really computes: fixed samples through TE's attention and linears and our attention, against float32.

A kernel that exists is not yet one that is right: TE's own FP8 attention was right in its first step and wrong from the
second. So training runs the attention and FP8 kernels that it will stand on here first, over some steps, and refuses
those that fail; `hmar-mega doctor` shows them all.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from hmar_mega.config import Config
from hmar_mega.config_precision import FP8_HEAD_DIM, FP8_MAX_Q_SCALE, PrecisionConfig
from hmar_mega.errors import UserError
from hmar_mega.kernels import HEAD_DIMS
from hmar_mega.precision import exact_float32
from hmar_mega.scales import ScaleSchedule

log = logging.getLogger(__name__)

Kind = Literal[
    "bf16 attention", "fp8 attention", "bf16 attention, triton", "fp8 attention, triton", "fp8 linears, delayed",
    "fp8 linears, current",
]  # fmt: skip

#: Largest relative error ‖ours − exact‖/‖exact‖ of outputs and of each gradient that is taken for rounding. Measured on
#: an H100 with head dim 128: FP8 attention 0.05 to 0.08 and 0.08 to 0.12. The own kernels' gradients are bf16.
TOLERANCES: dict[Kind, tuple[float, float]] = {
    "bf16 attention": (0.01, 0.02),
    "fp8 attention": (0.12, 0.25),
    "bf16 attention, triton": (0.02, 0.04),
    "fp8 attention, triton": (0.08, 0.05),
    "fp8 linears, delayed": (0.06, 0.12),
    "fp8 linears, current": (0.06, 0.12),
}

#: Scales of 324 and 1024 tokens, one a multiple of the kernels' tiles and one not, and two too small for FP8.
SCHEDULE = ScaleSchedule((1, 2, 18, 32))

#: Largest logits of the attention samples: as training starts, and the largest that are computed in FP8, or at all.
LOGITS: dict[Kind, tuple[float, ...]] = {
    "bf16 attention": (4.0, FP8_MAX_Q_SCALE),
    "fp8 attention": (4.0, FP8_MAX_Q_SCALE),
    "bf16 attention, triton": (4.0, 100.0),
    "fp8 attention, triton": (4.0, 9.9),
}

STEPS = 3


@dataclass(frozen=True)
class Machine:
    """The GPU and the libraries that compute on it; None where there is none, with the reason in `missing`."""

    gpu: str | None
    capability: tuple[int, int] | None
    transformer_engine: str | None
    cudnn: str | None
    missing: str | None


@dataclass(frozen=True)
class Check:
    """How one kernel did.

    Attributes:
        head_dim: None where it has no meaning.
        runs: right within its tolerance in every step.
        errors: largest relative error of outputs and of gradients; None where it could not be run.
        reason: why it does not run, or a remark on how it does.
    """

    kind: Kind
    head_dim: int | None
    runs: bool
    errors: tuple[float, float] | None
    reason: str = ""

    @property
    def name(self) -> str:
        """As tables and messages say it."""
        return self.kind if self.head_dim is None else f"{self.kind}, head_dim {self.head_dim}"


def look_at_machine() -> Machine:
    """What there is, without computing anything."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    capability = torch.cuda.get_device_capability() if gpu is not None else None
    cudnn = torch.backends.cudnn.version() if gpu is not None else None
    try:
        version: str | None = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        version = None
    missing = None
    if gpu is None:
        missing = "no CUDA GPU is visible"
    elif version is None:
        missing = "transformer-engine is not installed: pip install 'hmar-mega[te]'"
    else:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except (ImportError, OSError, RuntimeError) as err:
            missing = f"transformer-engine {version} cannot be imported: {err}"
    dotted = None if cudnn is None else f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return Machine(gpu, capability, version, dotted, missing)


def check(machine: Machine, kind: Kind, head_dim: int | None = None) -> Check:
    """Run the samples of one kernel on the current GPU."""
    own = kind.endswith("triton")
    if machine.missing is not None and not (own and machine.gpu is not None):
        return Check(kind, head_dim, False, None, machine.missing)
    assert machine.capability is not None
    if kind.startswith("fp8") and machine.capability < (8, 9):
        have = ".".join(map(str, machine.capability))
        return Check(
            kind, head_dim, False, None, f"FP8 needs compute capability 8.9 (Ada) or newer; {machine.gpu} has {have}"
        )
    samples = _attention_samples(kind, head_dim) if head_dim is not None else _linear_samples(kind)
    try:
        with exact_float32():
            pairs = [_errors(ours, exact) for ours, exact in samples]
    except Exception as err:  # TE, cuDNN, torch and Triton each raise their own for what they lack
        log.debug("%s does not run", kind, exc_info=True)
        return Check(kind, head_dim, False, None, str(err).strip().split("\n")[0] or type(err).__name__)
    return judge(kind, head_dim, pairs)


def judge(kind: Kind, head_dim: int | None, pairs: list[tuple[float, float]]) -> Check:
    """The verdict on (output, gradient) errors of some steps; NaN is no small error."""
    limits = TOLERANCES[kind]
    for step, errors in enumerate(pairs, 1):
        if not (errors[0] <= limits[0] and errors[1] <= limits[1]):
            reason = (
                f"wrong in step {step}: relative errors {errors[0]:.3g} and {errors[1]:.3g} (gradients), allowed are "
                f"{limits[0]:g} and {limits[1]:g}"
            )
            return Check(kind, head_dim, False, errors, reason)
    remark = ""
    if kind == "fp8 attention" and head_dim is not None and head_dim < FP8_HEAD_DIM:
        remark = f"zero-padded to {FP8_HEAD_DIM} (precision.fp8_pad_head_dim)"
    return Check(kind, head_dim, True, (max(p[0] for p in pairs), max(p[1] for p in pairs)), remark)


def check_all(machine: Machine) -> list[Check]:
    """Every kernel, attention at the head dims of published models and of FP8."""
    dims = (64, FP8_HEAD_DIM)
    kinds: tuple[Kind, ...] = (
        "bf16 attention, triton", "fp8 attention, triton", "bf16 attention", "fp8 attention",
    )  # fmt: skip
    attention = [check(machine, kind, dim) for kind in kinds for dim in dims]
    return [*attention, check(machine, "fp8 linears, delayed"), check(machine, "fp8 linears, current")]


def wanted_kernels(config: Config) -> list[tuple[Kind, int | None]]:
    """The kernels that training with `config` stands on. Own attention under `auto` is tried where there is a GPU."""
    precision, head_dim = config.precision, config.model.head_dim
    wanted: list[tuple[Kind, int | None]] = []
    backend, fp8_attention = config.model.attention.backend, precision.fp8 == "linears_and_attention"
    own = backend == "triton" or (backend == "auto" and _own_attention_is_taken(head_dim))
    if own and (precision.compute == "bf16" or backend == "triton"):
        wanted.append(("bf16 attention, triton", head_dim))
    if fp8_attention and backend == "triton":
        wanted.append(("fp8 attention, triton", head_dim))
    else:
        if backend == "te" or fp8_attention:
            wanted.append(("bf16 attention", head_dim))
        if fp8_attention:
            wanted.append(("fp8 attention", head_dim))
    if precision.fp8 != "none":
        wanted.append(("fp8 linears, delayed" if precision.fp8_recipe == "delayed" else "fp8 linears, current", None))
    return wanted


def _own_attention_is_taken(head_dim: int) -> bool:
    triton = importlib.util.find_spec("triton") is not None
    return torch.cuda.is_available() and triton and head_dim in HEAD_DIMS


def require_kernels(config: Config) -> list[Check]:
    """Run the kernels that training with `config` stands on; their checks.

    Raises:
        UserError: when one is missing or wrong.
    """
    wanted = wanted_kernels(config)
    if not wanted:
        return []
    machine = look_at_machine()
    checks = [check(machine, *kernel) for kernel in wanted]
    for done in checks:
        if not done.runs:
            setting, instead = "model.attention.backend=te", "model.attention.backend=auto"
            if done.kind == "bf16 attention, triton":
                setting, instead = "own attention (model.attention.backend)", "model.attention.backend=sdpa"
            if done.kind.startswith("fp8"):
                setting = f"precision.fp8={config.precision.fp8}"
                instead = "precision.fp8=none"
                if done.kind.startswith("fp8 attention"):
                    instead = "precision.fp8=linears"
            raise UserError(
                f"{setting} needs {done.name}, which does not run here: {done.reason}; set {instead} "
                "(`hmar-mega doctor` shows what this machine computes)"
            )
    return checks


def format_checks(checks: list[Check]) -> str:
    """A line a kernel: whether it runs, its errors, and why not."""
    rows = [("kernel", "runs", "output", "gradients", "")]
    for done in checks:
        errors = ("-", "-") if done.errors is None else (f"{done.errors[0]:.2g}", f"{done.errors[1]:.2g}")
        rows.append((done.name, "yes" if done.runs else "no", *errors, done.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


#: Outputs and gradients of a step.
_Results = tuple[Tensor, list[Tensor]]


def _errors(ours: _Results, exact: _Results) -> tuple[float, float]:
    gradients = [_relative(a, b) for a, b in zip(ours[1], exact[1], strict=True)]
    # max() of several floats may pass over a NaN
    return _relative(ours[0], exact[0]), float(torch.tensor(gradients).max())


def _relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def _attention_samples(kind: Kind, head_dim: int) -> Iterator[tuple[_Results, _Results]]:
    from hmar_mega.model.attention import Backend, scale_block_attention

    backends: dict[Kind, Backend] = {
        "bf16 attention": "te", "fp8 attention": "te_fp8", "bf16 attention, triton": "triton",
        "fp8 attention, triton": "triton_fp8",
    }  # fmt: skip
    heads, batch = 2, 2
    for step in range(STEPS):
        for logits in LOGITS[kind]:
            generator = torch.Generator().manual_seed(step)
            shape = (SCHEDULE.num_tokens, batch, 3, heads, head_dim)
            qkv = torch.randn(shape, generator=generator).cuda().bfloat16()
            weight = torch.randn(SCHEDULE.num_tokens, batch, heads * head_dim, generator=generator).cuda()
            q_scale = torch.full((heads,), logits, device="cuda")

            def attend(
                backend: Backend, dtype: torch.dtype, qkv: Tensor = qkv, weight: Tensor = weight, s: Tensor = q_scale
            ) -> _Results:
                leaf = qkv.to(dtype, copy=True).requires_grad_()
                out = scale_block_attention(leaf, s, SCHEDULE, "block_diagonal", backend)
                return _backward(out, weight, leaf, lambda gradient: list(gradient.unbind(2)))

            yield attend(backends[kind], torch.bfloat16), attend("reference", torch.float32)


def _linear_samples(kind: Kind) -> Iterator[tuple[_Results, _Results]]:
    import transformer_engine.pytorch as te

    from hmar_mega.model.fp8_scaling import fp8_recipe

    rows, width, out_features = 512, 256, 768
    recipe = fp8_recipe(PrecisionConfig(fp8_recipe="delayed" if kind.endswith("delayed") else "current"))
    recipe.reduce_amax = False  # this GPU alone: a rank whose probe fails must not leave the others waiting
    linear = te.Linear(width, out_features, bias=False, params_dtype=torch.bfloat16)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        weight = (0.1 * torch.randn(out_features, width, generator=generator)).cuda().bfloat16()
        x = torch.randn(rows, width, generator=generator).cuda().bfloat16()
        back = torch.randn(rows, out_features, generator=generator).cuda()
        with torch.no_grad():
            linear.weight.copy_(weight)
        linear.weight.grad = None
        leaf = x.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=recipe):
            out = linear(leaf)
        ours = _backward(out, back, leaf, lambda gradient: [gradient])
        ours[1].append(linear.weight.grad)
        exact_x, exact_w = x.float().requires_grad_(), weight.float().requires_grad_()
        exact = _backward(exact_x @ exact_w.t(), back, exact_x, lambda gradient: [gradient])
        assert exact_w.grad is not None
        exact[1].append(exact_w.grad)
        yield ours, exact


def _backward(out: Tensor, weight: Tensor, leaf: Tensor, parts: Callable[[Any], list[Tensor]]) -> _Results:
    out.backward(weight.to(out.dtype))
    return out.detach(), parts(leaf.grad)
