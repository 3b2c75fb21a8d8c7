"""The command `hmar-mega report`: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmar_mega.parsers import add_command


def add_report_parser(commands: Any) -> None:
    """Add `report` to the sub-parsers of `hmar-mega`; it sets `run`, a function of the arguments."""
    parser = add_command(
        commands,
        "report",
        "one HTML page about a run, or about several beside each other",
        "Curves of all scales and of each, sample grids over training, evaluations, throughput, memory, differences\n"
        "of the configurations and environment, in one file without links. Results of `hmar-mega evaluate` are taken\n"
        "from evaluation.json in RUN or a folder in it. Runs that still train can be reported too.",
        "  hmar-mega report runs/d16\n  hmar-mega report runs/var runs/hmar --names VAR,HMAR --out compared.html",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, help="the page (default: report.html, of one run in its directory)")
    parser.add_argument("--names", default="", metavar="A,B…", help="of the runs on the page (default: their folders')")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from hmar_mega.run_report import report

    out = args.out or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html"))
    print(f"report: {report(args.runs, out, [n.strip() for n in args.names.split(',') if n.strip()])}")
    return 0
