"""The service with a real Redis behind it: shared answers, and no harm from a Redis that is ill."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import httpx
import pytest
import redis

from tests.service.http.fakes import FakePipeline, running, wait_until
from tests.service.ops.redis_server import RedisServer, run_redis


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def ask(url: str, query: str = "a") -> httpx.Response:
    answer = httpx.post(f"{url}/v1/search", json={"query": query}, timeout=20)
    assert answer.status_code == 200
    return answer


def test_two_services_share_answers_and_bad_values_are_misses(redis_server: RedisServer) -> None:
    url, _ = redis_server
    first, second = FakePipeline(), FakePipeline()
    # a generous time-out: on a busy machine 50 ms may be missed, which is a miss and not what is tested here
    settings = {"redis_url": url, "redis_timeout_seconds": 2}
    with (
        running(first, **settings) as (one, _, _),
        running(second, **settings) as (other, _, _),
        redis.Redis.from_url(url) as direct,
    ):
        assert ask(one).headers["x-cache"] == "miss"
        wait_until(lambda: direct.dbsize() == 1)
        shared = ask(other)
        assert shared.headers["x-cache"] == "hit"
        assert shared.json()["results"] == ask(one).json()["results"]
        (key,) = direct.keys()
        assert 0 < direct.pttl(key) <= 3_600_000
        for bad in (b"", b"\xff" * 100, b'{"key": "x", "results": []}', b"[" * 50_000):
            direct.set(key, bad)
            assert ask(other).headers["x-cache"] == "miss"
            wait_until(lambda bad=bad: direct.get(key) != bad)


def test_hung_redis_delays_one_request_and_fails_none(redis_server: RedisServer) -> None:
    url, process = redis_server
    with running(FakePipeline(), redis_url=url) as (service, _, _):
        ask(service)
        process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        for number in range(20):
            ask(service, f"query {number}")
        assert time.monotonic() - begin < 10, "without the rest, every request would pay for the time-out"
        assert 'rhumb_cache_lookups_total{outcome="error"} 20.0' in httpx.get(f"{service}/metrics").text
        assert httpx.get(f"{service}/readyz").status_code == 200
        process.send_signal(signal.SIGCONT)


def test_service_starts_and_serves_without_its_redis() -> None:
    with running(FakePipeline(), redis_url="redis://127.0.0.1:1/0") as (service, _, _):
        assert ask(service).headers["x-cache"] == "miss"
