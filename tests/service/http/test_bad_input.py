"""Whatever a client sends: a 4xx problem with a remedy, never a 5xx, never an echo."""

from __future__ import annotations

import contextlib
import json
import time
import unicodedata
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.http import schemas
from service.http.app import create_app
from tests.service.http.fakes import FakePipeline, client_of, json_values, make_settings

JSON = {"content-type": "application/json"}
SECRET = "xyzzy-must-not-come-back"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    limits = make_settings(max_queries=8, max_query_characters=1000, max_top_k=100, max_body_bytes=200_000)
    async with client_of(create_app(FakePipeline(), limits)) as client:
        yield client


def check_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert SECRET not in answer.text
    assert len(answer.content) < 3000, "an answer to a mistake is short"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["detail"]
    return problem


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ('{"query": ""}', "#/query"),
        ('{"query": " \\t\\n\\u00a0\\u2003"}', "#/query"),
        ('{"query": "\\u200b\\u200d\\ufeff"}', "#/query"),
        ('{"query": "\\u0000"}', "#/query"),
        (f'{{"query": "{SECRET} \\u0007"}}', "#/query"),
        ('{"query": "a\\u009b"}', "#/query"),
        ('{"query": "\\ud800"}', "#/query"),
        (f'{{"query": "{SECRET} \\udc00\\ud800"}}', "#/query"),
        (json.dumps({"query": SECRET * 5000}), "#/query"),
        ('{"query": 5}', "#/query"),
        ('{"query": ["a"]}', "#/query"),
        ('{"query": null}', "#"),
        ("{}", "#"),
        ('{"query": "a", "queries": ["b"]}', "#"),
        ('{"query": "a", "histories": [["b"]]}', "#"),
        ('{"queries": ["a"], "history": ["b"]}', "#"),
        ('{"queries": ["a"], "histories": [["b"], ["c"]]}', "#"),
        ('{"queries": []}', "#/queries"),
        ('{"queries": ["a", ""]}', "#/queries/1"),
        ('{"queries": ["a", "\\ud800"]}', "#/queries/1"),
        (json.dumps({"queries": ["a"] * 9}), "#/queries"),
        (json.dumps({"queries": ["a"] * 20_000}), "#/queries"),
        (json.dumps({"queries": ["a", "b" * 1001]}), "#/queries"),
        ('{"query": "a", "history": "b"}', "#/history"),
        ('{"query": "a", "history": [""]}', "#/history/0"),
        (json.dumps({"query": "a", "history": ["b"] * 101}), "#/history"),
        (json.dumps({"query": "a", "history": ["b" * 1001]}), "#/history"),
        (json.dumps({"queries": ["a"], "histories": [["b" * 1001]]}), "#/histories"),
        ('{"query": "a", "scoring": "magic"}', "#/scoring"),
        ('{"query": "a", "ranking": 1}', "#/ranking"),
        ('{"query": "a", "include": ["everything"]}', "#/include/0"),
        ('{"query": "a", "include": "codes"}', "#/include"),
        ('{"query": "a", "explain": 1}', "#/explain"),
        ('{"query": "a", "explain": "true"}', "#/explain"),
        *[
            (json.dumps({"query": "a", name: value}), f"#/{name}")
            for name in ("top_k", "beam_width")
            for value in (
                0,
                -1,
                101 if name == "top_k" else 10**8,
                10**9,
                10**30,
                True,
                "5",
                5.0,
                5.5,
                [],
                {},
                *([None] if name == "top_k" else ()),
            )
        ],
        ("[]", "#"),
        ('"text"', "#"),
        ("null", "#"),
        ("5", "#"),
    ],
)
async def test_broken_rule_is_a_422_that_points_at_it(client: httpx.AsyncClient, body: str, pointer: str) -> None:
    problem = check_problem(await client.post("/v1/search", content=body, headers=JSON), 422)
    assert pointer in [error["pointer"] for error in problem["errors"]]


