"""Lexical search, and the modes that use it, against sums written down plainly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.build import build_bundle
from service.index.bundle import open_bundle
from service.index.postings import build_postings
from service.model.tokens import WordTokenizer, read_tokenizer
from service.search.filters import DocumentFilter, count_eligible
from service.search.lexical import LexicalSearch, _search
from service.search.pipeline import Pipeline, SearchOptions
from service.search.selection import new_best
from service.search.tables import frozen
from tests.tiny import make_bundle, make_documents, make_model

QUERIES = ["north star and rope", "harbour wind", "captain of the sphere", "nothing known here"]
DOCUMENTS = 60
VOCABULARY = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("words") / "bundle", code_levels=("1",))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Pipeline]:
    with closing(Pipeline(open_bundle(folder), threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> WordTokenizer:
    return WordTokenizer(read_tokenizer(folder / "model" / "tokenizer.json"))


def plain_shares(rows: list[list[int]], query: set[int]) -> list[float]:
    """BM25 of every document over the most that any could have, in double precision."""

    def worth(token: int, row: list[int]) -> float:
        tf, mean = row.count(token), sum(map(len, rows)) / len(rows)
        return idf(token) * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(row) / mean)) if tf else 0.0

    def idf(token: int) -> float:
        holding = sum(token in row for row in rows)
        return math.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))

    known = [token for token in query if any(token in row for row in rows)]
    most = sum(idf(token) * 2.2 for token in known)
    return [sum(worth(token, row) for token in known) / most if known else 0.0 for row in rows]


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=12),
    queries=st.lists(st.sets(st.integers(0, VOCABULARY - 1), max_size=5), min_size=1, max_size=3),
    top_k=st.integers(1, 14),
    data=st.data(),
)
def test_search_finds_the_greatest_shares(
    tokenizer: WordTokenizer, rows: list[list[int]], queries: list[set[int]], top_k: int, data: st.DataObject
) -> None:
    """The queries of a batch share their scratch memory: none sees another's scores."""
    search = LexicalSearch(build_postings([rows], VOCABULARY), len(rows), tokenizer)
    chosen = data.draw(st.none() | st.sets(st.integers(0, len(rows) - 1), min_size=1))
    eligible = None if chosen is None else DocumentFilter.from_positions(sorted(chosen), len(rows))
    known_Q = search.known([sorted(query) * 2 for query in queries])
    for tokens_T, query in zip(known_Q, queries, strict=True):
        assert sorted(tokens_T.tolist()) == sorted(token for token in query if any(token in row for row in rows))
    for tokens_T, query, found in zip(known_Q, queries, search.search(known_Q, top_k, eligible), strict=True):
        shares_N = search.shares(tokens_T, np.arange(len(rows)))
        assert shares_N == pytest.approx(plain_shares(rows, query), abs=1e-6)
        matching = [n for n in range(len(rows)) if shares_N[n] > 0 and (chosen is None or n in chosen)]
        assert found.positions_K.tolist() == sorted(matching, key=lambda n: (-shares_N[n], n))[:top_k]
        assert found.shares_K.tolist() == shares_N[found.positions_K].tolist(), "to the last bit"
        assert (shares_N <= 1).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_lists_of_common_words_are_cut_short_and_nothing_is_lost(
    tokenizer: WordTokenizer, seed: int, top_k: int
) -> None:
    """Words as frequent as in a language: rare ones decide, common ones stand in most of the documents."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, 301)
    rows = [
        rng.choice(300, size=int(size), p=frequency / frequency.sum()).tolist() for size in rng.integers(1, 40, 700)
    ]
    search = LexicalSearch(build_postings([rows], 300), len(rows), tokenizer)
    eligible = DocumentFilter.from_positions(np.flatnonzero(rng.random(len(rows)) < 0.5), len(rows))
    queries = search.known([rng.choice(300, size=6, p=frequency / frequency.sum()).tolist() for _ in range(40)])
    for allowed in (None, eligible):
        for tokens_T, found in zip(queries, search.search(queries, top_k, allowed), strict=True):
            shares_N = search.shares(tokens_T, np.arange(len(rows)))
            best = sorted(np.flatnonzero(shares_N), key=lambda n: (-shares_N[n], n))
            if allowed is not None:
                best = [n for n in best if count_eligible(allowed.words_W, allowed.ranks_W, n, n + 1)]
            assert found.positions_K.tolist() == best[:top_k]
            assert found.shares_K.tolist() == shares_N[best[:top_k]].tolist()


def test_a_list_of_a_common_word_is_not_read(tokenizer: WordTokenizer) -> None:
    """One word stands in a document alone, the other in all: where one result is wanted, no other document is met."""
    rows = [[0, 1] if document == 500 else [0] for document in range(1000)]
    postings = build_postings([rows], 2)
    search, best = LexicalSearch(postings, len(rows), tokenizer), new_best(1)
    (tokens_T,) = search.known([[0, 1]])
    assert tokens_T.tolist() == [1, 0]
    most_T = [2.2 * math.log(1 + (1000 - n + 0.5) / (n + 0.5)) for n in (1, 1000)]
    left_T, touched_N = np.array([sum(most_T), most_T[1], 0.0]), np.full(1000, -1, np.int32)
    nothing = (frozen(np.zeros(0, np.uint64)), frozen(np.zeros(0, np.uint32)))
    arrays = [frozen(array) for array in (postings.start_V, postings.document_P, postings.worth_P)]
    _search(*arrays, tokens_T, left_T, *nothing, np.zeros(1000, np.float32), touched_N, best)
    assert best.number.tolist() == [500]
    assert np.flatnonzero(touched_N >= 0).tolist() == [0], "one document was met"


def test_threads_share_it(pipeline: Pipeline, tokenizer: WordTokenizer) -> None:
    words = pipeline.check_words()
    tokens_Q = words.known(tokenizer.tokens(QUERIES)) * 20
    alone = [found.positions_K.tolist() for found in words.search(tokens_Q, 7)]
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: words.search(tokens_Q, 7), range(16)):
            assert [found.positions_K.tolist() for found in together] == alone


def shares_of(pipeline: Pipeline, query: str) -> np.ndarray:
    words, tokenizer = pipeline.check_words(), WordTokenizer(read_tokenizer(pipeline.bundle.model.tokenizer_file))
    return words.shares(words.known(tokenizer.tokens([query]))[0], np.arange(DOCUMENTS))


@pytest.mark.parametrize("chosen", [None, [1, 2, 30, 31, 44, 58]])
def test_lexical_ranks_by_words_alone(pipeline: Pipeline, chosen: list[int] | None) -> None:
    eligible = None if chosen is None else DocumentFilter.from_positions(chosen, DOCUMENTS)
    answers = pipeline.search(QUERIES, SearchOptions(5, mode="lexical", eligible=eligible))
    for query, answer in zip(QUERIES, answers, strict=True):
        shares_N = shares_of(pipeline, query)
        matching = [n for n in (chosen or range(DOCUMENTS)) if shares_N[n] > 0]
        assert [hit.position for hit in answer.hits] == sorted(matching, key=lambda n: (-shares_N[n], n))[:5]
        for hit in answer.hits:
            assert hit.score == pytest.approx(hit.lexical) == pytest.approx(float(shares_N[hit.position]))
            assert math.isnan(hit.beam_score)
            assert -1 <= hit.cosine <= 1
        assert (answer.beams, answer.decoder_steps) == (None, 0)
        assert set(answer.timings_seconds) == {"encode", "decode", "lexical", "rank", "documents"}
    assert answers[0].hits
    assert not answers[3].hits, "no document holds a word of it"


@pytest.mark.parametrize("weight", [None, 0.0, 0.2, 5.0])
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("scoring", ["guided", "geometric", "generative"])
def test_hybrid_ranks_by_cosine_decoder_and_words(
    pipeline: Pipeline, weight: float | None, codes: bool, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for so many results that all documents are candidates, it is an exact search by the sum."""
    if not codes:
        monkeypatch.setattr(pipeline, "codes", None)
    if not codes and weight == 0:
        with pytest.raises(
            ValueError, match=r"nothing to join the walk with: no packed codes.* and words that count nothing"
        ):
            pipeline.search(QUERIES, SearchOptions(mode="hybrid", lexical_weight=0.0))
        return
    options = SearchOptions(DOCUMENTS, 200, scoring=scoring, mode="hybrid", lexical_weight=weight)  # type: ignore[arg-type]
    model = pipeline.bundle.model.manifest
    vectors_QD = pipeline.encoder.encode_queries(QUERIES).vectors_QD.astype(np.float64)
    walks = pipeline.search(QUERIES, SearchOptions(DOCUMENTS, 200, scoring=scoring))
    for query, answer in enumerate(pipeline.search(QUERIES, options)):
        cosines_N = vectors_QD[query] @ np.asarray(pipeline.bundle.vectors, np.float64).T
        shares_N = shares_of(pipeline, QUERIES[query])
        scores_N = cosines_N + (0.3 if weight is None else weight) * shares_N
        if scoring == "guided":
            for hit in walks[query].hits:
                scores_N[hit.position] += hit.beam_score / model.guided_weight - cosines_N[hit.position]
        found = [hit.position for hit in answer.hits]
        assert sorted(found) == list(range(DOCUMENTS))
        assert np.all(np.diff(scores_N[found]) < 1e-6)
        for hit in answer.hits:
            assert hit.score == pytest.approx(scores_N[hit.position], abs=1e-6)
            assert hit.cosine == pytest.approx(cosines_N[hit.position], abs=1e-6)
            assert math.isnan(hit.lexical) if weight == 0 else hit.lexical == pytest.approx(shares_N[hit.position])
        assert ("lexical" in answer.timings_seconds) is (weight != 0)
        assert ("hamming" in answer.timings_seconds) is codes


