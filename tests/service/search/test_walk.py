"""The walk against oracles in plain Python: every SID scored in float64, and a beam search over prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.index.manifest import Normalisation, Scoring
from service.index.regions import HANDFUL, MOST_AXES, OPTIMISM, build_regions
from service.index.trie import build_trie
from service.search.filters import DocumentFilter
from service.search.scores import multiply_rows
from service.search.tables import WalkTables
from service.search.walk import Beams, walk

Sid = tuple[int, ...]
E, D = 6, 7
TOLERANCE = 2e-5  # float32 products of a few terms of size ten


@dataclass
class FakeDecoder:
    """A recurrent decoder: its state is the whole path and the query, so wrong parents change every score."""

    bias_QE: NDArray[np.float64]
    mixing_EE: NDArray[np.float64]
    columns: list[int] = field(default_factory=list)
    state_QBE: NDArray[np.float64] | None = None

    def __call__(
        self, embeddings_QBE: NDArray[np.float32], step: int, parents_QB: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        assert step == len(self.columns)
        assert (parents_QB is None) == (step == 0)
        queries = np.arange(len(embeddings_QBE))[:, None]
        before = np.zeros_like(embeddings_QBE) if self.state_QBE is None else self.state_QBE[queries, parents_QB]
        assert self.state_QBE is None or parents_QB is None or parents_QB.max() < self.state_QBE.shape[1]
        self.state_QBE = self.next_state(before, embeddings_QBE)
        self.columns.append(embeddings_QBE.shape[1])
        return self.hidden(self.state_QBE, self.bias_QE[:, None]).astype(np.float32)

    def next_state(self, state: NDArray[Any], embedding: NDArray[Any]) -> NDArray[np.float64]:
        return 0.6 * state @ self.mixing_EE + embedding.astype(np.float64)

    @staticmethod
    def hidden(state: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
        raw = np.tanh(state + bias)
        return raw / np.linalg.norm(raw, axis=-1, keepdims=True)

    def path(self, query: int, embeddings: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Return the hidden state behind a path of embeddings, from nothing."""
        state = np.zeros(E)
        for embedding in embeddings:
            state = self.next_state(state, embedding)
        return self.hidden(state, self.bias_QE[query])


