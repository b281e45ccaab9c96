"""The answer cache: an LRU in this process, or Redis for several. Whatever goes wrong with either is a miss.

Keys are SHA-256 over length-prefixed parts, so that no two lists of parts collide by concatenation; values are bytes
that the caller checks against its own schema after every ``get``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import TimeoutError as RedisTimeoutError

logger = logging.getLogger(__name__)

ENTRY_OVERHEAD_BYTES = 200  # key, list node and bookkeeping of one local entry, roughly
REST_SECONDS = 1.0  # after a Redis failure nobody asks for this long: a dead server costs few time-outs a second
SLOW_READS = 3  # one after the other are a failure: a single one may be our own event loop's doing
REDIS_BYTES = 256 << 10  # of one value, and of those that are written together: more would hold up everybody
REDIS_PREFIX = "rhumb:answer:"


class AnswerCache(Protocol):
    """What the service asks of a cache."""

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """Return each key's value or None; None for the whole call when the cache failed. Never raises."""

    async def put_many(self, values: Mapping[str, bytes]) -> None:
        """Keep the values if possible; never raises."""

    async def close(self) -> None:
        """Let go of connections."""


def answer_key(parts: Iterable[str | bytes]) -> str:
    """Return the hex SHA-256 over the parts, each preceded by its length (8 bytes, little-endian)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class LocalCache:
    """Least recently used answers of this process, bounded by entries, bytes and age.

    Used from the event loop only, hence without a lock.
    """

    def __init__(
        self, max_entries: int, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_entries, self.max_bytes, self.ttl_seconds = max_entries, max_bytes, ttl_seconds
        self.bytes = 0
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """Return each key's value, or None."""
        return [self._get(key) for key in keys]

    async def put_many(self, values: Mapping[str, bytes]) -> None:
        """Keep the values, then drop the least recently used until the bounds hold."""
        for key, value in values.items():
            if _cost(value) <= self.max_bytes and self.max_entries > 0:
                self._drop(key)
                self._entries[key] = (self._clock() + self.ttl_seconds, value)
                self.bytes += _cost(value)
        while len(self._entries) > self.max_entries or self.bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    async def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.bytes = 0

    def _get(self, key: str) -> bytes | None:
        expires, value = self._entries.get(key, (0.0, b""))
        if key not in self._entries:
            return None
        if self._clock() >= expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    def _drop(self, key: str) -> None:
        if entry := self._entries.pop(key, None):
            self.bytes -= _cost(entry[1])


def _cost(value: bytes) -> int:
    return len(value) + ENTRY_OVERHEAD_BYTES


class RedisCache:
    """Answers shared through Redis; slow, dead, full or talking nonsense, it is a miss. Large answers are not kept.

    Whoever finds no connection free goes on without it as well, which says nothing against the server.
    """

    def __init__(self, url: str, *, timeout_seconds: float, connections: int, ttl_seconds: float) -> None:
        pool = ConnectionPool.from_url(
            url,
            max_connections=connections,  # never asked for more: `_connections` counts them
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),  # the default of ten retries blocked requests for 15 s
            protocol=2,
        )
        self._redis = Redis(connection_pool=pool)
        self._timeout_seconds, self._ttl_ms = timeout_seconds, max(1, round(ttl_seconds * 1000))
        self._connections, self._wait_seconds = asyncio.Semaphore(connections), timeout_seconds / 2
        self._resting_until = self._writes_resting_until = 0.0
        self._slow, self._slow_until = 0, 0.0  # reads one after the other that took too long, and when the last ended

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """Return each key's value or None, in one round trip; None for the whole call on any failure."""
        if self._rests() or not await self._has_place():
            return None
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                values = await self._redis.mget([REDIS_PREFIX + key for key in keys])
            if len(values) != len(keys):
                raise ValueError(f"{len(values)} values for {len(keys)} keys")
            self._slow = 0
            return [value if isinstance(value, bytes) else None for value in values]
        except Exception as error:  # noqa: BLE001, RUF100  # the wire has raised RecursionError and AttributeError
            if begin >= self._slow_until:  # reads that were slow together are one
                self._slow, self._slow_until = self._slow + 1, time.monotonic()
            if not isinstance(error, TimeoutError | RedisTimeoutError) or self._slow >= SLOW_READS:
                self._resting_until, self._slow = _rest_after(error), 0
            return None
        finally:
            self._connections.release()

    async def put_many(self, values: Mapping[str, bytes]) -> None:
        """Store the values, some in each round trip, if Redis feels like it; answers are read on where it does not."""
        if self._rests() or time.monotonic() < self._writes_resting_until or not await self._has_place():
            return
        try:
            for batch in _batches(values):
                async with asyncio.timeout(self._timeout_seconds):
                    pipeline = self._redis.pipeline(transaction=False)
                    for key, value in batch.items():
                        pipeline.set(REDIS_PREFIX + key, value, px=self._ttl_ms)
                    await pipeline.execute()
        except Exception as error:  # noqa: BLE001, RUF100  # as above
            self._writes_resting_until = _rest_after(error)
        finally:
            self._connections.release()

    async def close(self) -> None:
        """Close the connections; a server that hangs does not hold us up."""
        try:
            async with asyncio.timeout(1):
                await self._redis.aclose(close_connection_pool=True)
        except Exception as error:  # noqa: BLE001, RUF100  # going away anyway
            logger.warning("closing the Redis cache failed: %s", type(error).__name__)

    async def _has_place(self) -> bool:
        """Take one of the connections; False where none is free in time."""
        try:
            async with asyncio.timeout(self._wait_seconds):
                return await self._connections.acquire()
        except TimeoutError:
            return False

    def _rests(self) -> bool:
        return time.monotonic() < self._resting_until


def _rest_after(error: Exception) -> float:
    """Return until when to leave Redis alone. Only the error's type is logged: its text may quote the wire."""
    logger.warning("the Redis cache failed, going on without it: %s", type(error).__name__)
    return time.monotonic() + REST_SECONDS


def _batches(values: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    """Give the values that are not too large, at most `REDIS_BYTES` at a time."""
    batch: dict[str, bytes] = {}
    size = 0
    for key, value in values.items():
        if len(value) > REDIS_BYTES:
            continue
        if size + len(value) > REDIS_BYTES:
            yield batch
            batch, size = {}, 0
        batch[key] = value
        size += len(value)
    if batch:
        yield batch
