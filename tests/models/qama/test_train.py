"""Training: resumed equals uninterrupted, the file equals the network, the model artefact takes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models.lines import DataError
from models.qama.objective import Objective, rank_offsets, stretch
from models.qama.recipe import LOSSES, RecipeError
from models.qama.start import FloatArray
from models.qama.train import _optimise, adapt, add_adapter, rate, run, start_objective, train_adapter
from models.qama.vectors import read_vectors
from models.tensors import CheckpointError
from service.index.artefact import ArtefactError
from service.index.bundle import open_model
from service.model.adapter import AdapterError, load_adapter
from service.model.binarizer import Binarizer
from service.model.encoder import Encoder
from service.model.layout import LEVELS
from tests.models.qama.conftest import PREFIXES, small_recipe
from tests.tiny import make_bundle, make_documents, make_model

ALL_LOSSES = dict.fromkeys(LOSSES, 0.1)


def train(vectors, recipe, out, **options):
    return train_adapter(vectors.documents, vectors.queries, recipe, out, pairs=vectors.pairs, quiet=True, **options)


@pytest.mark.parametrize("start", ["rotation", "residual", "random", "none"])
def test_the_codes_of_the_file_are_the_codes_of_the_network(start, vectors, tmp_path):
    recipe = small_recipe(network={"start": start}, losses=ALL_LOSSES)
    objective = _optimise(vectors, recipe, tmp_path, resume=False, quiet=True)
    objective.thresholds.start(adapt(objective, vectors.documents))
    binarizer = Binarizer.open(train(vectors, recipe, tmp_path))
    assert binarizer.levels == LEVELS
    with torch.no_grad():  # the file holds weight matrices in half precision
        for weight in objective.adapter.parameters():
            weight.copy_(weight.half().float() if weight.ndim == 2 else weight)
    adapted = adapt(objective, vectors.queries)
    np.testing.assert_allclose(binarizer.adapt(vectors.queries), adapted.numpy(), atol=3e-5)
    for level in LEVELS:
        layout = binarizer.layout(level)
        ours = objective.thresholds.quantise(adapted, layout).numpy()
        theirs = binarizer.quantise(binarizer.adapt(vectors.queries), layout)
        # numpy and torch round differently in the last bit: only a value that close to its threshold may differ
        assert (ours != theirs).mean() < 1e-3


@pytest.mark.parametrize("loss", ["similarity", "kl", "rank", "contrast", "bottleneck", "orthogonality"])
def test_training_lowers_a_loss_that_it_is_given(loss, vectors, tmp_path):
    """Not eq. 17 and 18, whose ramps raise them over training."""
    recipe = small_recipe(train={"steps": 60, "learning_rate": 3e-3}, losses=dict.fromkeys(LOSSES, 0.0) | {loss: 1.0})
    train(vectors, recipe, tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())
    losses = [step["loss"] for step in history]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_resumed_run_gives_the_adapter_of_an_uninterrupted_one(vectors, tmp_path, monkeypatch):
    recipe = small_recipe(losses=ALL_LOSSES)
    whole = contents(train(vectors, recipe, tmp_path / "whole"))
    forward = Objective.forward

    def fails_at_the_fifth(self, batch, step):
        if step == 4:
            raise KeyboardInterrupt
        return forward(self, batch, step)

    monkeypatch.setattr(Objective, "forward", fails_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(vectors, recipe, tmp_path / "cut")
    monkeypatch.setattr(Objective, "forward", forward)
    steps: list[int] = []
    monkeypatch.setattr(
        Objective, "forward", lambda self, batch, step: (steps.append(step), forward(self, batch, step))[1]
    )
    assert contents(train(vectors, recipe, tmp_path / "cut", resume=True)) == whole
    assert steps == [4, 5]
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "cut")]
    assert histories[0] == histories[1]


def test_a_checkpoint_of_another_run_is_refused(vectors, tmp_path):
    train(vectors, small_recipe(), tmp_path)
    with pytest.raises(CheckpointError, match="is of another recipe, seed or set of vectors"):
        train(vectors, small_recipe(train={"seed": 1}), tmp_path, resume=True)


def test_seeds_change_the_adapter_and_nothing_else_does(vectors, tmp_path):
    first, again = (contents(train(vectors, small_recipe(), tmp_path / name)) for name in "ab")
    other = contents(train(vectors, small_recipe(train={"seed": 1}), tmp_path / "c"))
    assert first == again
    assert first != other


def test_vectors_of_another_width_are_refused(vectors, tmp_path):
    with pytest.raises(ValueError, match="vectors have 8 dimensions, the recipe's prefixes end with 16"):
        train_adapter(vectors.documents[:, :8], None, small_recipe(), tmp_path, quiet=True)


def test_the_learning_rate_rises_and_falls(vectors):
    recipe = small_recipe(train={"steps": 100, "warmup": 0.1})
    rates = [rate(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=1e-3)
    assert max(rates) == rates[9] or max(rates) == rates[10]
    assert rates[50] == pytest.approx(0.5, abs=0.02)
    assert rates[99] < 1e-3
    flat = small_recipe(train={"steps": 100, "warmup": 0.1, "decay": False})
    assert rate(99, flat) == 1.0


def test_the_total_is_the_weighted_sum_over_prefixes(vectors):
    """Eq. 8: doubling one prefix's weight adds exactly that prefix's part."""
    from models.qama.batches import BatchSource

    def part(weights):
        recipe = small_recipe(
            losses=dict.fromkeys(LOSSES, 0.0) | {"variance": weights}, quantisation={"straight_through": False}
        )
        objective = start_objective(vectors, recipe)
        batch = BatchSource(vectors, recipe.batch, 0).batch(0)
        total, parts = objective(batch, 0)
        assert float(total.detach()) == pytest.approx(parts["variance"])
        return parts["variance"]

    alone = [part([float(i == j) for j in range(3)]) for i in range(3)]
    assert part([1.0, 1.0, 1.0]) == pytest.approx(sum(alone), rel=1e-5)
    assert part([1.0, 2.0, 0.0]) == pytest.approx(alone[0] + 2 * alone[1], rel=1e-5)
    assert min(alone) > 0


def test_levels_take_turns_with_weights_that_keep_their_mean():
    objective = Objective(small_recipe(quantisation={"levels_per_step": 2}))
    shares: dict[str, float] = {}
    for step in range(5):
        assert len(objective.levels_of(step)) == 2
        for level, share in objective.levels_of(step).items():
            shares[level] = shares.get(level, 0.0) + share / 5
    assert shares == pytest.approx({"0.5": 0.25, "1": 1, "1.5": 1, "2": 1, "hybrid": 1})


def test_stretched_similarities_have_the_teachers_mean_and_spread():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(8, 9, generator=generator), 0.1 * torch.randn(8, 9, generator=generator) + 0.4
    found = stretch(student, teacher)
    assert float(found.mean()) == pytest.approx(float(teacher.mean()), abs=1e-5)
    assert float(found.std()) == pytest.approx(float(teacher.std()), rel=1e-4)


def test_rank_offsets_are_distinct_and_stay_inside():
    assert rank_offsets(5, 16).tolist() == [1, 2, 3, 4]
    assert len(set(rank_offsets(100, 16).tolist())) == 16


def test_run_trains_on_a_plain_file_of_vectors(vectors, tmp_path):
    np.save(tmp_path / "vectors.npy", vectors.documents.astype(np.float16))
    recipe = write_recipe(tmp_path / "small.toml")
    adapter = run(recipe, [tmp_path / "vectors.npy"], tmp_path / "out", quiet=True)
    assert load_adapter(adapter)[1].prefixes == PREFIXES


def test_run_on_a_folder_without_vectors_says_what_to_give(tmp_path):
    with pytest.raises(DataError, match=r"docs\.npy: no such file; give a \.npy file of vectors"):
        run(write_recipe(tmp_path / "small.toml"), [tmp_path], tmp_path / "out", quiet=True)


def test_run_reads_a_folders_train_queries_and_their_pairs(vectors, tmp_path):
    save_folder(vectors, tmp_path)
    found = read_vectors(tmp_path)
    np.testing.assert_array_equal(found.documents, vectors.documents)
    np.testing.assert_array_equal(found.queries, vectors.queries)
    assert found.pairs.tolist() == vectors.pairs.tolist()


def test_run_with_a_model_encodes_the_folder_and_gives_the_model_its_adapter(tmp_path):
    model = make_model(tmp_path / "model")
    data = write_corpus(tmp_path / "data")
    out = run(write_recipe(tmp_path / "small.toml"), [data], tmp_path / "out", model=model, quiet=True)
    opened = open_model(out)
    assert opened.manifest.adapter.prefixes == PREFIXES
    assert opened.manifest.adapter.levels == LEVELS
    before = open_model(model)
    assert opened.manifest.files["encoder.onnx"] == before.manifest.files["encoder.onnx"]
    Binarizer.open(out / "adapter.safetensors", opened.manifest.files["encoder.onnx"].sha256)
    encoder = Encoder(out / "encoder.onnx", out / "tokenizer.json", opened.manifest.text)
    vectors: FloatArray = read_vectors(data, model, quiet=True).queries
    np.testing.assert_allclose(vectors[:1], encoder.encode_queries(["north compass"]).vectors_QD, atol=1e-5)


def test_an_adapter_of_another_encoder_or_width_is_refused(vectors, tmp_path):
    model = make_model(tmp_path / "model")
    foreign = train(vectors, small_recipe(train={"steps": 0}), tmp_path / "run", encoder="f" * 64)
    with pytest.raises(AdapterError, match="was trained on vectors of the encoder ffffffffffff"):
        add_adapter(model, foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    narrow = train_adapter(
        vectors.documents[:, :8], None, small_recipe(network={"prefixes": (8,)}), tmp_path / "narrow", quiet=True
    )
    with pytest.raises(AdapterError, match="is for 8 dimensions"):
        add_adapter(model, narrow, tmp_path / "out")


@pytest.mark.parametrize("out", ["model", "model/run/deep", "link", "bundle"])
def test_a_run_is_not_written_into_an_artefact(out, tmp_path):
    model = make_bundle(tmp_path / "bundle", decoder=False).with_name("bundle.model")
    model.rename(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    kind = "bundle" if out == "bundle" else "model"
    with pytest.raises(ArtefactError, match=rf"a {kind}, and holds its files only: choose another folder"):
        run(write_recipe(tmp_path / "small.toml"), [tmp_path / "no-such.npy"], tmp_path / out, quiet=True)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "small.toml"])


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("model", {"dimensions": 8}, "gives 8 dimensions, the recipe's prefixes end with 16"),
        ("out/model", {}, "would be replaced by the model with its adapter: choose another --out"),
    ],
)
def test_a_model_that_cannot_have_the_adapter_is_refused_before_data_are_read(model, changes, message, tmp_path):
    made = make_model(tmp_path / model, decoder=False, **changes)
    data = tmp_path / "no-such.npy"
    with pytest.raises((ArtefactError, RecipeError), match=message):
        run(write_recipe(tmp_path / "small.toml"), [data], tmp_path / "out", model=made, quiet=True)


def test_what_is_no_model_is_refused_before_data_are_read(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "encoder.onnx").write_bytes(b"no graph")
    recipe, data = write_recipe(tmp_path / "small.toml"), tmp_path / "no-such.npy"
    with pytest.raises(ArtefactError, match=r"has no manifest\.json"):
        run(recipe, [data], tmp_path / "out", model=tmp_path / "model", quiet=True)


def contents(adapter):
    """Every tensor's bytes; the file's own bytes also depend on the order of its metadata, which is not fixed."""
    tensors, info = load_adapter(adapter)
    return info, {name: tensor.tobytes() for name, tensor in tensors.items()}


def write_recipe(path):
    path.write_text(
        "[network]\nprefixes = [4, 8, 16]\nexpansion = 2\n"
        "[batch]\ndocuments = 16\ngroups = 4\nqueries = 8\nneighbours = 8\n[train]\nsteps = 2\n"
    )
    return path


def save_folder(vectors, folder):
    np.save(folder / "docs.npy", vectors.documents)
    np.save(folder / "queries_train.npy", vectors.queries)
    (folder / "docs.ids.txt").write_text("\n".join(f"d{i}" for i in range(120)))
    (folder / "queries_train.ids.txt").write_text("\n".join(f"q{i}" for i in range(40)))
    (folder / "qrels").mkdir(exist_ok=True)
    lines = [f"q{query}\td{document}\t1" for query, document in vectors.pairs.tolist()]
    (folder / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))


def write_corpus(folder):
    (folder / "qrels").mkdir(parents=True)
    documents = make_documents(30)
    rows = [json.dumps({"_id": d.id, "title": d.title, "text": d.text}) for d in documents]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    queries = [
        json.dumps({"_id": f"q{i}", "text": "north compass" if i == 0 else documents[i].title}) for i in range(8)
    ]
    (folder / "queries.jsonl").write_text("\n".join(queries))
    (folder / "qrels" / "train.tsv").write_text("\n".join(f"q{i}\t{documents[i].id}\t1" for i in range(8)))
    return folder
