"""The pipeline over a tiny bundle with real ONNX graphs, against exact search and against paths decoded one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.index.bundle import open_bundle
from service.search.filters import DocumentFilter
from service.search.pipeline import Pipeline, SearchOptions
from tests.tiny import make_bundle

QUERIES = ["north star", "harbour wind and rope", "captain of the sphere"]
STAGES = {"encode", "decode", "walk", "rank", "documents"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline over 60 documents with all three scorings, `guided` by default."""
    opened = Pipeline(open_bundle(make_bundle(tmp_path_factory.mktemp("pipeline") / "bundle")), threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def normalised_over_levels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline whose model was trained without a mask, with levels of several sizes."""
    folder = tmp_path_factory.mktemp("full") / "bundle"
    made = make_bundle(folder, normalisation="full", level_sizes=(8, 4, 6), lexical_weight=0.7, fusion_weight=5.0)
    opened = Pipeline(open_bundle(made), threads=1)
    yield opened
    opened.close()


def sids_of(pipeline: Pipeline) -> list[tuple[int, ...]]:
    """Return the tokens of all documents."""
    return [pipeline.bundle.trie.sid(position) for position in range(pipeline.bundle.trie.documents)]


def test_wide_geometric_walk_ranked_by_cosine_is_exact_search(pipeline: Pipeline) -> None:
    options = SearchOptions(top_k=60, beam_width=100, scoring="geometric", ranking="cosine")
    vectors = pipeline.encoder.encode_queries(QUERIES).vectors_QD
    for answer, vector in zip(pipeline.search(QUERIES, options), vectors, strict=True):
        cosines = pipeline.bundle.vectors.astype(np.float64) @ vector.astype(np.float64)
        assert sorted(hit.position for hit in answer.hits) == list(range(60))
        found = [cosines[hit.position] for hit in answer.hits]
        np.testing.assert_allclose(found, np.sort(cosines)[::-1], atol=1e-6)
        np.testing.assert_allclose([hit.cosine for hit in answer.hits], found, atol=1e-6)
        assert answer.decoder_steps == 0


def decoded_log_probability(pipeline: Pipeline, query: str, sid: tuple[int, ...]) -> float:
    """Walk one SID alone, one beam, and add up log P over its prefixes' children, or over all of their levels."""
    model, sids = pipeline.bundle.model, sids_of(pipeline)
    assert pipeline.decoder is not None
    step = pipeline.decoder.start(pipeline.encoder.encode_queries([query]))
    total, row = 0.0, len(model.tokens_TE) - 1
    for depth, token in enumerate(sid):
        hidden = step(model.tokens_TE[row][None, None], depth, np.zeros((1, 1), np.int64) if depth else None)[0, 0]
        rivals = {other[depth] for other in sids if other[:depth] == sid[:depth]}
        if model.manifest.normalisation == "full":
            rivals = set(range(*model.manifest.level_offsets[depth : depth + 2]))
        children = sorted(rivals)
        logits = model.manifest.token_scale[depth] * (model.tokens_TE[children].astype(np.float64) @ hidden)
        total += logits[children.index(token)] - np.log(np.exp(logits).sum())
        row = token
    return float(total)


@pytest.mark.parametrize("shown", ["pipeline", "normalised_over_levels"])
def test_generative_scores_are_those_of_paths_decoded_alone(shown: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(shown)
    options = SearchOptions(top_k=60, beam_width=100, scoring="generative")
    expected = {sid: decoded_log_probability(pipeline, QUERIES[1], sid) for sid in set(sids_of(pipeline))}
    hits = pipeline.search(QUERIES, options)[1].hits
    tokens = [pipeline.bundle.trie.sid(hit.position) for hit in hits]
    assert set(tokens) == set(expected)
    np.testing.assert_allclose([hit.score for hit in hits], [expected[sid] for sid in tokens], atol=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize("scoring", ["generative", "guided", "geometric"])
@pytest.mark.parametrize("ranking", ["lexicographic", "cosine", "fused"])
def test_batch_gets_what_each_query_gets_alone(pipeline: Pipeline, scoring: str, ranking: Any) -> None:
    options = SearchOptions(top_k=8, beam_width=12, scoring=scoring, ranking=ranking)
    together = pipeline.search(QUERIES, options)
    for query, answer in zip(QUERIES, together, strict=True):
        alone = pipeline.search([query], options)[0]
        assert [hit.id for hit in alone.hits] == [hit.id for hit in answer.hits]
        np.testing.assert_allclose([h.score for h in alone.hits], [h.score for h in answer.hits], atol=1e-4)
        assert set(answer.timings_seconds) == STAGES
        assert all(seconds >= 0 for seconds in answer.timings_seconds.values())


@pytest.mark.parametrize("scoring", ["generative", "guided", "geometric"])
def test_stages_take_up_all_the_time(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, scoring: str) -> None:
    """By a clock that goes on by one second whenever it is looked at."""
    looks = itertools.count()
    monkeypatch.setattr("service.search.pipeline.perf_counter", lambda: next(looks))
    timings = pipeline.search(QUERIES, SearchOptions(scoring=scoring))[0].timings_seconds
    assert sum(timings.values()) == next(looks) - 1
    assert (timings["decode"] > 0) == (scoring != "geometric")


def test_scores_are_made_with_what_the_model_says(pipeline: Pipeline, normalised_over_levels: Pipeline) -> None:
    for served, weight in ((pipeline, 3.0), (normalised_over_levels, 5.0)):
        for hit in served.search(QUERIES, SearchOptions(scoring="generative", ranking="fused"))[1].hits:
            assert hit.score == pytest.approx(hit.beam_score + weight * hit.cosine, abs=1e-4)
    assert (pipeline.has.lexical_weight, normalised_over_levels.has.lexical_weight) == (0.3, 0.7)


def test_every_token_has_the_scale_of_its_level(normalised_over_levels: Pipeline) -> None:
    tables = normalised_over_levels.tables
    np.testing.assert_allclose(tables.token_scale_T, [10.0] * 8 + [8.0] * 4 + [6.0] * 6)
    np.testing.assert_allclose(tables.guided_scale_T, [0.5] * 8 + [0.6] * 4 + [0.7] * 6)
    assert tables.guided_weight == 40.0


def test_hits_are_the_documents_of_the_bundle(pipeline: Pipeline) -> None:
    first = pipeline.bundle.manifest.model.level_offsets
    for hit in pipeline.search(["rope knot"])[0].hits:
        assert pipeline.bundle.documents.by_id(hit.id) == hit.position
        tokens = pipeline.bundle.trie.sid(hit.position)
        assert hit.sid == tuple(token - first[level] for level, token in enumerate(tokens))


def test_explained_beams_add_up(pipeline: Pipeline) -> None:
    answer = pipeline.search(["wind"], SearchOptions(scoring="guided", explain=True, beam_width=15))[0]
    assert answer.beams is not None
    assert 0 < answer.decoder_steps <= 3
    assert len(answer.beams) == 15
    assert max(len(beam.level_scores) for beam in answer.beams) == answer.decoder_steps
    for beam in answer.beams:
        assert sum(beam.level_scores) == pytest.approx(beam.score)
        offsets = pipeline.tables.level_offsets
        tokens = tuple(offsets[level] + code for level, code in enumerate(beam.sid))
        assert beam.documents == sids_of(pipeline).count(tokens)
    assert pipeline.search(["wind"])[0].beams is None


def test_only_eligible_documents_are_found(pipeline: Pipeline) -> None:
    chosen = [3, 17, 18, 44]
    eligible = DocumentFilter.from_positions(chosen, 60)
    for scoring in ("generative", "guided", "geometric"):
        hits = pipeline.search(["calm sea"], SearchOptions(scoring=scoring, eligible=eligible))[0].hits
        assert sorted(hit.position for hit in hits) == chosen


def test_beams_grow_with_what_is_wanted() -> None:
    assert SearchOptions().beams("guided") == 20
    assert SearchOptions().beams("geometric") == 100
    assert SearchOptions(top_k=100).beams("generative") == 100
    assert SearchOptions(top_k=300).beams("geometric") == 300
    assert SearchOptions(top_k=100, beam_width=5).beams("geometric") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k 0 is not between 1 and 1000"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 10**9}, "top_k 1000000000"),
        ({"top_k": True}, "top_k is a bool"),
        ({"top_k": "5"}, "top_k is a str"),
        ({"beam_width": 0}, "beam_width 0"),
        ({"beam_width": 1001}, "beam_width 1001 is not between 1 and 1000"),
        ({"beam_width": 2.0}, "beam_width is a float"),
        ({"ranking": "best"}, "choose one of lexicographic, cosine, fused"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


def test_unknown_scoring_is_refused_with_what_is_offered(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"'magic': it offers generative, geometric, guided"):
        pipeline.search(["calm"], SearchOptions(scoring="magic"))


def test_no_queries_give_no_answers(pipeline: Pipeline) -> None:
    assert pipeline.search([]) == []


def test_model_without_decoder_serves_geometric_only(tmp_path: Path) -> None:
    pipeline = Pipeline(open_bundle(make_bundle(tmp_path / "bundle", decoder=False)), threads=1)
    assert len(pipeline.search(["north"])[0].hits) == 10
    with pytest.raises(ValueError, match=r"'generative': it offers geometric"):
        pipeline.search(["north"], SearchOptions(scoring="generative"))
    pipeline.close()


def test_filters_of_different_documents_have_different_names() -> None:
    """An answer cache keys on the options' text."""
    names = {repr(DocumentFilter.from_positions([position], 10_000)) for position in (1, 4000, 4001)}
    assert len(names) == 3
    assert repr(DocumentFilter.from_positions([7], 90)) == repr(DocumentFilter.from_positions([7], 90))