async def test_unknown_field_is_refused_without_its_name(client: httpx.AsyncClient) -> None:
    for name in (SECRET, "\ud800", "a" * 100_000, "__proto__", ""):
        body = json.dumps({"query": "a", name: 1})
        problem = check_problem(await client.post("/v1/search", content=body, headers=JSON), 422)
        assert [error["pointer"] for error in problem["errors"]] == ["#"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'query': 'a'}",
        b'{"query": "a"} trailing ' + SECRET.encode(),
        b'{"query": NaN}',
        b'{"query": "a", "top_k": NaN}',
        b'{"query": "a", "top_k": Infinity}',
        b'{"query": "a", "top_k": -Infinity}',
        b'{"query": "a", "top_k": 1e999}',
        b'{"query": "a", "top_k": 1E+309}',
        b'{"query": "a", "top_k": ' + b"9" * 220 + b".0e99}",
        b'{"query": "a", "top_k": ' + b"9" * 400 + b".0}",
        b'{"query": "a", "query": "b"}',
        b'{"query": "a", "\\u0071uery": "b"}',
        b'{"query": {"deep": {"x": 1, "x": 2}}}',
        b'{"query": "\xff\xfe"}',
        b'{"query": "\xed\xa0\x80"}',
        b'{"query": "\xc0\xaf"}',
        b'\xef\xbb\xbf{"query": "a"}',
        '{"query": "a"}'.encode("utf-16"),
        b'{"query": "a\nb"}',
        b'{"query": "a\x00b"}',
        b"[" * 100_000,
        b'{"a":' * 30_000,
        b"[" * 50_000 + b"]" * 50_000,
        b'{"query": ' + b"9" * 5000 + b"}",
        b"\x00" * 100,
        b"[" * 20_001 + b'"' + b'\\"' * 80_000,
    ],
)
async def test_what_is_not_json_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    check_problem(await client.post("/v1/search", content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "\u00e9".encode("latin-1")},
        {**JSON, "content-encoding": "gzip"},
        {**JSON, "content-encoding": "br, identity"},
        {**JSON, "content-encoding": SECRET},
    ],
)
async def test_another_media_type_is_a_415(client: httpx.AsyncClient, headers: dict[str, Any]) -> None:
    check_problem(await client.post("/v1/search", content=b'{"query": "a"}', headers=headers), 415)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=UTF-8",
        'application/json;charset="utf8" ; profile=x',
        "application/json;",
        "application/json; charset*0=a; charset*=b",
        "application/json; charset*" + "1" * 5000 + "=x",
    ],
)
async def test_json_by_any_of_its_spellings_is_taken(client: httpx.AsyncClient, content_type: str) -> None:
    answer = await client.post("/v1/search", content=b'{"query": "a"}', headers={"content-type": content_type})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "query", ["a\tb\nc\r", "☃", "🙂", "مرحبا", "a" * 1000, "e\u0301", "C++", "?", "\U0001fae9", "\ue000"]
)
async def test_unusual_queries_are_answered(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.post("/v1/search", json={"query": query})).status_code == 200


async def test_oversized_body_is_counted_while_it_streams() -> None:
    """Without Content-Length, and with one that lies about it."""

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b" " * 10_000

    async with client_of(create_app(FakePipeline(), make_settings(max_body_bytes=20_000))) as client:
        for declared in ({}, *({"content-length": lie} for lie in (b"9" * 30, b"-5", b"\xb2", b"", b"1"))):
            sent = 0
            answer = await client.post("/v1/search", content=body(), headers={**JSON, **declared})
            check_problem(answer, 413)
            assert answer.headers["connection"] == "close"


fields = st.sampled_from(
    [
        "query",
        "queries",
        "top_k",
        "beam_width",
        "scoring",
        "ranking",
        "history",
        "histories",
        "include",
        "explain",
        "mode",
        "level",
        "filter",
    ]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(fields, json_values, max_size=5) | json_values)
def test_any_json_is_answered_below_500(body: Any) -> None:
    """Through the real middleware and routes, with one application for all examples."""
    answer = _portal().post("/v1/search", content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400, 413, 422)


@settings(max_examples=100)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_answered_below_500(body: bytes) -> None:
    assert _portal().post("/v1/search", content=body, headers=JSON).status_code in (400, 422)


@settings(max_examples=200)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_any_parameters_of_a_media_type_are_taken_or_refused(parameters: str) -> None:
    headers = {"content-type": f"application/json;{parameters}"}
    assert _portal().post("/v1/search", content=b'{"query": "a"}', headers=headers).status_code in (200, 415)


