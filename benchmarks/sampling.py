"""Sampling on one GPU: latency, images a second, memory, phases, and the least time that the work can take.

    python benchmarks/sampling.py --json sampling.json --markdown sampling.md
    python benchmarks/sampling.py --models d24-512:1,d24-512:8 --precision fp16 --compile-decoder
    python benchmarks/sampling.py --models d30-256:8 --external their_sampler.py
    python benchmarks/sampling.py --device cpu --tiny                              # whether the script itself works

Weights are random, of published sizes (mask branch included, tokenizer of 160 channels). Ours is what
`load_model(...).generate` runs, by the host's clock from call to finished images; `plain` is the same model kernel by
kernel. Nothing is timed before it was checked. benchmarks/README.md says how to read what is printed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    Clock,
    Limits,
    add_output_options,
    choices,
    describe,
    machine,
    markdown_table,
    measure_limits,
    peak_memory,
    reason,
    relative_error,
    write_results,
)
from sampling_floor import floor
from torch import Tensor

from hmar_mega.config import ModelConfig, TokenizerConfig
from hmar_mega.inference.decoding import ImageDecoder
from hmar_mega.inference.graphs import ImageSampler
from hmar_mega.inference.options import parse_mask_schedule
from hmar_mega.inference.packed import PackedState
from hmar_mega.inference.sampler import SampleSettings, SamplingState, generate_tokens, sample_truncated
from hmar_mega.model.hmar import HMAR
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule, mask_schedule_for
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Milliseconds of the published implementation (its default float32 with TF32) on an H100 80GB, torch 2.11, with the
#: mask schedule below. Measured elsewhere: for orientation.
PUBLISHED = {
    "d16-256:1": 119, "d16-256:50": 451, "d30-256:1": 195, "d30-256:8": 312, "d30-256:50": 1192, "d24-512:1": 328,
    "d24-512:8": 680,
}  # fmt: skip

#: The schedule that these figures are of.
MASK_SCHEDULE = ((1,), (1, 3), (1, 3, 5))

#: Guidance, top-k, and top-p 0.99, by depth: those of published evaluations.
EVALUATION = {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}

#: Largest relative error of packed logits against the plain model's in the same format.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}

#: Seconds that the timed calls of one row may take together; there are 10 to 50 of them.
BUDGET = 4.0


@dataclass
class Case:
    """A model in one format, with the settings it is sampled with."""

    model: HMAR
    tokenizer: MultiScaleVQVAE
    decoder: ImageDecoder
    settings: SampleSettings
    device: torch.device

    def inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        """Labels and seeds, (batch,) int64."""
        labels = torch.arange(batch, device=self.device) % self.model.config.num_classes
        return labels, torch.arange(batch, device=self.device)


def main(arguments: list[str] | None = None) -> None:
    """Check and time every model and batch; print the tables."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    precisions = choices(args.precision, tuple(DTYPES), "--precision", parser)
    device = torch.device(args.device)
    limits = measure_limits(Clock(device, budget=50.0))
    results: dict[str, Any] = {"machine": machine(device), "limits": limits, "rows": []}
    print(describe(results["machine"], limits), flush=True)
    known: tuple[tuple[str, str], Case] | None = None
    wanted = [(precision, name.strip()) for precision in precisions for name in args.models.split(",")]
    for precision, name in wanted:
        model, _, batch = name.partition(":")
        if not batch.isdigit() or int(batch) < 1:
            parser.error(f"--models: {name!r} is not dDEPTH-RESOLUTION:BATCH, such as d16-256:50")
        if known is None or known[0] != (precision, model):
            known = None  # frees the weights before the next ones are made
            if device.type == "cuda":
                torch.cuda.empty_cache()
            known = ((precision, model), make_case(model, precision, args, parser))
        row = {"model": name, "batch": int(batch), "precision": precision, "mask_schedule": args.mask_schedule}
        try:
            row |= measure(known[1], min(int(batch), 2) if args.tiny else int(batch), args, limits)
        except (RuntimeError, AssertionError) as err:
            row["failed"] = reason(err)
        results["rows"].append(row)
        print(live_line(row), flush=True)
        write_results(args, results, page(results["rows"]))
    print(f"\n{page(results['rows'])}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(PUBLISHED), help="dDEPTH-RESOLUTION:BATCH,… (default: %(default)s)"
    )
    parser.add_argument("--precision", default="bf16", help="of transformer and decoder, or several: bf16,fp16,fp32")
    parser.add_argument(
        "--mask-schedule", metavar="S", help="as of `hmar-mega sample` (default: that of the published times)"
    )
    parser.add_argument(
        "--mask-cfg", type=float, default=0.0,
        help="guidance of mask passes by --cfg's; 0 leaves their unconditional half out, which the published code "
        "computes: 1e-6 does as it does (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--compile-decoder", action="store_true", help="run the decoder through torch.compile")
    parser.add_argument("--external", type=Path, metavar="PATH.py", help="a rival's file; see benchmarks/README.md")
    parser.add_argument("--no-phases", action="store_true", help="leave the breakdown by phase out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers, three scales, batches of at most 2")
    add_output_options(parser)
    return parser


