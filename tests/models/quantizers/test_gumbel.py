"""DGI's quantizer against eq. 6-8 written out, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import models.quantizers.gumbel as gumbel
from models.quantizers.base import QuantizerError, codes_to_tokens, make_quantizer
from models.quantizers.gumbel import (
    Gumbel,
    GumbelSettings,
    annealed,
    gumbel_noise,
    hard_codes,
    soft_path,
    straight_through_path,
)
from models.quantizers.points import Points
from models.quantizers.rq_kmeans import RQKMeans, RQKMeansSettings
from service.model.quantizer import assign_sids

SIZES = (16, 12, 8)


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def score(r: NDArray[np.float64], e: NDArray[np.float64], scaled_cosine: bool) -> float:
    return cosine(r, e) if scaled_cosine else float(-((r - e) ** 2).sum() / 2 + r @ r / 2)


def random_case(seed: int) -> tuple[list[NDArray[np.float64]], NDArray[np.float64], list[torch.Tensor], torch.Tensor]:
    rng = np.random.default_rng(seed)
    books, x = [rng.normal(size=(k, 4)) for k in (5, 3)], rng.normal(size=(6, 4))
    return books, x, [torch.from_numpy(b) for b in books], torch.from_numpy(x)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.1, 1.0), scaled_cosine=st.booleans())
def test_a_soft_path_follows_the_equations(seed: int, temperature: float, scaled_cosine: bool) -> None:
    books, x, torch_books, torch_x = random_case(seed)
    noises = [torch.from_numpy(np.random.default_rng(seed).gumbel(size=(6, len(b)))) for b in books]
    given_noise = iter(noises)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gumbel, "gumbel_noise", lambda _: next(given_noise))
        scale = torch.tensor([3.0, 7.0], dtype=torch.float64)
        path = soft_path(torch_books, torch_x, scale, temperature, scaled_cosine)
    for row in range(len(x)):
        residual = x[row]
        for level, book in enumerate(books):
            scores = np.array([(3.0, 7.0)[level] * score(residual, e, scaled_cosine) for e in book])
            raised = np.exp((scores + noises[level][row].numpy()) / temperature)
            p = raised / raised.sum()
            np.testing.assert_allclose(path.weights[level][row], p, atol=1e-9)
            np.testing.assert_allclose(path.vectors_GLD[row, level], sum(w * e for w, e in zip(p, book, strict=True)))
            np.testing.assert_allclose(path.residuals_GLD[row, level], residual)
            assert path.codes_GL[row, level] == scores.argmax()
            residual = residual - p @ book


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), scaled_cosine=st.booleans())
def test_hard_codes_take_the_greatest_score_and_subtract_the_codeword(seed: int, scaled_cosine: bool) -> None:
    books, x, torch_books, torch_x = random_case(seed)
    codes = hard_codes(torch_books, torch_x, scaled_cosine).numpy()
    straight = straight_through_path(torch_books, torch_x, torch.ones(2), scaled_cosine)
    np.testing.assert_array_equal(codes, straight.codes_GL)
    for row in range(len(x)):
        residual = x[row]
        for level, book in enumerate(books):
            assert codes[row, level] == np.argmax([score(residual, e, scaled_cosine) for e in book])
            np.testing.assert_allclose(straight.vectors_GLD[row, level], book[codes[row, level]])
            residual = residual - book[codes[row, level]]


def test_without_noise_and_heat_the_soft_path_is_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gumbel, "gumbel_noise", torch.zeros_like)
    _, _, books, x = random_case(3)
    path = soft_path(books, x, torch.tensor([1000.0, 1000.0]), 0.1)
    np.testing.assert_array_equal(path.codes_GL, hard_codes(books, x, True))
    np.testing.assert_allclose(path.vectors_GLD[:, 0], books[0][path.codes_GL[:, 0]], atol=1e-6)


def test_gradients_reach_vectors_and_all_codewords_through_the_soft_path_only() -> None:
    """Eq. 8: the soft path moves every codeword; the straight-through one copies gradients to the vector unchanged."""
    torch.manual_seed(0)
    books = [torch.randn(k, 4, requires_grad=True) for k in (5, 3)]
    x = torch.randn(2, 4, requires_grad=True)
    soft_path(books, x, torch.ones(2), 1.0).vectors_GLD[:, 1].square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs() > 0).all())
    assert all(bool((book.grad.abs().sum(1) > 0).all()) for book in books if book.grad is not None)
    x.grad, pull = None, torch.randn(2, 4)
    for book in books:
        book.grad = None
    (straight_through_path(books, x, torch.ones(2)).vectors_GLD[:, 1] * pull).sum().backward()
    torch.testing.assert_close(x.grad, pull)
    assert all(book.grad is None for book in books), "an estimator that passes gradients straight by the codebooks"


def test_what_is_reached_does_not_shape_the_next_level() -> None:
    """Half of the documents are the first level's codewords but for rounding; level 2 starts from the others."""
    rng = np.random.default_rng(0)
    exact = np.eye(24, dtype=np.float32)[:4]
    near = exact[rng.integers(4, size=60)] + np.where(rng.random((60, 1)) < 0.5, 0.3, -0.3) * np.eye(24)[[10]]
    vectors = np.concatenate([np.repeat(exact, 50, axis=0), near]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[:200] *= 1 + 1e-7 * rng.standard_normal((200, 1)).astype(np.float32)
    made = Gumbel(GumbelSettings(level_sizes=(4, 4)))
    first = Points(vectors)
    words = torch.from_numpy(exact)
    left = first.through(lambda block: block - words[(block @ words.T).argmax(dim=1)])
    centres, _ = made._start_level(left, 4, 0)
    assert bool((centres[:, 10].abs() > 0.5 * centres.norm(dim=1)).all()), "all codewords lie where something is left"
    assert left.longer_than(1e-5, 61) is left, "too few are left for so many codes"


def test_noise_is_gumbel_distributed() -> None:
    torch.manual_seed(0)
    noise = gumbel_noise(torch.empty(200_000, dtype=torch.float64)).numpy()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.03)


