"""The decoder: beams in a batch with shuffled parents see exactly the path that led to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.bundle import Model
from service.model.decoder import Decoder, cache_names
from service.model.encoder import Encoded, Encoder
from service.model.session import ModelError
from tests.tiny import make_model


@pytest.fixture(scope="module")
def decoder(model: Model) -> Decoder:
    assert model.decoder_file is not None
    return Decoder(model.decoder_file, 1)


@pytest.fixture(scope="module")
def encoder(model: Model) -> Encoder:
    return Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)


@pytest.fixture(scope="module")
def encoded(encoder: Encoder) -> Encoded:
    return encoder.encode_queries(["north star", "the wind is calm and the crew is not", "keel"])


class Alone:
    """The oracle: one query, one beam, a session of its own, the whole path from the start, nothing shared."""

    def __init__(self, model: Model) -> None:
        self.session = ort.InferenceSession(str(model.decoder_file), providers=["CPUExecutionProvider"])
        self.outputs = [node.name for node in self.session.get_outputs()]

    def hidden(self, encoded: Encoded, query: int, path: list[np.ndarray]) -> np.ndarray:
        past = {name: np.zeros((1, 1, 2, 0, 4), np.float32) for name in cache_names("past", 2)}
        fixed: dict[str, Any] = {name: memory[query : query + 1] for name, memory in encoded.memory.items()}
        fixed["attention_mask"] = encoded.attention_mask_QS[query : query + 1]
        result: dict[str, np.ndarray] = {}
        for step, embedding in enumerate(path):
            feeds = {"embedding": embedding[None, None], "step": np.array([step]), **fixed, **past}
            result = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
            past = {name: result[name.replace("past", "present")] for name in past}
        return result["hidden"][0, 0]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), widths=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_every_beam_sees_its_own_path(
    model: Model, decoder: Decoder, encoded: Encoded, seed: int, widths: list[int]
) -> None:
    rng, oracle = np.random.default_rng(seed), Alone(model)
    step = decoder.start(encoded)
    start = np.broadcast_to(model.tokens_TE[-1], (3, 1, 12))
    hidden = step(start, 0)
    paths = [[[model.tokens_TE[-1]]] for _ in range(3)]
    for number, width in enumerate(widths, start=1):
        tokens = rng.integers(0, 24, (3, width))
        parents = rng.integers(0, len(paths[0]), (3, width))
        hidden = step(model.tokens_TE[tokens], number, parents)
        paths = [[[*paths[q][parents[q, b]], model.tokens_TE[tokens[q, b]]] for b in range(width)] for q in range(3)]
    for query in range(3):
        for beam, path in enumerate(paths[query]):
            np.testing.assert_allclose(hidden[query, beam], oracle.hidden(encoded, query, path), atol=1e-5)


def test_without_parents_the_rows_stay(decoder: Decoder, model: Model, encoded: Encoded) -> None:
    rows = np.tile(np.arange(4), (3, 1))
    embeddings = model.tokens_TE[rows]
    one, two = decoder.start(encoded), decoder.start(encoded)
    np.testing.assert_array_equal(one(embeddings, 0), two(embeddings, 0))
    np.testing.assert_array_equal(one(embeddings, 1), two(embeddings, 1, rows))


def test_hidden_states_are_unit_vectors(decoder: Decoder, model: Model, encoded: Encoded) -> None:
    hidden = decoder.start(encoded)(model.tokens_TE[np.zeros((3, 5), int)], 0)
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), 1, atol=1e-5)


def test_two_batches_do_not_disturb_each_other(decoder: Decoder, model: Model, encoded: Encoded) -> None:
    start = np.broadcast_to(model.tokens_TE[-1], (3, 1, 12))
    alone = decoder.start(encoded)
    alone(start, 0)
    expected = alone(model.tokens_TE[np.ones((3, 1), int)], 1)
    one, other = decoder.start(encoded), decoder.start(encoded)
    one(start, 0)
    other(model.tokens_TE[np.full((3, 7), 9)], 0)
    np.testing.assert_array_equal(one(model.tokens_TE[np.ones((3, 1), int)], 1), expected)


MISTAKES: dict[str, tuple[Any, Any, Any, str]] = {
    "late step": (np.zeros((3, 2, 12), np.float32), 3, None, "step 3 was asked for after 1 steps"),
    "queries": (np.zeros((2, 2, 12), np.float32), 1, None, r"shape \(2, 2, 12\), expected \(Q=3, B, E=12\)"),
    "size": (np.zeros((3, 2, 11), np.float32), 1, None, r"shape \(3, 2, 11\)"),
    "axes": (np.zeros((3, 12), np.float32), 1, None, r"shape \(3, 12\)"),
    "dtype": (np.zeros((3, 2, 12)), 1, None, "float64, expected float32"),
    "beams": (np.zeros((3, 4, 12), np.float32), 1, None, "2 beams became 4: say whose children"),
    "parents' shape": (np.zeros((3, 4, 12), np.float32), 1, np.zeros((3, 2), int), r"expected integers of \(3, 4\)"),
    "parents' dtype": (np.zeros((3, 1, 12), np.float32), 1, np.zeros((3, 1)), "parents are float64"),
    "parent": (np.zeros((3, 1, 12), np.float32), 1, np.full((3, 1), 2), "range from 2 to 2, the step before had 2"),
    "negative": (np.zeros((3, 1, 12), np.float32), 1, np.full((3, 1), -1), "range from -1 to -1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_the_step_before_is_refused(decoder: Decoder, encoded: Encoded, mistake: str) -> None:
    embeddings, number, parents, words = MISTAKES[mistake]
    step = decoder.start(encoded)
    step(np.zeros((3, 2, 12), np.float32), 0)
    with pytest.raises(ValueError, match=words):
        step(embeddings, number, parents)


def test_parents_before_the_first_step_are_refused(decoder: Decoder, encoded: Encoded) -> None:
    with pytest.raises(ValueError, match="parents were given at step 0"):
        decoder.start(encoded)(np.zeros((3, 1, 12), np.float32), 0, np.zeros((3, 1), int))


def test_an_encoder_of_another_model_is_refused(decoder: Decoder, tmp_path: Path, model: Model) -> None:
    folder = make_model(tmp_path / "bare", decoder=False)
    encoder = Encoder(folder / "encoder.onnx", folder / "tokenizer.json", model.manifest.text, 1)
    with pytest.raises(ModelError, match="encoder and decoder belong to different models"):
        decoder.start(encoder.encode_queries(["north"]))


def test_an_encoder_in_the_decoders_place_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"encoder\.onnx' has inputs"):
        Decoder(model.encoder_file, 1)


def test_wide_steps_give_their_memory_back(model: Model, encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(model.decoder_file, 1)  # type: ignore[arg-type]  # this model has one
    asked: list[bool] = []
    run = decoder.session.run

    def watched(outputs: Any, feeds: Any, shrink: bool = False) -> Any:
        asked.append(shrink)
        return run(outputs, feeds, shrink)

    monkeypatch.setattr(decoder.session, "run", watched)
    for beams in (1, 170, 171):
        decoder.start(encoded)(np.zeros((len(encoded), beams, decoder.embedding_dimensions or 0), np.float32), 0)
    assert asked == [False, False, True], "three queries: 510 and 513 beams"
