"""Embeddings, asked for by the official OpenAI client over a real socket, against the encoder and the adapter."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer

from service.http import embeddings
from service.http.app import create_app
from service.index.bundle import open_bundle
from service.model.layout import LEVELS
from service.search.pipeline import Pipeline
from tests.service.http.fakes import make_settings, running
from tests.service.http.fakes import refusal as refusal_of
from tests.tiny import make_bundle

TEXTS = ["north star", "a reef, a reef and an anchor", "☃"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefixes = {"query_prefix": "log ", "document_prefix": "chart "}
    return make_bundle(tmp_path_factory.mktemp("embed") / "bundle", decoder=False, code_levels=LEVELS, **prefixes)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with running(Pipeline(open_bundle(folder), 1), max_query_characters=500) as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none needed", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Pipeline]:
    opened = Pipeline(open_bundle(folder), 1)
    yield opened
    opened.close()


def test_client_gets_the_encoders_vectors_and_the_tokens(
    client: openai.OpenAI, pipeline: Pipeline, folder: Path
) -> None:
    """Left to itself the client asks for base64 and decodes it; asked for floats it takes them as they come."""
    expected = pipeline.encoder.encode_queries(TEXTS).vectors_QD
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode(f"log {text}").ids) for text in TEXTS)
    for more in ({}, {"encoding_format": "float"}, {"dimensions": 16}, {"user": "somebody"}):
        got = client.embeddings.create(input=TEXTS, model="any-name", **more)  # type: ignore[arg-type]
        np.testing.assert_allclose([each.embedding for each in got.data], expected, atol=1e-6)
        assert [each.index for each in got.data] == [0, 1, 2]
        assert (got.model, got.object, got.data[0].object) == ("tiny", "list", "embedding")
        assert (got.usage.prompt_tokens, got.usage.total_tokens) == (tokens, tokens)
        assert got.model_dump()["space"] == "encoder"


def test_one_text_needs_no_list(client: openai.OpenAI, pipeline: Pipeline) -> None:
    got = client.embeddings.create(input=TEXTS[0], model="any-name")
    np.testing.assert_allclose(
        got.data[0].embedding, pipeline.encoder.encode_queries(TEXTS[:1]).vectors_QD[0], atol=1e-6
    )
    assert len(got.data) == 1


def test_base64_is_little_endian_float32(client: openai.OpenAI, pipeline: Pipeline) -> None:
    got = client.embeddings.create(input=TEXTS, model="x", encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(str(each.embedding)), "<f4") for each in got.data]
    np.testing.assert_allclose(decoded, pipeline.encoder.encode_queries(TEXTS).vectors_QD, atol=1e-6)


def test_smaller_dimensions_are_unit_prefixes_of_the_adapters_vectors(
    client: openai.OpenAI, pipeline: Pipeline
) -> None:
    adapted = pipeline.check_codes().binarizer.adapt(pipeline.encoder.encode_queries(TEXTS).vectors_QD)[:, :8]
    expected = adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    for more in ({}, {"space": "adapter"}):
        got = client.embeddings.create(input=TEXTS, model="x", dimensions=8, extra_body=more)
        np.testing.assert_allclose([each.embedding for each in got.data], expected, atol=1e-5)
        assert got.model_dump()["space"] == "adapter"


@pytest.mark.parametrize("dims", [{}, {"dimensions": 16}])
def test_the_space_of_full_vectors_can_be_chosen(
    client: openai.OpenAI, pipeline: Pipeline, dims: dict[str, Any]
) -> None:
    vectors = pipeline.encoder.encode_queries(TEXTS).vectors_QD
    adapted = pipeline.check_codes().binarizer.adapt(vectors)
    assert np.abs(adapted - vectors).max() > 0.01
    for space, expected in (("encoder", vectors), ("adapter", adapted)):
        got = client.embeddings.create(input=TEXTS, model="x", extra_body={"space": space, **dims})
        np.testing.assert_allclose([each.embedding for each in got.data], expected, atol=1e-5)
        assert got.model_dump()["space"] == space


def test_documents_are_encoded_as_the_index_does(client: openai.OpenAI, pipeline: Pipeline, folder: Path) -> None:
    documents = pipeline.bundle.documents.many([0, 1, 2])
    texts = [f"{document.title} {document.text}" for document in documents]
    got = client.embeddings.create(input=texts, model="x", extra_body={"input_type": "document"})
    np.testing.assert_allclose([each.embedding for each in got.data], pipeline.bundle.vectors[:3], atol=1e-5)
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    assert got.usage.prompt_tokens == sum(min(48, len(tokenizer.encode(f"chart {text}").ids)) for text in texts)


@pytest.mark.parametrize("level", [None, *LEVELS])
@pytest.mark.parametrize("dims", [None, 8, 16])
def test_ubinary_is_the_packed_code_that_hamming_search_takes(
    client: openai.OpenAI, url: str, pipeline: Pipeline, level: str | None, dims: int | None
) -> None:
    more: dict[str, Any] = {"encoding_format": "ubinary"} | ({"level": level} if level else {})
    more |= {"dimensions": dims} if dims else {}
    got = client.embeddings.create(input=TEXTS, model="x", extra_body=more)
    vectors = pipeline.encoder.encode_queries(TEXTS).vectors_QD
    codes = pipeline.check_codes().binarizer.codes(vectors, level or "1", dims)
    assert got.model_dump()["space"] == "adapter"
    content = [bytes(map(int, each.embedding)) for each in got.data]  # the client's type says float
    assert content == [row.astype("<u8").tobytes() for row in codes]
    code = base64.b64encode(content[0]).decode()
    how = {"level": level or "1", "dims": dims or 16}
    by_code = httpx.post(f"{url}/v1/hamming/search", json={"code": code} | how).json()
    by_text = httpx.post(f"{url}/v1/hamming/search", json={"query": TEXTS[0]} | how).json()
    assert by_code["results"] == by_text["results"]


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"input": ""}, "#/input/0", "is empty"),
        ({"input": []}, "#/input", "at least 1"),
        ({"input": ["a", ""]}, "#/input/1", "is empty"),
        ({"input": [[1, 2, 3]]}, "#/input", "is an array of tokens, which are another model's: send texts"),
        ({"input": [1, 2, 3]}, "#/input", "is an array of tokens, which are another model's: send texts"),
        ({"input": [None]}, "#/input/0", "valid string"),
        ({"input": 5}, "#/input", "valid list"),
        ({"input": None}, "#/input", "valid list"),
        ({"input": ["a"] * 2049}, "#/input", "has 2049 inputs, more than 2048: send several requests"),
        ({"input": ["a"] * 10_001}, "#/input", "at most 10000"),
        ({"input": "a" * 501}, "#/input", "more than 500 characters"),
        ({"input": "a", "model": None}, "#/model", "valid string"),
        ({"input": "a", "dimensions": 9}, "#/dimensions", "is 9, which is no prefix of these codes: choose from 8, 16"),
        ({"input": "a", "dimensions": 17}, "#/dimensions", "is 17"),
        ({"input": "a", "dimensions": 0}, "#/dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "int8"}, "#/encoding_format", "'float', 'base64' or 'ubinary'"),
        ({"input": "a", "encoding_format": "ubinary", "level": "3"}, "#/level", "'hybrid'"),
        ({"input": "a", "level": "1"}, "#", "level belongs to encoding_format ubinary"),
        ({"input": "a", "space": "encoder", "dimensions": 8}, "#/space", "gives all 16 dimensions, as floats"),
        ({"input": "a", "space": "encoder", "encoding_format": "ubinary"}, "#/space", "or ask for `adapter`"),
        ({"input": "a", "space": "float"}, "#/space", "'encoder' or 'adapter'"),
        ({"input": "a", "truncate": "yes"}, "#/truncate", "valid boolean"),
        ({"input": "a", "input_type": "passage"}, "#/input_type", "'query' or 'document'"),
        ({"input": "a", "made_up": 1}, "#", "does not exist"),
    ],
)
def test_mistakes_are_named(url: str, body: dict[str, Any], pointer: str, words: str) -> None:
    answer = httpx.post(
        f"{url}/v1/embeddings", content=json.dumps({"model": "x"} | body), headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    error = answer.json()["errors"][0]
    assert error["pointer"] == pointer
    assert words in error["detail"]


LONG = "reef " * 30


@pytest.fixture(scope="module")
def plain_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A model without prefixes and without an adapter: queries have up to 24 tokens, documents 48."""
    folder = make_bundle(tmp_path_factory.mktemp("plain") / "bundle", decoder=False)
    opened = Pipeline(open_bundle(folder), 1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain(plain_pipeline: Pipeline) -> Iterator[TestClient]:
    """Two texts are computed at a time, five are taken."""
    with TestClient(create_app(plain_pipeline, make_settings(max_queries=2, max_embedding_inputs=5))) as client:
        yield client


def embed(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/embeddings", json={"model": "x"} | body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def refusal(client: TestClient, **body: Any) -> tuple[str, str]:
    return refusal_of(client, {"model": "x"} | body, "/v1/embeddings")


def test_texts_are_documents_where_prefixes_do_not_part_them(plain: TestClient, plain_pipeline: Pipeline) -> None:
    expected = plain_pipeline.encoder.encode_documents([("", LONG), ("", "north")], advance=lambda _: None)
    got = embed(plain, input=[LONG, "north"])
    np.testing.assert_allclose([each["embedding"] for each in got["data"]], expected, atol=1e-6)
    assert got["usage"] == {"prompt_tokens": 32 + 3, "total_tokens": 32 + 3}
    assert embed(plain, input=[LONG, "north"], input_type="document")["data"] == got["data"]


def test_texts_are_queries_where_prefixes_part_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.embeddings.create(input=LONG, model="x")
    assert "has 33 tokens, more than the 24 of a query" in refused.value.response.text


@pytest.mark.parametrize(
    ("kind", "text", "length", "most"),
    [("query", LONG, 32, 24), (None, 2 * LONG, 62, 48), ("document", 2 * LONG, 62, 48)],
)
def test_a_text_of_too_many_tokens_is_refused_unless_it_may_be_cut(
    plain: TestClient, plain_pipeline: Pipeline, kind: str | None, text: str, length: int, most: int
) -> None:
    body: dict[str, Any] = {"input": ["north", text]} | ({"input_type": kind} if kind else {})
    remedy = "shorten it, choose another input_type, or set truncate"
    detail = f"has {length} tokens, more than the {most} of a {kind or 'document'}: {remedy}"
    assert refusal(plain, **body) == ("#/input/1", detail)
    assert refusal(plain, **body, truncate=False) == ("#/input/1", detail)
    got = embed(plain, **body, truncate=True)
    encoder = plain_pipeline.encoder
    cut = (
        encoder.encode_queries([text]).vectors_QD[0]
        if kind == "query"
        else encoder.encode_documents([("", text)], advance=lambda _: None)[0]
    )
    np.testing.assert_allclose(got["data"][1]["embedding"], cut, atol=1e-6)
    assert got["usage"]["prompt_tokens"] == 3 + most


def test_a_text_of_just_as_many_tokens_is_taken(plain: TestClient) -> None:
    assert embed(plain, input="reef " * 22, input_type="query")["usage"]["prompt_tokens"] == 24
    assert refusal(plain, input="reef " * 23, input_type="query")[0] == "#/input/0"


def test_many_texts_are_computed_a_batch_at_a_time(
    plain: TestClient, plain_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["north", "south", LONG, "reef", "mast and keel"]
    expected = plain_pipeline.encoder.encode_documents([("", text) for text in texts], advance=lambda _: None)
    sizes: list[int] = []
    real = plain_pipeline.encoder.encode_documents
    monkeypatch.setattr(
        plain_pipeline.encoder,
        "encode_documents",
        lambda documents, advance: (sizes.append(len(documents)), real(documents, advance))[1],
    )
    got = embed(plain, input=texts)
    assert sizes == [2, 2, 1]
    assert [(each["object"], each["index"]) for each in got["data"]] == [("embedding", row) for row in range(5)]
    np.testing.assert_allclose([each["embedding"] for each in got["data"]], expected, atol=1e-6)
    assert refusal(plain, input=[*texts, "sail"]) == ("#/input", "has 6 inputs, more than 5: send several requests")
    sizes.clear()
    assert refusal(plain, input=[*texts[:4], 2 * LONG])[0] == "#/input/4"
    assert sizes == []  # nothing is encoded before all are known to be short enough


@pytest.mark.parametrize(("texts", "is_elsewhere"), [(1, False), (51, True)])
def test_answers_of_many_texts_are_put_together_off_the_event_loop(
    url: str, texts: int, is_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    real = embeddings._response
    monkeypatch.setattr(
        embeddings, "_response", lambda *given: (threads.append(threading.current_thread().name), real(*given))[1]
    )
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "x", "input": ["a"] * texts}).status_code == 200
    assert ["AnyIO worker thread" in name for name in threads] == [is_elsewhere]


def test_a_bundle_without_an_adapter_has_one_space(plain: TestClient) -> None:
    assert embed(plain, input="a", space="encoder")["space"] == "encoder"
    pointer, detail = refusal(plain, input="a", space="adapter")
    assert (pointer, "index with a model that has an adapter (recipe qama)" in detail) == ("#/space", True)
    assert refusal(plain, input="a", space="adapter", dimensions=8)[0] == "#/space"


def test_bytes_of_ubinary_are_whole_numbers(url: str) -> None:
    body = {"input": "a", "model": "x", "encoding_format": "ubinary"}
    (data,) = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"]
    assert len(data["embedding"]) == 16
    assert all(type(byte) is int and 0 <= byte < 256 for byte in data["embedding"])


def test_client_raises_its_own_error_for_ours(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(input="a", model="x", dimensions=9)


def test_openapi_says_that_a_text_or_a_list_is_taken(url: str) -> None:
    schema = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]["EmbeddingRequest"]
    assert [each["type"] for each in schema["properties"]["input"]["anyOf"]] == ["string", "array"]
