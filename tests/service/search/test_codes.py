"""Hamming and hybrid search of a tiny bundle, against unpacked bits and float64 cosines."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.artefact import ArtefactError
from service.index.bundle import open_bundle
from service.model.adapter import AdapterInfo, load_adapter, save_adapter
from service.model.layout import LEVELS, CodeError, code_layout
from service.search import cascade
from service.search.codes import Cascade, CodeSearch, HammingOptions, unit_vectors
from service.search.filters import DocumentFilter
from service.search.pipeline import Pipeline, SearchOptions
from service.search.rescoring import cosines_of
from tests.tiny import make_bundle

QUERIES = ["north star", "harbour wind and rope", "captain of the sphere"]
DOCUMENTS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("codes") / "bundle", code_levels=LEVELS)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Pipeline]:
    with closing(Pipeline(open_bundle(folder), threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def codes(pipeline: Pipeline) -> CodeSearch:
    return pipeline.check_codes()


@pytest.fixture(scope="module")
def vectors_QD(pipeline: Pipeline) -> np.ndarray:  # noqa: N802 - shape suffix
    return pipeline.encoder.encode_queries(QUERIES).vectors_QD


def bits_of(codes_NW: np.ndarray) -> np.ndarray:
    return np.unpackbits(codes_NW.astype("<u8").view(np.uint8), axis=1)


def distances(codes: CodeSearch, vectors_QD: np.ndarray, level: str, dims: int) -> np.ndarray:
    """Every distance, (Q, N), from codes made for the prefix alone."""
    queries = bits_of(codes.binarizer.codes(vectors_QD, level, dims))
    documents = bits_of(codes.binarizer.codes(np.array(codes.vectors_ND), level, dims))
    return (queries[:, None] != documents[None]).sum(axis=-1)


def cosines(codes: CodeSearch, vectors_QD: np.ndarray) -> np.ndarray:
    return vectors_QD.astype(np.float64) @ np.asarray(codes.vectors_ND, np.float64).T


def nearest(distances_N: np.ndarray, k: int, eligible: list[int]) -> list[int]:
    return sorted(eligible, key=lambda position: (distances_N[position], position))[:k]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dims", [None, 8, 16])
@pytest.mark.parametrize("chosen", [None, [0, 3, 17, 18, 31, 32, 59]])
def test_nearest_is_brute_force_over_unpacked_bits(
    codes: CodeSearch, vectors_QD: np.ndarray, level: str, dims: int | None, chosen: list[int] | None
) -> None:
    eligible = None if chosen is None else DocumentFilter.from_positions(chosen, DOCUMENTS)
    options = HammingOptions(12, level, dims, eligible)
    found = codes.nearest(codes.pack(vectors_QD, level), options)
    expected_QN = distances(codes, vectors_QD, level, dims or 16)
    bits = code_layout(level, (8, 16)).bits_of(dims)
    for row, expected_N in zip(found, expected_QN, strict=True):
        assert row.positions_K.tolist() == nearest(expected_N, 12, chosen or list(range(DOCUMENTS)))
        assert row.distances_K.tolist() == expected_N[row.positions_K].tolist()
        np.testing.assert_allclose(row.similarities_K, 1 - expected_N[row.positions_K] / bits, rtol=1e-6)
        assert row.cosines_K is None


@pytest.mark.parametrize("oversampling", [1, 3, 100])
def test_rescoring_sorts_the_nearest_by_cosine(codes: CodeSearch, vectors_QD: np.ndarray, oversampling: int) -> None:
    options = HammingOptions(5, "1", oversampling=oversampling)
    found = codes.nearest(codes.pack(vectors_QD, "1"), options, vectors_QD)
    expected_QN, cosines_QN = distances(codes, vectors_QD, "1", 16), cosines(codes, vectors_QD)
    for row, expected_N, cosines_N in zip(found, expected_QN, cosines_QN, strict=True):
        candidates = nearest(expected_N, 5 * oversampling, list(range(DOCUMENTS)))
        assert row.positions_K.tolist() == sorted(candidates, key=lambda position: -cosines_N[position])[:5]
        assert row.distances_K.tolist() == expected_N[row.positions_K].tolist()
        np.testing.assert_allclose(row.cosines_K, cosines_N[row.positions_K], atol=1e-6)


def test_cosines_are_those_of_one_product_however_many_are_gathered(codes: CodeSearch, vectors_QD: np.ndarray) -> None:
    positions = np.random.default_rng(0).integers(0, DOCUMENTS, 10_000)
    expected = cosines(codes, vectors_QD[:1])[0, positions]
    np.testing.assert_allclose(cosines_of(positions, vectors_QD[0], codes.vectors_ND), expected, atol=1e-6)
    assert len(cosines_of(positions[:0], vectors_QD[0], codes.vectors_ND)) == 0


@given(dims=st.integers(1, 400), copies=st.integers(1, 40), seed=st.integers(0, 99))
def test_equal_documents_have_equal_cosines_wherever_they_stand(dims: int, copies: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    row, query = rng.normal(size=(2, dims)).astype(np.float32)
    found = cosines_of(np.arange(copies), query, np.tile(row, (copies, 1)))
    assert len(set(found.tolist())) == 1


def test_a_cascade_is_cut_into_passes(
    codes: CodeSearch, vectors_QD: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HammingOptions(2, "1", cascade=Cascade(8, 0.5))
    whole = codes.nearest(codes.pack(vectors_QD, "1"), options)
    monkeypatch.setattr(cascade, "CANDIDATES_A_PASS", DOCUMENTS)
    for one, other in zip(whole, codes.nearest(codes.pack(vectors_QD, "1"), options), strict=True):
        assert one.positions_K.tolist() == other.positions_K.tolist()


def test_cascade_with_everything_shortlisted_is_exact(codes: CodeSearch, vectors_QD: np.ndarray) -> None:
    queries = codes.pack(vectors_QD, "hybrid")
    exact = codes.nearest(queries, HammingOptions(9, "hybrid"))
    both = codes.nearest(queries, HammingOptions(9, "hybrid", cascade=Cascade(8, 1.0)))
    for one, other in zip(exact, both, strict=True):
        assert one.positions_K.tolist() == other.positions_K.tolist()
        assert one.distances_K.tolist() == other.distances_K.tolist()


def test_cascade_shortlists_by_the_prefix(codes: CodeSearch, vectors_QD: np.ndarray) -> None:
    found = codes.nearest(codes.pack(vectors_QD, "1"), HammingOptions(2, "1", cascade=Cascade(8, 0.1)))
    for row, prefix_N, whole_N in zip(
        found, distances(codes, vectors_QD, "1", 8), distances(codes, vectors_QD, "1", 16), strict=True
    ):
        shortlist = nearest(prefix_N, DOCUMENTS // 10, list(range(DOCUMENTS)))
        assert row.positions_K.tolist() == nearest(whole_N, 2, shortlist)


@pytest.mark.parametrize("mode", ["hamming", "hybrid"])
@pytest.mark.parametrize("scoring", ["guided", "geometric"])
@pytest.mark.parametrize("chosen", [None, [1, 2, 30, 31, 44, 58]])
def test_modes_rank_the_union_of_candidates_by_cosine(
    pipeline: Pipeline, codes: CodeSearch, vectors_QD: np.ndarray, mode: Any, scoring: str, chosen: list[int] | None
) -> None:
    eligible = None if chosen is None else DocumentFilter.from_positions(chosen, DOCUMENTS)
    common: dict[str, Any] = {"top_k": 4, "beam_width": 2, "scoring": scoring, "eligible": eligible}
    found = pipeline.search(
        QUERIES, SearchOptions(**common, mode=mode, level="2", lexical_weight=0.0, ranking="cosine")
    )
    walked = pipeline.search(QUERIES, SearchOptions(**{**common, "top_k": 16}, ranking="cosine"))
    differs = False
    for query, answer in enumerate(found):
        near = nearest(distances(codes, vectors_QD, "2", 16)[query], 16, chosen or list(range(DOCUMENTS)))
        beams = {hit.position: hit.beam_score for hit in walked[query].hits} if mode == "hybrid" else {}
        cosines_N = cosines(codes, vectors_QD)[query]
        expected = sorted({*near, *beams}, key=lambda position: -cosines_N[position])[:4]
        assert [hit.position for hit in answer.hits] == expected
        for hit in answer.hits:
            assert hit.score == hit.cosine == pytest.approx(cosines_N[hit.position], abs=1e-6)
            assert math.isnan(hit.beam_score) is (hit.position not in beams)
            if hit.position in beams:
                assert hit.beam_score == pytest.approx(beams[hit.position], abs=1e-4)
            assert (hit.id, len(hit.sid)) == (pipeline.bundle.documents.get(hit.position).id, 3)
        differs |= [hit.position for hit in walked[query].hits][:4] != expected
        assert (answer.beams, answer.decoder_steps > 0) == (None, mode == "hybrid" and scoring == "guided")
    assert differs or chosen, "this bundle cannot show that the scan adds anything"


def test_hybrid_encodes_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = pipeline.encoder.encode_queries

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return encode(*given, **named)

    monkeypatch.setattr(pipeline.encoder, "encode_queries", counted)
    (answer,) = pipeline.search(QUERIES[:1], SearchOptions(mode="hybrid", explain=True))
    assert len(calls) == 1
    assert set(answer.timings_seconds) == {"encode", "decode", "walk", "hamming", "lexical", "rank", "documents"}
    assert answer.beams


def test_generative_mode_scans_nothing(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "codes", None)
    (answer,) = pipeline.search(QUERIES[:1])
    assert "hamming" not in answer.timings_seconds
    with pytest.raises(ValueError, match="no packed codes: index with a model that has an adapter"):
        pipeline.search(QUERIES[:1], SearchOptions(mode="hamming"))


@given(st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1))
@settings(max_examples=100)
def test_vectors_of_any_size_become_unit_vectors(rows: list[list[float]]) -> None:
    if any(not any(row) for row in rows):
        with pytest.raises(ValueError, match="vectors are zero, NaN or infinite, the first is number"):
            unit_vectors(rows)
        return
    units = unit_vectors(rows)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-5)
    for row, unit in zip(rows, units, strict=True):
        length = math.hypot(*(value / max(map(abs, row)) for value in row)) * max(map(abs, row))
        if math.isfinite(length) and length > 1e-300:
            np.testing.assert_allclose(unit, np.array(row) / length, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="1 vectors are zero, NaN or infinite, the first is number 1"):
        unit_vectors([[1.0, 2.0], [value, 0.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k 0 is not between 1 and 10000"),
        ({"top_k": 10_001}, "top_k 10001"),
        ({"oversampling": 0}, "oversampling 0 is not between 1 and 100"),
        ({"oversampling": 101}, "oversampling 101"),
        ({"cascade": Cascade(8, 0.5), "dims": 8}, "leave dims out"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HammingOptions(**options)


def test_what_the_bundle_lacks_is_refused_with_what_it_has(
    codes: CodeSearch, vectors_QD: np.ndarray, tmp_path: Path
) -> None:
    packed = codes.pack(vectors_QD, "1")
    with pytest.raises(CodeError, match=r"9 dimensions are no prefix of this code: choose one of \[8, 16\]"):
        codes.nearest(packed, HammingOptions(dims=9))
    with pytest.raises(CodeError, match=r"queries must be \(Q, 2\) uint64, got \(3, 1\)"):
        codes.nearest(packed[:, :1], HammingOptions())
    with pytest.raises(ValueError, match="rescoring needs the queries' vectors"):
        codes.nearest(packed, HammingOptions(oversampling=2))
    folder = make_bundle(tmp_path / "bundle", decoder=False, code_levels=("2", "0.5"))
    with closing(Pipeline(open_bundle(folder), 1)) as pipeline:
        assert pipeline.check_codes().default_level == "2"
        with pytest.raises(ValueError, match=r"no codes of level 1: choose from 2, 0\.5, or index again"):
            pipeline.search(QUERIES, SearchOptions(mode="hamming", level="1"))
        assert len(pipeline.search(QUERIES, SearchOptions(mode="hamming", top_k=1000))[0].hits) == DOCUMENTS


def test_an_adapter_that_says_another_encoder_is_refused_at_load(folder: Path, tmp_path: Path) -> None:
    """The manifest is right; only the adapter's own metadata names another encoder (exchanged after the opening)."""
    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    file = copy / "model" / "adapter.safetensors"
    tensors, info = load_adapter(file)
    with closing(open_bundle(copy)) as bundle:
        for encoder, prefixes, message in [
            ("ab" * 32, info.prefixes, "belongs to the encoder abababababab, this model's is"),
            (info.encoder, (4, 16), r"has prefixes \[4, 16\], the manifest says \[8, 16\]"),
        ]:
            file.unlink()
            save_adapter(file, tensors, AdapterInfo(prefixes, encoder))
            with pytest.raises(ArtefactError, match=message):
                Pipeline(bundle, 1)


def test_codes_of_another_width_are_refused_at_load(folder: Path) -> None:
    with closing(open_bundle(folder)) as bundle:
        other = replace(bundle, codes={"1": np.zeros((2, 3, 32), np.uint64)})
        with pytest.raises(ArtefactError, match="codes of 3 words"):
            Pipeline(other, 1)