@dataclass
class World:
    """An index, a decoder and queries, with the plain data that the oracles read."""

    tables: WalkTables
    decoder: FakeDecoder
    vectors_QD: NDArray[np.float32]
    sids: list[Sid]
    eligible: NDArray[np.bool_]

    def run(
        self, scoring: Scoring, normalisation: Normalisation, beam_width: int, filtered: bool, explain: bool = False
    ) -> Beams:
        chosen = DocumentFilter.from_mask(self.eligible) if filtered else None
        step = None if scoring == "geometric" else self.decoder
        return walk(self.tables, scoring, normalisation, beam_width, self.vectors_QD, step, chosen, explain)

    def allowed(self, prefix: Sid, filtered: bool) -> list[int]:
        """Return the documents under a prefix that may be found."""
        n = len(prefix)
        return [i for i, s in enumerate(self.sids) if s[:n] == prefix and (self.eligible[i] or not filtered)]


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return unit rows in float32."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def make_world(
    seed: int, documents: int, codes: int, levels: int, queries: int, variable: bool, wide: bool, skips: bool = False
) -> World:
    """Make a world of random vectors; few codes, so that prefixes, collisions and ends are common.

    `variable`: SIDs end early; `skips`: some leave out their second level.
    """
    rng = np.random.default_rng(seed)
    size = 40_000 if wide else codes  # wide levels need int32 tokens
    table = (rng.integers(0, codes, (documents, levels)) + np.arange(levels) * size).astype(np.int32)
    if variable:
        table[np.arange(levels) >= rng.integers(1, levels + 1, documents)[:, None]] = -1
    if skips and levels > 2:
        rows = rng.random(documents) < 0.5
        table[rows, 1:] = np.c_[table[rows, 2:], np.full(rows.sum(), -1)]
    trie, _ = build_trie(table)
    vectors = unit(rng.normal(size=(documents, D)))
    tokens = levels * size
    tables = WalkTables(
        trie=trie,
        vectors=vectors,
        regions=build_regions(trie, vectors),
        level_offsets=tuple(range(0, tokens + 1, size)),
        tokens_TE=unit(rng.normal(size=(tokens + 1, E))),
        token_scale_T=np.repeat(rng.uniform(2, 8, levels), size).astype(np.float32),
        guided_scale_T=np.repeat(rng.uniform(1, 4, levels), size).astype(np.float32),
        guided_weight=float(rng.uniform(2, 8)),
    )
    decoder = FakeDecoder(rng.normal(size=(queries, E)), rng.normal(size=(E, E)))
    sids = [trie.sid(i) for i in range(documents)]
    return World(tables, decoder, unit(rng.normal(size=(queries, D))), sids, rng.random(documents) < 0.6)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw a world of up to 40 documents."""
    integers = st.integers
    return make_world(
        draw(integers(0, 2**20)), draw(integers(1, 40)), draw(integers(1, 5)), draw(integers(1, 4)),
        draw(integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([False, False, False, True])),
        draw(st.booleans()),
    )  # fmt: skip


def log_share(logits: NDArray[np.float64], own: int) -> float:
    """Return the logarithm of one softmax value."""
    return float(logits[own] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


class Oracle:
    """Scores prefixes of one query by the definitions in docs/architecture.md, one at a time, in float64."""

    def __init__(self, world: World, scoring: Scoring, normalisation: Normalisation, query: int) -> None:
        self.world, self.scoring, self.query = world, scoring, query
        self.full = normalisation == "full" and scoring == "generative"

    def children(self, prefix: Sid) -> list[Sid]:
        n = len(prefix)
        return sorted({sid[: n + 1] for sid in self.world.sids if sid[:n] == prefix and len(sid) > n})

    def is_alone(self, prefix: Sid) -> bool:
        return len({sid for sid in self.world.sids if sid[: len(prefix)] == prefix}) == 1

    def cosines(self, documents: list[int]) -> NDArray[np.float64]:
        vectors = self.world.tables.vectors[documents].astype(np.float64)
        return np.asarray(vectors @ self.world.vectors_QD[self.query].astype(np.float64))

    def reach(self, documents: list[int]) -> float:
        """Return how near the best of them may be, as docs/architecture.md defines it."""
        n, cosines = len(documents), self.cosines(documents)
        if n <= HANDFUL or len({self.world.sids[document] for document in documents}) == 1:
            return float(cosines.max())
        vectors = self.world.tables.vectors[documents].astype(np.float64)
        _, lengths, directions = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
        variances, axes = lengths**2 / n, min(n // HANDFUL, MOST_AXES, D)
        along = directions[:axes] @ self.world.vectors_QD[self.query].astype(np.float64)
        variance = float(variances[:axes] @ along**2 + variances[axes:].sum() / max(D - axes, 1))
        return float(cosines.mean() + OPTIMISM * np.sqrt(2 * np.log(n) * variance))

    def standing(self, depth: int) -> list[int]:
        """Return the tokens of all levels that some SID has at a depth, and of those between them."""
        first = self.world.tables.level_offsets
        size = first[1]
        levels = [sid[depth] // size for sid in self.world.sids if len(sid) > depth]
        return list(range(first[min(levels)], first[max(levels) + 1]))

    def log_probability(self, child: Sid) -> float:
        """Return log P(last token of `child` | its prefix, query)."""
        world, tables = self.world, self.world.tables
        prefix, depth = child[:-1], len(child) - 1
        path = [tables.tokens_TE[-1], *(tables.tokens_TE[token] for token in prefix)]
        hidden = world.decoder.path(self.query, path)
        rivals = [token for *_, token in self.children(prefix)] if not self.full else self.standing(depth)
        scale_T = tables.token_scale_T if self.scoring == "generative" else tables.guided_scale_T
        logits = scale_T[rivals].astype(np.float64) * (tables.tokens_TE[rivals].astype(np.float64) @ hidden)
        own = rivals.index(child[-1])
        if self.scoring != "guided":
            return log_share(logits, own)
        reaches = [self.reach(world.allowed((*prefix, token), False)) for token in rivals]
        geometry = tables.guided_weight * np.array(reaches)
        return log_share(logits + geometry, own) - log_share(geometry, own)  # what the decoder changes

    def geometry(self, documents: list[int]) -> float:
        """Return the part of a node's score that is no sum over levels."""
        if self.scoring == "generative":
            return 0.0
        return self.reach(documents) * (self.world.tables.guided_weight if self.scoring == "guided" else 1.0)

    def end_score(self, prefix: Sid, score: float) -> float:
        """Return the score of the documents that end at an inner node."""
        if self.scoring == "generative":
            return score
        ending = [i for i, sid in enumerate(self.world.sids) if sid == prefix]
        best = float(self.cosines(ending).max())
        if self.scoring == "geometric":
            return best
        return score + self.world.tables.guided_weight * best - self.geometry(self.world.allowed(prefix, False))

    def child_score(self, child: Sid, score: float) -> float:
        own = self.geometry(self.world.allowed(child, False))
        if self.scoring == "geometric":
            return own
        before = self.geometry(self.world.allowed(child[:-1], False)) if len(child) > 1 else 0.0
        return score - before + own + self.log_probability(child)

    def sid_score(self, sid: Sid) -> float:
        """Return the score of a whole SID, level by level, without any idea of a finished node."""
        score = 0.0
        for depth in range(len(sid)):
            score = self.child_score(sid[: depth + 1], score)
        if any(other[: len(sid)] == sid and other != sid for other in self.world.sids):
            return self.end_score(sid, score)
        return score

    def best_sids(self, filtered: bool) -> dict[Sid, float]:
        """Score every SID."""
        return {sid: self.sid_score(sid) for sid in sorted(set(self.world.sids)) if self.may(sid, filtered)}

    def may(self, sid: Sid, filtered: bool) -> bool:
        return any(
            sid == other and (e or not filtered) for other, e in zip(self.world.sids, self.world.eligible, strict=True)
        )

    def beam_search(self, beam_width: int, filtered: bool) -> tuple[list[tuple[Sid, float]], float, list[int]]:
        """Return the SIDs of a beam search over prefixes, the narrowest gap at which it cut, and its unfinished
        beams before every step.
        """
        root_score = self.geometry(self.world.allowed((), False)) if self.is_alone(()) else 0.0
        beams: list[tuple[Sid, bool, float]] = (
            [((), self.is_done(()), root_score)] if self.world.allowed((), filtered) else []
        )
        gap, unfinished = np.inf, []
        while waiting := sum(not done for _, done, _ in beams):
            unfinished.append(waiting)
            found = [entry for beam in beams for entry in self.extend(*beam, filtered)]
            found.sort(key=lambda entry: (-entry[2], self.node_depth(entry[0]), entry[0]))
            if len(found) > beam_width and found[beam_width - 1][2] != found[beam_width][2]:
                gap = min(gap, found[beam_width - 1][2] - found[beam_width][2])
            beams = found[:beam_width]
        return [(self.whole(prefix), score) for prefix, _, score in beams], gap, unfinished

    def extend(self, prefix: Sid, done: bool, score: float, filtered: bool) -> list[tuple[Sid, bool, float]]:
        if done:
            return [(prefix, True, score)]
        found = [
            (child, self.is_done(child), self.child_score(child, score))
            for child in self.children(prefix)
            if self.world.allowed(child, filtered)
        ]
        if self.may(prefix, filtered):
            found.append((prefix, True, self.end_score(prefix, score)))
        return found

    def is_done(self, prefix: Sid) -> bool:
        return self.is_alone(prefix) and (not self.full or prefix in self.world.sids)

    def node_depth(self, prefix: Sid) -> int:
        """Return the depth of the trie's node for a prefix: below a SID that stands alone there are none."""
        return next(depth for depth in range(len(prefix) + 1) if depth == len(prefix) or self.is_alone(prefix[:depth]))

    def whole(self, prefix: Sid) -> Sid:
        return next(sid for sid in self.world.sids if sid[: len(prefix)] == prefix) if self.is_alone(prefix) else prefix


