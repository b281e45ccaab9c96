"""Trainings share codebooks that were learnt from the same things, and only those."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.quantizers.base import Quantizer, make_quantizer
from models.retriever import shelf as module
from models.retriever.shelf import Shelf

TABLE = {"system": "rq_kmeans", "seed": 3, "level_sizes": [4, 4]}


def vectors(seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(60, 8)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is learnt, and learn it."""
    noted: list[str] = []
    real = Quantizer.fit

    def fit(self: Quantizer, *args: Any, **options: Any) -> Any:
        noted.append(self.system)
        return real(self, *args, **options)

    monkeypatch.setattr(Quantizer, "fit", fit)
    return noted


def fitted(
    shelf: Shelf, table: dict[str, Any], points: np.ndarray, interactions: np.ndarray | None = None
) -> Quantizer:
    quantizer = make_quantizer(table)
    if interactions is not None:
        quantizer.interactions_N = interactions  # type: ignore[attr-defined]
    shelf.fit(quantizer, table, points, "cpu")
    return quantizer


def test_what_was_learnt_is_not_learnt_again(fits: list[str]) -> None:
    shelf = Shelf()
    first, second = (fitted(shelf, TABLE, vectors()) for _ in range(2))
    assert fits == ["rq_kmeans"]
    assert np.array_equal(first.encode(vectors()), second.encode(vectors()))
    assert first.state().level_sizes == second.state().level_sizes
    first.codebooks[0].zero_()
    assert np.array_equal(second.encode(vectors()), fitted(shelf, TABLE, vectors()).encode(vectors())), "copies"


@pytest.mark.parametrize("changed", [{"seed": 4}, {"level_sizes": [4, 8]}, {"system": "hhq", "epochs": 1}])
def test_other_settings_are_learnt_anew(changed: dict[str, Any], fits: list[str]) -> None:
    shelf = Shelf()
    fitted(shelf, TABLE, vectors())
    fitted(shelf, TABLE | changed, vectors())
    assert len(fits) == 2


def test_other_vectors_and_other_interactions_are_learnt_anew(fits: list[str]) -> None:
    shelf = Shelf()
    table = {"system": "acrq", "level_sizes": [4, 8], "extension": 0.25, "head_share": 0.2}
    counts = np.arange(60)
    for points, asked in ((vectors(), counts), (vectors(1), counts), (vectors(), counts[::-1]), (vectors(), counts)):
        fitted(shelf, table, points, asked)
    assert len(fits) == 3, "the last is the first"


def test_a_shelf_does_not_grow_for_ever(fits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_CODEBOOKS", 2)
    shelf = Shelf()
    for seed in (0, 1, 2, 0):
        fitted(shelf, TABLE | {"seed": seed}, vectors())
    assert len(fits) == 4
