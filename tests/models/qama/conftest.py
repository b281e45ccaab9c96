"""Small unit vectors with neighbourhoods, and a recipe that trains on them in a moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.qama.batches import TrainVectors
from models.qama.recipe import AdapterRecipe, parse_recipe

DIMS = 16
PREFIXES = (4, 8, 16)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def vectors() -> TrainVectors:
    """120 documents around 12 centres, 40 queries near documents of their own."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, DIMS))
    documents = unit(centres[rng.integers(0, 12, 120)] + 0.5 * rng.standard_normal((120, DIMS)))
    own = rng.integers(0, 120, 40)
    queries = unit(documents[own] + 0.1 * rng.standard_normal((40, DIMS)))
    return TrainVectors(documents, queries, np.stack([np.arange(40), own], axis=1))


def small_recipe(**tables: dict[str, Any]) -> AdapterRecipe:
    """A recipe for 16 dimensions; keyword arguments change its tables."""
    fields: dict[str, dict[str, Any]] = {
        "network": {"prefixes": PREFIXES, "expansion": 2},
        "batch": {"documents": 24, "groups": 4, "queries": 16, "neighbours": 10},
        "train": {"steps": 6, "checkpoint_every": 2},
    }
    for name, changes in tables.items():
        fields[name] = {**fields.get(name, {}), **changes}
    return parse_recipe(fields)