def found_sids(world: World, beams: Beams, query: int) -> list[tuple[Sid, float]]:
    """Return the SIDs of a query's beams, and check that each beam's documents are all that hold it."""
    found = []
    for beam in range(int(beams.size_Q[query])):
        lo, hi = int(beams.lo_QB[query, beam]), int(beams.hi_QB[query, beam])
        sid = world.sids[lo]
        assert [i for i, other in enumerate(world.sids) if other == sid] == list(range(lo, hi))
        found.append((sid, float(beams.score_QB[query, beam])))
    return found


RULES: list[tuple[Scoring, Normalisation]] = [
    ("generative", "constrained"), ("generative", "full"), ("guided", "constrained"), ("geometric", "constrained"),
]  # fmt: skip


@pytest.mark.parametrize(("scoring", "normalisation"), RULES)
@settings(max_examples=50)
@given(world=worlds(), filtered=st.booleans())
def test_beam_that_covers_the_tree_finds_exactly_the_best_sids(
    scoring: Scoring, normalisation: Normalisation, world: World, filtered: bool
) -> None:
    width = len(set(world.sids))
    world.decoder = FakeDecoder(world.decoder.bias_QE, world.decoder.mixing_EE)
    beams = world.run(scoring, normalisation, width, filtered)
    for query in range(len(world.vectors_QD)):
        expected = Oracle(world, scoring, normalisation, query).best_sids(filtered)
        found = found_sids(world, beams, query)
        assert sorted(sid for sid, _ in found) == sorted(expected), "every SID once, and nothing else"
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [expected[sid] for sid, _ in found], atol=TOLERANCE)


