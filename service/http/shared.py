"""What all endpoints share: the parts of the application, the operator's limits, and how they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.responses import Response

from service.http.engine import MANY_RESULTS, Engine, Timings
from service.http.problems import invalid
from service.http.readiness import Readiness
from service.model.layout import CodeLayout
from service.ops.metrics import Metrics
from service.search.codes import CodeSearch

Done = TypeVar("Done")


@dataclass(frozen=True)
class RequestLimits:
    """An operator's limits on one request."""

    max_queries: int
    max_query_characters: int
    max_top_k: int
    max_hamming_top_k: int
    max_embedding_inputs: int


@dataclass(frozen=True)
class Shared:
    """What the endpoints share."""

    engine: Engine
    readiness: Readiness
    metrics: Metrics
    limits: RequestLimits
    ready_timeout_seconds: float


async def _shared(request: Request) -> Shared:
    """Async although it waits for nothing: FastAPI sends what is not to another thread and back."""
    shared: Shared = request.app.state.shared
    return shared


FromApp = Annotated[Shared, Depends(_shared)]

BODY_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "Not JSON, or JSON with duplicate keys, NaN or too much nesting."},
    408: {"description": "The body took too long to arrive."},
    413: {"description": "The body is too large."},
    415: {"description": "Not `application/json`, or compressed."},
    422: {"description": "A field breaks its rule."},
    503: {"description": "Too many requests in flight: try again after `Retry-After` seconds."},
}


def check_texts(pointer: str, texts: Iterable[str], max_characters: int) -> None:
    """Raise a 422 for a text that is longer than the operator allows."""
    if any(len(text) > max_characters for text in texts):
        raise invalid(pointer, f"has a text of more than {max_characters} characters: shorten it")


def check_count(pointer: str, count: int, most: int, what: str = "queries") -> None:
    """Raise a 422 for a batch of more queries, or what it is of, than the operator allows."""
    if count > most:
        raise invalid(pointer, f"has {count} {what}, more than {most}: send several requests")


def needed_codes(engine: Engine, pointer: str) -> CodeSearch:
    """Return the search over packed codes; raises a 422 for a bundle without any."""
    if engine.pipeline.codes is None:
        detail = "needs packed codes, and this bundle has none: index with a model that has an adapter (recipe qama)"
        raise invalid(pointer, detail)
    return engine.pipeline.codes


def check_level(codes: CodeSearch, level: str | None) -> CodeLayout:
    """Return the layout of a level, None for the default; raises a 422 for one that the bundle lacks."""
    try:
        return codes.layout(level)
    except ValueError as error:
        raise invalid("#/level", str(error)) from None


def check_dims(pointer: str, dims: int | None, codes: CodeSearch) -> None:
    """Raise a 422 for dimensions that no prefix of the codes has."""
    if dims is not None and dims not in codes.prefixes:
        raise invalid(pointer, f"is {dims}, which is no prefix of these codes: choose from {_list(codes.prefixes)}")


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


async def off_loop(results: int, work: Callable[..., Done], *given: object) -> Done:
    """Do what takes time for many results in another thread, so that no other client waits for it."""
    return await run_in_threadpool(work, *given) if results > MANY_RESULTS else work(*given)


def timing_headers(timings: Timings) -> dict[str, str]:
    """Stage times in milliseconds as ``Server-Timing``, the pipeline's own in seconds."""
    return {
        "server-timing": ", ".join(f"{stage};dur={seconds * 1e3:.3f}" for stage, seconds in timings.items()),
        "x-pipeline-seconds": f"{timings.get('pipeline', 0.0):.6f}",
    }


def json_response(answer: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer as JSON, without the fields that are not there."""
    return Response(answer.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")
