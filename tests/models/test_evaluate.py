"""Evaluation of a tiny bundle through the real pipeline, held against plain restatements."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from models.cli import register
from models.comparison import Comparison
from models.data import DataError
from models.evaluate import evaluate, known_share, reorder, walk_once
from models.free_decoding import decode_freely, log_softmax, valid_share
from models.task import EncodedQueries, Settings, Task, make_task
from service.index.bundle import open_bundle
from service.index.documents import Document
from service.search.pipeline import Hit, Pipeline, SearchOptions
from tests.tiny import make_bundle, make_documents, make_model

QUERIES = 12


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("evaluate") / "bundle", level_sizes=(4, 4, 4))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries made of a document's words; the document is the relevant one."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    documents = make_documents()
    lines = [{"_id": d.id, "title": d.title, "text": d.text} for d in documents]
    queries = [{"_id": f"q{i}", "text": " ".join(documents[i].text.split()[:3])} for i in range(QUERIES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (folder / "qrels/test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(QUERIES)))
    return folder


@pytest.fixture(scope="module")
def pipeline(bundle_folder: Path) -> Iterator[Pipeline]:
    opened = Pipeline(open_bundle(bundle_folder), threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def compared(
    bundle_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Path]:
    runs = tmp_path_factory.mktemp("runs") / "new"
    settings = Settings(beams=(2, 8), free_queries=5, batch=5, runs=runs)
    return evaluate(bundle_folder, data_folder, settings), runs


def plain_figures(task: Task, found: list[list[str]]) -> tuple[float, float]:
    """R@10 and MRR@10 where query q<i> has the one relevant document d<i>."""
    wanted = [f"d{query.removeprefix('q')}" for query in task.ids]
    ranks = [row.index(one) + 1 if one in row else None for one, row in zip(wanted, found, strict=True)]
    within = [rank for rank in ranks if rank is not None and rank <= 10]
    return len(within) / len(found), sum(1 / rank for rank in within) / len(found)


def test_every_scoring_ranking_and_beam_has_a_row_beside_the_baselines(compared: tuple[Comparison, Path]) -> None:
    rows = compared[0].rows
    walks = [(row.scoring, row.ranking, row.beam) for row in rows if row.system == "walk"]
    expected = itertools.product(("generative", "geometric", "guided"), ("lexicographic", "cosine", "fused"), (2, 8))
    assert sorted(walks) == sorted(expected)
    assert [row.system for row in rows[:2]] == ["BM25", "dense, bundle"]
    words = [(row.system, row.scoring, row.beam) for row in rows[-4:]]
    assert words == [
        ("lexical", "", None), ("hybrid", "generative", 100), ("hybrid", "geometric", 100), ("hybrid", "guided", 100),
    ]  # fmt: skip
    assert (compared[0].documents, compared[0].queries, compared[0].free_queries) == (60, QUERIES, 5)


def test_words_that_count_nothing_are_joined_with_no_walk(data_folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", lexical_weight=0.0)
    settings = Settings(scorings=("geometric",), rankings=("cosine",), beams=(2,), free_queries=0)
    rows = evaluate(bundle, data_folder, settings).rows
    assert [row.system for row in rows] == ["BM25", "dense, bundle", "walk", "lexical"]


def test_rows_measure_what_the_pipeline_answers(
    compared: tuple[Comparison, Path], pipeline: Pipeline, data_folder: Path
) -> None:
    """Each row against the pipeline asked with that very ranking, its measures worked out by hand."""
    task = make_task_of(data_folder, pipeline)
    for row in compared[0].rows:
        if row.system not in ("walk", "lexical", "hybrid"):
            continue
        options = SearchOptions(
            top_k=100,
            beam_width=row.beam,
            scoring=row.scoring or None,
            ranking=row.ranking if row.system == "walk" else "lexicographic",  # type: ignore[arg-type]
            mode="generative" if row.system == "walk" else row.system,  # type: ignore[arg-type]
        )
        answers = pipeline.search(task.texts, options)
        recall, reciprocal = plain_figures(task, [[hit.id for hit in answer.hits] for answer in answers])
        assert row.measures["R@10"] == pytest.approx(recall), row.name
        assert row.measures["MRR@10"] == pytest.approx(reciprocal), row.name


@pytest.mark.parametrize("scoring", ["generative", "geometric", "guided"])
@pytest.mark.parametrize("ranking", ["lexicographic", "cosine", "fused"])
def test_candidates_are_reordered_as_the_pipeline_orders_them(
    pipeline: Pipeline, data_folder: Path, scoring: str, ranking: str
) -> None:
    task = make_task_of(data_folder, pipeline)
    walked = walk_once(pipeline, EncodedQueries(pipeline.encoder, task, 5), scoring, 6, lambda _: None)
    options = SearchOptions(top_k=100, beam_width=6, scoring=scoring, ranking=ranking)  # type: ignore[arg-type]
    weight = pipeline.bundle.manifest.model.fusion_weight
    for hits, answer in zip(walked.hits, pipeline.search(task.texts, options), strict=True):
        result = reorder(hits, ranking, weight)
        assert [id_ for id_, _ in result] == [hit.id for hit in answer.hits]
        np.testing.assert_allclose([score for _, score in result], [hit.score for hit in answer.hits], rtol=1e-5)


def make_task_of(data_folder: Path, pipeline: Pipeline) -> Task:
    from models.data import load_dataset

    return make_task(load_dataset(data_folder), Settings(), pipeline.bundle)


def test_leaves_may_be_sampled_in_place_of_ordered_by_cosine() -> None:
    """Beams keep their order; inside a leaf the order is drawn: nearly even over many, and the same each time."""

    def hits(start: int) -> list[Hit]:
        scores = [(-1.0, 0.9), (-1.0, 0.8), (-2.0, 0.95)]
        return [
            Hit(start + n, Document(f"d{n}", "", ""), 0.0, cosine, score, (0,))
            for n, (score, cosine) in enumerate(scores)
        ]

    orders = [[id_ for id_, _ in reorder(hits(start), "sampled", 1.0)] for start in range(400)]
    assert all(order[2] == "d2" for order in orders)
    assert 140 < sum(order[0] == "d0" for order in orders) < 260
    assert orders[0] == [id_ for id_, _ in reorder(hits(0), "sampled", 1.0)]


def test_the_first_queries_are_a_sample_and_not_the_head_of_the_file(data_folder: Path, pipeline: Pipeline) -> None:
    from models.data import load_dataset

    dataset = load_dataset(data_folder)
    whole, few = (make_task(dataset, Settings(limit=limit), pipeline.bundle).ids for limit in (0, 4))
    assert few == whole[:4] != dataset.judged("test")[:4]
    assert sorted(whole) == sorted(dataset.judged("test"))


def test_all_identifiers_are_valid_with_the_trie_and_not_all_without(compared: tuple[Comparison, Path]) -> None:
    rows = {(row.scoring, row.ranking, row.beam): row for row in compared[0].rows}
    for scoring in ("generative", "geometric", "guided"):
        assert rows[scoring, "lexicographic", 8].valid_trie == 1.0
    assert rows["generative", "lexicographic", 8].valid_free is not None
    assert 0 <= rows["generative", "lexicographic", 8].valid_free < 1
    assert rows["geometric", "lexicographic", 8].valid_free is None


def test_an_unknown_identifier_lowers_the_valid_share(pipeline: Pipeline, data_folder: Path) -> None:
    task = make_task_of(data_folder, pipeline)
    walked = walk_once(pipeline, EncodedQueries(pipeline.encoder, task, 12), "geometric", 4, lambda _: None)
    sids = {pipeline.bundle.trie.sid(position) for position in range(60)}
    hits = [hit for row in walked.hits for hit in row]
    lost = pipeline.bundle.trie.sid(hits[0].position)
    expected = sum(pipeline.bundle.trie.sid(hit.position) != lost for hit in hits) / len(hits)
    assert known_share(walked, pipeline.bundle, sids - {lost}) == pytest.approx(expected)
    assert known_share(walked, pipeline.bundle, sids) == 1.0


def test_free_decoding_covers_the_tree_like_brute_force() -> None:
    """With a beam that holds every sequence, the beams are all sequences sorted by their probability."""
    rng = np.random.default_rng(0)
    tokens, scale = rng.normal(size=(4, 5)).astype(np.float32), np.array([1.0, 2.0, 0.5], dtype=np.float32)
    weights = rng.normal(size=(5, 5)).astype(np.float32)

    class Memory:
        """A decoder whose hidden state is the mean of all embeddings of a beam's path: it must reorder its cache."""

        def __init__(self) -> None:
            self.paths = np.zeros((2, 1, 0, 5), dtype=np.float32)

        def __call__(self, embeddings: np.ndarray, number: int, parents: np.ndarray | None) -> np.ndarray:
            if parents is not None:
                self.paths = np.take_along_axis(self.paths, parents[:, :, None, None], axis=1)
            self.paths = np.concatenate([self.paths, embeddings[:, :, None]], axis=2)
            assert self.paths.shape[2] == number + 1
            return self.paths.mean(axis=2) @ weights * np.array([1.0, -2.0])[:, None, None].astype(np.float32)

    spans = [(0, 2), (0, 3), (1, 3)]
    found = decode_freely(Memory(), 2, tokens, scale, 27, spans, ())
    for query, sign in enumerate((1.0, -2.0)):
        expected = {}
        for path in itertools.product(*(range(*span) for span in spans)):
            total, seen = 0.0, [tokens[3]]
            for token, (lo, hi) in zip(path, spans, strict=True):
                logits = (np.mean(seen, axis=0) @ weights * sign) @ tokens[lo:hi].T * scale[lo:hi]
                total += log_softmax(logits)[token - lo]
                seen.append(tokens[token])
            expected[path] = total
        ordered = sorted(expected, key=lambda path: -expected[path])
        assert [tuple(row) for row in found.tokens[query].tolist()] == ordered
        np.testing.assert_allclose(found.log_probabilities[query], [expected[p] for p in ordered], atol=1e-4)


