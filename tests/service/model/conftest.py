"""A tiny model for tests of its halves."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.index.bundle import Model, open_model
from tests.tiny import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model, opened."""
    return open_model(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def history_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads the last two titles, with prefixes."""
    changes = {"history_count": 2, "query_prefix": "wind ", "document_prefix": "calm "}
    return make_model(tmp_path_factory.mktemp("history") / "tiny", **changes)
