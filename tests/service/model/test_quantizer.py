"""Semantic IDs in numpy against plain restatements of the papers' equations, one vector and one code at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model import quantizer as quantizers
from service.model.quantizer import QuantizerError, assign_sids, reconstruct
from tests.tiny import unit_rows

SIZES = (7, 5, 9)
KINDS = ("householder", "residual", "residual_cosine")


def codebooks(seed: int, dimensions: int = 6, unit: bool = True) -> np.ndarray:
    table = unit_rows(sum(SIZES), dimensions, seed)
    return table if unit else table * np.random.default_rng(seed).uniform(0.3, 2, (sum(SIZES), 1)).astype(np.float32)


def levels_of(table: np.ndarray) -> list[np.ndarray]:
    return np.split(table.astype(np.float64), np.cumsum(SIZES)[:-1])


def plain_scores(kind: str, x: np.ndarray, so_far: np.ndarray | None, book: np.ndarray) -> list[float]:
    """The equation of one level, code by code: the greatest score is chosen."""
    if kind == "householder":
        if so_far is None:
            return [float(x @ v) for v in book]  # eq. 2
        return [float((so_far - 2 * (so_far @ v) * v) @ x) for v in book]  # eq. 3 and 4
    residual = x - (0 if so_far is None else so_far)
    if kind == "residual":
        return [-float(np.linalg.norm(residual - c)) for c in book]
    return [float(residual @ c / np.linalg.norm(c)) for c in book]


def plain_next(kind: str, so_far: np.ndarray | None, chosen: np.ndarray) -> np.ndarray:
    if so_far is None:
        return chosen
    if kind == "householder":
        return so_far - 2 * (so_far @ chosen) * chosen  # eq. 5
    return so_far + chosen


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
def test_sids_are_those_of_the_equations(kind: str, seed: int, count: int) -> None:
    table = codebooks(seed, unit=kind == "householder")
    vectors = unit_rows(count, 6, seed + 1)
    tokens = assign_sids(vectors, kind, {"codebooks": table}, SIZES)
    assert (tokens.shape, tokens.dtype) == ((count, 3), np.int32)
    points = reconstruct(tokens, kind, {"codebooks": table}, SIZES)
    for row, x in enumerate(vectors.astype(np.float64)):
        so_far, offset = None, 0
        for level, book in enumerate(levels_of(table)):
            scores = plain_scores(kind, x, so_far, book)
            code = tokens[row, level] - offset
            # float32 may take the other of two codes that tie to six digits
            assert scores[code] >= max(scores) - 1e-5
            so_far, offset = plain_next(kind, so_far, book[code]), offset + len(book)
        np.testing.assert_allclose(points[row], so_far, atol=1e-4)


def test_householder_points_stay_on_the_sphere_and_get_nearer() -> None:
    """Reflections keep the length (section 3.1); with the opposite of every direction at hand none must worsen."""
    table, vectors = codebooks(3, 6), unit_rows(200, 6, 4)
    tokens = assign_sids(vectors, "householder", {"codebooks": table}, SIZES)
    points = reconstruct(tokens, "householder", {"codebooks": table}, SIZES)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)
    first = reconstruct(np.where([True, False, False], tokens, -1), "householder", {"codebooks": table}, SIZES)
    assert (points * vectors).sum(1).mean() > (first * vectors).sum(1).mean() + 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, vectors = {"codebooks": codebooks(5)}, unit_rows(100, 6, 6)
    whole = assign_sids(vectors, kind, tensors, SIZES)
    monkeypatch.setattr(quantizers, "BLOCK_FLOATS", 9 * 7)
    done: list[int] = []
    np.testing.assert_array_equal(assign_sids(vectors, kind, tensors, SIZES, done.append), whole)
    assert (sum(done), max(done)) == (100, 7)


def test_a_padded_level_leaves_the_point_where_it_is() -> None:
    tensors = {"codebooks": codebooks(8)}
    short = np.array([[2, -1, -1], [2, 8, -1]])
    points = reconstruct(short, "residual", tensors, SIZES)
    np.testing.assert_allclose(points[0], tensors["codebooks"][2])
    np.testing.assert_allclose(points[1], tensors["codebooks"][2] + tensors["codebooks"][8], rtol=1e-6)


def test_a_projection_is_an_mlp_with_relu_between_its_layers() -> None:
    rng = np.random.default_rng(1)
    w0, b0 = rng.standard_normal((11, 8)).astype(np.float32), rng.standard_normal(11).astype(np.float32)
    w1, b1 = rng.standard_normal((6, 11)).astype(np.float32), rng.standard_normal(6).astype(np.float32)
    layers = {"projection.weight_0": w0, "projection.bias_0": b0, "projection.weight_1": w1, "projection.bias_1": b1}
    table, vectors = codebooks(2, unit=False), unit_rows(30, 8, 3)
    projected = np.stack([w1 @ np.maximum(w0 @ x + b0, 0) + b1 for x in vectors])
    np.testing.assert_array_equal(
        assign_sids(vectors, "residual", {"codebooks": table, **layers}, SIZES),
        assign_sids(projected, "residual", {"codebooks": table}, SIZES),
    )


def test_vectors_may_be_a_read_only_memory_map_of_half_floats(tmp_path: Any) -> None:
    vectors = unit_rows(50, 6, 9).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    tensors = {"codebooks": codebooks(4)}
    for kind in KINDS:
        np.testing.assert_array_equal(
            assign_sids(mapped, kind, tensors, SIZES), assign_sids(vectors.astype(np.float32), kind, tensors, SIZES)
        )
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), vectors)


def test_the_callers_vectors_are_not_changed() -> None:
    vectors = unit_rows(10, 6, 9)
    before = vectors.copy()
    for kind in KINDS:
        assign_sids(vectors, kind, {"codebooks": codebooks(4)}, SIZES)
    np.testing.assert_array_equal(vectors, before)


def test_no_vectors_are_no_sids() -> None:
    assert assign_sids(np.zeros((0, 6), np.float32), "residual", {"codebooks": codebooks(1)}, SIZES).shape == (0, 3)


GOOD = {"codebooks": codebooks(1)}
LAYER = {"projection.weight_0": np.zeros((6, 8), np.float32), "projection.bias_0": np.zeros(6, np.float32)}
MISTAKES: list[tuple[str, dict[str, np.ndarray], int, str]] = [
    ("cubist", GOOD, 6, "kind 'cubist' is unknown, expected one of"),
    ("residual", {}, 6, "needs the tensor 'codebooks'"),
    ("residual", {"codebooks": codebooks(1)[:-1]}, 6, r"shape \(20, 6\) .* levels of \[7, 5, 9\] codes \(sum 21\)"),
    ("residual", {"codebooks": codebooks(1) * np.nan}, 6, "finite"),
    ("residual", GOOD, 5, r"shape \(4, 5\), the quantizer takes 6 dimensions"),
    ("residual", GOOD | {"length_rule": np.zeros(1)}, 6, r"tensors \['length_rule'\] are unknown"),
    ("residual", GOOD | LAYER, 6, r"shape \(4, 6\), the quantizer takes 8 dimensions"),
    ("residual", GOOD | LAYER | {"projection.bias_0": np.zeros(5)}, 8, r"biases of \[5\]"),
    ("residual", GOOD | {"projection.weight_0": LAYER["projection.weight_0"]}, 8, r"\['projection.weight_0'\]"),
]


@pytest.mark.parametrize(("kind", "tensors", "dimensions", "words"), MISTAKES)
def test_what_does_not_fit_together_is_refused(
    kind: str, tensors: dict[str, np.ndarray], dimensions: int, words: str
) -> None:
    with pytest.raises(QuantizerError, match=words):
        assign_sids(unit_rows(4, dimensions, 0), kind, tensors, SIZES)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([7, 8, 12], "level 1 has tokens 7 to 11"),
        ([0, 3, 12], "level 0 has tokens 0 to 6"),
        ([12, 8, -1], "level 1 has tokens 7 to 11"),
        ([0, 8, 21], "tokens 0 to 20, got 0 to 21"),
    ],
)
def test_a_token_of_another_level_is_refused(row: list[int], words: str) -> None:
    with pytest.raises(QuantizerError, match=words):
        reconstruct(np.array([row]), "residual", GOOD, SIZES)
