"""A tiny model and bundle, made once; tests that damage them work on copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny import make_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published bundle of 60 documents; read only."""
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Path:
    """The model that `tiny_bundle` was made with; read only."""
    return tiny_bundle.with_name("bundle.model")


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder to damage: same bytes, writable files."""
    return writable_copy(tiny_model, tmp_path / "model")


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle folder to damage: same bytes, writable files."""
    return writable_copy(tiny_bundle, tmp_path / "bundle")


def writable_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target