def test_a_beam_that_wrote_a_whole_identifier_ends_there() -> None:
    """(0,) is whole: it keeps its score and its one place in the beam, however it might go on."""
    tokens, scale = np.eye(4, dtype=np.float32), np.full(3, 2.0, np.float32)

    def step(embeddings: np.ndarray, number: int, parents: np.ndarray | None) -> np.ndarray:
        return np.broadcast_to(np.array([1.0, 0.5, 0.0, 0.0], np.float32), embeddings.shape)

    found = decode_freely(step, 1, tokens, scale, 4, [(0, 2), (0, 3)], {(0,), (1, 2)})
    first = log_softmax(np.array([2.0, 1.0], np.float32))
    then = log_softmax(np.array([2.0, 1.0, 0.0], np.float32))
    assert found.tokens[0].tolist() == [[0, -1], [1, 0], [1, 1], [1, 2]]
    np.testing.assert_allclose(found.log_probabilities[0], [first[0], *(first[1] + then)], atol=1e-6)
    assert valid_share(found.tokens, {(0,), (1, 2)}, (1, 2, 4)) == {1: 1.0, 2: 0.5, 4: 0.5}


def test_run_files_hold_every_row_in_six_columns(compared: tuple[Comparison, Path]) -> None:
    found, runs = compared
    assert {path.stem for path in runs.iterdir()} == {row.name for row in found.rows}
    lines = [line.split(" ") for line in (runs / "walk-guided-cosine-beam8.trec").read_text().splitlines()]
    assert all(len(line) == 6 and line[5] == "walk-guided-cosine-beam8" for line in lines)
    ranks = [int(line[3]) for line in lines if line[0] == "q0"]
    assert ranks == list(range(1, len(ranks) + 1))


