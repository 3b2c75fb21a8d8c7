"""What the process tests share: tiny inputs, made once a session."""

from __future__ import annotations

import pytest
from runs import Inputs, make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """64 codes and 7 classes, eight with the unconditional one: two and four ranks divide both."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), codebook=64, classes=7)


@pytest.fixture(scope="session")
def uneven_inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """61 codes and 4 classes: tables are padded for two ranks, and the last of four ranks holds no class at all."""
    return make_inputs(tmp_path_factory.mktemp("uneven"), codebook=61, classes=4)
