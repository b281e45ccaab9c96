"""What a wheel must carry besides Python: an editable installation never misses what it lacks."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
PACKAGES = sorted(pattern.removesuffix("*") for pattern in SETUPTOOLS["packages"]["find"]["include"])
PATTERNS = [(package, pattern) for package, listed in SETUPTOOLS["package-data"].items() for pattern in listed]
PAGES = {".md", ".png"}  # for readers of the repository: nothing opens them when the package runs
RESULTS = Path("models/results")  # nor these, the figures of pages among them


def matched(package: str, pattern: str) -> set[Path]:
    """The files that an entry of package-data names."""
    return {path.relative_to(ROOT) for path in (ROOT / package).glob(pattern) if path.is_file()}


def tracked_data() -> list[Path]:
    """The files beside package code that git tracks and that are neither Python nor pages."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository here: which files belong to the packages is not known")
    listed = subprocess.run(["git", "ls-files", "-z", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    data = (path for path in paths if path.suffix not in {".py", *PAGES} and RESULTS not in path.parents)
    return [path for path in data if (ROOT / path).exists()]


def test_every_tracked_data_file_is_package_data() -> None:
    files = tracked_data()
    assert Path("service/py.typed") in files
    carried = set().union(*(matched(package, pattern) for package, pattern in PATTERNS))
    assert [str(path) for path in files if path not in carried] == []


@pytest.mark.parametrize(("package", "pattern"), PATTERNS)
def test_package_data_names_what_exists(package: str, pattern: str) -> None:
    assert package in PACKAGES
    assert matched(package, pattern)
