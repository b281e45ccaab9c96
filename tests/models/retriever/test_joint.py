"""DGI's joint stage: its losses against the equations, its runs from training to answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import models.retriever.run as running
import models.retriever.train as training
from models.data import load_dataset
from models.quantizers.base import systems
from models.quantizers.gumbel import Gumbel, GumbelSettings, SoftPath, soft_path
from models.retriever.batches import tokenize
from models.retriever.joint import (
    GradientLog,
    Joint,
    decoder_reads,
    loss_weights,
    quantize_softly,
    soft_hidden,
    tie_codebooks,
    untie_codebooks,
)
from models.retriever.joint_losses import diversity_loss, global_loss, local_loss, next_token_loss
from models.retriever.network import Decoder, DecoderShape, Encoder, Retriever
from models.retriever.objectives import contrast
from models.retriever.recipe import RECIPES, JointTable, Recipe, RecipeError, load_recipe, parse_recipe
from models.retriever.shelf import Shelf
from service.index.build import build_bundle
from service.index.bundle import open_bundle, open_model
from service.model.text import TextSettings
from service.model.tokens import TextTokenizer
from service.search.pipeline import Pipeline, SearchOptions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the TorchScript exporter, about itself

JOINT = {"name": "joint", "objective": "joint", "queries": "real", "epochs": 3, "batch": 32, "encoder_lr": 1e-3}
DECODE = {"name": "decode", "objective": "decode", "queries": "real", "epochs": 2, "batch": 32}


def small_recipe(folder: Path, **changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "small",
        "text": {"max_query_tokens": 16, "max_document_tokens": 32},
        "encoder": {"name": str(folder), "freeze_embeddings": False},
        "quantizer": {"system": "dgi", "level_sizes": [8, 6]},
        "decoder": {"layers": 1, "heads": 2, "width": 16, "dropout": 0.1},
        "objective": {"constraint": "none", "guided": 0, "scale": 30},
        "joint": {"gradient_log_steps": 2},
        "default_scoring": "generative",
        "dev_share": 0.1,
        "bf16": False,
        "stage": [JOINT],
    }
    table |= changes
    if all(stage["objective"] != "joint" for stage in table["stage"]):
        del table["joint"]
    return parse_recipe(table)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def case(seed: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Unit vectors (5, 2, 4), two codebooks, codes (5, 2)."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(5, 2, 4))
    codes = np.stack([rng.integers(k, size=5) for k in (4, 3)], axis=1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), [rng.normal(size=(k, 4)) for k in (4, 3)], codes


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), unit_heads=st.booleans())
def test_next_token_loss_is_equation_16(seed: int, unit_heads: bool) -> None:
    hidden, books, codes = case(seed)
    scale, expected = (3.0, 9.0), 0.0
    for row in range(5):
        for level, book in enumerate(books):
            lengths = np.linalg.norm(book, axis=1) if unit_heads else np.ones(len(book))
            expected -= math.log(softmax(scale[level] * (book @ hidden[row, level]) / lengths)[codes[row, level]]) / 5
    heads = [torch.from_numpy(book).float() for book in books]
    found = next_token_loss(torch.from_numpy(hidden), heads, torch.tensor(scale), torch.from_numpy(codes), unit_heads)
    assert float(found) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), beta=st.floats(0, 2))
def test_reconstruction_losses_are_equations_17_and_18(seed: int, beta: float) -> None:
    residuals, books, codes = case(seed)
    x, vectors = np.random.default_rng(seed).normal(size=(5, 4)), residuals * 0.7
    whole, local = 0.0, 0.0
    for row in range(5):
        total = vectors[row].sum(0)
        whole += (1 - x[row] @ total / (np.linalg.norm(x[row]) * np.linalg.norm(total))) / 5
        for level, book in enumerate(books):
            distance = ((residuals[row, level] - book[codes[row, level]]) ** 2).sum()
            local += (distance + beta * distance) / 5
    tensors = [torch.from_numpy(book) for book in books]
    assert float(global_loss(torch.from_numpy(x), torch.from_numpy(vectors))) == pytest.approx(whole)
    found = local_loss(torch.from_numpy(residuals), tensors, torch.from_numpy(codes), beta)
    assert float(found) == pytest.approx(local)


def test_local_loss_stops_gradients_where_equation_18_says() -> None:
    book = torch.tensor([[1.0, 0.0]], requires_grad=True)
    residual = torch.tensor([[[0.5, 0.5]]], requires_grad=True)
    local_loss(residual, [book], torch.tensor([[0]]), 0.25).backward()
    torch.testing.assert_close(book.grad, torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(residual.grad, 0.25 * torch.tensor([[[-1.0, 1.0]]]))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_contrast_is_equation_19_and_diversity_equation_20(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, keys, label = rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.integers(2, size=4)
    expected = -np.mean([math.log(softmax(keys @ q / 0.3)[k]) for q, k in zip(queries, label, strict=True)])
    found = contrast(torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(label), 0.3)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    weights = [np.stack([softmax(rng.normal(size=k)) for _ in range(5)]) for k in (4, 3)]
    entropy = -sum(p * math.log(p) for level in weights for p in level.mean(0))
    assert float(diversity_loss([torch.from_numpy(w) for w in weights])) == pytest.approx(-entropy, abs=1e-6)


def tiny_retriever() -> Retriever:
    shape = DecoderShape(layers=1, heads=1, width=8, embedding=4, memory=4)
    return Retriever(Encoder(torch.nn.Identity()), Decoder(shape), (3, 2), (30.0, 3.0, 40.0))


def test_shared_codebooks_are_the_tokens_and_free_ones_are_not() -> None:
    """Shared, the quantizer sees every move of the tokens until it is untied; free, tokens and codebooks part."""
    for share in (True, False):
        torch.manual_seed(0)
        retriever, quantizer = tiny_retriever(), Gumbel(GumbelSettings(level_sizes=(3, 2)))
        quantizer.codebooks = [torch.randn(3, 4), torch.randn(2, 4)]
        start = torch.cat(quantizer.codebooks)
        parameters = tie_codebooks(retriever, quantizer, share)
        with torch.no_grad():
            parameters[0] += 1.0
        assert torch.equal(quantizer.codebooks[0], start[:3] + 1)
        assert torch.equal(retriever.tokens, torch.cat(quantizer.codebooks)) == share
        untie_codebooks(quantizer)
        with torch.no_grad():
            parameters[0] += 1.0
        assert torch.equal(quantizer.codebooks[0], start[:3] + 1)
        assert not quantizer.codebooks[0].requires_grad


def joint_of(retriever: Retriever, **table: Any) -> Joint:
    """A joint stage without data, its quantizer's codebooks of random directions."""
    quantizer = Gumbel(GumbelSettings(level_sizes=(3, 2)))
    quantizer.codebooks = [torch.randn(3, 4), torch.randn(2, 4)]
    tie_codebooks(retriever, quantizer, table.get("share", True))
    retriever.tokens.requires_grad_()
    work = SimpleNamespace(retriever=retriever, bf16=False, device="cpu")
    return Joint(work, quantizer, JointTable(**table), lambda: 0.0)  # type: ignore[arg-type]  # what these tests read of it


