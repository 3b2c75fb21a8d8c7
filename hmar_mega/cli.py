"""The command line, `hmar-mega …`. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hmar_mega import __version__
from hmar_mega.checkpoint.cli import add_checkpoint_parser
from hmar_mega.checkpoint.convert_cli import add_convert_parser
from hmar_mega.data.cli import add_data_parser
from hmar_mega.errors import UserError, refuse_options
from hmar_mega.evaluation.cli import add_evaluate_parser
from hmar_mega.inference.cli import add_inference_parsers
from hmar_mega.interrupts import Interrupts
from hmar_mega.launchers.cli import add_launcher_parsers
from hmar_mega.parsers import add_command, add_config_arguments
from hmar_mega.planning.cli import add_plan_parser
from hmar_mega.progress import LogHandler
from hmar_mega.report_cli import add_report_parser
from hmar_mega.scaling.cli import add_sweep_parser
from hmar_mega.serving.cli import add_serve_parser
from hmar_mega.tokenizer.cli import add_tokenizer_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0, 1 when training failed, 2 for bad input, 75 for "start me again", 130 when interrupted twice; a process that lost
    another leaves with 76 by itself.
    """
    args = parse(argv)
    rank = int(os.environ.get("RANK", 0))
    _start_logging(rank)
    try:
        status: int = args.run(args)
    except UserError as err:
        if rank == 0 or err.rank is not None:
            print(f"hmar-mega: {f'[rank {rank}] ' if rank else ''}{err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hmar-mega: interrupted", file=sys.stderr)
        return 130
    return status


def _start_logging(rank: int) -> None:
    """Readable lines from rank 0; only warnings, with their rank, from the others."""
    handler = LogHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `key=value` settings may stand anywhere after CONFIG, also behind options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or "=" not in text]
    if rest and (strange or not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hmar-mega",
        description="Train HMAR image models at any size and take them home to one GPU.",
        epilog="example:\n  hmar-mega demo --out demo_out        # everything, small, on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hmar-mega {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    add_data_parser(commands)
    add_tokenizer_parser(commands)
    add_plan_parser(commands)
    _add_train(commands)
    add_launcher_parsers(commands)
    add_sweep_parser(commands)
    add_checkpoint_parser(commands)
    _add_export(commands)
    add_convert_parser(commands)
    add_inference_parsers(commands)
    add_serve_parser(commands)
    add_evaluate_parser(commands)
    add_report_parser(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    parser = add_command(
        commands, "demo", "the whole pipeline on real digits: shards, tokenizer, two stages, export, report", "",
        "  hmar-mega demo --out demo_out",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="new folder (default: demo_out)")
    parser.add_argument(
        "--processes", type=int, default=2, help="training processes = tensor-parallel size (default: 2)"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove OUT first if it exists")
    parser.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> int:
    from hmar_mega.demo import run_demo

    return run_demo(args.out, args.processes, args.overwrite)


def _add_doctor(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    parser = add_command(
        commands, "doctor", "what this machine has, what is missing, and what its GPU computes rightly", "",
        "  hmar-mega doctor\n  hmar-mega doctor --json",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from hmar_mega.doctor import examine

    print(examine(args.json))
    return 0


def _add_train(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    parser = add_command(
        commands, "train", "train a transformer, alone or under torchrun", "",
        "  hmar-mega train train/d16-256 run.dir=runs/d16 data.train=tokens/train tokenizer.path=vae\n"
        "  torchrun --nproc-per-node 8 -m hmar_mega train train/d16-256 parallel.tensor_parallel=2 run.dir=runs/d16 …",
    )  # fmt: skip
    add_config_arguments(parser)
    parser.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> int:
    from hmar_mega.config_io import config_to_yaml, load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config_to_yaml(config), end="")
        return 0
    with Interrupts() as interrupts:  # before the slow imports: a signal may come during them
        from hmar_mega.engine import TrainingError
        from hmar_mega.train import train_from_config

        try:
            train_from_config(config, interrupts)
        except TrainingError as err:  # the same in every process
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"hmar-mega: {err}", file=sys.stderr)
            return 1
    return interrupts.status


def _add_export(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    parser = add_command(
        commands,
        "export",
        "write a run's model for one GPU, or a model for other runtimes",
        "Write a run's model as model.safetensors, config.json and tokenizer/, which sample, edit and evaluate take;\n"
        "or with --format programs for other runtimes, which are loaded back and compared with the model:\n"
        "torch-export (decoder.pt2 and generate.pt2, the whole of sampling), onnx (decoder.onnx), aoti (decoder.pt2,\n"
        "compiled for the device).",
        "  hmar-mega export runs/d16-masked models/d16\n  hmar-mega export models/d16 deploy/d16 --format onnx",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory; with --format also an exported model")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest (default), best, or a name such as step-00001000"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format (default: fp32)")
    parser.add_argument("--tokenizer", type=Path, help="folder of the run's tokenizer, if it has moved")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    parser.add_argument("--allow-unfinished", action="store_true", help="export even if training has not ended")
    parser.add_argument("--format", choices=("torch-export", "onnx", "aoti"), help="of programs for other runtimes")
    parser.add_argument("--batch", type=int, help="torch-export: images of a call of generate.pt2 (default: 1)")
    parser.add_argument("--device", help="aoti: to compile for (default: the first GPU, else the CPU)")
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    if args.format is not None:
        from hmar_mega.inference.commands import export_programs

        export_programs(args)
        return 0
    from hmar_mega.checkpoint.export import export_run

    refuse_options("they are of programs for other runtimes (--format)", batch=args.batch, device=args.device)
    dtype = args.dtype or "fp32"
    settings = export_run(
        args.run_dir, args.out, args.checkpoint, dtype, args.allow_unfinished, args.tokenizer, args.ema
    )
    branches = "next-scale and mask branches" if settings["mask_branch"] else "next-scale branch"
    print(f"exported step {settings['trained']['step']} of {args.run_dir} to {args.out}: {branches}, {dtype}")
    return 0
