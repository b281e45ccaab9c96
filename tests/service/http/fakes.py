"""A fake pipeline, a client without sockets and a server with them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import httpx
from fastapi import FastAPI
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.http.app import create_app
from service.http.engine import CANARY_QUERY
from service.http.server import Server, bind, server_config
from service.index.documents import Document
from service.index.manifest import BundleManifest
from service.ops.settings import Settings
from service.search.modes import Has
from service.search.options import Answer, Beam, Hit, SearchOptions
from tests.tiny import Tiny, tiny_manifest

DOCUMENTS = [
    Document("collections.Counter", "Counter", "Dict subclass for counting.", {"kind": "class"}),
    Document("a/path/with spaces?&#", "", "no title", {}),
    Document("ünïcödé/☃", "snow", "man", {"depth": {"er": [1, 2]}}),
]


class FakeStore:
    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = list(documents)

    def __len__(self) -> int:
        return len(self.documents)

    def get(self, position: int) -> Document:
        return self.documents[position]

    def positions_of(self, ids: Sequence[str]) -> list[int | None]:
        return [self.by_id(document_id) for document_id in ids]

    def by_id(self, document_id: str) -> int | None:
        return next((row for row, document in enumerate(self.documents) if document.id == document_id), None)


class FakeBundle:
    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = FakeStore(documents)
        self.manifest = BundleManifest(
            model=tiny_manifest(Tiny()),
            documents=max(1, len(documents)),
            distinct_sids=max(1, len(documents)),
            nodes=2,
            regions=0,
            region_rows=0,
            digest="0" * 64,
        )

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def touch(self) -> int:
        return 0


class FakePipeline:
    """Finds every document, best first; can be held, broken and counted."""

    def __init__(self, documents: Sequence[Document] = DOCUMENTS) -> None:
        self.bundle = cast("Any", FakeBundle(documents))
        self.codes: Any = None
        self.words: Any = None
        self.searches: list[tuple[list[str], SearchOptions, Any]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.error: Exception | None = None
        self.holds_canary = True
        self.is_closed = False

    @property
    def has(self) -> Has:
        return Has(self.codes is not None, self.words is not None, 0.3)

    def search(
        self,
        queries: Sequence[str],
        options: SearchOptions | None = None,
        histories: Sequence[Sequence[str]] | None = None,
    ) -> list[Answer]:
        assert options is not None
        self.searches.append((list(queries), options, histories))
        if self.holds_canary or list(queries) != [CANARY_QUERY]:
            assert self.may_go.wait(30), "a test forgot to let the pipeline go"
        if self.error is not None:
            raise self.error
        return [self._answer(options, query) for query in queries]

    def _answer(self, options: SearchOptions, query: str) -> Answer:
        shown = list(enumerate(self.bundle.documents.documents))[: options.top_k]
        return make_answer(
            [make_hit(position, document) for position, document in shown], {"encode": 0.002, "walk": 0.001}
        )

    def close(self) -> None:
        self.is_closed = True


def make_hit(position: int, document: Document) -> Hit:
    return Hit(
        position=position,
        document=document,
        score=-float(position),
        cosine=0.5 / (position + 1),
        beam_score=-float(position),
        sid=(position, 1, 2),
    )


def make_answer(hits: list[Hit], timings_seconds: dict[str, float]) -> Answer:
    return Answer(hits=hits, timings_seconds=timings_seconds, beams=[Beam((1, 2), -1.5, [-1.0, -0.5], 3)])


def make_settings(**changes: Any) -> Settings:
    return Settings(**{"concurrency": 2, "threads": 1, "drain_seconds": 0, "port": 0} | changes)


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run the application's lifespan and talk to it without a socket."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        yield client


@contextmanager
def running(pipeline: Any, **changes: Any) -> Iterator[tuple[str, int, Server]]:
    """Serve on a real socket in a thread; yields (url, port, server)."""
    settings = make_settings(**changes)
    app = create_app(pipeline, settings)
    bound = bind("127.0.0.1", settings.port)
    port = bound.getsockname()[1]
    started = threading.Event()
    server = Server(server_config(app, settings), app.state.shared.readiness, settings.drain_seconds, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: started.is_set() or not thread.is_alive(), seconds=200)
    assert started.is_set(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{port}", port, server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def refusal(client: TestClient, body: dict[str, Any], path: str) -> tuple[str, str]:
    """Return the pointer and detail of the one error of a 422."""
    answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 3000
    return tuple(answer.json()["errors"][0][part] for part in ("pointer", "detail"))  # type: ignore[return-value]
