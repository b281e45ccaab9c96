"""The encoder: batches change nothing, order is kept, vectors are unit vectors of the promised size."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.index.bundle import Model, open_model
from service.model import encoder as encoders
from service.model.encoder import Encoder, length_batches
from service.model.session import ModelError
from tests.tiny import WORDS, make_documents


@pytest.fixture(scope="module")
def encoder(model: Model) -> Encoder:
    manifest = model.manifest
    return Encoder(model.encoder_file, model.tokenizer_file, manifest.text, 1, dimensions=manifest.dimensions)


def alone(model: Model, encoder: Encoder, ids: list[int]) -> dict[str, np.ndarray]:
    """What onnxruntime says of one unpadded text, with a session of its own."""
    session = ort.InferenceSession(str(model.encoder_file), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


TEXTS = ["north", "the captain and the crew sail south by the star", "", "wind " * 60]


def test_queries_of_a_batch_are_what_they_are_alone(model: Model, encoder: Encoder) -> None:
    encoded = encoder.encode_queries(TEXTS)
    assert encoded.vectors_QD.shape == (4, 16)
    assert len(encoded) == 4
    assert set(encoded.memory) == {f"memory_{half}_{layer}" for half in ("key", "value") for layer in (0, 1)}
    for row, ids in enumerate(encoder.tokenizer.queries(TEXTS)):
        expected = alone(model, encoder, ids)
        np.testing.assert_allclose(encoded.vectors_QD[row], expected["vector"][0], atol=1e-6)
        assert encoded.attention_mask_QS[row].sum() == len(ids)
        for name, memory in encoded.memory.items():
            np.testing.assert_allclose(memory[row, :, : len(ids)], expected[name][0], atol=1e-6)


def test_the_shipped_model_reads_a_text_alike_in_any_company() -> None:
    """Decision 17: an int8 graph whose scales are of batches gives a cosine of .99."""
    shipped = open_model(Path(__file__).parents[3] / "models" / "pretrained" / "model")
    encoder = Encoder(shipped.encoder_file, shipped.tokenizer_file, shipped.manifest.text, threads=1)
    texts = ["read a csv file", "how to sort a list of dictionaries by the values of one of their keys", "regex"]
    together = encoder.encode_queries(texts)
    for row, text in enumerate(texts):
        single = encoder.encode_queries([text])
        np.testing.assert_allclose(together.vectors_QD[row], single.vectors_QD[0], atol=1e-5)
        length = int(together.attention_mask_QS[row].sum())
        for name, memory in single.memory.items():
            np.testing.assert_allclose(together.memory[name][row, :, :length], memory[0, :, :length], atol=1e-4)


def test_vectors_are_unit_vectors(encoder: Encoder) -> None:
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_queries(TEXTS).vectors_QD, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("window", "tokens"), [(4096, 4096), (7, 4096), (50, 64), (3, 1)])
def test_documents_keep_their_order_whatever_the_batches(
    model: Model, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, window: int, tokens: int
) -> None:
    monkeypatch.setattr(encoders, "WINDOW", window)
    monkeypatch.setattr(encoders, "BATCH_TOKENS", tokens)
    documents = [(document.title, document.text) for document in make_documents(40, seed=7)]
    vectors = encoder.encode_documents(documents)
    for row, ids in enumerate(encoder.tokenizer.documents(documents)):
        np.testing.assert_allclose(vectors[row], alone(model, encoder, ids)["vector"][0], atol=1e-6)


def test_no_documents_are_no_vectors(encoder: Encoder) -> None:
    assert encoder.encode_documents([]).shape == (0, 16)


def test_documents_report_their_progress(encoder: Encoder) -> None:
    done: list[int] = []
    encoder.encode_documents([("", word) for word in WORDS], done.append)
    assert sum(done) == len(WORDS)


def test_history_changes_the_vector_of_a_model_that_reads_it(history_model_folder: Path, encoder: Encoder) -> None:
    model = open_model(history_model_folder)
    reader = Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
    assert reader.dimensions == 16
    plain, past = (reader.encode_queries(["north"], history).vectors_QD for history in (None, [["south", "east"]]))
    assert float((plain @ past.T)[0, 0]) < 0.999
    ignored = [encoder.encode_queries(["north"], history).vectors_QD for history in (None, [["south", "east"]])]
    np.testing.assert_array_equal(*ignored)


@given(lengths=st.lists(st.integers(1, 600), max_size=60), max_tokens=st.integers(1, 5000))
def test_batches_hold_every_row_once_and_stay_within_the_cap(lengths: list[int], max_tokens: int) -> None:
    batches = [batch.tolist() for batch in length_batches(lengths, max_tokens)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = -(-max(lengths[row] for row in batch) // 8) * 8
        assert padded * len(batch) <= max_tokens or len(batch) == 1


def test_an_encoder_of_other_dimensions_is_refused_with_both_numbers(model: Model) -> None:
    with pytest.raises(ModelError, match="gives vectors of 16 dimensions, the manifest says 384"):
        Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1, dimensions=384)


def test_a_decoder_in_the_encoders_place_is_refused(model: Model) -> None:
    assert model.decoder_file is not None
    with pytest.raises(ModelError, match=r"decoder\.onnx' has inputs .* expected \['attention_mask', 'input_ids'\]"):
        Encoder(model.decoder_file, model.tokenizer_file, model.manifest.text, 1)


@pytest.mark.parametrize(("value", "words"), [(np.nan, "length nan"), (0.0, "length (nan|0.0)")])
def test_vectors_that_are_no_unit_vectors_are_refused(model: Model, tmp_path: Path, value: float, words: str) -> None:
    import onnx

    graph = onnx.load(model.encoder_file)
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, value, np.float32), tensor.name))
    (tmp_path / "encoder.onnx").write_bytes(graph.SerializeToString())
    shutil.copyfile(model.tokenizer_file, tmp_path / "tokenizer.json")
    broken = Encoder(tmp_path / "encoder.onnx", tmp_path / "tokenizer.json", model.manifest.text, 1)
    with pytest.raises(ModelError, match=words):
        broken.encode_queries(["north"])


def test_vectors_alone_are_the_same_vectors(encoder: Encoder) -> None:
    whole, alone = encoder.encode_queries(TEXTS[:2]), encoder.encode_queries(TEXTS[:2], memory=False)
    np.testing.assert_array_equal(alone.vectors_QD, whole.vectors_QD)
    assert whole.memory
    assert alone.memory == {}


def test_padding_stops_at_the_models_limit(encoder: Encoder) -> None:
    ids_QS, _ = encoder.tokenizer.pad([[1] * 77], 8, 77)
    assert ids_QS.shape == (1, 77)
    assert encoder.tokenizer.pad([[1] * 70], 8, 77)[0].shape == (1, 72)
    assert encoder.tokenizer.pad([[1] * 80], 8, 77)[0].shape == (1, 80)
