"""Vectors that look like a corpus: clusters on the sphere, with noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray


def make_vectors(documents: int = 600, dim: int = 24, clusters: int = 20, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = centres[rng.integers(clusters, size=documents)] + 0.7 * rng.normal(size=(documents, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def vectors() -> NDArray[np.float32]:
    return make_vectors()


@pytest.fixture
def learning_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step that Adam takes in this test."""
    rates: list[float] = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *arguments: Any, **options: Any) -> Any:
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return rates