@pytest.mark.parametrize(("scoring", "normalisation"), RULES)
@settings(max_examples=50)
@given(world=worlds(), beam_width=st.integers(1, 8), filtered=st.booleans())
def test_narrow_beams_equal_a_plain_beam_search(
    scoring: Scoring, normalisation: Normalisation, world: World, beam_width: int, filtered: bool
) -> None:
    world.decoder = FakeDecoder(world.decoder.bias_QE, world.decoder.mixing_EE)
    beams = world.run(scoring, normalisation, beam_width, filtered)
    waiting: list[list[int]] = []
    for query in range(len(world.vectors_QD)):
        expected, gap, unfinished = Oracle(world, scoring, normalisation, query).beam_search(beam_width, filtered)
        assume(gap > TOLERANCE)
        found = found_sids(world, beams, query)
        assert {sid for sid, _ in found} == {sid for sid, _ in expected}
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=TOLERANCE)
        assert beams.steps_Q[query] == len(unfinished)
        waiting.append(unfinished)
    columns = [max(counts) for counts in zip_longest(*waiting, fillvalue=0)]
    assert world.decoder.columns == ([] if scoring == "geometric" else columns), "no column more than is unfinished"
    assert beams.steps == len(world.decoder.columns)


def test_finished_beams_ask_the_decoder_nothing() -> None:
    """Document 0 stands alone after one token, the others part at the third: one column is enough for them."""
    table = np.array([[0, 2, 4], [1, 3, 4], [1, 3, 5]], np.int32)
    trie, _ = build_trie(table)
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(3, D)))
    ones = np.ones(6, np.float32)
    tables = WalkTables(trie, vectors, build_regions(trie, vectors), (0, 2, 4, 6), unit(rng.normal(size=(7, E))), ones)
    decoder = FakeDecoder(rng.normal(size=(1, E)), rng.normal(size=(E, E)))
    beams = walk(tables, "generative", "constrained", 5, vectors[:1], decoder)
    assert decoder.columns == [1, 1, 1]
    assert beams.size_Q.tolist() == [3]


