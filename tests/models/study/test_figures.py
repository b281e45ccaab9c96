"""What `figure` reads off a result made by hand, and what is measured far down on results made by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from models.comparison import Row
from models.data import Document
from models.study import measuring
from models.study.claims import figure
from models.study.measuring import measure_bundle, measure_far_down
from models.study.plan import Cell, Plan
from models.task import Task
from tests.tiny import make_bundle, make_documents


def rows_of(scoring: str, recall: dict[int, float], valid_free: dict[int, float], valid_trie: float) -> list[Row]:
    """The rows of one scoring as `evaluate` gives them: fused finds .01 more, sampled .02; R@1 is half of R@10."""
    rows = []
    for place, ranking in enumerate(("lexicographic", "fused", "sampled")):
        for beam, found in recall.items():
            measures = {"R@1": (found + place / 100) / 2, "R@10": found + place / 100}
            shown = (1.0, valid_trie, valid_free.get(beam), beam / 8) if ranking == "lexicographic" else (None,) * 4
            rows.append(Row("walk", measures, scoring, ranking, beam, *shown))
    return rows


def part(recall: float) -> dict[str, float]:
    return {"R@1": recall / 2, "R@10": recall, "deepest": recall + 0.05, "retrieved": 3.0, "queries": 9.0}


ROWS = [
    Row("BM25", {"R@1": 0.005, "R@10": 0.01}),
    *rows_of("generative", {100: 0.4, 10: 0.1, 20: 0.2}, {100: 0.7, 10: 0.95, 20: 0.85}, valid_trie=0.99),
    *rows_of("geometric", {10: 0.5, 20: 0.54}, {}, valid_trie=0.97),
    *rows_of("guided", {20: 0.64, 10: 0.6}, {}, valid_trie=0.98),
]
RESULT: dict[str, Any] = {
    "documents": 60,
    "queries": 60,
    "rows": [asdict(row) for row in ROWS],
    "deep": {
        "generative": {
            "recall": {"20": 0.73, "5": 0.71, "10": 0.72},
            "retrieved": 77.0,
            "parts": {"head": part(0.8), "tail": part(0.3), "head code": part(0.82), "tail code": part(0.32)},
        }
    },
    "given": {"R@1": 0.91, "R@10": 0.92},
    "same": {"R@1": 0.87, "R@10": 0.88},
    "sids": {
        "p_unique": 0.93,
        "cosine": 0.83,
        "mean_length": 2.5,
        "levels": [{"gini": 0.11}, {"gini": 0.22}, {"gini": 0.33}],
    },
    "log": [{"loss": 3.0}, {"generative_mrr": 0.41, "loss": 2.0}, {"generative_mrr": 0.42}],
}


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("p_unique", 0.93),
        ("cosine", 0.83),
        ("mean_length", 2.5),
        ("gini.1", 0.11),
        ("gini.2", 0.22),
        ("gini.3", 0.33),
        ("gini.4", None),
        ("generative.R@1", 0.1),
        ("generative.R@10", 0.2),
        ("geometric.R@10", 0.54),
        ("guided.R@1", 0.32),
        ("guided.R@10", 0.64),
        ("fused.R@10", 0.21),
        ("sampled.R@1", 0.11),
        ("sampled.R@10", 0.22),
        ("steps", 2.5),
        ("retrieved", 77.0),
        ("recall.first", 0.71),
        ("recall.second", 0.72),
        ("recall.deepest", 0.73),
        ("head.R@10", 0.8),
        ("tail.R@1", 0.15),
        ("tail.deepest", 0.35),
        ("head code.R@1", 0.41),
        ("tail code.R@10", 0.32),
        ("given.R@1", 0.91),
        ("given.R@10", 0.92),
        ("same.R@1", 0.87),
        ("same.R@10", 0.88),
        ("invalid.10", 0.05),
        ("invalid.20", 0.15),
        ("invalid.100", 0.3),
        ("invalid.50", None),
        ("invalid", 0.3),
        ("made-up", 0.03),
        ("early.generative_mrr", 0.41),
        ("early.loss", 3.0),
        ("early.accuracy", None),
        ("tail.R@10 less head.R@10", -0.5),
        ("generative.R@10 less gini.4", None),
    ],
)
def test_a_figure_is_read_where_its_name_says(metric: str, value: float | None) -> None:
    found = figure(RESULT, metric)
    assert found is None if value is None else found == pytest.approx(value)


@pytest.mark.parametrize(("beams", "nearest"), [((5, 50), 5), ((100, 10), 10), ((10, 25, 100), 25), ((50, 100), 50)])
def test_without_a_beam_of_20_the_nearest_one_counts(beams: tuple[int, ...], nearest: int) -> None:
    rows = rows_of("generative", {beam: beam / 200 for beam in beams}, {}, valid_trie=1.0)
    result = RESULT | {"rows": [asdict(row) for row in rows]}
    assert figure(result, "generative.R@10") == pytest.approx(nearest / 200)
    assert figure(result, "fused.R@10") == pytest.approx(nearest / 200 + 0.01)
    assert figure(result, "steps") == nearest / 8


def test_a_model_without_a_decoder_has_the_far_figures_of_geometry_and_none_of_writing() -> None:
    rows = rows_of("geometric", {10: 0.5, 20: 0.54}, {}, valid_trie=1.0)
    result = RESULT | {"rows": [asdict(row) for row in rows], "deep": {"geometric": RESULT["deep"]["generative"]}}
    assert figure(result, "retrieved") == 77.0
    assert figure(result, "recall.first") == 0.71
    for metric in ("generative.R@10", "fused.R@10", "steps", "invalid", "invalid.10"):
        assert figure(result, metric) is None, metric


def test_far_down_is_counted_by_hand() -> None:
    """Forty documents, depths 1, 2 and 4; two were asked for in training, and one of their three queries finds its
    document at place 12, too late for a hit. A document of grade 0 is asked for by nobody."""
    ids = [f"d{n}" for n in range(40)]
    qrels = {"q0": {"d0": 1}, "q1": {"d0": 2}, "q2": {"d1": 1}, "q3": {"d2": 1, "d3": 0}, "q4": {"d4": 1}}
    run = {
        "q0": ["d0", "d9"],
        "q1": [*ids[10:21], "d0"],
        "q2": ["d9", "d1"],
        "q3": ["d3", "d9", "d2"],
        "q4": ["d9"],
    }
    task = Task([Document(id_, "", "") for id_ in ids], [], [], [], qrels)
    parts = {"asked": {query: qrels[query] for query in ("q0", "q1", "q2")}, "nobody": {"q3": {"d3": 0}}}
    found = measure_far_down(run, task, dict.fromkeys(ids, 0) | {"d0": 9, "d1": 4}, parts)
    assert found["recall"] == pytest.approx({"1": 1 / 5, "2": 2 / 5, "4": 3 / 5})
    assert found["retrieved"] == 20 / 5
    assert found["buckets"] == [
        {"least": 4, "most": 9, "documents": 2, "queries": 3, "hits": 2},
        {"least": 0, "most": 0, "documents": 38, "queries": 2, "hits": 1},
    ]
    assert found["parts"].keys() == {"asked"}
    asked = {name: found["parts"]["asked"][name] for name in ("R@1", "deepest", "retrieved", "queries")}
    assert asked == pytest.approx({"R@1": 1 / 3, "deepest": 2 / 3, "retrieved": 16 / 3, "queries": 3})


def test_a_given_code_is_weighed_at_the_beam_nearest_20_and_far_down_is_the_widest(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest beam holds the whole tree of at most 64 identifiers, so only there every document is retrieved."""
    bundle = make_bundle(tmp_path / "bundle", make_documents(60, seed=1), level_sizes=(4, 4, 4))
    plan = Plan(
        seeds=(0,), data=("tiny",), beams=(2, 12, 100), queries=12, cell=(Cell(name="a", group="a", recipe="hhq"),)
    )
    walked: list[tuple[str, int]] = []

    def given(_pipeline: Any, _task: Task, scoring: str, beam: int) -> dict[str, float]:
        walked.append((scoring, beam))
        return {"R@1": 0.5}

    monkeypatch.setattr(measuring, "measure_given_first", given)
    result = measure_bundle(bundle, tiny_data, plan)
    walks = {
        (row["scoring"], row["beam"]): row["measures"] for row in result["rows"] if row["ranking"] == "lexicographic"
    }
    assert walked == [("generative", 12)]
    assert result["given"] == {"R@1": 0.5}
    assert result["same"] == pytest.approx(walks["generative", 12])
    assert all(walks["generative", beam] != walks["generative", 12] for beam in (2, 100))
    assert result["deep"]["generative"]["retrieved"] == 60
    assert {beam for scoring, beam in walks if scoring != "generative"} == {2, 12}, "the widest by the decoder alone"