_CLIENTS: list[Any] = []


def _portal() -> Any:
    """One synchronous client: hypothesis and event loops per example do not go together."""
    if not _CLIENTS:
        app = create_app(FakePipeline(), make_settings(max_query_characters=1000, max_top_k=100))
        _CLIENTS.append(TestClient(app, raise_server_exceptions=True))
    return _CLIENTS[0]


async def test_failure_of_our_own_is_a_500_without_its_reason() -> None:
    pipeline = FakePipeline()
    async with client_of(create_app(pipeline, make_settings())) as client:
        pipeline.error = RuntimeError(SECRET)
        answer = await client.post("/v1/search", json={"query": "a"})
        problem = check_problem(answer, 500)
        assert answer.headers["x-request-id"] in problem["detail"]
        pipeline.error = None
        assert (await client.post("/v1/search", json={"query": "a"})).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"query": "a" + "\u0300" * 40_000 + "\u0316" * 40_000}, 422, "more than 64 combining characters in a row"),
        ({"queries": ["a"], "histories": [[1] * 100] * 3000}, 422, "valid string"),
        ({"query": "a"} | {f"unknown{n}": 1 for n in range(20_000)}, 400, "20001 members, more than 100"),
        ({"query": "a", "unknown": [{}] * 30_000}, 400, "30002 objects and arrays, more than 20000"),
        ({"query": "a", "unknown": [[]] * 30_000}, 400, "30002 objects and arrays, more than 20000"),
        ({"queries": ["a"] * 64, "top_k": 1000}, 422, "64 queries, together more than 16384"),
        ({"queries": ["a"] * 64, "beam_width": 1000}, 422, "64 queries, together more than 16384"),
    ],
)
async def test_what_would_keep_everybody_waiting_is_refused_at_once(body: Any, status: int, words: str) -> None:
    async with client_of(create_app(FakePipeline(), make_settings())) as client:
        begin = time.perf_counter()
        answer = await client.post("/v1/search", json=body)
        assert words in json.dumps(check_problem(answer, status))
        assert time.perf_counter() - begin < 2  # putting 80,000 accents in order takes a minute


@pytest.mark.parametrize("text", ["[" * 30_000, '\\"{[' * 20_000, "\\" * 30_001 + "{" * 30_000])
async def test_brackets_in_a_text_are_no_arrays(text: str) -> None:
    async with client_of(create_app(FakePipeline(), make_settings(max_query_characters=100_000))) as client:
        assert (await client.post("/v1/search", json={"query": text})).status_code == 200


@pytest.mark.parametrize("words", ["e\u0301", "\u1ec7", "\u6f22", "\u0301" * 64 + "a", "\u3000", "\u200b"])
def test_a_long_text_is_not_asked_about_character_by_character(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    asked: list[str] = []

    def counted(ask: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda character: (asked.append(character), ask(character))[1]

    for name in ("combining", "category"):
        monkeypatch.setattr(schemas.unicodedata, name, counted(getattr(unicodedata, name)))
    with contextlib.suppress(ValueError):  # of those without a visible character
        schemas.clean_text(words * (100_000 // len(words)))
    assert 0 < len(asked) < 10


async def test_accents_as_languages_have_them_are_put_in_order() -> None:
    pipeline = FakePipeline()
    async with client_of(create_app(pipeline, make_settings())) as client:
        answer = await client.post("/v1/search", json={"query": "a\u0301\u0323" + "e\u0301" * 100})
        assert answer.status_code == 200
        assert pipeline.searches[-1][0] == ["\u1ea1\u0301" + "\u00e9" * 100]


async def test_refused_bodies_are_counted_under_their_route() -> None:
    app = create_app(FakePipeline(), make_settings())
    async with client_of(app) as client:
        assert (await client.post("/v1/search", content=b"{", headers=JSON)).status_code == 400
        assert (await client.post("/nowhere", content=b"{", headers=JSON)).status_code == 400
        text = (await client.get("/metrics")).text
    assert 'rhumb_request_seconds_count{route="/v1/search",status="400"} 1.0' in text
    assert 'rhumb_request_seconds_count{route="unmatched",status="400"} 1.0' in text