def test_the_table_comes_as_markdown_and_json(compared: tuple[Comparison, Path], tmp_path: Path) -> None:
    found = compared[0]
    lines = found.as_markdown().splitlines()
    assert lines[0].endswith(f" test: {QUERIES} queries, 60 documents**")
    assert len(lines) == 4 + len(found.rows)
    assert len({line.count("|") for line in lines[2:]}) == 1
    found.write_json(tmp_path / "r.json")
    loaded = json.loads((tmp_path / "r.json").read_text())
    assert [row["measures"] for row in loaded["rows"]] == [row.measures for row in found.rows]
    assert loaded["digest"] == found.digest


@pytest.mark.parametrize("kind", ["model", "vectors"])
def test_another_encoder_is_a_row(bundle_folder: Path, data_folder: Path, tmp_path: Path, kind: str) -> None:
    """A model folder, or vectors with ids in any order; vectors that point at the answer find it every time."""
    if kind == "model":
        untuned = make_model(tmp_path / "other", seed=5, dimensions=8, decoder=False)
    else:
        untuned = tmp_path
        np.save(tmp_path / "docs.npy", np.eye(60, dtype=np.float16)[::-1])
        (tmp_path / "docs.ids.txt").write_text("".join(f"d{i}\n" for i in reversed(range(60))))
        np.save(tmp_path / "queries_test.npy", np.eye(60, dtype=np.float16)[:QUERIES])
        (tmp_path / "queries_test.ids.txt").write_text("".join(f"q{i}\n" for i in range(QUERIES)))
    settings = Settings(scorings=("geometric",), beams=(2,), untuned=untuned)
    found = evaluate(bundle_folder, data_folder, settings)
    row = next(row for row in found.rows if row.system == "dense, untuned")
    assert row.measures["R@100"] == 1.0  # sixty documents only
    assert (row.measures["R@1"] == 1.0) or kind == "model"