@pytest.mark.parametrize("scoring", ["generative", "guided", "geometric"])
def test_explained_levels_add_up_to_the_score(scoring: Scoring) -> None:
    world = make_world(3, 60, 3, 4, 2, variable=True, wide=False)
    beams = world.run(scoring, "constrained", 30, filtered=False, explain=True)
    assert beams.levels_QBL is not None
    oracle = Oracle(world, scoring, "constrained", 1)
    for beam, (sid, score) in enumerate(found_sids(world, beams, 1)):
        levels = beams.levels_QBL[1, beam]
        walked = levels[~np.isnan(levels)]
        depth = min(next(d for d in range(1, 5) if d == len(sid) or oracle.is_alone(sid[:d])), len(sid))
        assert len(walked) == depth
        expected = [oracle.child_score(sid[: level + 1], 0.0) for level in range(depth)]
        if scoring == "guided" and len(sid) > depth - 1 and any(o[: len(sid)] == sid != o for o in world.sids):
            continue  # an end gives way to its own documents' cosine, which belongs to no level
        np.testing.assert_allclose(walked, expected, atol=TOLERANCE)
        if scoring != "geometric":
            assert walked.sum() == pytest.approx(score)


def test_explained_levels_under_full_are_those_of_every_token() -> None:
    """A SID that stands alone is walked on to its last token, and nothing is noted behind that."""
    world = make_world(3, 60, 3, 4, 2, variable=True, wide=False)
    beams = world.run("generative", "full", 60, filtered=False, explain=True)
    assert beams.levels_QBL is not None
    oracle = Oracle(world, "generative", "full", 1)
    lengths = set()
    for beam, (sid, score) in enumerate(found_sids(world, beams, 1)):
        expected = [oracle.log_probability(sid[: level + 1]) for level in range(len(sid))]
        np.testing.assert_allclose(beams.levels_QBL[1, beam], expected + [np.nan] * (4 - len(sid)), atol=TOLERANCE)
        assert sum(expected) == pytest.approx(score, abs=TOLERANCE)
        lengths.add(len(sid))
    assert lengths == {1, 2, 3, 4}


def test_a_finished_beam_stays_before_a_child_of_equal_score_and_larger_number() -> None:
    """Node 1 (token 0) has an end and one child, node 3; node 2 (token 1) is finished; all have probability 1/2."""
    table = np.array([[0, -1], [0, 2], [1, 2]], np.int32)
    trie, _ = build_trie(table)
    vectors = unit(np.random.default_rng(0).normal(size=(3, D)))
    flat = WalkTables(
        trie, vectors, build_regions(trie, vectors), (0, 2, 3), unit(np.ones((4, E))), np.zeros(3, np.float32)
    )
    decoder = FakeDecoder(np.ones((1, E)), np.eye(E))
    beams = walk(flat, "generative", "constrained", 2, vectors[:1], decoder)
    assert beams.score_QB[0].tolist() == pytest.approx([np.log(0.5)] * 2)
    assert beams.node_QB[0].tolist() == [1, 2]


def test_equal_scores_are_ordered_by_node_number() -> None:
    world = make_world(5, 200, 6, 3, 1, variable=False, wide=False)
    tables = world.tables
    flat = WalkTables(
        tables.trie, tables.vectors, tables.regions, tables.level_offsets, tables.tokens_TE,
        np.zeros_like(tables.token_scale_T),
    )  # fmt: skip
    beams = walk(flat, "generative", "constrained", 40, world.vectors_QD, world.decoder)
    keys = list(zip((-beams.score_QB[0]).tolist(), beams.node_QB[0].tolist(), strict=True))
    assert keys == sorted(keys)
    assert len({score for score, _ in keys}) < len(keys), "there are ties to order"


def test_batched_queries_get_what_each_gets_alone() -> None:
    world = make_world(11, 300, 6, 4, 5, variable=True, wide=False)
    together = world.run("guided", "constrained", 17, filtered=False)
    for query in range(5):
        decoder = FakeDecoder(world.decoder.bias_QE[[query]], world.decoder.mixing_EE)
        vector = world.vectors_QD[[query]]
        alone = walk(world.tables, "guided", "constrained", 17, vector, decoder)
        assert alone.node_QB[0].tolist() == together.node_QB[query].tolist()
        np.testing.assert_allclose(alone.score_QB[0], together.score_QB[query], atol=TOLERANCE)


