"""What the runs of the paper's tables need, by `hmar-mega plan`: hours on 8 and on 64 H100, a table in docs/paper.md.

    python benchmarks/paper_plan.py                       # print it
    python benchmarks/paper_plan.py --write docs/paper.md # put it between the two marks there

Hours are epochs · 1,281,167 images / (images a second that the planner predicts): reading data, evaluation,
checkpoints, requeues and slow nodes come on top. No run was made.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hmar_mega.config_io import load_config, packaged_configs
from hmar_mega.files import write_atomic
from hmar_mega.planning.cli import make_report
from hmar_mega.planning.cluster import load_cluster
from hmar_mega.planning.report import describe

#: Images of ImageNet-1k's training set.
IMAGES = 1_281_167

CLUSTERS = ("h100-8x1", "h100-8x8")
BEGIN, END = "<!-- begin: benchmarks/paper_plan.py -->", "<!-- end: benchmarks/paper_plan.py -->"
HEAD = ("| run | batch | epochs | steps | 8 H100 | 64 H100 |", "|---|---|---|---|---|---|")


def runs() -> list[str]:
    """The configurations of the tables: by size, stage 1 before stage 2."""
    return [name for name in packaged_configs() if name.startswith("paper/")]


def row(name: str) -> str:
    """One run's line of the table."""
    config = load_config(name)
    epochs, batch = config.optim.epochs, config.data.global_batch_size
    cells = [f"`{name}`", f"{batch:,}", f"{epochs:g}", f"{math.ceil(epochs * IMAGES / batch):,}"]
    for cluster in CLUSTERS:
        best = make_report(name, config, load_cluster(cluster)).best
        if best is None:
            cells.append("does not fit")
            continue
        hours = epochs * IMAGES / best.images_per_s / 3600
        layout, plain = best.layout, f"dp {best.layout.world}, ZeRO 1"
        how = "" if describe(layout) == plain else f"{describe(layout)}, "
        cells.append(f"{hours:,.0f} h ({how}{layout.micro_batch} × {layout.accumulation})")
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table as Markdown."""
    return "\n".join([*HEAD, *map(row, runs())])


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace what stands between the marks of this page")
    args = parser.parse_args()
    made = table()
    if args.write is None:
        print(made)
        return
    before, _, rest = args.write.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{args.write} has no {BEGIN} … {END}")
    write_atomic(args.write, f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
