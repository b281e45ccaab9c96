"""K-means against plain restatements: assignment, means, revival, blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.quantizers.kmeans import KMeansSettings, kmeans, nearest
from models.quantizers.points import Points


def blobs(per_blob: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four well separated blobs in the plane, and their true centres."""
    centres = torch.tensor([[5.0, 5.0], [-5.0, 5.0], [5.0, -5.0], [-5.0, -5.0]])
    noise = torch.randn(4 * per_blob, 2, generator=torch.Generator().manual_seed(seed)) / 5
    return centres.repeat_interleave(per_blob, dim=0) + noise, centres


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), spherical=st.booleans())
def test_nearest_is_the_brute_force_choice(seed: int, spherical: bool) -> None:
    rng = np.random.default_rng(seed)
    x, c = rng.normal(size=(17, 5)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    codes, gain = nearest(torch.from_numpy(x), torch.from_numpy(c), spherical)
    oracle = x @ c.T if spherical else -((x[:, None] - c[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(codes.numpy(), oracle.argmax(1))
    np.testing.assert_allclose(gain.numpy(), oracle.max(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("minibatch_rows", [10_000, 64])
def test_separated_blobs_are_found(minibatch_rows: int) -> None:
    points, centres = blobs()
    found = kmeans(Points(points), 4, KMeansSettings(minibatch_rows=minibatch_rows, seed=3))
    distance = torch.cdist(centres, found.centres)
    assert float(distance.min(dim=1).values.max()) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_a_centre_of_minibatches_is_the_mean_of_all_points_that_it_ever_received(seed: int) -> None:
    """300 batches of 10: its error is that of 3,000 points' mean, a seventeenth of the error of 10 points' mean."""
    points = torch.randn(500, 16, generator=torch.Generator().manual_seed(seed))
    found = kmeans(Points(points), 1, KMeansSettings(minibatch_rows=10, iterations=300, seed=seed))
    expected_error = (16 / 3000) ** 0.5
    assert float((found.centres[0] - points.mean(dim=0)).norm()) < 2 * expected_error


def test_a_converged_centre_is_the_mean_of_its_points(vectors: np.ndarray) -> None:
    points = torch.from_numpy(vectors)
    found = kmeans(Points(points), 12, KMeansSettings(iterations=200, tolerance=0.0))
    codes = ((vectors[:, None] - found.centres.numpy()[None]) ** 2).sum(-1).argmin(1)
    for code in range(12):
        np.testing.assert_allclose(found.centres[code], vectors[codes == code].mean(0), atol=1e-4)


def test_spherical_centres_are_unit_and_the_objective_never_falls(vectors: np.ndarray) -> None:
    found = kmeans(Points(torch.from_numpy(vectors)), 12, KMeansSettings(spherical=True, tolerance=0.0))
    np.testing.assert_allclose(found.centres.norm(dim=1), 1.0, atol=1e-5)
    assert all(b >= a - 1e-5 for a, b in zip(found.objective, found.objective[1:], strict=False))


def test_dead_centres_are_revived_onto_distinct_points() -> None:
    """A start inside one of many copies leaves dead centres; afterwards every centre has points."""
    points = torch.cat([torch.zeros(100, 2), torch.tensor([[10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])])
    found = kmeans(Points(points), 4, KMeansSettings(start="sample", seed=1))
    codes, _ = nearest(points, found.centres, spherical=False)
    assert len(torch.unique(codes)) == 4
    assert found.revived > 0


def test_blocks_give_what_memory_gives(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows derived block by block from an array that is not held give the same centres."""
    monkeypatch.setattr("models.quantizers.points.BLOCK_ROWS", 97)
    held = kmeans(Points(vectors), 8, KMeansSettings(seed=5))
    streamed = kmeans(Points(vectors, held_bytes=0), 8, KMeansSettings(seed=5))
    np.testing.assert_allclose(held.centres, streamed.centres, atol=1e-5)


def test_points_give_rows_in_the_order_asked_for(vectors: np.ndarray) -> None:
    rows = torch.tensor([5, 599, 0, 5])
    for held_bytes in (0, 1 << 20):
        points = Points(vectors, held_bytes=held_bytes).through(lambda block: block * 2)
        np.testing.assert_allclose(points.take(rows).numpy(), 2 * vectors[rows.numpy()])


def test_equal_seeds_give_equal_centres(vectors: np.ndarray) -> None:
    first, second, third = (kmeans(Points(vectors), 8, KMeansSettings(seed=seed)).centres for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_bad_requests_are_refused_with_the_numbers(vectors: np.ndarray) -> None:
    points = Points(vectors)
    with pytest.raises(ValueError, match="600 points into 601 centres"):
        kmeans(points, 601, KMeansSettings())
    with pytest.raises(ValueError, match="'nowhere', must be 'kmeans"):
        kmeans(points, 4, KMeansSettings(start="nowhere"))
