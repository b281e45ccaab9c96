"""From checked requests to answers: cache, admission, the pipeline in a thread pool of our own.

A micro-batcher would take the place of ``_submit``; everything round it stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from service.http.problems import Problem, invalid, overloaded
from service.http.rendering import SearchPipeline, explain, render_results
from service.http.schemas import DocumentIds, QueryAnswer, Result
from service.model.tokens import TextError
from service.ops.cache import AnswerCache, answer_key
from service.ops.metrics import Metrics
from service.ops.sources import sources_digest
from service.search.filters import DocumentFilter
from service.search.modes import served
from service.search.options import SearchOptions

logger = logging.getLogger(__name__)

CANARY_QUERY = "how do I find what I am looking for"
PIECE_BEAMS = 1024  # of the queries that are walked together, while others wait
MANY_RESULTS = 50  # a millisecond of JSON where their documents are long: not for the event loop
MUCH_JSON = 100_000  # bytes of answers from the cache, likewise
Timings = dict[str, float]
Answers = TypeVar("Answers")
Work = Callable[[], tuple[Answers, Timings]]  # runs in a thread; gives its result and seconds per stage


class CachedAnswer(BaseModel):
    """What the cache holds; the key is repeated inside, so that a mixed-up reply cannot pass for the answer."""

    key: str
    results: list[Result]


@dataclass(frozen=True)
class Search:
    """A checked request.

    Attributes:
        queries: texts in NFC.
        options: how to search; its scoring is never None.
        histories: one per query, or None.
        include: the parts of a result that were asked for.
        filter: the documents that may be found, None for all; looked up by the thread that computes.
    """

    queries: Sequence[str]
    options: SearchOptions
    histories: Sequence[Sequence[str]] | None = None
    include: frozenset[str] = frozenset()
    filter: DocumentIds | None = None

    def part(self, rows: Sequence[int]) -> Search:
        """Return the search for some of the queries."""
        histories = None if self.histories is None else [self.histories[row] for row in rows]
        return replace(self, queries=[self.queries[row] for row in rows], histories=histories)

    def keys(self, digest: str) -> list[str]:
        """Return the cache key of each query: everything that its answer depends on."""
        allowed = None if self.filter is None else sorted(set(self.filter.ids))
        how = repr((self.options, sorted(self.include), allowed))  # once: a filter may be long
        histories = self.histories or [[]] * len(self.queries)
        return [
            answer_key([digest, how, query, *history]) for query, history in zip(self.queries, histories, strict=True)
        ]


def pieces(search: Search) -> list[range]:
    """Give the rows of each piece of a batch: whoever waits behind it waits for one piece at most."""
    options, queries = search.options, len(search.queries)
    walks = options.mode in ("generative", "hybrid")
    size = max(1, PIECE_BEAMS // options.beams(options.scoring or "")) if walks else queries
    return [range(start, min(start + size, queries)) for start in range(0, queries, size)]


class Engine:
    """Answers searches; refuses beyond ``max_in_flight`` requests.

    Args:
        pipeline: the search pipeline over an open bundle.
        cache: the answer cache.
        metrics: where to count.
        concurrency: threads that compute.
        max_in_flight: requests that compute or wait for a thread.
        queue_seconds: how long work waits for a thread.
    """

    def __init__(
        self,
        pipeline: SearchPipeline,
        cache: AnswerCache,
        metrics: Metrics,
        concurrency: int,
        max_in_flight: int,
        queue_seconds: float,
    ) -> None:
        self.pipeline, self.cache, self.metrics = pipeline, cache, metrics
        self.max_in_flight, self.queue_seconds = max_in_flight, queue_seconds
        self.in_flight = 0
        # of what answers: services of another bundle or other code that share a Redis do not read these answers
        self._digest = pipeline.bundle.digest + sources_digest("search", "model", "index", "http")
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="rhumb-search")
        self._canary_thread = ThreadPoolExecutor(1, thread_name_prefix="rhumb-canary")
        self._writes: set[asyncio.Task[None]] = set()

    async def search(self, search: Search) -> tuple[list[QueryAnswer], Timings]:
        """Return the answers in order, and seconds per stage.

        Raises:
            Problem: 503 when the service is full.
        """
        begin = time.perf_counter()
        if search.options.explain:  # beams are not cached
            answers: list[QueryAnswer] = []
            timings = await self._compute_search(search, answers)
        else:
            answers, timings = await self._search_cached(search)
        self.metrics.count_queries(len(answers))
        return answers, timings | {"total": time.perf_counter() - begin}

    async def _search_cached(self, search: Search) -> tuple[list[QueryAnswer], Timings]:
        begin = time.perf_counter()
        keys = search.keys(self._digest)
        answers = await self._look_up(keys)
        timings = {"cache": time.perf_counter() - begin}
        rows = {key: row for row, key in enumerate(keys) if key not in answers}  # each question once
        if rows:
            fresh: list[QueryAnswer] = []
            try:
                timings |= await self._compute_search(search.part(list(rows.values())), fresh)
            finally:  # a batch that finds no thread in the end is asked again, and then finds what was computed
                if fresh:
                    await self._remember(dict(zip(rows, fresh, strict=False)))
            answers |= dict(zip(rows, fresh, strict=True))
        return [answers[key] for key in keys], timings

    async def _compute_search(self, search: Search, answers: list[QueryAnswer]) -> Timings:
        """Compute all queries, a piece of them at a time where they are walked by many beams; add their answers."""
        eligible = cache(partial(document_filter, self.pipeline, search.filter))  # once, by the first piece's thread
        parts = [search.part(rows) for rows in pieces(search)]
        return await self.compute_each([partial(self._run, part, eligible) for part in parts], answers.extend)

    async def _look_up(self, keys: Sequence[str]) -> dict[str, QueryAnswer]:
        values = await self.cache.get_many(keys)
        if values is None:
            self.metrics.count_cache("error", len(keys))
            return {}
        size = sum(len(value) for value in values if value is not None)
        found = await asyncio.to_thread(_read_all, keys, values) if size > MUCH_JSON else _read_all(keys, values)
        hits = sum(key in found for key in keys)
        self.metrics.count_cache("hit", hits)
        self.metrics.count_cache("miss", len(keys) - hits)
        return found

    async def _remember(self, answers: dict[str, QueryAnswer]) -> None:
        """Begin to write to the cache: the local one is done at once, a slow one must not hold up the answer."""
        many = sum(len(answer.results) for answer in answers.values()) > MANY_RESULTS
        values = await asyncio.to_thread(_written, answers) if many else _written(answers)
        task = asyncio.create_task(self.cache.put_many(values))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.sleep(0)

    async def compute(self, work: Work[Answers]) -> tuple[Answers, Timings]:
        """Run work in a thread of the pool; give its result, and seconds per stage with the wait in the queue.

        Raises:
            Problem: 503 when the service is full or no thread was free in time, 422 for a text that the model cannot
                encode, or what the work raises.
        """
        answers: list[Answers] = []
        timings = await self.compute_each([work], answers.append)
        return answers[0], timings

    async def compute_each(self, works: Sequence[Work[Answers]], keep: Callable[[Answers], None]) -> Timings:
        """Run the pieces of one request in turn, each behind what waits by then; see `compute`.

        They have one place, which is free again when a thread is done with the last, not when the client leaves. Each
        piece's result is given to `keep` when it is there.
        """
        if self.in_flight >= self.max_in_flight:
            self.metrics.count_refusal("overload")
            raise overloaded(f"{self.in_flight} requests are in flight")
        timings: Timings = {}
        running: Future[tuple[Answers, Timings]] | None = None
        self._count(+1)
        try:
            for work in works:
                running = self._submit(work)
                answer, stages = await self._in_time(running)
                keep(answer)
                timings |= {stage: timings.get(stage, 0.0) + seconds for stage, seconds in stages.items()}
        except TextError as error:
            raise Problem(422, f"a text {error.reason}") from None
        finally:
            self._leave_after(running)
        self.metrics.observe_stages(timings)
        return timings

    async def _in_time(self, queued: Future[Answers]) -> Answers:
        """Wait for work; what no thread has begun is dropped when its time is over, or the request is cancelled."""
        timer = asyncio.get_running_loop().call_later(self.queue_seconds, queued.cancel)
        try:
            return await asyncio.wrap_future(queued)
        except asyncio.CancelledError:
            if (request := asyncio.current_task()) is not None and request.cancelling():
                raise
            self.metrics.count_refusal("queue")
            raise overloaded(f"no thread was free for {self.queue_seconds:g} seconds") from None
        finally:
            timer.cancel()

    def _submit(self, work: Work[Answers]) -> Future[tuple[Answers, Timings]]:
        """Queue the work. What is dropped stays in the pool's queue for a while, but not what it refers to."""
        queued = time.perf_counter()
        waiting = [work]

        def run() -> tuple[Answers, Timings]:
            waited = time.perf_counter() - queued
            answers, timings = waiting.pop()()
            return answers, {"queue": waited, **timings}

        future = self._threads.submit(run)
        future.add_done_callback(lambda _: waiting.clear())
        return future

    def _leave_after(self, running: Future[Any] | None) -> None:
        """Free a place: at once, or when the thread is done with what it still runs."""
        if running is None or running.done():
            self._count(-1)
        else:
            loop = asyncio.get_running_loop()
            running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._count, -1))

    def _count(self, change: int) -> None:
        self.in_flight += change
        self.metrics.in_flight.set(self.in_flight)

    def _run(
        self, search: Search, eligible: Callable[[], DocumentFilter | None] | None = None
    ) -> tuple[list[QueryAnswer], Timings]:
        """Compute in a thread: the pipeline, then what clients get."""
        begin = time.perf_counter()
        options = search.options if eligible is None else replace(search.options, eligible=eligible())
        found = self.pipeline.search(search.queries, options, search.histories)
        done = time.perf_counter()
        answers = [
            QueryAnswer(
                results=render_results(answer, options, search.include),
                cached=False,
                explanation=explain(answer, options) if options.explain else None,
            )
            for answer in found
        ]
        stages = found[0].timings_seconds if found else {}
        end = time.perf_counter()
        return answers, {**stages, "pipeline": done - begin, "render": end - done}

    def warm_up(self) -> None:
        """Touch every page and compile every kernel: canaries of each scoring and mode. Blocks; raises what fails."""
        bundle, codes, words = self.pipeline.bundle, self.pipeline.codes, self.pipeline.words
        bundle.touch()
        if codes is not None:
            codes.warm_up()
        if words is not None:
            self._run(Search([CANARY_QUERY], SearchOptions(mode="lexical")))  # whose words no document may hold
        if "hybrid" in served(self.pipeline.has):
            self._canary(SearchOptions(mode="hybrid"))
        first = DocumentFilter.from_positions([0], bundle.manifest.documents)
        for scoring in bundle.manifest.model.scorings:
            for wanted in (False, True):
                self._canary(SearchOptions(scoring=scoring, explain=wanted))
            self._canary(SearchOptions(scoring=scoring, eligible=first))

    async def is_answering(self, timeout_seconds: float) -> bool:
        """Whether a canary query finds its way through the whole pipeline in time, past the queue of requests."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.wrap_future(self._canary_thread.submit(self._canary, SearchOptions(top_k=1)))
        except Exception:
            logger.exception("the canary query failed")
            return False
        return True

    def _canary(self, options: SearchOptions) -> None:
        answers, _ = self._run(Search([CANARY_QUERY], options))
        if not answers[0].results:
            raise RuntimeError("the canary query found nothing")

    async def close(self) -> None:
        """Finish what is running, then let go of everything."""
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        await asyncio.to_thread(self._canary_thread.shutdown, wait=True, cancel_futures=True)
        if self._writes:
            await asyncio.wait(self._writes, timeout=1)
        await self.cache.close()
        await asyncio.to_thread(self.pipeline.close)


def document_filter(pipeline: SearchPipeline, given: DocumentIds | None) -> DocumentFilter | None:
    """Return the documents that a request allows, None for all; raises a 422 for ids that no document has."""
    if given is None:
        return None
    documents = pipeline.bundle.documents
    positions = documents.positions_of(given.ids)
    unknown = [row for row, position in enumerate(positions) if position is None]
    if unknown:
        raise invalid(
            "#/filter/ids",
            f"has {len(unknown)} ids of {len(positions)} that no document has, the first is number {unknown[0]}: "
            "leave them out",
        )
    return DocumentFilter.from_positions([position for position in positions if position is not None], len(documents))


def _written(answers: Mapping[str, QueryAnswer]) -> dict[str, bytes]:
    """Return what the cache keeps of answers, by key."""
    return {
        key: CachedAnswer(key=key, results=answer.results).model_dump_json(exclude_none=True).encode()
        for key, answer in answers.items()
    }


def _read_all(keys: Sequence[str], values: Sequence[bytes | None]) -> dict[str, QueryAnswer]:
    """Return the answers among what the cache gave, by key."""
    return {key: answer for key, value in zip(keys, values, strict=True) if (answer := _read(key, value))}


def _read(key: str, value: bytes | None) -> QueryAnswer | None:
    """Return the cached answer if it is one, and the one for this key."""
    if value is None:
        return None
    try:
        cached = CachedAnswer.model_validate_json(value)
    except ValidationError:
        return None
    return QueryAnswer(results=cached.results, cached=True) if cached.key == key else None
