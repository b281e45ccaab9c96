"""Facts that need real sockets: slow and oversized bodies, overload, readiness, shutdown."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn

from service.http import server
from service.http.app import create_app
from service.http.engine import Engine
from service.http.protocol import BoundedProtocol
from service.http.readiness import CANARY_SECONDS
from service.http.server import ListenError, bind, raise_file_limit, run_server
from service.index.documents import Document
from service.ops.cache import LocalCache
from service.ops.metrics import Metrics
from service.search.modes import Has
from tests.service.http.fakes import FakePipeline, make_settings, running, wait_until

QUERY = json.dumps({"query": "a"}).encode()


def talk(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send the parts with pauses; return what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(pause)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def head(length: int, extra: bytes = b"") -> bytes:
    return (
        b"POST /v1/search HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
        b"content-length: " + str(length).encode() + b"\r\n" + extra + b"\r\n"
    )


def test_a_query_over_a_socket() -> None:
    with running(FakePipeline()) as (url, _, _):
        answer = httpx.post(f"{url}/v1/search", json={"query": "a", "top_k": 1})
        assert answer.json()["results"][0]["id"] == "collections.Counter"
        assert "server" not in answer.headers


def test_slow_body_gets_a_408_and_the_connection_closes() -> None:
    with running(FakePipeline(), body_timeout_seconds=0.5) as (_, port, _):
        begin = time.monotonic()
        answer = talk(port, head(100), b"{", pause=0.1)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"application/problem+json" in answer
        assert b"connection: close" in answer.lower()
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize("start", [b"", b"POST /v1/search HTTP/1.1\r\nhost: t\r\nx-slow: "])
def test_slow_head_gets_a_408(start: bytes) -> None:
    with running(FakePipeline(), body_timeout_seconds=0.5) as (_, port, _):
        assert talk(port, start).startswith(b"HTTP/1.1 408 ")


def test_what_is_not_http_gets_a_400_problem() -> None:
    with running(FakePipeline()) as (_, port, _):
        answer = talk(port, b"\x16\x03\x01 is TLS\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in answer


def test_slow_second_head_on_a_connection_gets_a_408() -> None:
    with running(FakePipeline(), body_timeout_seconds=0.5) as (_, port, _):
        answer = talk(port, head(len(QUERY)) + QUERY, b"GET /livez HTTP/1.1\r\nhost: ", pause=0.2)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in answer


@pytest.mark.parametrize(
    "next_head",
    [
        b"GET /livez HTTP/1.1\r\nho",
        b"no HTTP at all\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_a_bad_second_request_leaves_the_answer_under_way_alone(next_head: bytes) -> None:
    pipeline = FakePipeline()
    with running(pipeline, body_timeout_seconds=0.3) as (_, port, _):
        pipeline.may_go.clear()
        timer = threading.Timer(1.0, pipeline.may_go.set)
        timer.start()
        answer = talk(port, head(len(QUERY)) + QUERY, next_head, pause=0.1)
        timer.join()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"}")
    assert b"collections.Counter" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_idle_connection_outlives_the_head_deadline() -> None:
    """Between requests a client may keep its connection for as long as keep-alive says."""
    with running(FakePipeline(), body_timeout_seconds=0.3) as (url, _, _), httpx.Client() as client:
        client.get(f"{url}/livez")
        time.sleep(0.8)
        assert client.get(f"{url}/livez").status_code == 200


def test_endless_head_gets_a_431() -> None:
    with running(FakePipeline()) as (_, port, _):
        answer = talk(port, b"GET /livez HTTP/1.1\r\nhost: t\r\n", *[b"x-a: " + b"b" * 8000 + b"\r\n"] * 20)
        assert answer.startswith(b"HTTP/1.1 431 ")


def test_slow_clients_lock_nobody_out() -> None:
    with running(FakePipeline(), body_timeout_seconds=20) as (url, port, _):
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
        for connection in slow:
            connection.sendall(head(100) + b"{")
        begin = time.monotonic()
        assert httpx.post(f"{url}/v1/search", json={"query": "a"}, timeout=15).status_code == 200
        assert time.monotonic() - begin < 10
        for connection in slow:
            connection.close()


def test_oversized_body_is_answered_not_reset() -> None:
    """The client sends 8 MB before it reads; it must see the 413."""
    with running(FakePipeline(), max_body_bytes=10_000) as (_, port, _):
        body = b" " * 8_000_000
        assert talk(port, head(len(body)) + body).startswith(b"HTTP/1.1 413 ")
        chunked = head(0).replace(b"content-length: 0", b"transfer-encoding: chunked")
        chunks = (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 20 + b"0\r\n\r\n"
        assert talk(port, chunked + chunks).startswith(b"HTTP/1.1 413 ")


def test_who_asks_first_is_refused_before_sending() -> None:
    with running(FakePipeline(), max_body_bytes=10_000) as (_, port, _):
        answer = talk(port, head(1 << 30, b"expect: 100-continue\r\n"))
        assert answer.startswith(b"HTTP/1.1 413 "), "no 100 Continue"


def test_client_that_hangs_up_in_its_body_does_no_harm() -> None:
    with running(FakePipeline()) as (url, port, _):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head(100) + b"{")
        assert httpx.get(f"{url}/livez").status_code == 200


def test_full_service_refuses_quickly_and_recovers() -> None:
    pipeline = FakePipeline()
    with running(pipeline, concurrency=1, max_in_flight=2) as (url, _, _), ThreadPoolExecutor(8) as clients:
        pipeline.searches.clear()
        pipeline.may_go.clear()
        waiting = [clients.submit(_ask, url, f"first {number}") for number in range(2)]
        wait_until(lambda: pipeline.searches and "in_flight 2.0" in httpx.get(f"{url}/metrics").text)
        begin = time.monotonic()
        refused = _ask(url, "one too many")
        assert time.monotonic() - begin < 1
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.headers["content-type"] == "application/problem+json"
        assert 'rhumb_refusals_total{reason="overload"} 1.0' in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/livez").status_code == 200
        pipeline.may_go.set()
        assert [each.result().status_code for each in waiting] == [200, 200]
        assert _ask(url, "afterwards").status_code == 200


def test_a_full_service_looks_no_filter_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline()
    looked_up: list[Any] = []
    documents = pipeline.bundle.documents
    plain = documents.positions_of
    monkeypatch.setattr(documents, "positions_of", lambda ids: looked_up.append(ids) or plain(ids))
    wanted = {"query": "a", "filter": {"ids": ["collections.Counter"]}}
    with running(pipeline, concurrency=1, max_in_flight=1) as (url, _, _), ThreadPoolExecutor(1) as clients:
        pipeline.searches.clear()
        pipeline.may_go.clear()
        first = clients.submit(_ask, url, "first")
        wait_until(lambda: pipeline.searches)
        assert httpx.post(f"{url}/v1/search", json=wanted).status_code == 503
        assert not looked_up
        pipeline.may_go.set()
        assert first.result().status_code == 200
        assert httpx.post(f"{url}/v1/search", json=wanted).status_code == 200
        assert httpx.post(f"{url}/v1/search", json=wanted).headers["x-cache"] == "hit"
        assert len(looked_up) == 1
        assert pipeline.searches[-1][1].eligible is not None


def test_who_waits_too_long_for_a_thread_is_refused() -> None:
    pipeline = FakePipeline()
    with running(pipeline, concurrency=1, queue_seconds=0.3) as (url, _, _), ThreadPoolExecutor(1) as clients:
        pipeline.searches.clear()
        pipeline.may_go.clear()
        first = clients.submit(_ask, url, "first")
        wait_until(lambda: pipeline.searches)
        try:
            late = httpx.post(f"{url}/v1/search", json={"query": "late"}, timeout=10)
            assert (late.status_code, late.headers["retry-after"]) == (503, "1")
            assert "no thread was free for 0.3 seconds" in late.json()["detail"]
            metrics = httpx.get(f"{url}/metrics").text
            assert 'rhumb_refusals_total{reason="queue"} 1.0' in metrics
            assert "rhumb_in_flight 1.0" in metrics
            assert not first.done(), "what a thread has begun has as long as it takes"
        finally:
            pipeline.may_go.set()
        assert first.result().status_code == 200
        assert _ask(url, "afterwards").status_code == 200
        assert [queries for queries, *_ in pipeline.searches] == [["first"], ["afterwards"]]


def test_nothing_is_computed_for_a_client_that_has_left_the_queue() -> None:
    pipeline = FakePipeline()
    with running(pipeline, concurrency=1) as (url, port, _), ThreadPoolExecutor(1) as clients:
        pipeline.searches.clear()
        pipeline.may_go.clear()
        first = clients.submit(_ask, url, "first")
        wait_until(lambda: pipeline.searches)
        try:
            with socket.create_connection(("127.0.0.1", port)) as leaver:
                leaver.sendall(head(len(QUERY)) + QUERY)
                wait_until(lambda: "rhumb_in_flight 2.0" in httpx.get(f"{url}/metrics").text)
            wait_until(lambda: "rhumb_in_flight 1.0" in httpx.get(f"{url}/metrics").text, seconds=4)
        finally:
            pipeline.may_go.set()
        assert first.result().status_code == 200
        assert _ask(url, "afterwards").status_code == 200
        assert [queries for queries, *_ in pipeline.searches] == [["first"], ["afterwards"]]
        assert 'route="/v1/search",status="499"} 1.0' in httpx.get(f"{url}/metrics").text


def _ask(url: str, query: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/search", json={"query": query}, timeout=20)


# ---------------------------------------------------------------- readiness


def test_probes_within_a_second_share_one_canary() -> None:
    pipeline = FakePipeline()
    with running(pipeline) as (url, _, _):
        pipeline.searches.clear()
        begin = time.monotonic()
        for _ in range(10):
            assert httpx.get(f"{url}/readyz").status_code == 200
        assert 1 <= len(pipeline.searches) <= 3 + (time.monotonic() - begin) / CANARY_SECONDS


def test_full_queue_is_not_taken_for_a_broken_service() -> None:
    """Under load the canary goes past the waiting requests: a busy replica must not be taken out of service."""
    pipeline = FakePipeline()
    pipeline.holds_canary = False
    settings = {"concurrency": 1, "max_in_flight": 1, "ready_timeout_seconds": 5}
    with running(pipeline, **settings) as (url, _, _), ThreadPoolExecutor(1) as clients:
        pipeline.may_go.clear()
        busy = clients.submit(_ask, url, "long")
        wait_until(lambda: pipeline.searches and pipeline.searches[-1][0] == ["long"])
        assert httpx.get(f"{url}/readyz", timeout=10).status_code == 200
        assert _ask(url, "too many").status_code == 503
        pipeline.may_go.set()
        assert busy.result().status_code == 200


def test_broken_pipeline_is_not_ready_and_a_mended_one_is() -> None:
    pipeline = FakePipeline()
    with running(pipeline) as (url, _, _):
        pipeline.error = RuntimeError("broken")
        answer = httpx.get(f"{url}/readyz")
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
        assert "broken" not in answer.text
        assert httpx.get(f"{url}/livez").status_code == 200
        pipeline.error = None
        time.sleep(CANARY_SECONDS)
        assert httpx.get(f"{url}/readyz").status_code == 200


def test_hanging_pipeline_is_not_ready() -> None:
    pipeline = FakePipeline()
    with running(pipeline, ready_timeout_seconds=0.3) as (url, _, _):
        pipeline.may_go.clear()
        assert httpx.get(f"{url}/readyz").status_code == 503
        pipeline.may_go.set()


def test_empty_answer_to_the_canary_refuses_to_start() -> None:
    pipeline = FakePipeline(documents=[])
    with pytest.raises(RuntimeError, match="canary"):
        Engine(pipeline, LocalCache(1, 1, 1), Metrics(), 1, 1, 1).warm_up()


def test_warm_up_runs_every_scoring() -> None:
    pipeline = FakePipeline()
    with running(pipeline):
        assert {options.scoring for _, options, _ in pipeline.searches} == {"generative", "geometric", "guided"}


def test_warm_up_asks_by_every_mode_that_the_bundle_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that count nothing are nothing to join a walk with; they may still be looked for alone."""
    for weight, modes in ((0.3, {"generative", "lexical", "hybrid"}), (0.0, {"generative", "lexical"})):
        pipeline = FakePipeline()
        pipeline.words = object()
        monkeypatch.setattr(FakePipeline, "has", Has(codes=False, words=True, lexical_weight=weight))
        Engine(pipeline, LocalCache(1, 1, 1), Metrics(), 1, 1, 1).warm_up()
        assert {options.mode for _, options, _ in pipeline.searches} == modes


