"""Hamming search over HTTP on a real bundle: against unpacked bits and float64 cosines, and what clients get wrong."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.http import hamming
from service.http.app import create_app
from service.index.bundle import open_bundle
from service.model.layout import LEVELS
from service.search.pipeline import Pipeline
from tests.service.http.fakes import FakePipeline, json_values, make_settings
from tests.service.http.fakes import refusal as refusal_of
from tests.tiny import make_bundle, make_documents

DOCUMENTS = {document.id: document for document in make_documents()}
QUERIES = ["north star over the reef", "a rope and a knot"]
WIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("hamming") / "bundle", code_levels=LEVELS)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Pipeline]:
    opened = Pipeline(open_bundle(folder), 1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    limits = make_settings(max_queries=8, max_query_characters=1000, max_hamming_top_k=1000)
    with TestClient(create_app(Pipeline(open_bundle(folder), 1), limits)) as client:
        yield client


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/hamming/search", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def refusal(client: TestClient, body: dict[str, Any], path: str = "/v1/hamming/search") -> tuple[str, str]:
    return refusal_of(client, body, path)


def vectors_of(pipeline: Pipeline) -> np.ndarray:
    return pipeline.encoder.encode_queries(QUERIES).vectors_QD


def expected_ids(pipeline: Pipeline, level: str, dims: int, k: int) -> list[list[tuple[str, int]]]:
    """(id, distance) of the nearest by brute force over unpacked bits, ties by position."""
    binarizer = pipeline.check_codes().binarizer

    def bits(vectors: np.ndarray) -> np.ndarray:
        return np.unpackbits(binarizer.codes(vectors, level, dims).view(np.uint8), axis=1)

    distances = (bits(vectors_of(pipeline))[:, None] != bits(np.array(pipeline.bundle.vectors))).sum(axis=-1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    names = [pipeline.bundle.documents.get(position).id for position in range(len(DOCUMENTS))]
    return [[(names[p], int(row[p])) for p in places] for row, places in zip(distances, order, strict=True)]


def found_ids(answer: dict[str, Any]) -> list[tuple[str, int]]:
    return [(result["id"], result["distance"]) for result in answer["results"]]


def packed(pipeline: Pipeline, level: str, dims: int | None = None) -> list[str]:
    codes = pipeline.check_codes().binarizer.codes(vectors_of(pipeline), level, dims)
    return [base64.b64encode(row.astype("<u8").tobytes()).decode() for row in codes]


@pytest.mark.parametrize("level", [None, *LEVELS])
@pytest.mark.parametrize("dims", [None, 8])
def test_texts_vectors_and_codes_find_the_nearest(
    client: TestClient, pipeline: Pipeline, level: str | None, dims: int | None
) -> None:
    how: dict[str, Any] = {"top_k": 7} | ({"level": level} if level else {}) | ({"dims": dims} if dims else {})
    expected = expected_ids(pipeline, level or "1", dims or WIDE, 7)
    vectors = (vectors_of(pipeline) * np.array([[250.0], [1e-30]])).tolist()
    codes = packed(pipeline, level or "1")
    batches = [{"queries": QUERIES}, {"vectors": vectors}, {"codes": codes}]
    batches += [
        {"codes": packed(pipeline, level or "1", dims)},
        {"codes": [codes[0], packed(pipeline, level or "1", dims)[1]]},
    ]
    for batch in batches:
        answer = ask(client, **batch, **how)
        assert [found_ids(each) for each in answer["answers"]] == expected
        assert (answer["level"], answer["dims"]) == (level or "1", dims or WIDE)
    for single in ({"query": QUERIES[1]}, {"vector": vectors[1]}, {"code": codes[1]}):
        assert found_ids(ask(client, **single, **how)) == expected[1]
    bits = pipeline.check_codes().layout(level).bits_of(dims)
    for result in ask(client, query=QUERIES[0], **how)["results"]:
        assert result["similarity"] == pytest.approx(1 - result["distance"] / bits, abs=1e-6)
        assert set(result) == {"id", "distance", "similarity", "title"}


def test_rescored_results_are_sorted_by_cosine(client: TestClient, pipeline: Pipeline) -> None:
    cosines = dict(
        zip(
            [pipeline.bundle.documents.get(position).id for position in range(60)],
            np.asarray(pipeline.bundle.vectors, np.float64) @ vectors_of(pipeline)[0].astype(np.float64),
            strict=True,
        )
    )
    candidates = expected_ids(pipeline, "1", WIDE, 12)[0]
    expected = sorted(candidates, key=lambda each: -cosines[each[0]])[:3]
    for one in ({"query": QUERIES[0]}, {"vector": (7 * vectors_of(pipeline)[0]).tolist()}):
        answer = ask(client, **one, top_k=3, rescore=4)
        assert found_ids(answer) == expected
        for result in answer["results"]:
            assert result["cosine"] == pytest.approx(cosines[result["id"]], abs=1e-5)


def test_filter_cascade_and_documents(client: TestClient) -> None:
    chosen = ["d3", "d59", "d17", "d3"]
    answer = ask(client, query="rope", filter={"ids": chosen}, include=["documents"])
    assert sorted(result["id"] for result in answer["results"]) == ["d17", "d3", "d59"]
    for result in answer["results"]:
        document = DOCUMENTS[result["id"]]
        assert (result["title"], result["text"], result["metadata"]) == (
            document.title,
            document.text,
            document.metadata,
        )
    exact = ask(client, query="rope", level="2")
    assert ask(client, query="rope", level="2", cascade={"dims": 8, "share": 1.0})["results"] == exact["results"]
    few = ask(client, query="rope", level="2", top_k=1, cascade={"dims": 8, "share": 0.02})
    assert len(few["results"]) == 1


def test_a_cascade_ranks_the_few_that_are_near_by_their_prefix(client: TestClient) -> None:
    """Of 60 documents the six nearest by 8 dimensions, the two nearest of them by all."""
    differs = False
    for query in QUERIES:
        whole, prefix = (
            [name for name, _ in found_ids(ask(client, query=query, level="2", top_k=60, **dims))]
            for dims in ({}, {"dims": 8})
        )
        shortlist = set(prefix[:6])
        expected = [found for found in whole if found in shortlist][:2]
        found = ask(client, query=query, level="2", top_k=2, cascade={"dims": 8, "share": 0.1})
        assert [name for name, _ in found_ids(found)] == expected
        differs |= expected != whole[:2]
    assert differs


def test_as_many_results_as_documents_are_all_of_them(client: TestClient) -> None:
    for more in ({}, {"rescore": 100}, {"dims": 8}):
        answer = ask(client, query="rope", top_k=60, **more)
        assert sorted(result["id"] for result in answer["results"]) == sorted(DOCUMENTS)


def test_who_asks_for_no_number_gets_all_of_few_documents(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", make_documents(3), decoder=False, code_levels=("1",))
    with TestClient(create_app(Pipeline(open_bundle(folder), 1), make_settings())) as client:
        for more in ({}, {"rescore": 100}):
            assert len(ask(client, query="rope", **more)["results"]) == 3
        assert refusal(client, {"query": "rope", "top_k": 4}) == (
            "#/top_k",
            "is more than the 3 documents: ask for at most 3",
        )
        assert len(client.post("/v1/search", json={"query": "rope", "mode": "hamming"}).json()["results"]) == 3


def test_stages_and_queries_are_counted(client: TestClient) -> None:
    before = queries_counted(client)
    ask(client, queries=["rope", "knot"])
    assert queries_counted(client) == before + 2
    for queries in (["rope", "north"], ["north", "rope"]):
        assert client.post("/v1/search", json={"queries": queries}).status_code == 200  # computed, then from the cache
    assert queries_counted(client) == before + 6
    answer = client.post("/v1/hamming/search", json={"query": "rope"})
    timings = answer.json()["timings"]
    assert {"queue", "encode", "pack", "hamming", "render", "pipeline", "total"} <= set(timings)
    assert "hamming;dur=" in answer.headers["server-timing"]
    text = client.get("/metrics").text
    assert 'rhumb_stage_seconds_count{stage="hamming"}' in text
    assert 'route="/v1/hamming/search",status="200"' in text


def queries_counted(client: TestClient) -> float:
    return float(re.findall(r"^rhumb_queries_total (.*)$", client.get("/metrics").text, re.MULTILINE)[0])


def test_info_names_levels_prefixes_and_bytes(client: TestClient, pipeline: Pipeline) -> None:
    codes = client.get("/info").json()["codes"]
    assert (codes["prefixes"], codes["default_level"]) == ([8, 16], "1")
    assert [entry["level"] for entry in codes["levels"]] == list(LEVELS)
    for entry in codes["levels"]:
        for dims in (8, 16):
            code = pipeline.check_codes().binarizer.codes(vectors_of(pipeline), entry["level"], dims)[0]
            assert entry["bytes_per_document"][str(dims)] == code.nbytes


def test_openapi_examples_are_accepted(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    for path in ("/v1/hamming/search", "/v1/embeddings"):
        post = page["paths"][path]["post"]
        for example in post["requestBody"]["content"]["application/json"]["examples"].values():
            assert client.post(path, json=example["value"]).status_code == 200
        assert set(post["responses"]["422"]["content"]) == {"application/problem+json"}


# ---------------------------------------------------------------- what clients get wrong


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({}, "#", "give exactly one of query, queries, vector, vectors, code, codes: there are 0"),
        ({"query": "a", "code": "AAAA"}, "#", "there are 2"),
        ({"query": ""}, "#/query", "is empty"),
        ({"queries": []}, "#/queries", "at least 1"),
        ({"queries": ["a"] * 9}, "#/queries", "9 queries, more than 8"),
        ({"query": "a" * 1001}, "#/query", "more than 1000 characters"),
        ({"query": "a", "level": "3"}, "#/level", "'0.5', '1', '1.5', '2' or 'hybrid'"),
        ({"query": "a", "level": 1}, "#/level", "'0.5'"),
        ({"query": "a", "dims": 9}, "#/dims", "is 9, which is no prefix of these codes: choose from 8, 16"),
        ({"query": "a", "dims": 0}, "#/dims", "greater than or equal to 1"),
        ({"query": "a", "top_k": 0}, "#/top_k", "greater than or equal to 1"),
        ({"query": "a", "top_k": 1001}, "#/top_k", "is more than 1000"),
        ({"query": "a", "top_k": 10**30}, "#/top_k", ""),
        ({"query": "a", "top_k": 61}, "#/top_k", "is more than the 60 documents: ask for at most 60"),
        ({"query": "a", "top_k": 61, "filter": {"ids": ["d1"]}}, "#/top_k", "ask for at most 60"),
        ({"query": "a", "top_k": 1000, "rescore": 101}, "#/rescore", "less than or equal to 100"),
        ({"code": "AAAA", "rescore": 2}, "#", "rescore needs more than a code"),
        ({"query": "a", "dims": 8, "cascade": {"dims": 8, "share": 0.5}}, "#", "leave dims out"),
        ({"query": "a", "cascade": {"dims": 16, "share": 0.5}}, "#/cascade/dims", "takes all 2 words of a code"),
        ({"query": "a", "cascade": {"dims": 5, "share": 0.5}}, "#/cascade/dims", "is 5, which is no prefix"),
        ({"query": "a", "cascade": {"dims": 8, "share": 0}}, "#/cascade/share", "greater than 0"),
        ({"query": "a", "cascade": {"dims": 8, "share": 1.5}}, "#/cascade/share", "less than or equal to 1"),
        ({"query": "a", "filter": {}}, "#/filter/ids", "required"),
        ({"query": "a", "filter": {"ids": ["\ud800"]}}, "#/filter/ids/0", "valid string"),
        ({"query": "a", "filter": {"ids": []}}, "#/filter/ids", "at least 1"),
        ({"query": "a", "filter": {"ids": ["x"] * 10_001}}, "#/filter/ids", "at most 10000"),
        (
            {"query": "a", "filter": {"ids": ["d1", "x", "y"]}},
            "#/filter/ids",
            "has 2 ids of 3 that no document has, the first is number 1: leave them out",
        ),
        ({"vector": [1.0] * 15}, "#/vector", "has 15 numbers, this model's vectors have 16"),
        ({"vectors": [[1.0] * 16, [1.0] * 17]}, "#/vectors/1", "has 17 numbers"),
        ({"vector": []}, "#/vector", "at least 1"),
        ({"vector": [0.0] * 16}, "#/vector", "1 vectors are zero, NaN or infinite"),
        ({"vectors": [[1.0] * 16, [0.0] * 16]}, "#/vectors", "the first is number 1"),
        ({"vector": ["1"] * 16}, "#/vector/0", "valid number"),
        ({"vector": [True] * 16}, "#/vector/0", "valid number"),
        ({"vector": [None] * 16}, "#/vector/0", "valid number"),
        ({"vector": [10**400] * 16}, "#/vector/0", ""),
        ({"vectors": [1.0] * 16}, "#/vectors/0", "valid list"),
        ({"code": ""}, "#/code", "has 0 bytes, a code here has 16: check level and dims"),
        ({"code": "AAAA"}, "#/code", "has 3 bytes"),
        ({"code": "A"}, "#/code", "is not base64"),
        ({"code": "AAA*AAAA"}, "#/code", "is not base64"),
        ({"code": "☃" * 4}, "#/code", "is not base64"),
        ({"code": "\ud800AAA"}, "#/code", "valid string"),
        ({"code": "AAAAAAAAAAA=" + "AAAAAAAAAAA="}, "#/code", "is not base64"),
        ({"code": base64.b64encode(bytes(15)).decode()}, "#/code", "has 15 bytes, a code here has 16"),
        ({"codes": [base64.b64encode(bytes(16)).decode(), "%"]}, "#/codes/1", "is not base64"),
        ({"code": base64.b64encode(bytes(24)).decode(), "dims": 8}, "#/code", "24 bytes, a code here has 8 or 16"),
        ({"code": base64.b64encode(b"\xff" * 16).decode()}, "#/code", "is no code of level 1, which has 16 bits"),
        ({"code": "A" * 40_001}, "#/code", "at most 40000"),
        ({"code": 5}, "#/code", "valid string"),
        ({"query": "a", "include": ["codes"]}, "#/include/0", "'documents'"),
        ({"query": "a", "made_up": 1}, "#", "does not exist"),
    ],
)
def test_mistakes_are_named_with_numbers_and_a_remedy(
    client: TestClient, body: dict[str, Any], pointer: str, words: str
) -> None:
    found, detail = refusal(client, body)
    assert found == pointer
    assert words in detail


@pytest.mark.parametrize("level", ["1.5", "2", "hybrid"])
@pytest.mark.parametrize("dims", [None, 8])
def test_codes_packed_in_another_order_of_bits_are_refused(
    client: TestClient, pipeline: Pipeline, level: str, dims: int | None
) -> None:
    """As `numpy.packbits` packs them if it is not told otherwise."""
    right = packed(pipeline, level, dims)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(right[1]), np.uint8), bitorder="little")
    wrong = base64.b64encode(np.packbits(bits).tobytes()).decode()
    body = {"codes": [right[0], wrong], "level": level} | ({"dims": dims} if dims else {})
    pointer, detail = refusal(client, body)
    assert (pointer, f"is no code of level {level}" in detail) == ("#/codes/1", True)
    assert "bit i of word w least significant first" in detail


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_a_400(client: TestClient, value: str) -> None:
    body = f'{{"vector": [{value}{", 1.0" * 15}]}}'
    answer = client.post("/v1/hamming/search", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")


def test_largest_numbers_are_a_vector_like_any_other(client: TestClient) -> None:
    small = ask(client, vector=[1.0, -1.0] * 8)["results"]
    assert ask(client, vector=[1.7e308, -1.7e308] * 8)["results"] == small
    assert ask(client, vector=[5e-324, -5e-324] * 8)["results"] == small


def test_answers_of_a_batch_are_bounded_together(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "MAX_RESULTS", 100)
    monkeypatch.setattr(hamming, "MAX_CANDIDATES", 300)
    assert refusal(client, {"queries": ["a", "b"], "top_k": 51}) == (
        "#/top_k",
        "gives 102 results, more than 100: send smaller batches",
    )
    pointer, detail = refusal(client, {"queries": ["a", "b"], "top_k": 50, "rescore": 4})
    assert (pointer, "400 candidates, more than 300" in detail) == ("#/rescore", True)
    ask(client, queries=["a", "b"], top_k=50, rescore=3)


def test_shortlists_are_bounded_together(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "MAX_SHORTLISTED", 60)
    ask(client, queries=["a", "b"], level="2", cascade={"dims": 8, "share": 0.5})
    pointer, detail = refusal(client, {"queries": ["a", "b"], "level": "2", "cascade": {"dims": 8, "share": 0.51}})
    assert (pointer, "shortlists 62 documents for all queries, more than 60" in detail) == ("#/cascade/share", True)


def test_bundle_without_codes_says_so(tmp_path: Path) -> None:
    with TestClient(create_app(FakePipeline(), make_settings())) as client:
        assert "codes" not in client.get("/info").json()
        remedy = "needs packed codes, and this bundle has none: index with a model that has an adapter (recipe qama)"
        assert refusal(client, {"query": "a"}) == ("#", remedy)
        assert refusal(client, {"query": "a", "mode": "hamming"}, "/v1/search") == ("#/mode", remedy)
        pointer, detail = refusal(client, {"query": "a", "mode": "hybrid"}, "/v1/search")
        assert pointer == "#/mode"
        assert "(recipe qama), and no index of words: index again without --no-lexical" in detail
        pointer, detail = refusal(client, {"query": "a", "mode": "lexical"}, "/v1/search")
        assert (pointer, "index again without --no-lexical" in detail) == ("#/mode", True)
        assert refusal(client, {"input": "a", "model": "x", "encoding_format": "ubinary"}, "/v1/embeddings") == (
            "#/encoding_format",
            remedy,
        )
        assert refusal(client, {"input": "a", "model": "x", "dimensions": 8}, "/v1/embeddings") == (
            "#/dimensions",
            remedy,
        )


def test_level_that_the_bundle_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", decoder=False, code_levels=("1.5", "2"))
    with TestClient(create_app(Pipeline(open_bundle(folder), 1), make_settings())) as client:
        assert ask(client, query="a")["level"] == "1.5"
        detail = (
            "this bundle has no codes of level 1: choose from 1.5, 2, or index again with an adapter that offers it"
        )
        assert refusal(client, {"query": "a", "level": "1"}) == ("#/level", detail)
        assert refusal(client, {"query": "a", "level": "1", "mode": "hamming"}, "/v1/search") == ("#/level", detail)
        body = {"input": "a", "model": "x", "encoding_format": "ubinary"}
        assert refusal(client, body, "/v1/embeddings") == ("#/level", detail)


numbers = st.lists(st.floats(width=64) | st.integers(), min_size=15, max_size=17)
codes = st.binary(max_size=40).map(lambda content: base64.b64encode(content).decode()) | st.text(max_size=30)
plausible = {
    "query": st.text(max_size=5),
    "vector": numbers,
    "vectors": st.lists(numbers, max_size=3),
    "code": codes,
    "codes": st.lists(codes, max_size=3),
    "level": st.sampled_from(["1", "2", "hybrid", "9"]),
    "dims": st.integers(0, 20),
    "top_k": st.integers(-1, 2000),
    "rescore": st.integers(-1, 101),
    "cascade": st.fixed_dictionaries({"dims": st.sampled_from([8, 16]), "share": st.floats(-1, 2)}),
    "filter": st.fixed_dictionaries({"ids": st.lists(st.sampled_from(["d1", "d2", "x"]), max_size=3)}),
}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.fixed_dictionaries({}, optional={name: each | json_values for name, each in plausible.items()}))
def test_any_request_is_answered_below_500(client: TestClient, body: dict[str, Any]) -> None:
    answer: httpx.Response = client.post(
        "/v1/hamming/search", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 422), answer.text
