"""Embeddings, asked for by the official OpenAI client over a real socket, against the encoder and the adapter."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from service.index.bundle import open_bundle
from service.model.layout import LEVELS
from service.search.pipeline import Pipeline
from tests.service.http.fakes import running
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
    got = client.embeddings.create(input=TEXTS, model="x", dimensions=8)
    expected = adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    np.testing.assert_allclose([each.embedding for each in got.data], expected, atol=1e-5)


def test_documents_are_encoded_as_the_index_does(client: openai.OpenAI, pipeline: Pipeline, folder: Path) -> None:
    documents = pipeline.bundle.documents.many([0, 1, 2])
    texts = [f"{document.title} {document.text}" for document in documents]
    got = client.embeddings.create(input=texts, model="x", extra_body={"input_type": "document"})
    np.testing.assert_allclose([each.embedding for each in got.data], pipeline.bundle.vectors[:3], atol=1e-5)
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    assert got.usage.prompt_tokens == sum(min(48, len(tokenizer.encode(f"chart {text}").ids)) for text in texts)
    long = client.embeddings.create(input="reef " * 500, model="x", extra_body={"input_type": "document"})
    assert long.usage.prompt_tokens == 48


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
        ({"input": [[1, 2, 3]]}, "#/input/0", "valid string"),
        ({"input": 5}, "#/input", "valid list"),
        ({"input": None}, "#/input", "valid list"),
        ({"input": ["a"] * 65}, "#/input", "65 queries, more than 64"),
        ({"input": "a" * 501}, "#/input", "more than 500 characters"),
        ({"input": "a", "model": None}, "#/model", "valid string"),
        ({"input": "a", "dimensions": 9}, "#/dimensions", "is 9, which is no prefix of these codes: choose from 8, 16"),
        ({"input": "a", "dimensions": 17}, "#/dimensions", "is 17"),
        ({"input": "a", "dimensions": 0}, "#/dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "int8"}, "#/encoding_format", "'float', 'base64' or 'ubinary'"),
        ({"input": "a", "encoding_format": "ubinary", "level": "3"}, "#/level", "'hybrid'"),
        ({"input": "a", "level": "1"}, "#", "level belongs to encoding_format ubinary"),
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
