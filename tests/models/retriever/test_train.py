"""A whole run on a tiny encoder: learns, resumes to the same result, publishes models that index and answer."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import models.retriever.run as running
import models.retriever.train as training
from models.data import load_dataset, vectors_file
from models.quantizers.acrq import ACRQ
from models.retriever.batches import Texts, embed, tokenize
from models.retriever.material import gather
from models.retriever.network import Encoder, load_backbone
from models.retriever.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from models.retriever.run import load_tokenizer
from models.retriever.stages import leave_out
from models.retriever.tree import CodeTree
from service.index.build import build_bundle
from service.index.bundle import open_bundle, open_model
from service.model.encoder import Encoder as ServedEncoder
from service.search.pipeline import Pipeline, SearchOptions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the TorchScript exporter, about itself


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "tiny",
        "text": {"max_query_tokens": 16, "max_document_tokens": 32},
        "encoder": {"name": str(folder), "freeze_embeddings": False},
        "quantizer": {"system": "hhq", "level_sizes": [8, 8]},
        "decoder": {"layers": 1, "heads": 2, "width": 16, "dropout": 0.1},
        "pseudo_queries": {"per_document": 2},
        "dev_share": 0.1,
        "bf16": False,
        "stage": [
            {"name": "tune", "objective": "contrast", "epochs": 2, "batch": 16, "encoder_lr": 1e-3},
            {"name": "decode", "objective": "decode", "epochs": 4, "batch": 32, "decoder_lr": 3e-3, "patience": 4},
        ],
    }
    return parse_recipe(table | changes)


def test_copied_queries_are_cut_out_of_their_documents() -> None:
    documents = Texts([[101, 1, 2, 3, 4, 102], [101, 5, 6, 102], [101, 1, 2, 3, 102], [101, 7, 2, 3, 8, 102]], 0)
    queries = Texts([[101, 2, 3, 102], [101, 5, 6, 102], [101, 9, 102], [101, 102], [101, 7, 2, 102]], 0)
    pairs = [(0, 0), (1, 1), (2, 2), (3, 2), (0, 3), (4, 3)]
    cut = leave_out(documents, queries, pairs, 1.0, random.Random(0))
    assert cut.ids == [
        [101, 1, 4, 102],
        [101, 5, 6, 102],  # nothing would be left
        [101, 1, 2, 3, 102],  # its queries are not in it
        [101, 7, 8, 102],  # of two that overlap the first
    ]
    assert documents.ids[0] == [101, 1, 2, 3, 4, 102], "the texts themselves stay"
    shares = [
        leave_out(documents, queries, [(0, 0)], 0.9, random.Random(seed)).ids[0] != documents.ids[0]
        for seed in range(400)
    ]
    assert 0.85 < np.mean(shares) < 0.95


def test_what_is_held_out_is_in_no_history(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Queries of two users, in turns; only the last of each can be held out, however much is asked for."""
    shutil.copytree(tiny_data, tmp_path / "data")
    qrels = tmp_path / "data" / "qrels" / "train.tsv"
    _, *rows = qrels.read_text().splitlines()
    renamed = {row.split("\t")[0]: f"user{number % 2}-{number}" for number, row in enumerate(rows)}
    for path in (qrels, tmp_path / "data" / "queries.jsonl"):
        text = path.read_text()
        for old, new in renamed.items():
            text = text.replace(f'"{old}"', f'"{new}"').replace(f"{old}\t", f"{new}\t")
        path.write_text(text)
    (tmp_path / "data" / "sequences.jsonl").write_text("")
    recipe = tiny_recipe(tiny_encoder).model_copy(update={"dev_share": 0.4})
    dataset = load_dataset(tmp_path / "data", splits=["train"])
    material = gather([dataset], recipe, load_tokenizer(str(tiny_encoder)))
    assert len(material.held_out) == 2
    assert {document for _, document in material.held_out} == {
        dataset.position[row.split("\t")[1]] for row in rows[-2:]
    }