@pytest.mark.parametrize("share", [True, False])
def test_the_decoder_reads_soft_codewords_with_gradients(share: bool) -> None:
    """Section 4.1.1: mixtures of codewords by p of eq. 6, made unit, that vectors and codebooks learn through."""
    torch.manual_seed(1)
    retriever, x_GD = tiny_retriever(), torch.nn.functional.normalize(torch.randn(5, 4), dim=1).requires_grad_()
    joint = joint_of(retriever, share=share)
    if not share:
        with torch.no_grad():
            retriever.tokens.add_(torch.randn_like(retriever.tokens))
    path = quantize_softly(joint, x_GD)
    read = decoder_reads(joint, path)
    tokens = torch.split(retriever.tokens, (3, 2))
    for level, weight in enumerate(path.weights):
        assert 0.05 < float(weight.detach().max(dim=1).values.min()) < 0.999, "soft, not the code itself"
        mixed = torch.nn.functional.normalize(weight @ tokens[level], dim=1)
        torch.testing.assert_close(read[:, level], mixed)
    gradients = torch.autograd.grad(read[:, 1].sum(), [x_GD, retriever.tokens])
    assert all(gradient.abs().sum() > 1e-3 for gradient in gradients)


def test_straight_through_reads_codes_and_passes_gradients_by() -> None:
    """The codewords of the codes, forward; backward as if they were the residuals (without soft gradients)."""
    torch.manual_seed(1)
    retriever, x_GD = tiny_retriever(), torch.nn.functional.normalize(torch.randn(5, 4), dim=1).requires_grad_()
    joint = joint_of(retriever, straight_through=True)
    path = quantize_softly(joint, x_GD)
    read = decoder_reads(joint, path)
    own = torch.split(retriever.unit_tokens(), (3, 2))
    for level in range(2):
        torch.testing.assert_close(read[:, level], own[level][path.codes_GL[:, level]])
    assert torch.autograd.grad(read.sum(), x_GD)[0].abs().sum() > 1e-3


