"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from service import cli
from service.ops.kernels import prepare_kernel_cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, and torch's threads wait by spinning
hypothesis.settings.register_profile("rhumbline", deadline=None)  # a first example may compile a kernel
hypothesis.settings.load_profile("rhumbline")
prepare_kernel_cache(Path(__file__).parents[1] / ".pytest_cache")  # before any test imports numba: see there


@pytest.fixture(scope="session")
def datasets() -> Path:
    """Return the folder of development data sets, or skip."""
    folder = Path(os.environ.get("RHUMB_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no development data sets at {folder} (set RHUMB_TEST_DATA)")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call `rhumb` in this process as the console script does; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "400")  # messages name long paths, and stay on a line

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rhumb", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run
