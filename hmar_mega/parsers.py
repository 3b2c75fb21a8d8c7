"""How every command of the command line is described: one line in the list, a sentence, and an example that runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    """Add a command to a group of sub-parsers.

    Args:
        summary: the line in the list of commands.
        description: what its help begins with; empty: the summary as a sentence.
        example: command lines shown below the options.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, `key=value` overrides and --print-config."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a packaged configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument("--print-config", action="store_true", help="print the full configuration and stop")
