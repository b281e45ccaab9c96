from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from service.ops import cache as cache_module
from service.ops.cache import ENTRY_OVERHEAD_BYTES, LocalCache, RedisCache, answer_key
from tests.service.ops.redis_server import RedisServer, run_redis

parts_strategy = st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=5)


@settings(max_examples=200)
@given(parts_strategy, parts_strategy)
def test_keys_are_equal_exactly_when_the_parts_are(left: list[str], right: list[str]) -> None:
    assert (answer_key(left) == answer_key(right)) == (left == right)


def test_keys_do_not_collide_by_concatenation_nor_by_composition() -> None:
    """Ids are as they are stored: two that differ in composition alone are two documents."""
    assert answer_key(["ab", "c"]) != answer_key(["a", "bc"])
    assert answer_key(["a", ""]) != answer_key(["a"])
    assert answer_key(["caf\u00e9"]) != answer_key(["cafe\u0301"])


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_local_cache_drops_the_least_recently_used() -> None:
    cache = LocalCache(2, 1 << 20, 60)
    await cache.put_many({"a": b"1", "b": b"2"})
    assert await cache.get_many(["a"]) == [b"1"]
    await cache.put_many({"c": b"3"})
    assert await cache.get_many(["a", "b", "c"]) == [b"1", None, b"3"]
    assert len(cache) == 2


async def test_local_cache_is_bounded_by_bytes_and_counts_them_exactly() -> None:
    cache = LocalCache(100, 3 * (ENTRY_OVERHEAD_BYTES + 10), 60)
    for number in range(50):
        await cache.put_many({str(number % 7): bytes(10)})
        assert cache.bytes == len(cache) * (ENTRY_OVERHEAD_BYTES + 10)
    assert len(cache) == 3
    await cache.put_many({"large": bytes(10_000)})
    assert await cache.get_many(["large"]) == [None]
    assert len(cache) == 3, "a value that cannot fit pushes nothing out"


async def test_local_cache_forgets_by_age() -> None:
    clock = Clock()
    cache = LocalCache(10, 1 << 20, 60, clock)
    await cache.put_many({"a": b"1"})
    clock.now += 59
    assert await cache.get_many(["a"]) == [b"1"]
    clock.now += 1
    assert await cache.get_many(["a"]) == [None]
    assert (len(cache), cache.bytes) == (0, 0)


async def test_local_cache_of_no_entries_keeps_nothing() -> None:
    cache = LocalCache(0, 1 << 20, 60)
    await cache.put_many({"a": b"1"})
    assert await cache.get_many(["a"]) == [None]


# ---------------------------------------------------------------- Redis, a real one


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def connect(url: str, ttl_seconds: float = 60, timeout_seconds: float = 3.0) -> RedisCache:
    """A generous time-out for what must succeed on a busy machine; the failure tests use the real one."""
    return RedisCache(url, timeout_seconds=timeout_seconds, connections=4, ttl_seconds=ttl_seconds)


@pytest.fixture
async def redis_cache(redis_server: RedisServer) -> AsyncIterator[RedisCache]:
    cache = connect(redis_server[0])
    yield cache
    await cache.close()


async def test_redis_keeps_what_it_got(redis_cache: RedisCache) -> None:
    await redis_cache.put_many({"a": b"\x00\xff", "b": b"2"})
    assert await redis_cache.get_many(["a", "nothing", "b"]) == [b"\x00\xff", None, b"2"]


async def test_two_processes_share_answers(redis_cache: RedisCache, redis_server: RedisServer) -> None:
    await redis_cache.put_many({"shared": b"yes"})
    other = connect(redis_server[0])
    assert await other.get_many(["shared"]) == [b"yes"]
    await other.close()


async def test_redis_answers_expire(redis_server: RedisServer) -> None:
    cache = connect(redis_server[0], ttl_seconds=0.05)
    await cache.put_many({"brief": b"1"})
    await asyncio.sleep(0.2)
    assert await cache.get_many(["brief"]) == [None]
    await cache.close()


async def test_foreign_type_under_our_key_is_a_miss(redis_cache: RedisCache, redis_server: RedisServer) -> None:
    client = Redis.from_url(redis_server[0])
    await client.rpush("rhumb:answer:list", "x")  # type: ignore[misc]
    await client.aclose()
    assert await redis_cache.get_many(["list"]) == [None]


async def test_more_callers_than_connections_all_return(redis_cache: RedisCache) -> None:
    await redis_cache.put_many({"a": b"1"})
    answers = await asyncio.gather(*(redis_cache.get_many(["a"]) for _ in range(50)))
    assert all(answer in ([b"1"], None) for answer in answers)
    assert [b"1"] in answers


async def test_a_burst_is_no_failure_of_the_server() -> None:
    """With all connections busy for longer than others wait, those have a miss, and the next one is answered."""
    busy = asyncio.Event()
    cache = RedisCache("redis://127.0.0.1:1/0", timeout_seconds=30, connections=2, ttl_seconds=60)
    cache._wait_seconds = 0.05

    class Busy(FakeRedis):
        async def mget(self, keys: list[str]) -> list[bytes]:
            await busy.wait()
            return await super().mget(keys)

    cache._redis = Busy()  # type: ignore[assignment]
    burst = [asyncio.create_task(cache.get_many(["a"])) for _ in range(10)]
    while sum(task.done() for task in burst) < 8:
        await asyncio.sleep(0.01)
    busy.set()
    answers = await asyncio.gather(*burst)
    assert answers.count(None) == 8
    assert await cache.get_many(["a"]) == [b"1"]


