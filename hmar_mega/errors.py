"""Errors meant for the person at the keyboard: the command line prints their message without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names what was given, what is allowed and what to do.

    Attributes:
        rank: the process it happened in, once processes work together; None before, when it is the same in all.
    """

    rank: int | None = None