def test_a_bundle_without_decoder_is_measured_by_geometry(data_folder: Path, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", decoder=False)
    found = evaluate(folder, data_folder, Settings(beams=(4,), baselines=False, limit=3))
    assert {(row.system, row.scoring) for row in found.rows} == {
        ("walk", "geometric"), ("lexical", ""), ("hybrid", "geometric"),
    }  # fmt: skip
    assert found.queries == 3


def test_data_that_do_not_fit_the_bundle_are_refused(bundle_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    small = make_bundle(tmp_path / "small", make_documents()[:5])
    with pytest.raises(DataError, match=r"7 unknown judged document values, e\.g\. 'd\d+'.*5 are known"):
        evaluate(small, data_folder, Settings())
    with pytest.raises(DataError, match=r"no split 'dev'|dev\.tsv: no such file"):
        evaluate(bundle_folder, data_folder, Settings(split="dev"))
    with pytest.raises(DataError, match="does not offer scoring 'telepathic': it offers generative, geometric, guided"):
        evaluate(bundle_folder, data_folder, Settings(scorings=("telepathic",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rankings": ("best",)}, "ranking 'best': must be one of lexicographic"),
        ({"beams": ()}, r"beams \[\]: need at least one"),
        ({"beams": (0,)}, "width of 1 to 1,000"),
        ({"beams": (10**9,)}, "width of 1 to 1,000"),
        ({"batch": 0}, "batch 0"),
        ({"limit": -1}, "limit -1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_queries_that_stand_in_train_are_counted(bundle_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """Only with a document of theirs; the same words in other case and spacing are the same."""
    shutil.copytree(data_folder, tmp_path / "data")
    asked = [json.loads(line)["text"] for line in (tmp_path / "data" / "queries.jsonl").read_text().splitlines()]
    with (tmp_path / "data" / "queries.jsonl").open("a") as file:
        for number, text in enumerate((f"  {asked[0].upper()} ", asked[1], "nobody asks this")):
            file.write(json.dumps({"_id": f"t{number}", "text": text}) + "\n")
    train = "query-id\tcorpus-id\tscore\nt0\td0\t1\nt1\td7\t1\nt2\td2\t1\n"
    (tmp_path / "data" / "qrels" / "train.tsv").write_text(train)
    settings = Settings(beams=(2,), baselines=False, free_queries=0, scorings=("geometric",))
    found = evaluate(bundle_folder, tmp_path / "data", settings)
    assert found.seen == 1
    assert found.title.endswith("60 documents; 1 query stands in train with a document of theirs")
    (tmp_path / "data" / "qrels" / "train.tsv").write_text(train + "unknown\td2\t1\nt2\tunknown\t1\n")
    assert evaluate(bundle_folder, tmp_path / "data", settings).seen == 1, "who is unknown was not asked here"
    (tmp_path / "data" / "qrels" / "train.tsv").write_text("no qrels at all")
    assert evaluate(bundle_folder, tmp_path / "data", settings).seen == 0


@pytest.fixture
def commands() -> Typer:
    app = Typer(pretty_exceptions_enable=False)
    register(app)
    return app


def test_rhumb_evaluate_prints_the_table_and_writes_files(
    commands: Typer, bundle_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = ["--scoring", "geometric", "--beam", "3", "--ranking", "cosine", "--free-queries", "0"]
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md"), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(
        commands, ["evaluate", str(bundle_folder), "--data", str(data_folder), *options, *files]
    )
    assert result.exit_code == 0, result.output
    for expected in ("BM25", "dense, bundle", "geometric", "nDCG@10"):
        assert expected in result.stdout
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 5
    assert (tmp_path / "r.md").read_text().count("\n| ") == 7
    assert len(list((tmp_path / "runs").iterdir())) == 5


def test_rhumb_report_prints_json_and_picture(commands: Typer, bundle_folder: Path, tmp_path: Path) -> None:
    interactions = tmp_path / "interactions.tsv"
    interactions.write_text("corpus-id\tcount\nd0\t5\n")
    options = [
        "--interactions",
        str(interactions),
        "--json",
        str(tmp_path / "r.json"),
        "--plot",
        str(tmp_path / "r.png"),
    ]
    result = CliRunner().invoke(commands, ["report", str(bundle_folder), *options])
    assert result.exit_code == 0, result.output
    assert "p_unique" in result.stdout
    assert "head" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["documents"] == 60
    interactions.write_text("nowhere\t5\n")
    result = CliRunner().invoke(commands, ["report", str(bundle_folder), *options])
    assert isinstance(result.exception, DataError)
    result = CliRunner().invoke(commands, ["report", str(tmp_path / "nothing.npy"), "--level-sizes", "a,b"])
    assert result.exit_code == 2


def test_packed_codes_are_measured_level_by_level(data_folder: Path, tmp_path: Path) -> None:
    """Rows of a bundle with codes against counted bits, rescored rows against plain cosines, cascades by their sets."""
    bundle = make_bundle(
        tmp_path / "bundle", level_sizes=(4, 4, 4), dimensions=128, code_levels=("1", "2"), code_prefixes=(64, 128)
    )
    settings = Settings(beams=(2,), scorings=("geometric",), baselines=False, batch=5)
    found = evaluate(bundle, data_folder, settings)
    rows = {(row.scoring, row.ranking): row for row in found.rows if row.system == "Hamming"}
    assert sorted(rows) == [("1", "distance"), ("1", "rescored 4x"), ("2", "distance"), ("2", "rescored 4x")]
    with closing(Pipeline(open_bundle(bundle), threads=1)) as pipeline:
        assert pipeline.codes is not None
        task = make_task_of(data_folder, pipeline)
        vectors = pipeline.encoder.encode_queries(task.texts).vectors_QD
        ids = [document.id for document in task.documents]
        for level in ("1", "2"):
            documents = pipeline.codes.pack(np.asarray(pipeline.bundle.vectors), level)
            queries = pipeline.codes.pack(vectors, level)
            bits = np.unpackbits((queries[:, None] ^ documents[None]).view(np.uint8), axis=2).sum(2)
            order = np.argsort(bits, axis=1, kind="stable")
            expected = plain_figures(task, [[ids[p] for p in row] for row in order])
            assert (rows[level, "distance"].measures["R@10"], rows[level, "distance"].measures["MRR@10"]) == expected
            for cascade in found.cascades:
                if cascade.level == level:
                    assert cascade.words < cascade.all_words
                    assert 0 <= cascade.recall <= 1
        cosines = np.argsort(-(vectors @ pipeline.bundle.vectors.T), axis=1, kind="stable")
        exact = plain_figures(task, [[ids[p] for p in row] for row in cosines])
        assert rows["1", "rescored 4x"].measures["MRR@10"] == pytest.approx(exact[1]), "60 documents: all are rescored"
    assert len(found.as_markdown().splitlines()) == 4 + len(found.rows) + (3 + len(found.cascades))