def test_a_hidden_state_has_read_what_is_before_its_code_and_no_more() -> None:
    torch.manual_seed(1)
    retriever = tiny_retriever().eval()
    work = joint_of(retriever).work
    states, mask, read = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.long), torch.randn(2, 2, 4)
    before = soft_hidden(work, states, mask, read)
    last, first = read.clone(), read.clone()
    last[:, 1] += 1.0
    first[:, 0] += 1.0
    torch.testing.assert_close(soft_hidden(work, states, mask, last), before)
    moved = soft_hidden(work, states, mask, first)
    torch.testing.assert_close(moved[:, 0], before[:, 0])
    assert (moved[:, 1] - before[:, 1]).abs().max() > 1e-3


def test_every_part_has_its_own_learning_rate_and_loss_its_weight(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    stage = JOINT | {"encoder_lr": 1e-3, "decoder_lr": 2e-3, "quantizer_lr": 3e-3}
    weights = {"reconstruction": 0.2, "local": 0.3, "diversity": 0.5}
    objective = {"constraint": "none", "guided": 0, "generative": 0.1, "contrast": 0.4}
    recipe = small_recipe(tiny_encoder, stage=[stage], joint=weights, objective=objective)
    run = running.start_run(recipe, [load_dataset(tiny_data, ["train"])], tmp_path, "cpu", Shelf())
    training.prepare(run, recipe.stage[0])
    groups = {group["name"]: group for group in training.parameter_groups(run, recipe.stage[0])}
    assert {name: group["peak"] for name, group in groups.items()} == {
        "encoder": 1e-3,
        "decoder": 2e-3,
        "quantizer": 3e-3,
    }
    held = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    assert held["quantizer"] == {id(run.retriever.tokens)}
    assert held["encoder"] == {id(p) for p in run.retriever.encoder.parameters() if p.requires_grad}
    assert run.retriever.decoder is not None
    assert {id(p) for p in run.retriever.decoder.parameters()} < held["decoder"]
    assert not held["decoder"] & (held["encoder"] | held["quantizer"])
    work = SimpleNamespace(objective=recipe.objective)
    found = loss_weights(SimpleNamespace(work=work, table=recipe.joint))  # type: ignore[arg-type]  # what it reads of it
    assert found == {"generative": 0.1, "contrast": 0.4} | weights


def test_gradient_norms_are_logged_before_they_are_clipped() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [parameter], "name": "encoder"}], lr=0.1)
    rows: list[dict[str, Any]] = []
    norms = GradientLog(optimizer, lambda **row: rows.append(row), every=2)
    for step, gradient in enumerate(([3.0, 4.0], [0.0, 1.0], [9.0, 9.0]), 1):
        parameter.grad = torch.tensor(gradient)
        norms.record(step)
    assert rows == [{"step": 2, "gradient_encoder": 3.0, "gradient_encoder_max": 5.0}]


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dgi")
    stage = JOINT | {"epochs": 80, "batch": 60, "encoder_lr": 5e-3, "decoder_lr": 5e-3, "quantizer_lr": 5e-3}
    training.run(small_recipe(tiny_encoder, stage=[stage]), [tiny_data], out)
    return out


