"""Importing Megatron-core in a third of the time: what only its own engines use is left until it is used.

Megatron-core hands dozens of functions to `torch.compile` while it is imported, which imports torch's compiler, and it
imports wandb for its inference engine. Training here uses none of it, and every rank would pay for both at every start.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


@contextmanager
def slim_import() -> Iterator[None]:
    """What is imported meanwhile compiles functions, and loads wandb, when it first uses them."""
    compile_now, torch.compile = torch.compile, compile_at_first_call  # type: ignore[assignment]
    try:
        with module_at_first_use("wandb"):
            yield
    finally:
        torch.compile = compile_now


def compile_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile(function, **options)`, made when it is first called; without a function, a decorator of one."""
    if function is None:
        return functools.partial(compile_at_first_call, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function, **options)
        return made

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


@contextmanager
def module_at_first_use(name: str) -> Iterator[None]:
    """`import name` meanwhile gives a module that loads the real one when it is first asked for something.

    A module that is loaded already, or not installed, is imported as ever; afterwards every module is.
    """
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        yield
        return
    module = sys.modules[name] = _AtFirstUse(name)
    module.__spec__ = spec  # by which others look whether it is installed
    try:
        yield
    finally:
        if sys.modules.get(name) is module:
            del sys.modules[name]


class _AtFirstUse(ModuleType):
    """Stands for a module that is not loaded yet."""

    #: `inspect` asks it of every module that there is, which is no use of this one.
    __file__ = None

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)