def test_the_temperature_falls_by_a_constant_factor() -> None:
    steps = [annealed(1.0, 0.1, share) for share in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(np.divide(steps[1:], steps[:-1]), 0.1**0.25)
    assert (steps[0], steps[-1], annealed(1.0, 0.1, 1.5)) == (1.0, pytest.approx(0.1), pytest.approx(0.1))


@pytest.mark.parametrize("scaled_cosine", [True, False])
def test_the_service_assigns_the_same_codes(vectors: NDArray[np.float32], scaled_cosine: bool) -> None:
    made = Gumbel(GumbelSettings(level_sizes=SIZES, scaled_cosine=scaled_cosine))
    made.fit(vectors, progress=False)
    kind, tensors, level_sizes = made.state()
    assert kind == ("residual_cosine" if scaled_cosine else "residual")
    codes = made.encode(vectors)
    np.testing.assert_array_equal(assign_sids(vectors, kind, tensors, level_sizes), codes_to_tokens(codes, level_sizes))
    again = Gumbel(made.settings)
    again.restore(made.learnt())
    np.testing.assert_array_equal(again.encode(vectors), codes)
    assert again.state().kind == kind


def test_the_start_uses_all_codes_and_approaches_the_vectors(vectors: NDArray[np.float32]) -> None:
    """Codes by cosine with fitted lengths come close to residual k-means, the least-squares start."""
    made, kmeans = Gumbel(GumbelSettings(level_sizes=SIZES)), RQKMeans(RQKMeansSettings(level_sizes=SIZES))
    reached, bound = (q.fit(vectors, progress=False).objective[-1] for q in (made, kmeans))
    codes = made.encode(vectors)
    assert reached > bound - 0.05
    assert all(len(np.unique(codes[:, level])) == size for level, size in enumerate(SIZES))
    rebuilt = made.reconstruct(codes)
    assert (
        np.linalg.norm(rebuilt - vectors, axis=1).mean()
        < np.linalg.norm(made.reconstruct(one(codes)) - vectors, axis=1).mean()
    )


def one(codes: NDArray[np.int32]) -> NDArray[np.int32]:
    """The same codes with the first level alone."""
    return np.where(np.arange(codes.shape[1]) == 0, codes, -1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tau": 1.0}, "dgi knows no setting 'tau'; allowed: level_sizes, seed, scaled_cosine, kmeans_iterations"),
        ({"scaled_cosine": 1}, "dgi.scaled_cosine must be bool"),
    ],
)
def test_settings_are_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        make_quantizer({"system": "dgi"} | table)