def test_what_the_walk_did_not_find_has_the_least_that_the_decoder_said(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"top_k": 20, "beam_width": 2, "scoring": "guided"}
    (walked,), (joined,) = (
        pipeline.search(QUERIES[:1], SearchOptions(**options, mode=mode, lexical_weight=weight))
        for mode, weight in (("generative", None), ("hybrid", 0.0))
    )
    weight = pipeline.bundle.model.manifest.guided_weight
    said = {hit.position: hit.beam_score / weight - hit.cosine for hit in walked.hits}
    others = [hit for hit in joined.hits if hit.position not in said]
    assert others
    for hit in joined.hits:
        assert hit.score - hit.cosine == pytest.approx(said.get(hit.position, min(said.values())), abs=1e-5)


def test_words_find_what_nothing_else_finds(pipeline: Pipeline) -> None:
    """A document far from the query's vector, and out of the walk's way, that holds its words."""
    options: dict[str, Any] = {"top_k": 1, "beam_width": 1, "scoring": "geometric"}
    gained = 0
    for text in (document.text for document in make_documents()):
        words, cosine = (
            pipeline.search([text], SearchOptions(**options, mode="hybrid", lexical_weight=weight))[0].hits[0]
            for weight in (50.0, 0.0)
        )
        gained += words.position != cosine.position
        assert words.lexical >= max(shares_of(pipeline, text)) - 1e-6
    assert gained, "this bundle cannot show that words add anything"


def test_a_bundle_without_words_says_so(tmp_path: Path) -> None:
    build_bundle(make_model(tmp_path / "model"), make_documents(), tmp_path / "bundle", progress=False, lexical=False)
    with closing(Pipeline(open_bundle(tmp_path / "bundle"), threads=1)) as pipeline:
        assert pipeline.search(QUERIES[:1])[0].hits
        with pytest.raises(ValueError, match="no index of words: index again without --no-lexical"):
            pipeline.search(QUERIES, SearchOptions(mode="lexical"))
        with pytest.raises(ValueError, match="nothing to join the walk with"):
            pipeline.search(QUERIES, SearchOptions(mode="hybrid"))


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, 101.0])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="is not between 0 and 100"):
        SearchOptions(mode="hybrid", lexical_weight=weight)
