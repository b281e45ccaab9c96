"""The endpoints. What they share (engine, readiness, metrics, limits) hangs on ``app.state.shared``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Depends, Path, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.responses import Response

from service import __version__
from service.http.engine import Engine, Search, Timings
from service.http.problems import Problem, invalid
from service.http.readiness import Readiness
from service.http.schemas import (
    SEARCH_EXAMPLES,
    BatchAnswer,
    QueryAnswer,
    SearchAnswer,
    SearchRequest,
    ServiceInfo,
    StoredDocument,
)
from service.index.documents import Document
from service.ops.metrics import Metrics
from service.search.options import SearchOptions


@dataclass(frozen=True)
class RequestLimits:
    """An operator's limits on one request."""

    max_queries: int
    max_query_characters: int
    max_top_k: int


@dataclass(frozen=True)
class Shared:
    """What the endpoints share."""

    engine: Engine
    readiness: Readiness
    metrics: Metrics
    limits: RequestLimits
    ready_timeout_seconds: float


def _shared(request: Request) -> Shared:
    shared: Shared = request.app.state.shared
    return shared


FromApp = Annotated[Shared, Depends(_shared)]

_BODY_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "Not JSON, or JSON with duplicate keys, NaN or too much nesting."},
    408: {"description": "The body took too long to arrive."},
    413: {"description": "The body is too large."},
    415: {"description": "Not `application/json`, or compressed."},
    422: {"description": "A field breaks its rule."},
    503: {"description": "Too many requests in flight: try again after `Retry-After` seconds."},
}

search_router = APIRouter(prefix="/v1", tags=["search"])
service_router = APIRouter(tags=["service"])


@search_router.post(
    "/search",
    summary="Find documents for a query, or for each of a batch",
    response_model=SearchAnswer | BatchAnswer,
    responses=_BODY_PROBLEMS,
)
async def search(
    body: Annotated[SearchRequest, Body(openapi_examples=SEARCH_EXAMPLES)], shared: FromApp
) -> Response:
    """Walk the trie of semantic IDs and return the best documents.

    A `query` gives `results`; a batch of `queries` gives `answers`, one for each query in its order.
    """
    check_request_limits(body, shared.limits)
    answers, timings = await shared.engine.search(_search_of(body, shared.engine))
    answer = (
        BatchAnswer(answers=answers, timings=timings)
        if body.queries is not None
        else SearchAnswer(**dict(answers[0]), timings=timings)
    )
    return _json(answer, _timing_headers(answers, timings))


@search_router.get(
    "/documents/{document_id:path}",
    summary="A stored document by its id",
    response_model=StoredDocument,
    responses={404: {"description": "No document has this id."}},
)
async def document(
    document_id: Annotated[str, Path(description="The id; slashes in it stay as they are.")], shared: FromApp
) -> Response:
    """Return what the bundle stores of a document."""
    found = await run_in_threadpool(_find_document, shared.engine, document_id)
    if found is None:
        raise Problem(404, "no document has this id")
    position, stored = found
    return _json(
        StoredDocument(
            id=stored.id, title=stored.title, text=stored.text, metadata=stored.metadata, position=position
        )
    )


@service_router.get("/info", summary="What is served, and within which limits", response_model=ServiceInfo)
async def info(shared: FromApp) -> Response:
    """Describe the service, its bundle and its limits."""
    manifest = shared.engine.pipeline.bundle.manifest
    limits = shared.limits
    return _json(
        ServiceInfo(
            version=__version__,
            digest=manifest.digest,
            documents=manifest.documents,
            distinct_sids=manifest.distinct_sids,
            dimensions=manifest.model.dimensions,
            level_sizes=list(manifest.model.level_sizes),
            scorings=list(manifest.model.scorings),
            default_scoring=manifest.model.default_scoring,
            recipe=manifest.model.provenance.recipe,
            max_queries=limits.max_queries,
            max_query_characters=limits.max_query_characters,
            max_top_k=limits.max_top_k,
        )
    )


@service_router.get("/livez", summary="Whether the process is alive")
async def livez() -> dict[str, str]:
    """Answer as long as the event loop runs."""
    return {"status": "alive"}


@service_router.get(
    "/readyz",
    summary="Whether the service takes work",
    responses={503: {"description": "Starting, draining, or not answering its canary query."}},
)
async def readyz(shared: FromApp) -> dict[str, str]:
    """Send a canary query through the whole pipeline, at most once a second."""
    if reason := await shared.readiness.reason_against(shared.engine, shared.ready_timeout_seconds):
        raise Problem(503, reason, headers={"retry-after": "1"})
    return {"status": "ready"}


metrics_router = APIRouter(tags=["service"])


@metrics_router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(shared: FromApp) -> Response:
    """Return the metrics in Prometheus' text format."""
    text, media_type = shared.metrics.exposition()
    return Response(text, headers={"content-type": media_type})


def check_request_limits(body: SearchRequest, limits: RequestLimits) -> None:
    """Raise a 422 for what the operator does not allow."""
    if body.top_k > limits.max_top_k:
        raise invalid("#/top_k", f"is more than {limits.max_top_k}: ask for fewer results")
    if len(body.texts()) > limits.max_queries:
        raise invalid("#/queries", f"has more than {limits.max_queries} queries: send several requests")
    where = "#/query" if body.query is not None else "#/queries"
    texts: dict[str, Iterable[str]] = {
        where: body.texts(),
        "#/history": body.history or [],
        "#/histories": chain(*body.histories or []),
    }
    for pointer, some in texts.items():
        if any(len(text) > limits.max_query_characters for text in some):
            raise invalid(pointer, f"has a text of more than {limits.max_query_characters} characters: shorten it")


def _search_of(body: SearchRequest, engine: Engine) -> Search:
    manifest = engine.pipeline.bundle.manifest.model
    scoring = body.scoring or manifest.default_scoring
    if scoring not in manifest.scorings:
        raise invalid("#/scoring", f"is not offered by this bundle: choose from {', '.join(manifest.scorings)}")
    options = SearchOptions(
        top_k=body.top_k,
        beam_width=body.beam_width if "beam_width" in body.model_fields_set else None,
        scoring=scoring,
        ranking=body.ranking,
        explain=body.explain,
    )
    return Search(body.texts(), options, body.text_histories(), frozenset(body.include))


def _find_document(engine: Engine, document_id: str) -> tuple[int, Document] | None:
    documents = engine.pipeline.bundle.documents
    position = documents.by_id(document_id)
    return None if position is None else (position, documents.get(position))


def _timing_headers(answers: list[QueryAnswer], timings: Timings) -> dict[str, str]:
    """Stage times in milliseconds as ``Server-Timing``, the pipeline's own in seconds, and what the cache gave."""
    cached = sum(answer.cached for answer in answers)
    outcome = "hit" if cached == len(answers) else "miss" if cached == 0 else "partial"
    return {
        "server-timing": ", ".join(f"{stage};dur={seconds * 1e3:.3f}" for stage, seconds in timings.items()),
        "x-pipeline-seconds": f"{timings.get('pipeline', 0.0):.6f}",
        "x-cache": outcome,
    }


def _json(answer: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")
