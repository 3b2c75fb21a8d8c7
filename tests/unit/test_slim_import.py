"""Megatron-core is imported without torch's compiler and wandb, and what wants them has them when it first asks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hmar_mega.parallel.slim_import import compile_at_first_call, module_at_first_use, slim_import


def test_training_starts_without_the_compiler_and_wandb() -> None:
    """In a fresh process: here they may be loaded already."""
    program = (
        "import sys, torch; ours = torch.compile; import hmar_mega.train; assert torch.compile is ours;"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("options", [{}, {"backend": "mine", "dynamic": False}])
def test_a_function_is_compiled_once_when_it_is_first_called(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    made = []

    def compiler(function: Any, **given: Any) -> Any:
        made.append(given)
        return lambda *args, **kwargs: -function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiler)

    def add(x: int, *, y: int) -> int:
        """A sum."""
        return x + y

    with slim_import():
        given = torch.compile(**options)(add) if options else torch.compile(add)
    assert torch.compile is compiler
    assert (given.__name__, given.__doc__) == ("add", "A sum.")
    assert not made
    assert [given(1, y=2), given(2, y=2)] == [-3, -4]
    assert made == [options]


def test_what_is_deferred_is_what_torch_compiles() -> None:
    """With torch's own compiler, the parts that make code for a machine left out."""
    cosine = compile_at_first_call(torch.cos, backend="eager")
    x = torch.linspace(0, 1, 5)
    assert torch.equal(cosine(x), torch.cos(x))


def test_a_module_is_loaded_when_it_is_first_asked_for_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_module.py").write_text("value = 7\n")
    with module_at_first_use("late_module"):
        early = importlib.import_module("late_module")
        assert early.__file__ is None  # as inspect asks of every module: it is not loaded for that
        assert early is sys.modules["late_module"]
    assert "late_module" not in sys.modules
    assert early.value == 7
    assert importlib.import_module("late_module") is sys.modules["late_module"] is not early
    with pytest.raises(AttributeError, match="other"):
        _ = early.other


def test_a_module_asked_while_others_are_imported_is_loaded_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "asked_module.py").write_text("value = 7\n")
    with module_at_first_use("asked_module"):
        assert importlib.import_module("asked_module").value == 7
        loaded = sys.modules["asked_module"]
    assert sys.modules["asked_module"] is loaded
    with module_at_first_use("asked_module"):
        assert importlib.import_module("asked_module") is loaded


def test_a_module_that_is_not_installed_is_missing_as_ever() -> None:
    with module_at_first_use("no_such_module_anywhere"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")
