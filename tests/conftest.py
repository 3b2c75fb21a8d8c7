"""What every test of the suite shares: thread counts, hypothesis settings, and the skipping of GPU tests."""

from __future__ import annotations

import os

# Before torch is imported: the tensors of tests are tiny, test files run side by side, and threads cost more than they
# give. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

# Triton reads it when it is first imported, which torch leaves to those who need it: without a GPU its kernels run in
# its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# deadline: a first call that imports or compiles is slow by nature. derandomize: continuous integration must repeat
# itself, while a developer's runs go on looking for new counter-examples.
settings.register_profile("house", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
