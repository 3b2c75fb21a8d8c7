"""Errors meant for the person at the keyboard: the command line prints their message without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names what was given, what is allowed and what to do.

    Attributes:
        rank: the process it happened in, once processes work together; None before, when it is the same in all.
    """

    rank: int | None = None


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is good."""


def refuse_options(why: str, **options: object) -> None:
    """Raise UserError for options of the command line that were given and would do nothing.

    Args:
        why: they do nothing.
        options: values by name; None and False are those of options that were not given.
    """
    given = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value is not False
    ]
    if given:
        raise UserError(f"{' and '.join(given)} would do nothing: {why}; leave {'them' if given[1:] else 'it'} out")
