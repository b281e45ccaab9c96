"""The endpoints of search by semantic IDs, of documents, and of the service itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated

from fastapi import APIRouter, Body, Path
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from service import __version__
from service.http.engine import Engine, Search
from service.http.info_schemas import CodeLevel, CodesInfo, ServiceInfo, StoredDocument
from service.http.problems import Problem, invalid
from service.http.schemas import (
    SEARCH_EXAMPLES,
    BatchAnswer,
    QueryAnswer,
    SearchAnswer,
    SearchRequest,
)
from service.http.shared import (
    BODY_PROBLEMS,
    FromApp,
    RequestLimits,
    check_count,
    check_level,
    check_texts,
    json_response,
    needed_codes,
    off_loop,
    timing_headers,
)
from service.index.documents import Document
from service.search.codes import CodeSearch
from service.search.modes import served, ways_of
from service.search.options import SearchOptions

MAX_RESULTS = 16_384  # of a batch
MAX_BEAMS = 16_384  # of a batch; each keeps the decoder's keys and values of its path
UNWALKED = ("hamming", "lexical")
IDLE: dict[str, tuple[str, ...]] = {  # fields that have nothing to act on in a mode
    "generative": ("level", "lexical_weight"),
    "hamming": ("beam_width", "explain", "lexical_weight", "ranking", "scoring"),
    "lexical": ("beam_width", "explain", "level", "lexical_weight", "ranking", "scoring"),
    "hybrid": ("ranking",),
}

search_router = APIRouter(prefix="/v1", tags=["search"])
service_router = APIRouter(tags=["service"])


@search_router.post(
    "/search",
    summary="Find documents for a query, or for each of a batch",
    response_model=SearchAnswer | BatchAnswer,
    responses=BODY_PROBLEMS,
)
async def search(body: Annotated[SearchRequest, Body(openapi_examples=SEARCH_EXAMPLES)], shared: FromApp) -> Response:
    """Walk the trie of semantic IDs and return the best documents.

    A `query` gives `results`; a batch of `queries` gives `answers`, one for each query in its order.
    """
    check_request_limits(body, shared.limits)
    wanted = _search_of(body, shared.engine)
    check_size(wanted)
    answers, timings = await shared.engine.search(wanted)
    answer = (
        BatchAnswer(answers=answers, timings=timings)
        if body.queries is not None
        else SearchAnswer(**dict(answers[0]), timings=timings)
    )
    headers = timing_headers(timings) | {"x-cache": _cache_outcome(answers)}
    return await off_loop(sum(map(_size, answers)), json_response, answer, headers)


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
    return json_response(
        StoredDocument(id=stored.id, title=stored.title, text=stored.text, metadata=stored.metadata, position=position)
    )


@service_router.get("/info", summary="What is served, and within which limits", response_model=ServiceInfo)
async def info(shared: FromApp) -> Response:
    """Describe the service, its bundle and its limits."""
    codes, manifest = shared.engine.pipeline.codes, shared.engine.pipeline.bundle.manifest
    limits = shared.limits
    return json_response(
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
            history_count=manifest.model.text.history_count,
            max_queries=limits.max_queries,
            max_query_characters=limits.max_query_characters,
            max_top_k=limits.max_top_k,
            max_hamming_top_k=limits.max_hamming_top_k,
            max_embedding_inputs=limits.max_embedding_inputs,
            modes=served(shared.engine.pipeline.has),
            lexical_weight=None if shared.engine.pipeline.words is None else manifest.model.lexical_weight,
            codes=None if codes is None else _codes_info(codes),
        )
    )


@service_router.head("/livez", include_in_schema=False)
@service_router.get("/livez", summary="Whether the process is alive")
async def livez() -> dict[str, str]:
    """Answer as long as the event loop runs."""
    return {"status": "alive"}


@service_router.head("/readyz", include_in_schema=False)
@service_router.get(
    "/readyz",
    summary="Whether the service takes work",
    responses={503: {"description": "Draining, or not answering its canary query."}},
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
    check_count("#/queries", len(body.texts()), limits.max_queries)
    check_texts("#/query" if body.query is not None else "#/queries", body.texts(), limits.max_query_characters)
    check_texts("#/history", body.history or [], limits.max_query_characters)
    check_texts("#/histories", chain(*body.histories or []), limits.max_query_characters)


def check_size(wanted: Search) -> None:
    """Raise a 422 for a batch whose results, or beams, would take memory and time from everybody else."""
    queries, options = len(wanted.queries), wanted.options
    beams = 0 if options.mode in UNWALKED else options.beams(options.scoring or "")
    for name, width, most in (("top_k", options.top_k, MAX_RESULTS), ("beam_width", beams, MAX_BEAMS)):
        if queries > 1 and queries * width > most:
            detail = f"is {width} for each of {queries} queries, together more than {most}: send smaller batches"
            raise invalid(f"#/{name}", detail)


def _check_mode(body: SearchRequest, engine: Engine) -> None:
    """Raise a 422 where a field has nothing to act on in the mode, or names codes that the bundle has not."""
    for name in IDLE[body.mode]:
        cosine = name == "ranking" and body.ranking == "cosine" and body.mode in ("hamming", "hybrid")
        given = getattr(body, name)
        if given is not None and given is not False and not cosine:
            raise invalid(f"#/{name}", f"does nothing in mode {body.mode}: leave it out")
    if body.mode == "hamming" or body.level is not None:
        check_level(needed_codes(engine, "#/level" if body.mode == "hybrid" else "#/mode"), body.level)
    if body.mode == "hybrid" and body.ranking == "cosine" and body.lexical_weight:
        raise invalid("#/lexical_weight", "does nothing with ranking cosine, which leaves words out: leave out one")


def _search_of(body: SearchRequest, engine: Engine) -> Search:
    _check_mode(body, engine)
    manifest = engine.pipeline.bundle.manifest.model
    scoring = body.scoring or manifest.default_scoring
    if scoring not in manifest.scorings:
        raise invalid("#/scoring", f"is not offered by this bundle: choose from {', '.join(manifest.scorings)}")
    options = SearchOptions(
        top_k=body.top_k,
        beam_width=body.beam_width,
        scoring=scoring,
        ranking=(body.ranking or "lexicographic") if body.mode in ("generative", "hybrid") else "cosine",
        explain=body.explain,
        mode=body.mode,
        level=body.level,
        lexical_weight=body.lexical_weight,
        whole="documents" in body.include,
    )
    try:
        ways_of(options, engine.pipeline.has)
    except ValueError as error:
        raise invalid("#/mode", f"cannot be served: {error}") from None
    return Search(body.texts(), options, body.text_histories(), frozenset(body.include), body.filter)


def _find_document(engine: Engine, document_id: str) -> tuple[int, Document] | None:
    documents = engine.pipeline.bundle.documents
    position = documents.by_id(document_id)
    return None if position is None else (position, documents.get(position))


def _size(answer: QueryAnswer) -> int:
    """Results and explained beams of an answer."""
    return len(answer.results) + len(answer.explanation.beams if answer.explanation else ())


def _cache_outcome(answers: Sequence[QueryAnswer]) -> str:
    cached = sum(answer.cached for answer in answers)
    return "hit" if cached == len(answers) else "miss" if cached == 0 else "partial"


def _codes_info(codes: CodeSearch) -> CodesInfo:
    return CodesInfo(
        prefixes=list(codes.prefixes),
        default_level=codes.default_level,
        levels=[
            CodeLevel(
                level=level,
                bytes_per_document={str(dims): 8 * layout.words_of(dims) for dims in layout.prefix_dims},
            )
            for level, layout in codes.layouts.items()
        ],
    )