@pytest.mark.parametrize(("hard", "allowed"), [(4096, 1280), (1100, 1100), (resource.RLIM_INFINITY, 1280)])
def test_the_file_limit_is_raised_as_far_as_it_goes(
    hard: int, allowed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    raise_file_limit(1000)
    assert limits == []
    raise_file_limit(1280)
    assert limits == [(allowed, hard)]
    assert ("may open 1100 files, RHUMB_MAX_CONNECTIONS wants 1280" in caplog.text) == (allowed < 1280)


def test_a_system_that_refuses_more_files_is_served_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As macOS does above a limit of its own, although the process's hard limit is infinite."""

    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_file_limit(1280)
    assert "may open 256 files, RHUMB_MAX_CONNECTIONS wants 1280" in caplog.text


def test_a_start_that_failed_is_not_announced_and_ends_with_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions of uvicorn do it: they return from a start that failed."""

    async def startup(server: uvicorn.Server, sockets: Any = None) -> None:
        await server.lifespan.startup()
        server.should_exit = server.lifespan.should_exit

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    settings = make_settings()
    app = create_app(FakePipeline(documents=[]), settings)  # the canary finds nothing
    with bind("127.0.0.1", 0) as bound, pytest.raises(SystemExit) as ended:
        run_server(app, settings, bound, lambda: pytest.fail("announced"))
    assert ended.value.code == 3


# ---------------------------------------------------------------- shutdown


def test_shutdown_drains_then_finishes_what_runs() -> None:
    """Signal: not ready, still serving with `connection: close`; then no new connections; the running one ends well."""
    pipeline = FakePipeline()
    with running(pipeline, drain_seconds=2.0) as (url, port, server), ThreadPoolExecutor(2) as clients:
        server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{url}/readyz").status_code == 503
        answer = _ask(url, "still served")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        pipeline.may_go.clear()
        running_request = clients.submit(_ask, url, "long")
        wait_until(lambda: len(server.server_state.tasks) > 0)
        wait_until(lambda: _refuses(port))
        assert not running_request.done()
        pipeline.may_go.set()
        assert running_request.result().status_code == 200
    assert pipeline.is_closed


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


def test_no_request_is_lost_while_the_service_goes() -> None:
    """Clients behind a balancer that notices the 503 of /readyz within the drain time see no failed request."""
    pipeline = FakePipeline()
    outcomes: list[Any] = []
    noticed = threading.Event()
    with running(pipeline, drain_seconds=3) as (url, port, server):
        clients = [threading.Thread(target=_hammer, args=(url, outcomes, noticed)) for _ in range(4)]
        for client in clients:
            client.start()
        time.sleep(0.3)
        server.handle_exit(signal.SIGTERM, None)
        while httpx.get(f"{url}/readyz").status_code != 503:
            time.sleep(0.05)
        time.sleep(0.5)
        noticed.set()
        for client in clients:
            client.join(20)
        wait_until(lambda: _refuses(port))
    assert len(outcomes) > 10
    assert set(outcomes) == {200}


def _hammer(url: str, outcomes: list[Any], noticed: threading.Event) -> None:
    with httpx.Client(timeout=30) as client:
        while not noticed.is_set():
            try:
                query = {"query": f"q{len(outcomes)}"}
                outcomes.append(client.post(f"{url}/v1/search", json=query).status_code)
            except httpx.HTTPError as error:
                outcomes.append(repr(error))


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_second_signal_or_the_keyboard_skips_the_draining(signals: list[int]) -> None:
    with running(FakePipeline(), drain_seconds=60) as (_, port, server):
        for number in signals:
            server.handle_exit(number, None)
        wait_until(lambda: _refuses(port))


# ---------------------------------------------------------------- listening


def test_taken_port_is_named_with_the_remedy() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{port}.*RHUMB_PORT"):
            bind("127.0.0.1", port)


def test_unknown_host_is_named_with_the_remedy() -> None:
    with pytest.raises(ListenError, match="RHUMB_HOST"):
        bind("no such host", 8080)


@pytest.mark.parametrize("last", [b"\r\n", b""])
def test_bytes_that_begin_no_request_do_not_hold_a_connection(last: bytes) -> None:
    with running(FakePipeline(), body_timeout_seconds=0.5) as (_, port, _):
        begin = time.monotonic()
        answer = talk(port, b"GET /livez HTTP/1.1\r\nhost: t\r\n\r\n", b"\r\n" + last, pause=0.2)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in answer
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("length", [b"content-length: 1000000000", b"transfer-encoding: chunked"])
def test_a_body_where_none_belongs_is_refused_unread(length: bytes) -> None:
    with running(FakePipeline()) as (_, port, _):
        answer = talk(port, b"GET /livez HTTP/1.1\r\nhost: t\r\n" + length + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"takes no body" in answer
        assert b"connection: close" in answer.lower()


def test_a_connection_too_many_gets_a_503_and_the_others_go_on() -> None:
    with running(FakePipeline(), max_connections=2) as (_, port, _), contextlib.ExitStack() as open_ones:
        first, _ = (open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in "12")
        first.sendall(b"GET /livez HTTP/1.1\r\nhost: t\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
        refused = talk(port)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"application/problem+json" in refused
        assert b"retry-after: 1" in refused
        first.sendall(b"GET /livez HTTP/1.1\r\nhost: t\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_never_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 1)
    with running(FakePipeline([Document("a", "a", "x" * 20_000_000)])) as (_, port, _), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /v1/documents/a HTTP/1.1\r\nhost: t\r\n\r\n")
        time.sleep(3)
        connection.settimeout(5)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(1 << 20):
                received += len(chunk)
        assert received < 20_000_000


HANGS = b"GET /v1/documents/a HTTP/1.1\r\nhost: t\r\n"


@pytest.mark.parametrize(
    "sent", [[HANGS + b"connection: close\r\n\r\n"], [HANGS + b"\r\n", b"G"], [HANGS + b"\r\n"] * 3]
)
def test_slow_readers_are_cut_off(monkeypatch: pytest.MonkeyPatch, sent: list[bytes]) -> None:
    """Whether it is their last answer, they begin another request, or send several at once."""
    monkeypatch.setattr(BoundedProtocol, "write_timeout_seconds", 0.3)
    pipeline = FakePipeline([Document("a", "a", "x" * 20_000_000)])
    with running(pipeline, body_timeout_seconds=0.5) as (_, port, server), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        wait_until(lambda: server.server_state.connections)
        for part in sent:
            connection.sendall(part)
            time.sleep(0.1)
        wait_until(lambda: not server.server_state.connections)


def test_a_client_that_reads_slowly_but_steadily_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "write_timeout_seconds", 0.5)
    with running(FakePipeline([Document("a", "a", "x" * 20_000_000)])) as (_, port, _), socket.socket() as connection:
        connection.connect(("127.0.0.1", port))
        connection.sendall(HANGS + b"connection: close\r\n\r\n")
        received = 0
        while chunk := connection.recv(1 << 20):
            received += len(chunk)
            time.sleep(0.02)
        assert received > 20_000_000


def test_refusals_of_the_protocol_are_counted() -> None:
    with running(FakePipeline(), body_timeout_seconds=0.3, max_connections=3) as (url, port, _):
        talk(port, b"no HTTP\r\n\r\n")
        talk(port, b"GET / HTTP/1.1\r\nhost: t\r\nx: " + b"b" * 70_000)
        talk(port)
        with contextlib.ExitStack() as open_ones:
            for _ in range(3):
                open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            talk(port)
        wait_until(lambda: httpx.get(f"{url}/livez").status_code == 200)
        text = httpx.get(f"{url}/metrics").text
    for reason in ("not_http", "large_head", "late_head", "connections"):
        assert f'rhumb_refusals_total{{reason="{reason}"}} 1.0' in text


def test_two_servers_cannot_take_one_port() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(ListenError, match="RHUMB_METRICS_PORT"):
        bind("127.0.0.1", bound.getsockname()[1], "RHUMB_METRICS_PORT")


def test_probes_may_ask_for_the_head_alone() -> None:
    with running(FakePipeline()) as (url, _, _):
        for path in ("/livez", "/readyz"):
            answer = httpx.head(url + path)
            assert answer.status_code == 200
            assert answer.content == b""


@pytest.mark.parametrize("host", ["..", "a" * 70, "no such host"])
def test_what_is_no_host_is_refused_with_the_remedy(host: str) -> None:
    with pytest.raises(ListenError, match="choose another with RHUMB_HOST"):
        bind(host, 0)
