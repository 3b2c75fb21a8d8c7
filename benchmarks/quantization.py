"""Quantized models beside float ones: what 8 bits cost in quality, and on a GPU what they bring in speed.

    python benchmarks/quantization.py quality MODEL --reference shards/train --json quality.json --markdown quality.md
    python benchmarks/quantization.py speed --models d30-256:1,d30-256:8 --json speed.json --markdown speed.md
    python benchmarks/quantization.py speed --device cpu --tiny                    # whether the script itself works

`quality`: MODEL is an exported model. Logits are teacher-forced on the tokens that the float32 model drew: relative
error, KL divergence from float32 in nats, and how often the likeliest token is the same. Tokens are drawn from the same
seeds; columns as in `sampling_accuracy.py`. FID and KID are of EfficientNet-lite0's features beside --reference, of
other seeds than those of the tokens; `fp32, other seeds` says how much chance alone moves them.

`speed`: weights are random, of published sizes. Latency is that of `sampling.py`, bf16 beside 8 bits in the same run;
below it each of a block's linears by rows, by the kernel and by cuBLAS. FP8 scales are no measured ones: they do not
change the time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import numpy as np
import sampling
import torch
import torch.nn.functional as F
from common import Clock, add_output_options, describe, machine, markdown_table, reason, relative_error, write_results
from sampling_accuracy import agreement, reference
from torch import Tensor

from hmar_mega.evaluation.distances import FrechetReference, kernel_distance
from hmar_mega.evaluation.images import Fit, open_images
from hmar_mega.evaluation.moments import Moments
from hmar_mega.evaluation.networks import FeatureNetwork, open_network
from hmar_mega.inference import ImageModel, load_model
from hmar_mega.inference.generation import to_bytes
from hmar_mega.inference.graphs import ImageSampler
from hmar_mega.inference.quantize import DEFAULT_PARTS, quantized
from hmar_mega.model import layers_quantized
from hmar_mega.model.layers_quantized import PARTS, Format, Part, linears_of, quantize_linears
from hmar_mega.sequence import teacher_input

#: Rows of `quality` beside the float formats: which parts are quantized, to either format.
CHOICES: tuple[tuple[Part, ...], ...] = (("blocks",), ("blocks", "adaln"), PARTS)

#: Images that go through the model, and through the feature network, at once.
BATCH = 50

#: First seed of the images that are measured, and of the other float32 ones.
SEED, OTHER_SEED = 1_000_000, 2_000_000

#: Rows of the linears that `speed` times.
ROWS = (1, 2, 16, 32, 64, 256, 1024, 4096)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write one of the two pages."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.what == "speed" and args.device == "cpu" and not args.tiny:
        parser.error("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    args.run(args, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    quality = commands.add_parser("quality", help="tokens, logits and images of a trained model")
    quality.add_argument("model", type=Path, metavar="MODEL", help="exported model")
    quality.add_argument(
        "--count", type=int, default=32, help="images whose tokens are compared (default: %(default)s)"
    )
    quality.add_argument("--reference", type=Path, metavar="REF", help="image shards or folder for FID and KID")
    quality.add_argument("--images", type=int, default=1000, help="images for FID and KID (default: %(default)s)")
    quality.add_argument("--reference-images", type=int, metavar="N", help="the first N of them (default: all)")
    quality.add_argument("--all-parts", action="store_true", help="also other parts than quantize takes by default")
    quality.add_argument("--network", default="efficientnet-lite0", help="or pixels (default: %(default)s)")
    quality.set_defaults(run=run_quality)
    speed = commands.add_parser("speed", help="latency of models and linears of published sizes")
    speed.add_argument(
        "--models", default="d16-256:1,d30-256:1,d30-256:8,d30-256:50,d24-512:1",
        help="dDEPTH-RESOLUTION:BATCH,… (default: %(default)s)",
    )  # fmt: skip
    speed.add_argument("--tiny", action="store_true", help="two layers, three scales, batches of at most 2")
    speed.set_defaults(run=run_speed, precision="bf16", compile_decoder=False)
    for command in (quality, speed):
        command.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
        add_output_options(command)
    return parser


# ------------------------------------------------------------------------------------------------------- quality


def run_quality(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The page of `quality`."""
    truth = reference(args.model, args.count, args.device)
    plain = load_model(args.model, args.device, graphs=False)
    logits = teacher_forced(plain, truth)
    results: dict[str, Any] = {"machine": machine(plain.device), "model": str(args.model), "count": args.count}
    real, network = None, None
    if args.reference is not None:
        network = open_network(args.network, None, plain.device)
        real = reference_features(network, args.reference, args.reference_images)
        results |= {"network": network.label, "reference_images": len(real), "images": args.images}
    rows: list[dict[str, Any]] = []
    results["rows"] = rows
    makers: list[tuple[str, Any]] = [
        ("fp32", lambda: plain), ("bf16", lambda: load_model(args.model, args.device, torch.bfloat16, graphs=False)),
    ]  # fmt: skip
    choices = CHOICES if args.all_parts else (DEFAULT_PARTS,)
    makers += [(f"{to}: {', '.join(p)}", _maker(args, to, p)) for to in get_args(Format) for p in choices]
    for name, make in makers:
        model = make()
        row = {"name": name, "bytes": weight_bytes(model), **agreement(model, truth)}
        row |= logit_errors(teacher_forced(model, truth), logits)
        if network is not None and real is not None:
            row |= distances(network, model, args.images, SEED, real)
        rows.append(row)
        print(f"{name}: {row}", flush=True)
        write_results(args, results, quality_table(rows))
    if network is not None and real is not None:
        rows.insert(1, {"name": "fp32, other seeds", **distances(network, plain, args.images, OTHER_SEED, real)})
    print(f"{describe(results['machine'])}\n\n{quality_table(rows)}")
    write_results(args, results, quality_table(rows))