def test_many_children_take_the_matrix_product_and_agree_with_gathered_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(13, 400, 8, 3, 2, variable=False, wide=False)
    results = []
    for share in (0.0, 2.0):  # always, never
        monkeypatch.setattr("service.search.walk.DENSE_SHARE", share)
        world.decoder = FakeDecoder(world.decoder.bias_QE, world.decoder.mixing_EE)
        results.append(world.run("generative", "constrained", 50, filtered=True))
    assert results[0].node_QB.tolist() == results[1].node_QB.tolist()
    np.testing.assert_allclose(results[0].score_QB, results[1].score_QB, atol=TOLERANCE)


def test_filter_that_leaves_nothing_finds_nothing() -> None:
    world = make_world(17, 20, 3, 3, 2, variable=False, wide=False)
    world.eligible[:] = False
    for scoring, normalisation in RULES:
        beams = world.run(scoring, normalisation, 5, filtered=True)
        assert beams.size_Q.tolist() == [0, 0]
    assert world.decoder.columns == []


def test_a_thousand_beams_stay_valid() -> None:
    world = make_world(19, 5000, 12, 4, 1, variable=True, wide=False)
    beams = world.run("generative", "constrained", 1000, filtered=True)
    found = [world.sids[lo] for lo in beams.lo_QB[0, : beams.size_Q[0]]]
    assert len(set(found)) == len(found) == 1000
    for lo, hi in zip(beams.lo_QB[0], beams.hi_QB[0], strict=True):
        assert world.eligible[lo:hi].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam_width": 0}, "between 1 and 1000"),
        ({"beam_width": 1001}, "between 1 and 1000"),
        ({"beam_width": True}, "between 1 and 1000"),
        ({"scoring": "magic"}, "choose one of geometric, generative, guided"),
        ({"normalisation": "half"}, "neither"),
        ({"step": None}, "without a decoder|with a decoder"),
        ({"vectors_QD": np.zeros((1, D + 1), np.float32)}, r"expected float32 \(Q, 7\)"),
        ({"vectors_QD": np.full((1, D), np.nan, np.float32)}, "not finite"),
        ({"eligible": DocumentFilter.from_mask(np.ones(3, np.bool_))}, "over 3 documents"),
        ({"step": lambda embeddings, step, parents: embeddings * np.nan}, "not finite"),
    ],
)
def test_bad_arguments_are_refused_with_the_numbers(change: dict[str, Any], message: str) -> None:
    world = make_world(23, 20, 3, 3, 1, variable=False, wide=False)
    arguments: dict[str, Any] = {
        "scoring": "generative", "normalisation": "constrained", "beam_width": 5, "vectors_QD": world.vectors_QD,
        "step": world.decoder, "eligible": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        walk(world.tables, **(arguments | change))


def test_tables_of_different_indexes_are_refused() -> None:
    world = make_world(29, 20, 3, 3, 1, variable=False, wide=False)
    tables = world.tables
    with pytest.raises(ValueError, match="vectors is"):
        WalkTables(tables.trie, tables.vectors[:5], tables.regions, tables.level_offsets)
    with pytest.raises(ValueError, match="3 levels, the model 2"):
        WalkTables(tables.trie, tables.vectors, tables.regions, (0, 3, 6))


def test_model_without_a_decoder_offers_geometric_only() -> None:
    world = make_world(31, 20, 3, 3, 1, variable=False, wide=False)
    tables = world.tables
    plain = WalkTables(tables.trie, tables.vectors, tables.regions, tables.level_offsets)
    assert plain.scorings == ("geometric",)
    with pytest.raises(ValueError, match="'guided' is not offered: choose one of geometric"):
        walk(plain, "guided", "constrained", 5, world.vectors_QD, world.decoder)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 7), lo=st.integers(0, 5), count=st.integers(0, 9))
def test_products_of_rows_are_those_of_numpy(seed: int, rows: int, lo: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(rows, 19)).astype(np.float32), rng.normal(size=(16, 19)).astype(np.float32)
    found = np.full((rows, count), np.nan, np.float32)
    multiply_rows(left, right, lo, lo + count, found)
    np.testing.assert_allclose(found, left @ right[lo : lo + count].T, atol=1e-4)
