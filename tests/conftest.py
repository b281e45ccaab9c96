"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.ops.kernels import prepare_kernel_cache

prepare_kernel_cache(Path(__file__).parents[1] / ".pytest_cache")  # before any test imports numba: see there



@pytest.fixture(scope="session")
def datasets() -> Path:
    """Return the folder of development data sets, or skip."""
    folder = Path(os.environ.get("RHUMB_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no development data sets at {folder} (set RHUMB_TEST_DATA)")
    return folder
