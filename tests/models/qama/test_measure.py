"""The measures of the study against ir-measures and brute force."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest

from models.qama.batches import TrainVectors
from models.qama.measure import Judged, baseline, float_baselines, measure, ndcg, nearest, rescore
from models.qama.train import train_adapter
from service.model.binarizer import Binarizer
from service.model.packing import unpack_bits
from tests.models.qama.conftest import PREFIXES, small_recipe


@pytest.fixture(scope="module")
def judged(vectors: TrainVectors) -> Judged:
    rng = np.random.default_rng(2)
    grades = [{int(d): int(rng.integers(1, 4)) for d in rng.choice(120, rng.integers(1, 15), False)} for _ in range(40)]
    return Judged(vectors.documents, vectors.queries, grades)


def by_ir_measures(ranked, grades):
    qrels = [ir_measures.Qrel(str(q), str(d), grade) for q, row in enumerate(grades) for d, grade in row.items()]
    run = [ir_measures.ScoredDoc(str(q), str(d), -rank) for q, row in enumerate(ranked) for rank, d in enumerate(row)]
    return ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]


def test_ndcg_is_that_of_ir_measures(judged):
    ranked = nearest(judged.queries, judged.documents)
    assert ndcg(ranked, judged.grades) == pytest.approx(by_ir_measures(ranked, judged.grades), abs=1e-6)
    assert baseline(judged) == ndcg(ranked, judged.grades)


def test_queries_without_a_relevant_document_are_left_out(judged):
    ranked = nearest(judged.queries, judged.documents)
    assert ndcg(ranked[:2], [judged.grades[0], {}]) == ndcg(ranked[:1], judged.grades[:1])


def test_rescoring_everything_is_exact_search(judged):
    everything = np.tile(np.arange(119, -1, -1), (40, 1))
    np.testing.assert_array_equal(rescore(everything, judged), nearest(judged.queries, judged.documents))


def test_half_precision_changes_next_to_nothing(judged):
    found = float_baselines(judged)
    assert found["FP16"] == pytest.approx(baseline(judged), abs=0.01)
    assert found["Int8"] == pytest.approx(baseline(judged), abs=0.02)


def test_scores_are_those_of_brute_force_over_unpacked_bits(judged, vectors, tmp_path):
    recipe = small_recipe(train={"steps": 0})
    binarizer = Binarizer.open(train_adapter(vectors.documents, None, recipe, tmp_path, quiet=True))
    scores = {(s.level, s.dims): s for s in measure(binarizer, judged)}
    assert {dims for _, dims in scores} == set(PREFIXES)
    for level in binarizer.levels:
        layout = binarizer.layout(level)
        bits = [unpack_bits(binarizer.codes(part, level), layout) for part in (judged.queries, judged.documents)]
        for dims in PREFIXES:
            cut = layout.bits_of(dims)
            distances = (bits[0][:, None, :cut] != bits[1][None, :, :cut]).sum(axis=2)
            order = np.argsort(distances, axis=1, kind="stable")
            found = scores[level, dims]
            assert found.ndcg == pytest.approx(by_ir_measures(order[:, :10], judged.grades), abs=1e-6)
            assert found.rescored == pytest.approx(ndcg(rescore(order[:, :40], judged), judged.grades))
            assert found.bytes == 8 * layout.words_of(dims)
    full = PREFIXES[-1]
    assert scores["float", full].ndcg == pytest.approx(baseline(judged), abs=1e-3)