def make_case(name: str, precision: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> Case:
    """The model `dDEPTH-RESOLUTION` with random weights on the device."""
    depth, _, resolution = name.removeprefix("d").partition("-")
    if not depth.isdigit() or not resolution.isdigit() or int(resolution) not in PATCH_NUMS:
        parser.error(
            f"--models: {name!r} is not dDEPTH-RESOLUTION with a resolution of {', '.join(map(str, PATCH_NUMS))}"
        )
    device, dtype = torch.device(args.device), DTYPES["fp32" if args.device == "cpu" else precision]
    schedule = ScaleSchedule((1, 2, 4) if args.tiny else PATCH_NUMS[int(resolution)])
    config = ModelConfig(depth=2, width=64, heads=2, mask_layers=1) if args.tiny else ModelConfig(depth=int(depth))
    coder = TokenizerConfig(base_channels=32, codebook_size=64) if args.tiny else TokenizerConfig()
    with torch.device("meta"):
        model = HMAR(config, schedule, coder.codebook_size, coder.latent_channels, mask_branch=True)
        tokenizer = MultiScaleVQVAE(coder, schedule)
    torch.manual_seed(0)
    fill_model(model, device, dtype)
    tokenizer.to_empty(device=device)
    for module in tokenizer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tokenizer.eval().requires_grad_(False)
    cfg, top_k = EVALUATION.get(int(depth), (1.6, 900))
    asked = parse_mask_schedule(args.mask_schedule) if args.mask_schedule else MASK_SCHEDULE
    passes = mask_schedule_for(schedule, ((1,), (1, 3), (6, 10)) if args.tiny else asked)
    settings = SampleSettings(cfg, top_k, 0.99, passes, mask_cfg=args.mask_cfg * cfg)
    return Case(model, tokenizer, ImageDecoder(tokenizer, dtype, args.compile_decoder), settings, device)


def fill_model(model: HMAR, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights in place of meta ones: matrices of std 1/√inputs, so that logits are spread as after training."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if leaf == "log_scale":
            values = torch.full(parameter.shape, math.log(4), device=device)
        else:
            std = 0.02 if parameter.ndim < 2 or "ada" in name else parameter.shape[-1] ** -0.5
            values = (torch.randn(parameter.shape, device=device, dtype=torch.float32) * std).to(dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.register_buffer("level_ids", model.schedule.level_ids(device), persistent=False)
    model.eval()


def measure(case: Case, batch: int, args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """One row: check, then time."""
    sampler = ImageSampler(case.model, case.decoder)
    labels, seeds = case.inputs(batch)
    row: dict[str, Any] = {"checked": check(case, sampler, batch)}
    row["refused"] = sampler.why_not(batch, case.settings)
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row["ours"] = latency(lambda: sampler(labels, seeds, case.settings), case.device)
    row["peak_gb"] = (peak_memory(case.device) or 0) / 1e9
    plain = ImageSampler(case.model, case.decoder, graphs=False)
    try:
        row["plain"] = latency(lambda: plain(labels, seeds, case.settings), case.device, count=3)
    except torch.OutOfMemoryError:
        row["plain"] = {"p50": math.nan}
    if args.external is not None:
        try:
            rival = load_external(args.external)(case.model, case.tokenizer, case.settings, batch, case.device)
            row["external"] = latency(rival, case.device)
        except Exception as err:  # the rival's own failures, whatever they are, must not end the others
            row["external_failed"] = reason(err)
    row["floor"] = floor(case.model, case.tokenizer.config, case.settings, batch, limits)
    if not args.no_phases:
        row["phases"] = phases(case, sampler, batch)
    return row


def load_external(path: Path) -> Callable[..., Callable[[], object]]:
    """`sampler(model, tokenizer, settings, batch, device)` of a rival's file, which gives a call that makes a batch."""
    spec = importlib.util.spec_from_file_location("external_sampler", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Callable[[], object]] = module.sampler
    return found


@torch.inference_mode()
def check(case: Case, sampler: ImageSampler, batch: int) -> dict[str, float]:
    """Raise AssertionError unless packed logits are the model's, and images repeat and are images."""
    labels, seeds = case.inputs(batch)
    given = (case.tokenizer.quantizer, labels, seeds, case.settings)
    plain, fast = SamplingState(case.model, *given), PackedState(sampler.program().packed, *given)
    scale, grid = case.model.schedule.num_scales - 1, case.model.schedule.grid
    plain.f_hat = fast.f_hat = torch.randn(batch, case.tokenizer.config.latent_channels, grid, grid, device=case.device)
    strength = plain.strengths[scale]
    found, wanted = (state.logits(scale, "next_scale", strength) for state in (fast, plain))
    error = relative_error(found, wanted)
    dtype = case.model.pos_start.dtype
    assert error <= TOLERANCE[dtype], f"packed logits are {error:.1e} off, more than {TOLERANCE[dtype]:.0e}"
    drawn = draws_agree(fast, scale, strength, found)
    assert drawn > 0.999, f"the fused draw gives {drawn:.2%} of the plain draw's tokens from the same logits"
    del found, wanted, plain, fast
    tokens, images = sampler(labels, seeds, case.settings)
    again, same = sampler(labels, seeds, case.settings)
    assert torch.equal(tokens, again), "a second run gave other tokens"
    assert torch.equal(images, same), "a second run gave other images"
    assert 0 <= float(images.min()) < float(images.max()) <= 1, "these are no images"  # nor is anything with NaN
    found = {"logits": error, "draws": drawn}
    try:
        wanted, _ = generate_tokens(case.model, case.tokenizer.quantizer, labels, seeds, case.settings)
    except torch.OutOfMemoryError:  # of the plain path, which is not what is measured
        return found
    return found | {"tokens_as_plain": float((tokens == wanted).float().mean())}


def draws_agree(fast: PackedState, scale: int, strength: float, logits: Tensor) -> float:
    """Share of tokens that the state's own draw and the plain one make alike from the same numbers."""
    tokens, _, _ = fast.sample(scale, "next_scale", strength, 0)
    numbers = fast.numbers[scale, 0][:, : logits.shape[1]]
    wanted, _ = sample_truncated(logits, numbers, fast.settings.top_k, fast.settings.top_p)
    return float((tokens == wanted).float().mean())


def latency(call: Callable[[], object], device: torch.device, count: int | None = None) -> dict[str, float]:
    """p50 and p95 in ms by the host's clock, each call waited for; how many there were."""
    times: list[float] = []
    while len(times) < 3 + (count or 10):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
        if count is None and len(times) == 3:
            count = min(50, max(10, int(1e3 * BUDGET / times[-1])))
    ordered = sorted(times[3:])
    return {
        "p50": statistics.median(ordered), "p95": ordered[math.ceil(0.95 * len(ordered)) - 1], "count": len(ordered),
    }  # fmt: skip


@torch.inference_mode()
def phases(case: Case, sampler: ImageSampler, batch: int) -> dict[str, Any]:
    """ms of each part by itself: transformer and draw of each pass, f̂, decoder."""
    program, clock = sampler.program(), Clock(case.device, budget=60.0)
    labels, seeds = case.inputs(batch)
    state = PackedState(program.packed, case.tokenizer.quantizer, labels, seeds, case.settings)
    transformer: dict[str, float] = {}
    draws, features = 0.0, 0.0
    for scale, counts in enumerate(case.settings.mask_schedule):
        length = sum(counts)
        for branch, strength, times in (
            ("next_scale", state.strengths[scale], 1), ("masked", state.mask_strengths[scale], len(counts) - 1),
        ):  # fmt: skip
            if times == 0:
                continue
            rows = (2 if strength > 0 else 1) * batch
            x = torch.randn(length, rows, case.model.config.resolved_width, device=case.device).to(
                case.model.pos_start.dtype
            )

            def forward(x: Tensor = x, branch: Any = branch) -> Tensor:
                return program.packed.logits(x, branch, state.modulation)

            key = f"{case.model.schedule.patch_nums[scale]}"
            transformer[key] = transformer.get(key, 0.0) + times * timed(forward, clock)
            logits = forward()
            numbers = torch.rand(batch, length, device=case.device)
            draws += times * timed(lambda g=logits, u=numbers, t=strength: draw(g, u, t, program, case.settings), clock)
        tokens = torch.randint(case.model.codebook_size, (batch, length), device=case.device)
        features += len(counts) * timed(lambda k=scale, t=tokens: case.tokenizer.quantizer.scale_features(k, t), clock)
    grid = case.model.schedule.grid
    f_hat = torch.randn(batch, case.tokenizer.config.latent_channels, grid, grid, device=case.device)
    decoder = timed(lambda: case.decoder(f_hat), clock)
    modulation = timed(lambda: program.packed.modulation(labels, case.model.config.num_classes, 2).first, clock)
    return {
        "transformer": transformer, "sampling": draws, "features": features, "decoder": decoder,
        "modulation": modulation,
    }  # fmt: skip


def draw(logits: Tensor, numbers: Tensor, strength: float, program: Any, settings: SampleSettings) -> Tensor:
    """The tokens of a pass as the program draws them."""
    if program.packed.draws_in_one:
        from hmar_mega.kernels.sampling import sample_tokens

        return sample_tokens(logits, numbers, strength, settings.top_k, settings.top_p)[0]
    both = logits.float().transpose(0, 1)
    batch = len(numbers)
    guided = both if len(both) == batch else (1 + strength) * both[:batch] - strength * both[batch:]
    return sample_truncated(guided, numbers, settings.top_k, settings.top_p)[0]


@functools.cache
def capture_stream() -> Any:
    """One for all captures: cuBLAS keeps a workspace for every stream, which would count as a later row's memory."""
    return torch.cuda.Stream()


def timed(function: Callable[[], object], clock: Clock) -> float:
    """Median ms; on a GPU of a CUDA graph of it."""
    if not clock.cuda:
        return clock.time(lambda _: function()).median
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return clock.time(lambda _: graph.replay()).median


def live_line(row: dict[str, Any]) -> str:
    """A row in a line while the others are still to come."""
    if "failed" in row:
        return f"{row['model']}: {row['failed']}"
    how = row["refused"] or "CUDA graph"
    return f"{row['model']}: {row['ours']['p50']:.1f} ms ({how}); plain {row['plain']['p50']:.1f} ms; {row['checked']}"


def page(rows: list[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    header = [
        "model:batch", "precision", "p50 ms", "p95 ms", "img/s", "peak GB", "lower bound ms", "× bound", "plain ms",
        "external ms", "published ms",
    ]  # fmt: skip
    lines, parts = [], []
    for row in rows:
        if "failed" in row:
            lines.append([row["model"], row["precision"], row["failed"], *[""] * 8])
            continue
        ours, bound = row["ours"], row["floor"]["total"]
        external = f"{row['external']['p50']:.1f}" if "external" in row else row.get("external_failed", "–")
        lines.append([
            row["model"], row["precision"], f"{ours['p50']:.1f}", f"{ours['p95']:.1f}",
            f"{1e3 * row['batch'] / ours['p50']:.1f}", f"{row['peak_gb']:.1f}", f"{bound:.1f}",
            f"{ours['p50'] / bound:.2f}", f"{row['plain']['p50']:.1f}", external, str(PUBLISHED.get(row["model"], "–")),
        ])  # fmt: skip
        if "phases" in row:
            found = row["phases"]
            each = ", ".join(f"{side}²: {ms:.2f}" for side, ms in found["transformer"].items())
            parts.append([
                row["model"], f"{sum(found['transformer'].values()):.1f}", f"{row['floor']['transformer']:.1f}",
                f"{found['sampling']:.2f}", f"{found['features']:.2f}", f"{found['modulation']:.2f}",
                f"{found['decoder']:.1f}", f"{row['floor']['decoder']:.1f}", each,
            ])  # fmt: skip
    text = markdown_table(header, lines)
    if parts:
        text += "\n\n" + markdown_table(
            ["model:batch", "transformer ms", "its bound", "draws", "f̂", "AdaLN", "decoder", "its bound", "by scale"],
            parts,
        )
    return text


if __name__ == "__main__":
    main()
