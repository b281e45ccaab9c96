"""The study runs from a folder of vectors, keeps what it has, and writes tables, JSON and a plot."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from models.lines import DataError
from models.qama import study
from models.qama.measure import Score
from models.qama.recipe import LOSSES
from models.qama.study import Plan, run_study
from models.qama.study_data import load_set, subset
from models.qama.study_report import Results, level_curve, render
from models.qama.variants import ablation_variants
from tests.models.qama.conftest import small_recipe

ALL = ["thresholds", "documents", "qama"]


@pytest.fixture
def folder(vectors, tmp_path):
    """Two sets in the layout of the study; the test queries are others than the train queries."""
    for name in ("one", "two"):
        home = tmp_path / "data" / name
        (home / "qrels").mkdir(parents=True)
        rng = np.random.default_rng(len(name))
        own = rng.integers(0, 120, 20)
        test = vectors.documents[own] + 0.1 * rng.standard_normal((20, 16))
        np.save(home / "docs.npy", vectors.documents)
        np.save(home / "queries_train.npy", vectors.queries)
        np.save(home / "queries_test.npy", test.astype(np.float16))
        (home / "docs.ids.txt").write_text("\n".join(f"d{i}" for i in range(120)))
        (home / "queries_train.ids.txt").write_text("\n".join(f"q{i}" for i in range(40)))
        (home / "queries_test.ids.txt").write_text("\n".join(f"t{i}" for i in range(20)))
        train = [f"q{query}\td{document}\t1" for query, document in vectors.pairs.tolist()]
        texts = [(f"q{i}", f"Asks for {i}") for i in range(40)] + [(f"t{i}", f"tests {i}") for i in range(20)]
        (home / "queries.jsonl").write_text("\n".join(json.dumps({"_id": id_, "text": text}) for id_, text in texts))
        (home / "qrels" / "train.tsv").write_text("\n".join(train))
        (home / "qrels" / "test.tsv").write_text("\n".join(f"t{i}\td{d}\t1" for i, d in enumerate(own)))
    return tmp_path / "data"


def plan(**changes):
    recipe = small_recipe(train={"steps": 2}, losses={"contrast": 0.5})
    return Plan(**({"sets": ("one", "two"), "seeds": 2, "recipe": recipe, "ablation": True} | changes))


def test_a_second_run_trains_nothing_and_gives_the_same_results(folder, tmp_path, monkeypatch):
    chosen = plan(seeds=1)
    first = run_study(folder, tmp_path / "out", chosen, "the command", quiet=True)
    monkeypatch.setattr(study, "train_adapter", None)
    again = run_study(folder, tmp_path / "out", chosen, "the command", quiet=True)
    assert again == first
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["fp32"] == first.fp32
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "results.md").read_text()
    assert "`the command`" in page
    for variant in plan().variants():
        assert variant.title in page


def test_a_changed_recipe_trains_its_cells_anew(folder, tmp_path, monkeypatch):
    options = {"sets": ("one",), "seeds": 1, "ablation": False}
    run_study(folder, tmp_path / "out", plan(**options), "", quiet=True)
    trained = []
    real = study.train_adapter
    monkeypatch.setattr(study, "train_adapter", lambda *a, **k: (trained.append(a[2]), real(*a, **k))[1])
    changed = small_recipe(train={"steps": 3}, losses={"contrast": 0.5})
    run_study(folder, tmp_path / "out", plan(**options, recipe=changed), "", quiet=True)
    assert [recipe.train.steps for recipe in trained] == [3, 3]  # thresholds train nothing, so they stay as they are


def other_train_query(home):
    queries = np.load(home / "queries_train.npy")
    np.save(home / "queries_train.npy", np.roll(queries, 1, axis=1))


def other_grade(home):
    rewrite(home / "qrels" / "test.tsv", "t3\t", "t30\t")
    with (home / "qrels" / "test.tsv").open("a") as file:
        file.write("\nt3\td0\t2")


def other_test_query(home):
    queries = np.load(home / "queries_test.npy")
    np.save(home / "queries_test.npy", np.roll(queries, 1, axis=1))


@pytest.mark.parametrize(
    ("change", "expected"), [(other_train_query, ["thresholds", "qama"]), (other_grade, ALL), (other_test_query, ALL)]
)
def test_changed_data_trains_the_cells_anew_that_see_it(change, expected, folder, tmp_path, monkeypatch):
    chosen = plan(sets=("one",), seeds=1, ablation=False)
    run_study(folder, tmp_path / "out", chosen, "", quiet=True)
    change(folder / "one")
    trained = []
    real = study.train_adapter
    monkeypatch.setattr(study, "train_adapter", lambda *a, **k: (trained.append(a[3].parent.name), real(*a, **k))[1])
    run_study(folder, tmp_path / "out", chosen, "", quiet=True)
    assert trained == expected


def test_documents_only_sees_no_query(folder, tmp_path, monkeypatch):
    seen = []
    real = study.train_adapter
    monkeypatch.setattr(study, "train_adapter", lambda *a, **k: (seen.append((a[1], k["pairs"])), real(*a, **k))[1])
    run_study(folder, tmp_path / "out", plan(sets=("one",), seeds=1, ablation=False), "", quiet=True)
    assert [queries is None and pairs is None for queries, pairs in seen] == [False, True, False]


def test_training_never_sees_a_test_query(folder, tmp_path):
    data = load_set(folder / "one", tmp_path)
    near = data.train.queries @ data.test.queries.T
    assert near.max() < 0.9999
    assert (data.train.queries[:, None] != data.test.queries[None]).any(axis=2).all()


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_train_queries_with_the_text_of_a_test_query_are_left_out(folder, vectors, tmp_path):
    rewrite(folder / "one" / "queries.jsonl", '"tests 5"', '" ASKS  for 7"')
    rewrite(folder / "one" / "queries.jsonl", '"tests 6"', '"asks for 30"')
    data = load_set(folder / "one", tmp_path)
    kept = [row for row in range(40) if row not in (7, 30)]
    assert data.left_out == 2
    np.testing.assert_allclose(data.train.queries, vectors.queries[kept], atol=1e-6)
    expected = [(kept.index(query), document) for query, document in vectors.pairs.tolist() if query in kept]
    assert list(map(tuple, data.train.pairs.tolist())) == expected
    assert len(data.test.queries) == 20
    assert load_set(folder / "two", tmp_path).left_out == 0
    assert subset(data, 30, 8).left_out == 2


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("qrels/test.tsv", "t3\td", "t3\tnowhere-d", r"test\.tsv: 1 unknown corpus-id values, e\.g\. 'nowhere-d"),
        ("queries_test.ids.txt", "t3", "t-gone", r"queries\.jsonl: 1 unknown query values, e\.g\. 't-gone'"),
        ("queries_train.ids.txt", "q39", "q-gone", r"queries\.jsonl: 1 unknown query values, e\.g\. 'q-gone'"),
    ],
)
def test_unknown_ids_are_named(name, old, new, message, folder, tmp_path):
    rewrite(folder / "one" / name, old, new)
    with pytest.raises(DataError, match=message):
        load_set(folder / "one", tmp_path)


def test_a_train_query_without_a_text_is_named_before_any_is_encoded(folder, tmp_path):
    (folder / "one" / "queries_train.npy").unlink()
    rewrite(folder / "one" / "qrels" / "train.tsv", "q39\t", "q-gone\t")
    with pytest.raises(DataError, match=r"train\.tsv: 1 unknown query-id values, e\.g\. 'q-gone'"):
        load_set(folder / "one", tmp_path)


def test_a_subset_keeps_the_documents_that_its_queries_need(folder, tmp_path):
    data = load_set(folder / "one", tmp_path)
    small = subset(data, documents=30, queries=8)
    assert len(small.test.documents) == 30
    for query, (before, after) in enumerate(zip(data.test.grades, small.test.grades, strict=False)):
        wanted = sorted(map(tuple, data.test.documents[list(before)].tolist()))
        assert sorted(map(tuple, small.test.documents[list(after)].tolist())) == wanted
        assert query < 8
    for query, document in small.train.pairs.tolist():
        original = [d for q, d in data.train.pairs.tolist() if q == query]
        assert any(np.array_equal(small.train.documents[document], data.train.documents[d]) for d in original)


def flat(recipe):
    """Every setting by its dotted name; losses as one weight a prefix."""
    fields = recipe.model_dump()
    tables = {f"{t}.{key}": value for t in fields if isinstance(fields[t], dict) for key, value in fields[t].items()}
    return tables | {f"losses.{name}": [recipe.weight(name, i) for i in range(3)] for name in LOSSES}


def test_ablation_rows_add_one_thing_at_a_time():
    recipe = small_recipe(losses={"contrast": 0.5, "variance": 0.25})
    rows = ablation_variants(recipe)
    changed = []
    for before, after in pairwise(rows):
        a, b = flat(before.recipe), flat(after.recipe)
        changed.append({key for key in a if a[key] != b[key]})
    assert changed == [
        {"losses.quantization"},
        {"losses.kl", "losses.contrast", "losses.quantization"},
        {"losses.orthogonality"},
        {"losses.bottleneck"},
        {"losses.variance"},
        {"network.start"},
        {"quantisation.straight_through"},
        {"batch.groups"},
    ]
    final = rows[-1].recipe
    assert final.losses.variance == 0.25
    assert final.model_copy(update={"losses": recipe.losses}) == recipe
    assert {name for name in LOSSES if getattr(final.losses, name) != getattr(recipe.losses, name)} == {
        "quantization", "orthogonality", "bottleneck",
    }  # fmt: skip


def test_tables_show_means_and_spreads_of_seeds():
    def scores(value):
        levels = ("float", "0.5", "1", "1.5", "2", "hybrid")
        return [Score(level, 8, value, None if level == "float" else 0.5, 8) for level in levels]

    cells = {key: {"one": [scores(0.4), scores(0.44)]} for key in ("thresholds", "documents", "qama")}
    titles = {"thresholds": "Untuned", "documents": "Documents", "qama": "QAMA"}
    results = Results("cmd", (8,), {"one": 0.5}, {"one": {"FP16": 0.5, "Int8": 0.49}}, {"one": 3}, cells, titles)
    page = render(results)
    assert "| QAMA | 2 bit | 84.0 ± 4.0 | 84.0 ± 4.0 | 98 % |" in page
    assert "| QAMA | 1 bit, 40 candidates rescored | 100.0 ± 0.0 | 100.0 ± 0.0 | 99.5 % |" in page
    assert "| Int8 | 8 | 384 | 384 MB | 768 | 768 MB | 75.0 | 98.0 |" in page
    assert "| 1 bit | 1 | 56 | 56 MB | 104 | 104 MB | 96.4 | 84.0 |" in page  # 8 dimensions have a word of their own
    assert "train queries that have the text of one are left out (one 3)" in page
    assert "| 2 bit | 100.0 ± 0.0 | 100.0 ± 0.0 |" in page
    assert level_curve(results, "2") == [(8, pytest.approx(0.84))]


def test_the_command_line_cuts_a_quick_run_down(folder, tmp_path, monkeypatch):
    recipe = tmp_path / "small.toml"
    recipe.write_text("[network]\nprefixes = [8, 16]\nexpansion = 2\n")
    report = tmp_path / "report" / "qama.md"
    out = tmp_path / "out"
    study.main(
        [
            "--data",
            str(folder),
            "--out",
            str(out),
            "--sets",
            "one",
            "--quick",
            "--recipe",
            str(recipe),
            "--report",
            str(report),
        ]
    )
    assert "--sets one --recipe small.toml --quick" in report.read_text()
    assert str(tmp_path) not in report.read_text()
    assert report.with_suffix(".png").is_file()
    assert len(json.loads((out / "one" / "qama" / "0" / "history.json").read_text())) == study.QUICK["steps"]
