"""The command `hmar-mega serve`: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmar_mega.inference.cli import add_device_options, add_model_options
from hmar_mega.parsers import add_command


def add_serve_parser(commands: Any) -> None:
    """Add `serve` to the sub-parsers of `hmar-mega`; it sets `run`, a function of the arguments."""
    parser = add_command(
        commands,
        "serve",
        "an HTTP service with a page for pictures and edits (extra `serve`)",
        "Serve a model over HTTP: a page at /, and POST /v1/images, /v1/images/stream and /v1/edits; GET /v1/model,\n"
        "/healthz, /metrics and /openapi.json. Requests with the same settings are computed together.\n\n"
        "Only this machine can reach it, unless --host says otherwise; then every request needs a token: the first\n"
        "line of --token-file, or HMAR_MEGA_TOKEN, or one that is made and printed once. There is no TLS: put a proxy\n"
        "that has it in front. SIGTERM and Ctrl-C stop taking requests, finish those there are, and exit with 0.",
        "  hmar-mega serve models/d16\n"
        "  hmar-mega serve models/d16 --host 0.0.0.0 --port 8080 --token-file token --precision bf16 --max-batch 32",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported model, or run directory")
    add_model_options(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    where.add_argument("--token-file", type=Path, metavar="FILE", help="its first line is what requests must bring")
    batching = parser.add_argument_group("batching")
    batching.add_argument("--max-batch", type=int, default=16, help="images computed together (default: 16)")
    batching.add_argument(
        "--max-wait", type=float, default=10.0, metavar="MS", help="that an image waits for company (default: 10)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, default=256, help="images that may wait; beyond: 429 (default: 256)")
    limits.add_argument("--max-count", type=int, default=16, help="images a request (default: 16)")
    limits.add_argument("--max-body", type=float, default=10.0, metavar="MB", help="of a request (default: 10)")
    limits.add_argument("--timeout", type=float, default=60.0, metavar="S", help="a request, then 504 (default: 60)")
    limits.add_argument(
        "--grace", type=int, default=30, metavar="S", help="for what is in flight when asked to stop (default: 30)"
    )
    add_device_options(parser.add_argument_group("how to compute"))
    parser.set_defaults(run=_run_serve)


def _run_serve(args: argparse.Namespace) -> int:
    from hmar_mega.serving.server import serve

    return serve(args)
