"""HHQ and RQ-KMeans against their equations written out, code by code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.quantizers.base import (
    Quantizer,
    QuantizerError,
    VectorError,
    codes_to_tokens,
    make_quantizer,
    systems,
    tokens_to_codes,
)
from models.quantizers.hhq import HHQ, HHQSettings, _Trainer, apply_codes, encode_greedy, householder, paper_settings
from models.quantizers.points import Points, unit_or_random
from models.quantizers.rq_kmeans import RQKMeans, RQKMeansSettings
from service.model.quantizer import assign_sids

SIZES = (16, 12, 8)


@pytest.fixture(scope="module", params=["hhq", "rq_kmeans"])
def fitted(request: pytest.FixtureRequest, vectors: NDArray[np.float32]) -> Quantizer:
    table = {"hhq": {"epochs": 20}, "rq_kmeans": {}}[request.param]
    quantizer = make_quantizer({"system": request.param, "level_sizes": list(SIZES), **table})
    quantizer.fit(vectors, progress=False)
    return quantizer


def test_rows_without_a_direction_get_one_by_the_seed() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    made = unit_or_random(rows, 7)
    torch.testing.assert_close(made.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(made[1], torch.tensor([0.6, 0.0, 0.8]))
    assert not torch.equal(made[0], made[2])
    assert torch.equal(made, unit_or_random(rows, 7))
    assert not torch.equal(made, unit_or_random(rows, 8))


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reflect(z: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """The reflection as a matrix: I − 2 v vᵀ."""
    return (np.eye(len(v)) - 2 * np.outer(v, v)) @ z


def test_what_the_first_codeword_reaches_does_not_shape_the_reflections() -> None:
    """Most documents are first codewords but for rounding; reflections start from where the others lie."""
    rng = np.random.default_rng(0)
    exact = np.eye(24, dtype=np.float32)[:4]
    near = exact[rng.integers(4, size=60)] + np.where(rng.random((60, 1)) < 0.5, 0.3, -0.3) * np.eye(24)[[10]]
    vectors = np.concatenate([np.repeat(exact, 50, axis=0), unit(near)]).astype(np.float32)
    vectors[:200] *= 1 + 1e-6 * rng.standard_normal((200, 1)).astype(np.float32)
    hhq = HHQ(HHQSettings(level_sizes=(4, 4)))
    hhq.codebooks = [torch.from_numpy(exact)]
    reflections = hhq._start_level(Points(vectors), 1, 4)
    assert bool((reflections[:, 10].abs() > 0.9).all())


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_a_reflection_keeps_length_and_undoes_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z, v = rng.normal(size=(3, 7)), unit(rng.normal(size=(3, 7)))
    once = householder(torch.from_numpy(z), torch.from_numpy(v))
    np.testing.assert_allclose(once, [reflect(a, b) for a, b in zip(z, v, strict=True)], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(once, axis=1), np.linalg.norm(z, axis=1))
    np.testing.assert_allclose(householder(once, torch.from_numpy(v)), z, atol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_householder_codes_follow_the_equations(seed: int) -> None:
    """Every document by itself, every code tried by its matrix (eq. 2, 4, 5)."""
    rng = np.random.default_rng(seed)
    codebooks, x = [unit(rng.normal(size=(k, 6))) for k in (5, 4, 3)], unit(rng.normal(size=(9, 6)))
    codes = encode_greedy([torch.from_numpy(c) for c in codebooks], torch.from_numpy(x)).numpy()
    rebuilt = apply_codes([torch.from_numpy(c) for c in codebooks], torch.from_numpy(codes)).numpy()
    for row in range(len(x)):
        expected = [int(np.argmax(codebooks[0] @ x[row]))]
        approximation = codebooks[0][expected[0]]
        for codebook in codebooks[1:]:
            reached = [reflect(approximation, v) for v in codebook]
            expected.append(int(np.argmax([r @ x[row] for r in reached])))
            approximation = reached[expected[-1]]
        assert codes[row].tolist() == expected
        np.testing.assert_allclose(rebuilt[row], approximation, atol=1e-12)


def test_residual_codes_follow_the_definition(vectors: NDArray[np.float32]) -> None:
    quantizer = RQKMeans(RQKMeansSettings(level_sizes=SIZES))
    quantizer.fit(vectors, progress=False)
    codes, residual = quantizer.encode(vectors), vectors.astype(np.float64)
    for level, codebook in enumerate(quantizer.codebooks):
        distance = ((residual[:, None] - codebook.numpy()[None]) ** 2).sum(-1)
        np.testing.assert_array_equal(codes[:, level], distance.argmin(1))
        residual = residual - codebook.numpy()[codes[:, level]]
    np.testing.assert_allclose(quantizer.reconstruct(codes), vectors - residual, atol=1e-5)


def test_the_service_assigns_the_same_codes(fitted: Quantizer, vectors: NDArray[np.float32]) -> None:
    kind, tensors, level_sizes = fitted.state()
    tokens = assign_sids(vectors, kind, tensors, level_sizes)
    expected = codes_to_tokens(fitted.encode(vectors), level_sizes)
    np.testing.assert_array_equal(tokens, expected)


def test_what_was_learnt_makes_the_same_quantizer_again(fitted: Quantizer, vectors: NDArray[np.float32]) -> None:
    again = type(fitted)(fitted._settings)
    again.restore(fitted.learnt())
    np.testing.assert_array_equal(again.encode(vectors), fitted.encode(vectors))
    assert again.level_sizes == SIZES
    assert fitted.state().tensors["codebooks"].shape == (sum(SIZES), vectors.shape[1])


def test_reconstruction_resembles_the_vectors_and_all_codes_are_used(
    fitted: Quantizer, vectors: NDArray[np.float32]
) -> None:
    codes = fitted.encode(vectors)
    rebuilt = unit(fitted.reconstruct(codes).astype(np.float64))
    assert codes.dtype == np.int32
    assert (rebuilt * vectors).sum(1).mean() > 0.75
    assert all(len(np.unique(codes[:, level])) == size for level, size in enumerate(SIZES))


def test_training_raises_the_cosine_above_the_hierarchical_start(vectors: NDArray[np.float32]) -> None:
    hhq = HHQ(HHQSettings(level_sizes=SIZES, epochs=30))
    objective = hhq.fit(vectors, progress=False).objective
    rebuilt = hhq.reconstruct(hhq.encode(vectors))
    assert objective[-1] > objective[0] + 0.02
    assert (rebuilt * vectors).sum(1).mean() > objective[0] + 0.02


def test_codewords_stay_on_the_sphere(vectors: NDArray[np.float32]) -> None:
    hhq = HHQ(paper_settings(HHQSettings(level_sizes=SIZES, epochs=5)))
    hhq.fit(vectors, progress=False)
    for codebook in hhq.codebooks:
        np.testing.assert_allclose(codebook.norm(dim=1), 1.0, atol=1e-5)
        assert not codebook.requires_grad


def test_gradients_reach_every_chosen_codeword() -> None:
    generator = torch.Generator().manual_seed(0)
    codebooks = [
        torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1).requires_grad_() for _ in range(3)
    ]
    x = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator), dim=1)
    codes = encode_greedy(codebooks, x)
    (1 - (apply_codes(codebooks, codes) * x).sum(1).mean()).backward()
    for level, codebook in enumerate(codebooks):
        assert codebook.grad is not None
        moved = codebook.grad.abs().sum(1) > 0
        assert set(torch.nonzero(moved)[:, 0].tolist()) == set(codes[:, level].tolist())


def test_dead_codes_are_revived(vectors: NDArray[np.float32]) -> None:
    """A codebook of copies has dead codes; training with revival uses them, without it most stay dead."""
    used = {}
    for revive in (True, False):
        hhq = HHQ(HHQSettings(level_sizes=SIZES, epochs=15, revive=revive))
        hhq._start_level = lambda points, level, codes: torch.eye(points.dim)[:1].repeat(codes, 1)  # type: ignore[method-assign]
        hhq.fit(vectors, progress=False)
        used[revive] = len(np.unique(hhq.encode(vectors)[:, 0]))
    assert used[True] == SIZES[0]
    assert used[False] < SIZES[0]


def test_a_revived_code_has_no_momentum_of_the_place_it_left(vectors: NDArray[np.float32]) -> None:
    """In a step that no document chooses it in, it stays where it was put; another unchosen code is carried on."""
    hhq = HHQ(HHQSettings(level_sizes=SIZES, epochs=0, separation=0.0))
    hhq.fit(vectors, progress=False)
    x = torch.from_numpy(vectors)
    with torch.no_grad():
        trainer = _Trainer(hhq, Points(vectors))
        codes = encode_greedy(hhq.codebooks, x)
        for _ in range(5):
            trainer._step(x, codes)
        used = [torch.ones(size, dtype=torch.bool) for size in SIZES]
        used[1][3] = False
        left = trainer._parameters[1].clone()
        trainer._revive(used, x[:64])
        placed = trainer._parameters[1].clone()
        others = (codes[:, 1] != 3) & (codes[:, 1] != 4)
        trainer._step(x[others], codes[others])
        moved = (trainer._parameters[1] - placed).norm(dim=1)
    assert torch.nonzero((placed != left).any(dim=1))[:, 0].tolist() == [3]
    assert moved[3] < 1e-6
    assert moved[4] > 1e-3


@pytest.mark.parametrize("decay", [True, False])
def test_the_learning_rate_falls_to_zero_on_a_half_cosine_or_stays(
    vectors: NDArray[np.float32], learning_rates: list[float], decay: bool
) -> None:
    settings = HHQSettings(level_sizes=SIZES, epochs=10, batch_size=300, learning_rate=0.01)
    HHQ(replace(settings, decay=decay)).fit(vectors, progress=False)
    epochs = [0.01 * np.cos(np.pi / 2 * epoch / 10) ** 2 if decay else 0.01 for epoch in range(10)]
    assert learning_rates == pytest.approx(np.repeat(epochs, 2).tolist())  # 600 documents are two steps an epoch


QUICKLY: dict[str, dict[str, object]] = {
    "acrq": {"epochs": 2},
    "hhq": {"epochs": 3},
    "rq_vae": {"hidden": [32, 16], "latent": 8, "epochs": 2},
    "sa2crq": {"epochs": 2},
}


@pytest.mark.parametrize(
    "table",
    [
        *({"system": system, **QUICKLY.get(system, {})} for system in systems()),
        *({"system": system, "epochs": 0} for system in ("hhq", "acrq")),
    ],
    ids=lambda table: f"{table['system']}, {table.get('epochs', 'no')} epochs",
)
def test_equal_seeds_give_equal_codes_and_another_seed_others(
    table: dict[str, object], vectors: NDArray[np.float32]
) -> None:
    """Every system, and the start of those that would tell seeds apart by their training alone."""

    def codes(seed: int) -> NDArray[np.int32]:
        made = make_quantizer(table | {"level_sizes": [8, 12, 16], "seed": seed})
        made.fit(vectors, progress=False)
        return made.encode(vectors)

    np.testing.assert_array_equal(codes(1), codes(1))
    assert not np.array_equal(codes(1), codes(2))


def test_a_memory_map_in_blocks_gives_the_codes_of_memory(
    tmp_path: Path, vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.quantizers.points.BLOCK_ROWS", 128)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    for made in (HHQ(HHQSettings(level_sizes=SIZES, epochs=2)), RQKMeans(RQKMeansSettings(level_sizes=SIZES))):
        made.fit(vectors, progress=False)
        expected = made.encode(vectors)
        made.held_bytes = 0
        made.fit(mapped, progress=False)
        assert (made.encode(mapped) == expected).mean() > 0.99  # sums in another order may turn a near tie


def test_a_code_of_minus_one_leaves_its_level_out(fitted: Quantizer, vectors: NDArray[np.float32]) -> None:
    codes = fitted.encode(vectors[:4])
    codes[:, 1] = -1
    kept = [fitted.codebooks[0].numpy()[codes[:, 0]], fitted.codebooks[2].numpy()[codes[:, 2]]]
    if fitted.kind == "residual":
        expected = kept[0] + kept[1]
    else:
        expected = np.stack([reflect(z, v) for z, v in zip(*kept, strict=True)])
    np.testing.assert_allclose(fitted.reconstruct(codes), expected, atol=1e-5)


@settings(max_examples=50)
@given(data=st.data())
def test_codes_and_tokens_are_one_to_one(data: st.DataObject) -> None:
    row = st.tuples(*(st.integers(-1, size - 1) for size in SIZES))
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=8)), dtype=np.int32)
    tokens = codes_to_tokens(codes, SIZES)
    offsets = (0, 16, 28)
    for code_row, token_row in zip(codes, tokens, strict=True):
        expected = [offset + code for offset, code in zip(offsets, code_row, strict=True) if code >= 0]
        assert token_row.tolist() == expected + [-1] * (3 - len(expected))
    np.testing.assert_array_equal(tokens_to_codes(tokens, SIZES), codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:10], r"16 codes, but the corpus has 10 documents with 10 distinct"),
        (lambda v: np.repeat(v[:10], 5, axis=0), r"50 documents with 10 distinct vectors: use at most 10"),
        (lambda v: np.where(np.arange(600)[:, None] == 7, np.nan, v), r"1 of 600 vectors have NaN.*\[7\]"),
        (lambda v: np.where(np.arange(600)[:, None] < 2, 0, v), r"2 of 600 vectors have length zero.*\[0, 1\]"),
        (lambda v: v[0], r"got shape \(24,\)"),
        (lambda v: v[:0], r"got shape \(0, 24\)"),
        (lambda v: v.astype(np.int64), r"must be floating point, got int64"),
    ],
)
def test_unusable_vectors_are_refused_with_the_numbers(vectors: NDArray[np.float32], change, message: str) -> None:
    for made in (HHQ(HHQSettings(level_sizes=SIZES)), RQKMeans(RQKMeansSettings(level_sizes=SIZES))):
        with pytest.raises(VectorError, match=message):
            made.fit(change(vectors), progress=False)


@pytest.mark.parametrize("duplicates", [1, 40])
def test_as_many_codes_as_distinct_documents_is_possible(vectors: NDArray[np.float32], duplicates: int) -> None:
    """After level 1 nothing is left over; deeper levels must still come out finite and usable."""
    few = np.repeat(vectors[:16], duplicates, axis=0)
    for table in ({"system": "hhq", "epochs": 2}, {"system": "rq_kmeans"}, {"system": "dgi"}):
        made = make_quantizer(table | {"level_sizes": [16, 16]})
        made.fit(few, progress=False)
        kind, tensors, level_sizes = made.state()
        codes = made.encode(few)
        assert np.isfinite(tensors["codebooks"]).all()
        assert len(np.unique(codes, axis=0)) == 16
        np.testing.assert_array_equal(
            assign_sids(few, kind, tensors, level_sizes), codes_to_tokens(codes, level_sizes), err_msg=made.system
        )


def test_wrong_use_is_refused(fitted: Quantizer, vectors: NDArray[np.float32]) -> None:
    with pytest.raises(QuantizerError, match="no codebooks yet"):
        type(fitted)().encode(vectors)
    with pytest.raises(QuantizerError, match="vectors have 5 dimensions, the codebooks 24"):
        fitted.encode(vectors[:, :5])
    with pytest.raises(QuantizerError, match=r"code 12 in row 0 is outside level 1 of 12"):
        fitted.reconstruct(np.array([[0, 12, 0]], dtype=np.int32))
    with pytest.raises(QuantizerError, match=r"must be whole numbers \(N, 3\)"):
        fitted.reconstruct(np.array([[0, 1]], dtype=np.int32))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"system": "nope"}, r"quantizer.system is 'nope', must be one of .*hhq, .*rq_kmeans"),
        ({}, r"quantizer.system is None"),
        ({"system": "hhq", "epoch": 3}, r"hhq knows no setting 'epoch'; allowed: level_sizes, seed, .*epochs"),
        ({"system": "hhq", "epochs": "3"}, r"hhq.epochs must be int like 60, got '3'"),
        ({"system": "hhq", "epochs": True}, r"hhq.epochs must be int"),
        ({"system": "hhq", "learning_rate": False}, r"hhq.learning_rate must be float"),
        ({"system": "hhq", "level_sizes": [4, 1]}, r"level_sizes must be whole numbers of at least 2, got \[4, 1\]"),
        ({"system": "hhq", "level_sizes": []}, r"level_sizes must be"),
    ],
)
def test_a_bad_recipe_table_is_refused_with_what_is_allowed(table: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        make_quantizer(table)


def test_a_recipe_table_makes_its_system() -> None:
    made = make_quantizer({"system": "hhq", "level_sizes": [8, 4], "epochs": 7, "learning_rate": 1})
    assert isinstance(made, HHQ)
    assert made.settings == HHQSettings(level_sizes=(8, 4), epochs=7, learning_rate=1)
    assert set(systems()) >= {"hhq", "rq_kmeans"}


@pytest.mark.data
@pytest.mark.parametrize("name", ["squad-dev", "tldr", "cosqa"])
def test_hhq_beats_rq_kmeans_in_unique_identifiers_and_cosine(datasets: Path, name: str) -> None:
    """The paper's appendix C, on a sample of each set (fewer epochs than a recipe's)."""
    vectors = np.load(datasets / name / "docs.npy").astype(np.float32)[:2000]
    figures = []
    for made in (
        HHQ(HHQSettings(level_sizes=(64,) * 4, epochs=30)),
        RQKMeans(RQKMeansSettings(level_sizes=(64,) * 4)),
    ):
        cosine = made.fit(vectors, progress=False).objective[-1]
        figures.append((len(np.unique(made.encode(vectors), axis=0)), cosine))
    assert figures[0][0] > figures[1][0]
    assert figures[0][1] > figures[1][1]