def test_history_is_cut_before_the_query_as_in_service(tiny_encoder: Path, tiny_data: Path) -> None:
    """A query with more history than fits has the ids that the service would give it, and keeps its own words."""
    dataset = load_dataset(tiny_data, splits=["train"])
    past = tuple(document.title for document in dataset.documents[:12])
    dataset = replace(dataset, histories=dict.fromkeys(dataset.queries, past))
    text = {"max_query_tokens": 12, "max_document_tokens": 16, "history_count": 10}
    recipe = small_recipe(tiny_encoder, text=text, dev_share=0)
    material = running.gather([dataset], recipe, running.load_tokenizer(str(tiny_encoder)))
    served = TextTokenizer(tiny_encoder / "tokenizer.json", recipe.text)
    queries = [dataset.queries[query] for query, _ in dataset.pairs("train")]
    assert material.queries.ids == served.queries(queries, [past] * len(queries))
    assert all(ids[-3:] == bare[-3:] for ids, bare in zip(material.queries.ids, served.queries(queries), strict=True))


@pytest.mark.parametrize("name", ["[PAD]", "<pad>", "<|endoftext|>", "word"])
def test_padding_is_the_services(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"first": 0, name: 1}, unk_token="first"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    served = TextTokenizer(tmp_path / "tokenizer.json", TextSettings(max_query_tokens=8, max_document_tokens=8))
    assert tokenize(tokenizer, ["first"], 8).pad == served.pad_id == (name != "word")


