"""Requests in several pieces: they take turns with others, hold one place, and give it back when a thread is done."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from service.http.engine import Engine, Search, Timings
from service.http.problems import Problem
from service.http.schemas import DocumentIds
from service.index.documents import Document
from service.model.tokens import TextError
from service.ops.cache import LocalCache
from service.ops.metrics import Metrics
from service.search.filters import DocumentFilter
from service.search.options import Mode, SearchOptions
from service.search.pipeline import Answer
from tests.service.http.fakes import FakeBundle, FakePipeline, make_answer, make_hit


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """One thread, two places."""
    engine = Engine(FakePipeline(), LocalCache(0, 0, 1), Metrics(), concurrency=1, max_in_flight=2, queue_seconds=10)
    yield engine
    await engine.close()


def named(
    name: str, log: list[str], go: threading.Event | None = None, error: Exception | None = None
) -> Callable[[], tuple[str, Timings]]:
    def work() -> tuple[str, Timings]:
        log.append(name)
        assert go is None or go.wait(10)
        if error is not None:
            raise error
        return name, {"encode": 0.25}

    return work


async def begun(log: list[str]) -> None:
    while not log:
        await asyncio.sleep(0.001)


async def test_pieces_let_others_in_between_and_have_one_place(engine: Engine) -> None:
    log: list[str] = []
    go = threading.Event()
    answers: list[str] = []
    works = [named("a", log, go), named("b", log), named("c", log)]
    pieces = asyncio.create_task(engine.compute_each(works, answers.append))
    await begun(log)
    other = asyncio.create_task(engine.compute(named("other", log)))
    await asyncio.sleep(0.01)
    assert engine.in_flight == 2
    with pytest.raises(Problem, match="2 requests are in flight"):
        await engine.compute(named("one too many", log))
    go.set()
    timings = await pieces
    assert (await other)[0] == "other"
    assert log == ["a", "other", "b", "c"]
    assert answers == ["a", "b", "c"]
    assert timings["encode"] == 0.75
    assert timings["queue"] > 0
    assert engine.in_flight == 0


async def test_a_client_that_leaves_keeps_its_place_while_a_thread_computes(engine: Engine) -> None:
    log: list[str] = []
    go = threading.Event()
    pieces = asyncio.create_task(engine.compute_each([named("a", log, go), named("b", log)], log.append))
    await begun(log)
    pieces.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pieces
    assert engine.in_flight == 1
    go.set()
    async with asyncio.timeout(10):
        while engine.in_flight:
            await asyncio.sleep(0.001)
    assert (await engine.compute(named("next", log)))[0] == "next"
    assert log == ["a", "next"]


@pytest.mark.parametrize(
    ("mode", "beam_width", "sizes"),
    [("generative", 400, [2, 2, 1]), ("hybrid", 1000, [1] * 5), ("generative", 8, [5]), ("lexical", None, [5])],
)
async def test_a_batch_of_many_beams_is_computed_in_pieces(
    mode: Mode, beam_width: int | None, sizes: list[int]
) -> None:
    """Every query's answer is at its place, and the times of all pieces are added up."""
    pipeline, queries = Echo(), [f"q{number}" for number in range(5)]
    engine = Engine(pipeline, LocalCache(9, 1 << 20, 9), Metrics(), concurrency=1, max_in_flight=1, queue_seconds=10)
    options = SearchOptions(mode=mode, beam_width=beam_width, scoring="generative")
    answers, timings = await engine.search(Search(queries, options, [[name] for name in queries]))
    assert [answer.results[0].title for answer in answers] == queries
    assert [len(asked) for asked, _, _ in pipeline.searches] == sizes
    assert all(histories == [[name] for name in asked] for asked, _, histories in pipeline.searches)
    assert timings["encode"] == pytest.approx(0.002 * len(sizes))
    await engine.close()


class Echo(FakePipeline):
    """Finds documents whose title is the query."""

    def _answer(self, options: SearchOptions, query: str) -> Answer:
        return make_answer([make_hit(0, Document("0", query, "text"))], {"encode": 0.002})


async def test_a_piece_that_fails_is_the_last(engine: Engine) -> None:
    log: list[str] = []
    bad = named("bad", log, error=TextError("query 0", "has no tokens: give it a word"))
    with pytest.raises(Problem, match="a text has no tokens: give it a word"):
        await engine.compute_each([named("a", log), bad, named("b", log)], [].append)
    assert log == ["a", "bad"]
    assert engine.in_flight == 0


async def test_what_a_batch_computed_is_kept_where_a_later_piece_finds_no_thread() -> None:
    """So that who asks again gets further, however busy the service is."""
    engine = Engine(Echo(), LocalCache(9, 1 << 20, 9), Metrics(), concurrency=1, max_in_flight=3, queue_seconds=0.5)
    batch = Search(["q0", "q1"], SearchOptions(beam_width=1000, scoring="generative"))
    log: list[str] = []
    go, stop = threading.Event(), threading.Event()
    first = asyncio.create_task(engine.compute(named("first", log, go)))
    await begun(log)
    asked = asyncio.create_task(engine.search(batch))
    while engine.in_flight < 2:
        await asyncio.sleep(0.001)
    last = asyncio.create_task(engine.compute(named("last", log, stop)))  # between the two pieces
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(Problem, match="no thread was free"):
        await asked
    stop.set()
    await asyncio.gather(first, last)
    answers, _ = await engine.search(batch)
    assert [answer.cached for answer in answers] == [True, False]
    await engine.close()


@pytest.mark.parametrize("changed", ["nothing", "bundle", "code"])
async def test_services_of_another_bundle_or_other_code_do_not_read_these_answers(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = LocalCache(9, 1 << 20, 9)
    for answered in (False, changed == "nothing"):
        engine = Engine(pipeline := Echo(), shared, Metrics(), concurrency=1, max_in_flight=1, queue_seconds=10)
        answers, _ = await engine.search(Search(["q"], SearchOptions(scoring="guided")))
        assert (answers[0].cached, len(pipeline.searches)) == (answered, 1 - answered)
        if changed == "bundle":
            monkeypatch.setattr(FakeBundle, "digest", "1" * 64)
        elif changed == "code":
            monkeypatch.setattr("service.http.engine.sources_digest", lambda *_: "other")


async def test_a_filter_is_looked_up_once_for_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, looked_up = Echo(), []
    engine = Engine(pipeline, LocalCache(0, 0, 1), Metrics(), concurrency=1, max_in_flight=1, queue_seconds=10)
    real = pipeline.bundle.documents.positions_of
    monkeypatch.setattr(pipeline.bundle.documents, "positions_of", lambda ids: looked_up.append(ids) or real(ids))
    allowed = DocumentIds(ids=["collections.Counter"])
    options = SearchOptions(beam_width=1000, scoring="generative")
    await engine.search(Search(["q0", "q1", "q2"], options, filter=allowed))
    assert looked_up == [["collections.Counter"]]
    found = {asked[1].eligible for asked in pipeline.searches}
    assert len(pipeline.searches) == 3
    assert [repr(each) for each in found] == [repr(DocumentFilter.from_positions([0], 3))]
    await engine.close()