def _maker(args: argparse.Namespace, to: Format, parts: tuple[Part, ...]) -> Any:
    return lambda: quantized(load_model(args.model, args.device, graphs=False), to, parts)


def weight_bytes(model: ImageModel) -> int:
    """Of the transformer's parameters and 8-bit weights with their scales."""
    return sum(tensor.nbytes for tensor in model.model.state_dict().values())


@torch.inference_mode()
def teacher_forced(model: ImageModel, truth: dict[str, Any]) -> Tensor:
    """(B, N, V) float32 logits of the next-scale branch on the tokens that were drawn in float32."""
    given = teacher_input(truth["tokens"], model.tokenizer.quantizer, model.schedule)
    return model.next_scale_logits(truth["labels"], given)


def logit_errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative error, mean KL(truth ‖ found) in nats, and the share of positions with the same likeliest token."""
    divergence = F.kl_div(found.log_softmax(-1), truth.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return {
        "logits": relative_error(found, truth), "kl": float(divergence.mean()),
        "top1": float((found.argmax(-1) == truth.argmax(-1)).float().mean()),
    }  # fmt: skip


def reference_features(network: FeatureNetwork, path: Path, limit: int | None) -> np.ndarray:
    """(n, D) pooled features of the images at `path`, or the first `limit` of them."""
    source = open_images(path, Fit(None, False))
    count = min(limit or len(source), len(source))
    parts = [
        network.extract(torch.from_numpy(source.read(i, min(i + BATCH, count)))).pooled.numpy()
        for i in range(0, count, BATCH)
    ]
    return np.concatenate(parts)


def distances(network: FeatureNetwork, model: ImageModel, count: int, seed: int, real: np.ndarray) -> dict[str, float]:
    """FID and KID of `count` images, classes in turn, from seeds `seed`, ….

    KID has no bias at few images; FID has, the same in every row.
    """
    found = []
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        images = model.generate([i % model.num_classes for i in numbers], seed=[seed + i for i in numbers])
        found.append(network.extract(torch.from_numpy(to_bytes(images))).pooled.numpy())
    fake = np.concatenate(found)
    moments, wanted = Moments.of(fake), Moments.of(real)
    return {
        "fid": FrechetReference(wanted.mean, wanted.covariance).distance(moments.mean, moments.covariance),
        "kid": float(kernel_distance(fake, real, np.ones((1, len(fake))))[0]),
    }  # fmt: skip


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of `quality`; a dash where a row has no such figure."""
    columns = (
        ("weights MB", "bytes", lambda v: f"{v / 1e6:.2f}"), ("logit error", "logits", "{:.2%}".format),
        ("KL nats", "kl", "{:.5f}".format), ("likeliest alike", "top1", "{:.2%}".format),
        ("draws alike", "draws", "{:.2%}".format), ("tokens alike", "tokens", "{:.2%}".format),
        ("images alike", "images", "{:.1%}".format), ("FID", "fid", "{:.2f}".format),
        ("KID ×1000", "kid", lambda v: f"{1e3 * v:.2f}"),
    )  # fmt: skip
    body = [[row["name"], *(form(row[key]) if key in row else "–" for _, key, form in columns)] for row in rows]
    return markdown_table(["weights", *(title for title, _, _ in columns)], body)


# --------------------------------------------------------------------------------------------------------- speed