def test_every_seed_holds_out_the_same_queries(tiny_encoder: Path, tiny_data: Path) -> None:
    """Or an encoder that one run tuned would have seen what the next run, with another seed, validates on."""
    dataset, tokenizer = load_dataset(tiny_data, splits=["train"]), load_tokenizer(str(tiny_encoder))
    held_out, shares = [], []
    for seed, dev_share in ((0, 0.4), (1, 0.4), (2, 0.4), (3, 0.2)):
        recipe = tiny_recipe(tiny_encoder).model_copy(update={"seed": seed, "dev_share": dev_share})
        material = gather([dataset], recipe, tokenizer)
        held_out.append({(str(material.queries.ids[query]), document) for query, document in material.held_out})
        shares.append(len(material.held_out))
    assert held_out[0] == held_out[1] == held_out[2]
    assert held_out[3] < held_out[0], "a smaller share is a part of the larger"
    assert shares[0] > shares[3] > 0


@pytest.mark.parametrize(("trust", "share"), [("full", 0.8), ("as_right", 0.4)])
def test_a_teacher_counts_as_far_as_it_is_right(
    tiny_encoder: Path, trust: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 1, 2 and 20 are an MRR@10 of one half."""
    monkeypatch.setattr(training, "exact_ranks", lambda *_: np.array([1, 2, 20]))
    recipe = tiny_recipe(tiny_encoder, objective={"distillation": 0.8, "trust": trust})
    rows: list[dict[str, Any]] = []
    run = SimpleNamespace(
        recipe=recipe, material=SimpleNamespace(held_out=[(0, 0)]), log=lambda **row: rows.append(row)
    )
    work = SimpleNamespace(stage=recipe.stage[-1])
    assert training.trusted_distillation(run, work) == pytest.approx(share)  # type: ignore[arg-type]
    assert [row["teacher_mrr"] for row in rows] == ([] if trust == "full" else [pytest.approx(0.5)])


@pytest.mark.parametrize(("trust", "learnt"), [("full", True), ("as_right", False)])
def test_the_weight_of_geometry_is_learnt_or_held(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, trust: str, learnt: bool
) -> None:
    """Adam moves whatever it is given; what held-out queries decide is not given to it."""
    recipe = tiny_recipe(tiny_encoder, objective={"trust": trust, "guided_weight": 5.0})
    training.run(recipe, [tiny_data], tmp_path)
    rows = log_of(tmp_path)
    begun = next((row["guided_weight"] for row in rows if "guided_weight" in row), 5.0)
    share = next(row["decoder_share"] for row in rows if "decoder_share" in row)
    served = open_model(tmp_path / "model").manifest.guided_weight
    assert ("guided_weight" in {name for row in rows for name in row}) is not learnt
    assert (served * max(share, 1.0) == pytest.approx(begun)) is not learnt


def test_a_dev_split_is_what_validation_asks(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    qrels = tmp_path / "data" / "qrels"
    shutil.copy(qrels / "test.tsv", qrels / "dev.tsv")
    recipe, tokenizer = tiny_recipe(tiny_encoder), load_tokenizer(str(tiny_encoder))
    without = gather([load_dataset(tiny_data, splits=training.train_splits(tiny_data))], recipe, tokenizer)
    material = gather(
        [load_dataset(tmp_path / "data", splits=training.train_splits(tmp_path / "data"))], recipe, tokenizer
    )
    assert len(material.held_out) == len((qrels / "dev.tsv").read_text().splitlines()) - 1
    assert len(material.real) == len(without.real) + len(without.held_out), "all of train is for training"


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    training.run(tiny_recipe(tiny_encoder), [tiny_data], out)
    return out


@pytest.fixture(scope="module")
def learnt(tiny_encoder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is long enough to learn its sixty documents."""
    out = tmp_path_factory.mktemp("learnt")
    stages = [
        {"name": "tune", "objective": "contrast", "epochs": 25, "batch": 60, "encoder_lr": 5e-3},
        {"name": "decode", "objective": "decode", "epochs": 25, "batch": 64, "decoder_lr": 5e-3},
    ]
    training.run(tiny_recipe(tiny_encoder, stage=stages), [tiny_data], out)
    return out


def test_losses_fall(learnt: Path) -> None:
    rows = log_of(learnt)
    tune = [row["contrast_loss"] for row in rows if "contrast_loss" in row]
    decode = [row["generative_loss"] for row in rows if "generative_loss" in row]
    guided = [row["guided_loss"] for row in rows if "guided_loss" in row]
    assert tune[-1] < 0.7 * tune[0]
    assert decode[-1] < 0.85 * decode[0]
    assert guided[-1] < guided[0], "geometry knows most of these documents already"
    assert all(0 <= row["guided_mrr"] <= 1 for row in rows if "guided_loss" in row)


@pytest.mark.parametrize("precision", ["model", "model-int8"])
def test_models_index_and_answer(learnt: Path, tiny_data: Path, tmp_path: Path, precision: str) -> None:
    """A published model makes a bundle, and a train query finds its document by every scoring the model offers."""
    dataset = load_dataset(tiny_data, splits=["train"])
    build_bundle(learnt / precision, dataset.documents, tmp_path / "bundle", threads=1, progress=False)
    pairs = dataset.pairs("train")[:40]
    with closing(open_bundle(tmp_path / "bundle")) as bundle, closing(Pipeline(bundle, threads=1)) as pipeline:
        assert set(bundle.manifest.model.scorings) == {"geometric", "generative", "guided"}
        for scoring in bundle.manifest.model.scorings:
            options = SearchOptions(top_k=5, beam_width=20, scoring=scoring)
            answers = pipeline.search([dataset.queries[query] for query, _ in pairs], options)
            found = [
                dataset.documents[d].id in [h.id for h in a.hits] for (_, d), a in zip(pairs, answers, strict=True)
            ]
            assert np.mean(found) > 0.6


@pytest.mark.parametrize("run", ["trained", "learnt"])
def test_int8_and_float32_give_the_same_first_ids_mostly(
    run: str, tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Both precisions are the same model: same tokens, same quantizer, other weights in the graphs only.

    Guided scores of a model that learnt its documents hang on geometry alone, so one that learnt little is asked too.
    """
    out: Path = request.getfixturevalue(run)
    whole, small = (open_model(out / name) for name in ("model", "model-int8"))
    assert np.array_equal(np.load(whole.path / "tokens.npy"), np.load(small.path / "tokens.npy"))
    assert (small.path / "encoder.onnx").stat().st_size < (whole.path / "encoder.onnx").stat().st_size
    dataset = load_dataset(tiny_data, splits=["train"])
    queries = [dataset.queries[query] for query, _ in dataset.pairs("train")]
    vectors = np.load(vectors_file(out, tiny_data))
    first: dict[str, list[list[tuple[int, ...]]]] = {"generative": [], "guided": []}
    for model in (whole, small):
        target = tmp_path / model.path.name
        build_bundle(model.path, dataset.documents, target, vectors=vectors, threads=1, progress=False)
        with closing(open_bundle(target)) as bundle, closing(Pipeline(bundle, threads=1)) as pipeline:
            for scoring, found in first.items():
                answers = pipeline.search(queries, SearchOptions(top_k=1, scoring=scoring))
                found.append([answer.hits[0].sid for answer in answers])
    for scoring, found in first.items():
        assert len(set(found[0])) > 20, "not the same for all queries"
        assert np.mean([one == other for one, other in zip(*found, strict=True)]) > 0.9, scoring


@pytest.mark.parametrize("cut", ["tune", "decode"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    trained: Path, tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """A run that dies in the second epoch of a stage and is started again publishes bit-equal tensors."""
    epochs = 0
    name = f"{'contrast' if cut == 'tune' else 'decode'}_epoch"
    whole = getattr(training, name)

    def dies_in_second(*arguments: Any) -> Any:
        nonlocal epochs
        epochs += 1
        if epochs == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(training, name, dies_in_second)
    with pytest.raises(KeyboardInterrupt):
        training.run(tiny_recipe(tiny_encoder), [tiny_data], tmp_path)
    monkeypatch.setattr(training, name, whole)
    training.run(tiny_recipe(tiny_encoder), [tiny_data], tmp_path)
    assert (tmp_path / "model/encoder.onnx").read_bytes() == (trained / "model/encoder.onnx").read_bytes()
    assert (tmp_path / "model/decoder.onnx").read_bytes() == (trained / "model/decoder.onnx").read_bytes()
    assert (tmp_path / "model/tokens.npy").read_bytes() == (trained / "model/tokens.npy").read_bytes()


def test_a_checkpoint_of_another_recipe_is_refused(trained: Path, tiny_encoder: Path, tiny_data: Path) -> None:
    with pytest.raises(ValueError, match="of another recipe, seed or data set"):
        training.run(tiny_recipe(tiny_encoder, seed=9), [tiny_data], trained)


@pytest.mark.parametrize("system", ["hhq", "rq_kmeans", "dgi", "rq_vae"])
def test_the_index_has_the_sids_that_were_trained(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """With matrix products in bfloat16: vectors that are a little off have other codes, and the decoder other paths."""
    trees: list[CodeTree] = []
    vectors: list[np.ndarray] = []
    whole = training.make_tree

    def noted(run: Any) -> CodeTree:
        vectors.append(run.vectors_ND.numpy())
        trees.append(whole(run))
        return trees[-1]

    monkeypatch.setattr(training, "make_tree", noted)
    quantizer = {"system": system, "level_sizes": [16, 16, 16]}
    recipe = tiny_recipe(tiny_encoder, bf16=True, quantizer=quantizer, stage=[DECODE | {"epochs": 1}])
    model = training.run(recipe, [tiny_data], tmp_path / "run")
    documents = load_dataset(tiny_data, splits=["train"]).documents
    trained = {documents[row].id: trees[-1].trie.sid(place) for place, row in enumerate(trees[-1].order)}
    kept = np.load(tmp_path / "run" / "vectors" / f"{tiny_data.name}.npy")
    for name, given in (("model", None), ("model", kept), ("model-int8", kept)):
        target = tmp_path / f"bundle of {name}"
        build_bundle(model.with_name(name), documents, target, vectors=given, threads=1, progress=False, replace=True)
        with closing(open_bundle(target)) as bundle:
            ids = [bundle.documents.get(place).id for place in range(len(documents))]
            indexed = {id_: bundle.trie.sid(place) for place, id_ in enumerate(ids)}
            rows = [[document.id for document in documents].index(id_) for id_ in ids]
            np.testing.assert_allclose(vectors[-1][rows], bundle.vectors, atol=1e-5)
        assert trained == indexed


def test_a_checkpoint_of_other_judgements_is_refused(
    trained: Path, tiny_encoder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The texts are the same; which query asks for which document is not."""
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "run")
    qrels = tmp_path / "data" / "qrels" / "train.tsv"
    head, *rows = (line.split("\t") for line in qrels.read_text().splitlines())
    turned = [[row[0], other[1], row[2]] for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    qrels.write_text("\n".join("\t".join(row) for row in [head, *turned]) + "\n")
    with pytest.raises(ValueError, match="of another recipe, seed or data set"):
        training.run(tiny_recipe(tiny_encoder), [tmp_path / "data"], tmp_path / "run")


@pytest.mark.parametrize("died_in", [2, 4])
def test_a_run_that_goes_on_remembers_its_patience_and_its_teacher(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died_in: int
) -> None:
    """The walks get worse after the first epoch: with patience 2 there are three epochs, however often it dies."""
    recipe = tiny_recipe(
        tiny_encoder,
        stage=[DECODE | {"patience": 2, "encoder_lr": 1e-3}, DECODE | {"name": "settle", "epochs": 1}],
        objective={"trust": "as_right"},
    )
    worse = {1: 0.9, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.1}
    epochs: list[float] = []
    whole = training.decode_epoch

    def counted(work: Any, seed: str) -> Any:
        if work.stage.name == "decode":
            epochs.append(work.distillation)
            if len(epochs) == died_in:
                raise KeyboardInterrupt
        return whole(work, seed)

    monkeypatch.setattr(training, "decode_epoch", counted)
    monkeypatch.setattr(
        training, "walked_scores", lambda *_: {"generative_mrr": worse[len({row["epoch"] for row in log_rows()}) + 1]}
    )

    def log_rows() -> list[dict[str, Any]]:
        rows = log_of(tmp_path) if (tmp_path / "log.jsonl").exists() else []
        return [row for row in rows if "epoch" in row and row["stage"] == "decode"]

    with contextlib.suppress(KeyboardInterrupt):
        training.run(recipe, [tiny_data], tmp_path)
    died_in = 0
    training.run(recipe, [tiny_data], tmp_path)
    assert [row["epoch"] for row in log_rows()] == [1, 2, 3]
    assert len(set(epochs)) == 1, "the teacher's share is what it was when the stage began"
    rows = [row for row in log_of(tmp_path) if row.get("stage") == "settle"]
    (weight,) = (row["guided_weight"] for row in rows if "guided_weight" in row)
    (share,) = (row["decoder_share"] for row in rows if "decoder_share" in row)
    served = open_model(tmp_path / "model").manifest.guided_weight
    assert served == pytest.approx(weight / max(share, 1.0)), "no epoch moves what held-out queries said"


def test_held_out_queries_are_walked_as_often_as_asked(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Every second epoch and after the last; how often changes nothing that is learnt."""
    often, seldom = (tmp_path / name for name in ("often", "seldom"))
    for out, every in ((often, 1), (seldom, 2)):
        stage = DECODE | {"epochs": 3, "validate_every": every, "patience": 0}
        training.run(tiny_recipe(tiny_encoder, stage=[stage]), [tiny_data], out)
    walked = [
        [row["epoch"] for row in log_of(out) if "epoch" in row and "guided_mrr" in row] for out in (often, seldom)
    ]
    assert walked == [[1, 2, 3], [2, 3]]
    losses = [[row["guided_loss"] for row in log_of(out) if "epoch" in row] for out in (often, seldom)]
    assert losses[0] == losses[1]


def test_what_is_held_out_is_not_trained_on_under_another_document(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Every query has two relevant documents: both pairs are held out, or neither."""
    shutil.copytree(tiny_data, tmp_path / "data")
    qrels = tmp_path / "data" / "qrels" / "train.tsv"
    _, *rows = (line.split("\t") for line in qrels.read_text().splitlines())
    with qrels.open("a") as file:
        file.writelines(f"{row[0]}\t{other[1]}\t1\n" for row, other in zip(rows, rows[2:] + rows[:2], strict=True))
    recipe = tiny_recipe(tiny_encoder).model_copy(update={"dev_share": 0.3})
    dataset = load_dataset(tmp_path / "data", splits=["train"])
    material = gather([dataset], recipe, load_tokenizer(str(tiny_encoder)))
    held, kept = (
        {tuple(material.queries.ids[query]) for query, _ in pairs} for pairs in (material.held_out, material.real)
    )
    assert held
    assert not held & kept
    assert len(material.held_out) == 2 * int(0.3 * len(rows))


def test_what_is_held_out_is_not_trained_on_under_another_id(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Every train query is asked a second time, in capitals: whoever holds one out leaves the other away."""
    shutil.copytree(tiny_data, tmp_path / "data")
    queries, qrels = tmp_path / "data" / "queries.jsonl", tmp_path / "data" / "qrels" / "train.tsv"
    _, *rows = (line.split("\t") for line in qrels.read_text().splitlines())
    texts = {row["_id"]: row["text"] for row in map(json.loads, queries.read_text().splitlines())}
    with queries.open("a") as file:
        file.writelines(json.dumps({"_id": f"{row[0]}-again", "text": texts[row[0]].upper()}) + "\n" for row in rows)
    with qrels.open("a") as file:
        file.writelines(f"{row[0]}-again\t{row[1]}\t1\n" for row in rows)
    recipe = tiny_recipe(tiny_encoder).model_copy(update={"dev_share": 0.1})
    dataset = load_dataset(tmp_path / "data", splits=["train"])
    material = gather([dataset], recipe, load_tokenizer(str(tiny_encoder)))
    assert len(material.held_out) == int(0.1 * 2 * len(rows))
    ids = material.queries.ids
    assert not {tuple(ids[q]) for q, _ in material.held_out} & {tuple(ids[q]) for q, _ in material.real}
    assert len(material.real) >= 2 * len(rows) - 2 * len(material.held_out)


def test_more_codes_than_documents_are_refused_before_anything_is_trained(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_encoder, quantizer={"system": "hhq", "level_sizes": [8, 500]})
    with pytest.raises(RecipeError, match="a level of 500 codes for 60 documents"):
        training.run(recipe, [tiny_data], tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_more_frozen_layers_than_there_are_is_refused(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_encoder, encoder={"name": str(tiny_encoder), "freeze_layers": 99})
    with pytest.raises(RecipeError, match=r"freeze_layers is 99, the encoder has \d layers"):
        training.run(recipe, [tiny_data], tmp_path)


@pytest.mark.parametrize("key", ["max_query_tokens", "max_document_tokens"])
def test_texts_longer_than_the_encoders_positions_are_refused(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, key: str
) -> None:
    recipe = tiny_recipe(tiny_encoder, text={"max_query_tokens": 16, "max_document_tokens": 64} | {key: 65})
    with pytest.raises(RecipeError, match=rf"text\.{key} is 65, and .* reads 64 tokens: give fewer"):
        training.run(recipe, [tiny_data], tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_moving_encoder_is_held_by_its_anchor(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With `encoder_lr` a decode stage moves the encoder; a strong anchor keeps documents nearer to where they were."""
    dataset = load_dataset(tiny_data, splits=["train"])
    encoder = Encoder(load_backbone(str(tiny_encoder)))
    texts = tokenize(load_tokenizer(str(tiny_encoder)), [f"{d.title} {d.text}" for d in dataset.documents], 32)
    start = embed(encoder, texts, "cpu", False, "documents").numpy()
    kept = {}
    for anchor in (0.0, 50.0):
        stage = {"name": "both", "objective": "decode", "epochs": 3, "batch": 32, "encoder_lr": 3e-3, "anchor": anchor}
        recipe = tiny_recipe(tiny_encoder, stage=[stage, DECODE | {"epochs": 1}])
        model = open_model(training.run(recipe, [tiny_data], tmp_path / str(anchor)))
        served = ServedEncoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
        kept[anchor] = float(
            (served.encode_documents([(d.title, d.text) for d in dataset.documents]) * start).sum(1).mean()
        )
    assert kept[0.0] < kept[50.0]


def test_a_model_without_a_decoder_offers_geometry_only(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    stages = [{"name": "tune", "objective": "contrast", "epochs": 1, "batch": 16, "encoder_lr": 1e-3}]
    recipe = tiny_recipe(tiny_encoder, decoder={"layers": 0}, stage=stages)
    model = open_model(training.run(recipe, [tiny_data], tmp_path))
    assert model.manifest.scorings == ("geometric",)
    assert not (model.path / "decoder.onnx").exists()


@pytest.mark.parametrize("layers", [0, 1])
def test_head_and_tail_are_told_apart_by_train_queries(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """A model without a decoder has its codebooks fitted at the end, with the same counts."""
    counts: list[Any] = []
    whole = ACRQ.fit

    def noted(quantizer: ACRQ, *arguments: Any) -> Any:
        counts.append(quantizer.interactions_N)
        return whole(quantizer, *arguments)

    monkeypatch.setattr(ACRQ, "fit", noted)
    recipe = tiny_recipe(
        tiny_encoder,
        quantizer={"system": "acrq", "level_sizes": [8, 8], "epochs": 1},
        decoder={"layers": layers, "heads": 2, "width": 16},
        stage=[TUNE, DECODE | {"epochs": 1}][: 1 + layers],
    )
    training.run(recipe, [tiny_data], tmp_path)
    (found,) = counts
    dataset = load_dataset(tiny_data, splits=["train"])
    real = gather([dataset], recipe, load_tokenizer(str(tiny_encoder))).real
    np.testing.assert_array_equal(found, np.bincount([document for _, document in real], minlength=60))


def test_an_encoder_that_was_not_written_to_its_end_does_not_count_as_tuned(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the weights and the tokenizer; the same command then goes on to a whole folder."""
    recipe = tiny_recipe(tiny_encoder, decoder={"layers": 0}, stage=[TUNE])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "save_tokenizer", die)
        with pytest.raises(KeyboardInterrupt):
            training.run(recipe, [tiny_data], tmp_path)
    assert not (tmp_path / "encoder").exists()
    for _ in range(2):  # a folder that is there is replaced
        training.run(recipe, [tiny_data], tmp_path)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            p.name for p in (tmp_path / "encoder").iterdir()
        }
    assert not (tmp_path / "encoder.partial").exists()


TUNE = {"name": "tune", "objective": "contrast", "epochs": 1, "batch": 16, "encoder_lr": 1e-3}
DECODE = {"name": "decode", "objective": "decode", "epochs": 6, "batch": 32, "decoder_lr": 3e-3}


PREFIXED = {"max_query_tokens": 9, "max_document_tokens": 9, "query_prefix": "q: "}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, r"colour: unknown key; allowed here: .*quantizer"),
        ({"decoder": {"depth": 2}}, r"decoder.depth: unknown key; allowed here: bearing, dropout, heads, layers"),
        ({"pseudo_queries": {"source": "file"}}, "source 'file' needs path"),
        ({"stage": []}, "stage"),
        ({"dev_share": 0.9}, "dev_share"),
        ({"decoder": {"layers": 0}}, r"a decode stage needs a decoder: decoder\.layers is 0"),
        ({"stage": [TUNE]}, "no stage trains the decoder"),
        ({"stage": [TUNE, DECODE, TUNE]}, "a contrast stage follows one that uses codes"),
        ({"objective": {"generative": 0, "guided": 0}}, "a decode stage would learn nothing"),
        ({"objective": {"generative": 0, "scale": 9}}, r"scale is 9\.0 and .*generative 0: nothing reads it, rem"),
        ({"objective": {"generative": 0, "distillation": 0.5}}, r"distillation is 0\.5 and generative 0: .*remove"),
        ({"objective": {"guided": 0, "guided_weight": 9}}, r"guided_weight is 9\.0 and guided 0: .* set guided above"),
        (
            {"objective": {"guided": 0, "distillation": 0, "trust": "as_right"}},
            "trust is 'as_right', distillation 0 and guided 0: nothing listens",
        ),
        ({"stage": [TUNE | {"decoder_lr": 1e-3}, DECODE]}, "stage 'tune': a contrast stage .*, remove decoder_lr"),
        ({"stage": [TUNE | {"patience": 2, "anchor": 1}, DECODE]}, "stage 'tune': .*, remove patience and anchor"),
        ({"stage": [TUNE | {"validate_every": 2}, DECODE]}, "stage 'tune': .*, remove validate_every"),
        ({"stage": [DECODE | {"patience": 2, "validate_every": 2}]}, "patience counts epochs, so validate_every must"),
        ({"stage": [DECODE | {"encoder_lr": 1e-4}]}, "stage 'decode' comes last and moves .*: .* encoder_lr = 0"),
        (
            {"stage": [TUNE | {"leave_out": 0.5}, DECODE], "text": PREFIXED},
            "leave_out looks for a query's words in its document, and text.query_prefix is 'q: ': use one",
        ),
        (
            {"quantizer": {"system": "sarq", "level_sizes": [4, 4], "threshold": 0.1, "held_out": True}},
            "quantizer.threshold is 0.1, and with held_out the held-out queries choose it: use one of them",
        ),
        ({"stage": [DECODE | {"anchor": 2.0}]}, "stage 'decode': anchor is 2.0 and encoder_lr 0: .* set encoder_lr"),
        (
            {"objective": {"guided": 0}, "default_scoring": "guided"},
            "default_scoring is 'guided', and objective.guided is 0: raise it",
        ),
        (
            {"objective": {"generative": 0}, "default_scoring": "generative"},
            "default_scoring is 'generative', and objective.generative is 0: raise it",
        ),
        (
            {"decoder": {"layers": 0}, "stage": [TUNE], "default_scoring": "guided"},
            "default_scoring is 'guided', and decoder.layers is 0: set 'geometric'",
        ),
    ],
)
def test_recipes_are_refused_by_name(tiny_encoder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(tiny_encoder, **changes)


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="no recipe 'nonsense': give a TOML file, or one of:"):
        load_recipe("nonsense")


def test_an_empty_encoder_name_is_refused(tiny_data: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    recipe = tiny_recipe(tiny_encoder, encoder={"name": ""})
    with pytest.raises(RecipeError, match=r"encoder\.name is empty"):
        training.run(recipe, [tiny_data], tmp_path)