async def test_one_slow_read_is_no_failure_and_several_are() -> None:
    cache, asked = connect("redis://127.0.0.1:1/0", timeout_seconds=0.05), 0

    class Slow(FakeRedis):
        async def mget(self, keys: list[str]) -> list[bytes]:
            nonlocal asked
            asked += 1
            if asked != 2:
                await asyncio.sleep(10)
            return await super().mget(keys)

    cache._redis = Slow()  # type: ignore[assignment]
    assert [await cache.get_many(["a"]) for _ in range(8)] == [None, [b"1"], *[None] * 6]
    assert asked == 5, "a slow one, a quick one, three slow ones, and nobody asks for a second"


async def test_reads_that_were_slow_together_are_one() -> None:
    """As when our own event loop stood still: many time out at once, and the server is not to blame."""
    cache = connect("redis://127.0.0.1:1/0", timeout_seconds=0.05)

    class Slow(FakeRedis):
        async def mget(self, keys: list[str]) -> list[bytes]:
            await asyncio.sleep(10 if keys[0].endswith("slow") else 0)
            return await super().mget(keys)

    cache._redis = Slow()  # type: ignore[assignment]
    assert await asyncio.gather(*(cache.get_many(["slow"]) for _ in range(5))) == [None] * 5
    assert await cache.get_many(["a"]) == [b"1"]


class FakeRedis:
    """Keeps what it gets, round trip by round trip; fails writes where asked to."""

    def __init__(self, is_slow: bool = False) -> None:
        self.trips: list[dict[str, bytes]] = []
        self.is_slow = is_slow

    def pipeline(self, **_: object) -> FakeRedis:
        self.trips.append({})
        return self

    def set(self, key: str, value: bytes, px: int) -> None:
        assert px > 0
        self.trips[-1][key] = value

    async def execute(self) -> None:
        if self.is_slow:
            raise TimeoutError

    async def mget(self, keys: list[str]) -> list[bytes]:
        return [b"1" for _ in keys]

    async def aclose(self, **_: object) -> None:
        pass


async def test_large_answers_do_not_travel_and_others_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "REDIS_BYTES", 100)
    cache, redis = connect("redis://127.0.0.1:1/0"), FakeRedis()
    cache._redis = redis  # type: ignore[assignment]
    await cache.put_many({"large": b"x" * 101} | {str(number): b"y" * 30 for number in range(7)} | {"full": b"z" * 100})
    assert [len(trip) for trip in redis.trips] == [3, 3, 1, 1]
    assert not any("large" in key for trip in redis.trips for key in trip)
    await cache.put_many({"large": b"x" * 101})
    await cache.put_many({})
    assert len(redis.trips) == 4


async def test_answers_are_read_on_after_a_write_was_too_slow() -> None:
    cache, redis = connect("redis://127.0.0.1:1/0"), FakeRedis(is_slow=True)
    cache._redis = redis  # type: ignore[assignment]
    for _ in range(3):
        await cache.put_many({"a": b"1"})
        assert await cache.get_many(["a"]) == [b"1"]
    assert len(redis.trips) == 1, "further writes wait a second"


@asynccontextmanager
async def server_that_says(noise: bytes | None) -> AsyncIterator[str]:
    """A loopback server that answers every connection with ``noise``; with None it hangs."""
    over = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if noise is None:
            await over.wait()
        else:
            writer.write(noise)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    over.set()
    server.close()
    await asyncio.sleep(0.01)  # let the handlers close their connections


async def test_hung_server_costs_one_time_out_then_nothing() -> None:
    """The first call waits its 50 ms, the next ones not at all."""
    async with server_that_says(None) as url:
        cache = connect(url, timeout_seconds=0.05)
        begin = time.monotonic()
        assert await cache.get_many(["a"]) is None
        assert time.monotonic() - begin < 5
        begin = time.monotonic()
        for _ in range(100):
            assert await cache.get_many(["a"]) is None
            await cache.put_many({"a": b"1"})
        assert time.monotonic() - begin < 5  # 200 time-outs are ten seconds
        await cache.close()


async def test_dead_server_is_a_miss() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cache = connect(f"redis://127.0.0.1:{port}/0", timeout_seconds=0.05)
    await cache.put_many({"a": b"1"})
    assert await cache.get_many(["a"]) is None
    await cache.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"*1\r\n" * 5000,
        b"$5\r\nab",
        b"*1\r\n$-7\r\n",
        b"*99999999\r\n",
        b":notanumber\r\n",
        b"\xff\xfe\x00\r\n",
        b"-ERR \xff\r\n",
        b"+OK\r\n" * 20,
        b"",
    ],
)
async def test_garbage_on_the_wire_is_a_miss(noise: bytes) -> None:
    async with server_that_says(noise) as url:
        cache = connect(url, timeout_seconds=0.05)
        assert (await cache.get_many(["a"])) in (None, [None])
        cache._resting_until = 0.0
        await cache.put_many({"a": b"1"})
        await cache.close()


async def test_a_failed_cache_recovers(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP hangs a real server in the middle of its life; after SIGCONT and the rest, answers come again."""
    monkeypatch.setattr(cache_module, "REST_SECONDS", 0.2)
    url, process = redis_server
    cache = connect(url, timeout_seconds=0.2)
    await cache.put_many({"a": b"1"})
    process.send_signal(signal.SIGSTOP)
    try:
        assert await cache.get_many(["a"]) is None
    finally:
        process.send_signal(signal.SIGCONT)
    for _ in range(50):
        await asyncio.sleep(0.1)
        if await cache.get_many(["a"]) == [b"1"]:
            break
    else:
        pytest.fail("the cache never came back")
    await cache.close()


async def test_cancelled_caller_is_cancelled_not_a_miss() -> None:
    async with server_that_says(None) as url:
        cache = connect(url, timeout_seconds=5)
        task = asyncio.create_task(cache.get_many(["a"]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cache.close()