def run_speed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The page of `speed`."""
    device = torch.device(args.device)
    results: dict[str, Any] = {"machine": machine(device), "rows": [], "linears": []}
    for name in args.models.split(","):
        model, _, batch = name.strip().partition(":")
        if not batch.isdigit() or int(batch) < 1:
            parser.error(f"--models: {name!r} is not dDEPTH-RESOLUTION:BATCH, such as d30-256:1")
        for to in ("float", *get_args(Format)):
            row: dict[str, Any] = {"model": name.strip(), "to": to, "batch": min(int(batch), 2 if args.tiny else 10**6)}
            try:
                row |= model_speed(model, to, row["batch"], args, parser)
            except (RuntimeError, AssertionError) as err:
                row["failed"] = reason(err)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            results["rows"].append(row)
            print(row, flush=True)
            write_results(args, results, speed_page(results))
    width = 64 if args.tiny else 1920
    for shape in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        for rows in ROWS[:2] if args.tiny else ROWS:
            results["linears"].append(linear_speed(*shape, rows, device))
    print(f"{describe(results['machine'])}\n\n{speed_page(results)}")
    write_results(args, results, speed_page(results))


def model_speed(
    name: str, to: str, batch: int, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """Bytes of weights, and latency of a batch in ms."""
    case = sampling.make_case(name, args, parser)
    if to != "float":
        ranges = {linear: torch.tensor(30.0) for linear in linears_of(case.model)}
        quantize_linears(case.model, to, ("blocks", "adaln"), ranges)  # type: ignore[arg-type]
    labels, seeds = case.inputs(batch)
    sampler = ImageSampler(case.model, case.decoder)
    sampler(labels, seeds, case.settings)
    return {
        "bytes": sum(t.nbytes for t in case.model.state_dict().values()),
        "refused": sampler.why_not(batch, case.settings),
        **sampling.latency(lambda: sampler(labels, seeds, case.settings), case.device),
    }  # fmt: skip


@torch.inference_mode()
def linear_speed(outputs: int, inputs: int, rows: int, device: torch.device) -> dict[str, Any]:
    """µs of one linear: in bf16 (float32 on a CPU), int8 by the kernel and by cuBLAS, and FP8."""
    dtype, clock = torch.bfloat16 if device.type == "cuda" else torch.float32, Clock(device, budget=20.0)
    linear = torch.nn.Linear(inputs, outputs, device=device)
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    found: dict[str, Any] = {"shape": f"{inputs} → {outputs}", "rows": rows}
    plain = torch.nn.Linear(inputs, outputs, device=device, dtype=dtype)
    found["float"] = 1e3 * clock.time(lambda _: plain(x)).median
    most = layers_quantized.KERNEL_ROWS
    for key, to, limit in (("int8 kernel", "int8", 10**9), ("int8 cuBLAS", "int8", 0), ("fp8", "fp8", most)):
        holder = torch.nn.ModuleDict({"ada_lin": linear})
        quantize_linears(holder, to, ("adaln",), {"ada_lin": torch.tensor(6.0)})  # type: ignore[arg-type]
        layer = holder["ada_lin"]
        layer.bias = torch.nn.Parameter(linear.bias.to(dtype), requires_grad=False)
        layers_quantized.KERNEL_ROWS = limit
        try:
            found[key] = 1e3 * clock.time(lambda _, layer=layer: layer(x)).median
        except RuntimeError as err:
            found[key] = reason(err)
        finally:
            layers_quantized.KERNEL_ROWS = most
    return found


def speed_page(results: dict[str, Any]) -> str:
    """Markdown of `speed`."""
    models = []
    for row in results["rows"]:
        if "failed" in row:
            models.append([row["model"], row["to"], f"failed: {row['failed']}", "", "", ""])
            continue
        before = next((r for r in results["rows"] if r["model"] == row["model"] and "p50" in r), row)
        models.append(
            [
                row["model"], row["to"], f"{row['bytes'] / 1e6:.0f}", f"{row['p50']:.1f} ({row['p95']:.1f})",
                f"{1e3 * row['batch'] / row['p50']:.1f}", f"{before['p50'] / row['p50']:.2f}",
            ]
        )  # fmt: skip
    page = markdown_table(["model", "weights", "MB", "ms p50 (p95)", "images/s", "beside float"], models)
    if results["linears"]:
        keys = ("float", "int8 kernel", "int8 cuBLAS", "fp8")
        cells = [
            [row["shape"], str(row["rows"]), *(v if isinstance(v, str) else f"{v:.1f}" for v in map(row.get, keys))]
            for row in results["linears"]
        ]
        page += "\n\n" + markdown_table(["linear", "rows", *(f"{key} µs" for key in keys)], cells)
    return page


if __name__ == "__main__":
    main()