def test_the_temperature_cools_over_the_stage(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is colder than the one before by one factor, from the start's temperature towards the end's."""
    heard: list[float] = []

    def listens(*arguments: Any) -> SoftPath:
        heard.append(arguments[3])
        return soft_path(*arguments)

    monkeypatch.setattr("models.retriever.joint.soft_path", listens)
    training.run(small_recipe(tiny_encoder), [tiny_data], tmp_path)
    assert len(heard) == 3 * 4  # epochs of 108 pairs in batches of 32
    np.testing.assert_allclose(heard, [0.1 ** (step / 12) for step in range(12)])


def answers_of(model: Path, data: Path, target: Path) -> list[bool]:
    """Whether train queries find their documents by generative scoring, through index and pipeline."""
    dataset = load_dataset(data, splits=["train"])
    build_bundle(model, dataset.documents, target, threads=1, progress=False)
    pairs = dataset.pairs("train")[:40]
    with closing(open_bundle(target)) as bundle, closing(Pipeline(bundle, threads=1)) as pipeline:
        assert bundle.manifest.model.default_scoring == "generative"
        options = SearchOptions(top_k=5, beam_width=10)
        answers = pipeline.search([dataset.queries[query] for query, _ in pairs], options)
    return [dataset.documents[d].id in [h.id for h in a.hits] for (_, d), a in zip(pairs, answers, strict=True)]


def test_dgi_learns_logs_and_answers(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows = log_of(trained)
    epochs = [row for row in rows if "generative_loss" in row]
    assert epochs[-1]["generative_loss"] < 0.8 * epochs[0]["generative_loss"]
    assert epochs[-1]["contrast_loss"] < epochs[0]["contrast_loss"]
    assert {"reconstruction_loss", "local_loss", "diversity_loss"} <= epochs[0].keys()
    gradients = next(row for row in rows if "gradient_encoder" in row)
    assert all(
        0 < gradients[f"gradient_{group}"] <= gradients[f"gradient_{group}_max"] for group in ("encoder", "quantizer")
    )
    assert rows[-2].keys() == {"stage", "generative_mrr"}
    assert rows[-1].keys() == {"lexical_weight", "hybrid_mrr", "exact_mrr"}
    for model in ("model", "model-int8"):
        assert open_model(trained / model).manifest.lexical_weight == rows[-1]["lexical_weight"]
    assert np.mean(answers_of(trained / "model", tiny_data, tmp_path / "bundle")) > 0.5


def test_heads_of_dgi_are_its_codebooks(trained: Path) -> None:
    """Eq. 9: tokens of the published model are the quantizer's codebooks, made unit (eq. 13)."""
    model = open_model(trained / "model")
    books = load_file(model.path / "quantizer.safetensors")["codebooks"]
    assert model.manifest.quantizer.kind == "residual_cosine"
    assert model.manifest.normalisation == "full"
    np.testing.assert_allclose(
        np.load(model.path / "tokens.npy")[:-1], books / np.linalg.norm(books, axis=1, keepdims=True), atol=1e-6
    )


def test_tiger_trains_and_answers(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Tokens of the retriever's own, codes of a latent space; the index is made without torch."""
    stages = [
        {"name": "tune", "objective": "contrast", "epochs": 10, "batch": 60, "encoder_lr": 5e-3},
        DECODE | {"epochs": 25, "decoder_lr": 5e-3, "batch": 60},
    ]
    quantizer = {"system": "rq_vae", "level_sizes": [8, 6], "hidden": [16], "latent": 6, "epochs": 30}
    recipe = small_recipe(tiny_encoder, stage=stages, quantizer=quantizer)
    model = open_model(training.run(recipe, [tiny_data], tmp_path / "run"))
    assert (model.manifest.dimensions, model.manifest.quantizer.kind) == (24, "residual")
    assert load_file(model.path / "quantizer.safetensors")["codebooks"].shape == (14, 6)
    assert np.load(model.path / "tokens.npy").shape == (15, 24)
    decode = [row["generative_loss"] for row in log_of(tmp_path / "run") if "generative_loss" in row]
    assert decode[-1] < 0.8 * decode[0]
    assert np.mean(answers_of(model.path, tiny_data, tmp_path / "bundle")) > 0.5


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, train: Callable[[], Path]) -> Path:
    """Train, die in the second call of an epoch function, and go on."""
    whole, epochs = getattr(training, name), 0

    def dies_in_second(*arguments: Any) -> Any:
        nonlocal epochs
        epochs += 1
        if epochs == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(training, name, dies_in_second)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.setattr(training, name, whole)
    return train()


FREE = {"share": False, "straight_through": True}
RQ_VAE = {"system": "rq_vae", "level_sizes": [8, 6], "hidden": [16], "latent": 6, "epochs": 3}
HELD_OUT = {"system": "sarq", "base": "dgi", "level_sizes": [8, 6], "held_out": True}
SA2CRQ = {"system": "sa2crq", "level_sizes": [4, 6], "threshold": 0.05, "head_share": 0.5, "epochs": 3}
TAUGHT = {"distillation": 0.9, "trust": "as_right"}
RESUMED = {
    "joint": {"stage": [JOINT | {"epochs": 2}, DECODE]},
    "joint, free heads": {"joint": FREE, "stage": [JOINT | {"epochs": 2}]},
    "tokens of their own": {"quantizer": RQ_VAE, "stage": [DECODE]},
    "lengths that held-out queries choose": {"quantizer": HELD_OUT, "objective": TAUGHT, "stage": [DECODE]},
    "lengths by head and tail": {"quantizer": SA2CRQ, "stage": [DECODE]},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Codebooks, their moments, latent projections and tokens all come back from the checkpoint, bit for bit."""
    recipe = small_recipe(tiny_encoder, **changes)
    whole = training.run(recipe, [tiny_data], tmp_path / "whole")
    name = f"{recipe.stage[0].objective}_epoch"
    parts = interrupted(monkeypatch, name, lambda: training.run(recipe, [tiny_data], tmp_path / "parts"))
    for file in ("quantizer.safetensors", "tokens.npy", "encoder.onnx", "decoder.onnx"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file
    rows = [[row | {"seconds": 0} for row in log_of(model.parent)] for model in (parts, whole)]
    assert rows[0] == rows[1], "what was logged after the last checkpoint is not logged twice"


def test_a_run_that_begins_anew_begins_its_log_anew(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_encoder, stage=[DECODE | {"epochs": 1}], quantizer=RQ_VAE)
    logs = []
    for resume in (True, False, True):
        training.run(recipe, [tiny_data], tmp_path, resume=resume)
        logs.append([row | {"seconds": 0} for row in log_of(tmp_path)])
    assert logs[0] == logs[1] == logs[2]


ABLATIONS: dict[str, dict[str, Any]] = {
    "straight through": {"joint": {"straight_through": True}},
    "free heads": {"joint": {"share": False}},
    "neither": {"joint": FREE},
    "dot product": {"quantizer": {"system": "dgi", "level_sizes": [8, 6], "scaled_cosine": False}},
    "frozen encoder": {"stage": [JOINT | {"encoder_lr": 0.0, "epochs": 8}]},
}


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_ablations_train_to_models_that_index(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = small_recipe(tiny_encoder, **({"stage": [JOINT | {"epochs": 8, "decoder_lr": 3e-3}]} | changes))
    model = training.run(recipe, [tiny_data], tmp_path / "run")
    losses = [row["generative_loss"] for row in log_of(tmp_path / "run") if "generative_loss" in row]
    assert losses[-1] < losses[0]
    assert len(answers_of(model, tiny_data, tmp_path / "bundle")) == 40
    books = load_file(model / "quantizer.safetensors")["codebooks"]
    tokens = np.load(model / "tokens.npy")[:-1]
    tied = recipe.joint.share
    rows = (
        books / np.linalg.norm(books, axis=1, keepdims=True) if recipe.quantizer.get("scaled_cosine", True) else books
    )
    assert np.allclose(tokens, rows, atol=1e-6) == tied


BAD: list[tuple[dict[str, Any], str]] = [
    ({"joint": {"tau": 1}}, r"joint.tau: unknown key; allowed here: beta, diversity, gradient_log_steps"),
    ({"joint": {"temperature_end": 2.0}}, "temperature rises from 1.0 to 2.0"),
    ({"quantizer": {"system": "hhq"}}, "needs quantizer.system = 'dgi', not 'hhq'"),
    ({"decoder": {"layers": 0}}, "needs a decoder: decoder.layers is 0"),
    ({"objective": {"guided": 0}}, "set objective.constraint = 'none' and guided = 0, or end with a decode stage"),
    ({"objective": {"constraint": "none"}}, "generative is 1.0 and objective.guided 1.0: a joint stage trains gener"),
    ({"objective": {"constraint": "none", "guided": 1}}, "set guided = 0 and generative above 0, or end with a decode"),
    ({"objective": {"constraint": "none", "guided": 0, "generative": 0}}, "objective.generative is 0.0 and objective"),
    (
        {"objective": {"constraint": "none", "guided": 0, "trust": "as_right"}},
        r"objective\.trust is of decode stages, and there is none: leave it out, or add one",
    ),
    ({"stage": [JOINT | {"patience": 2}]}, "patience and anchor have no meaning while codes move"),
    ({"stage": [DECODE | {"quantizer_lr": 1e-3}]}, "quantizer_lr belongs to joint stages, this one is decode"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_contradictory_recipes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        small_recipe(tmp_path, **changes)


def test_a_joint_stage_reads_the_scale_whatever_the_next_one_trains(tmp_path: Path) -> None:
    """It is γ of the codes' choice there (eq. 13)."""
    objective = {"constraint": "trie", "generative": 0, "scale": 10.0}
    recipe = small_recipe(tmp_path, stage=[JOINT, DECODE], objective=objective, default_scoring="guided")
    assert recipe.objective.scale == 10.0


def test_a_joint_table_without_a_joint_stage_is_refused(tmp_path: Path) -> None:
    table = small_recipe(tmp_path).model_dump(exclude_unset=True) | {"stage": [DECODE]}
    with pytest.raises(RecipeError, match=r"\[joint\] is given, but no stage has objective = 'joint'"):
        parse_recipe(table)


def test_latent_codes_refuse_tokens_that_do_not_learn(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_encoder, stage=[DECODE], quantizer=RQ_VAE, decoder={"train_tokens": False})
    with pytest.raises(RecipeError, match=r"codes of rq_vae are no vectors to read: decoder.train_tokens must be true"):
        training.run(recipe, [tiny_data], tmp_path)


SHIPPED = [path.stem for path in sorted(RECIPES.glob("*.toml")) if "[[stage]]" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_make_their_quantizer(name: str) -> None:
    recipe = load_recipe(name)
    made = running.make_quantizer({"seed": recipe.seed} | recipe.quantizer)
    assert made.system in systems()
    assert recipe.name == name
    assert recipe.encoder.name == ""


def test_the_recipes_of_the_papers_are_shipped() -> None:
    assert {"rq_kmeans", "tiger", "hhq", "dgi"} <= set(SHIPPED)
