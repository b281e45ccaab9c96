"""The application: what is built from settings, in which order it starts and stops, and the middleware round it.

A request passes ``Observe`` (id, time, log), ``BodyLimits`` (size, time, media type, JSON), then the routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from rich.console import Console
from starlette.exceptions import HTTPException

from service import __version__
from service.http.embeddings import embeddings_router
from service.http.engine import Engine
from service.http.hamming import hamming_router
from service.http.limits import BodyLimits
from service.http.observe import Observe
from service.http.openapi import describe
from service.http.problems import Problem, on_http_exception, on_problem, on_validation_error
from service.http.readiness import Phase, Readiness
from service.http.rendering import SearchPipeline
from service.http.routes import metrics_router, search_router, service_router
from service.http.shared import RequestLimits, Shared
from service.ops.cache import AnswerCache, LocalCache, RedisCache
from service.ops.metrics import Metrics
from service.ops.settings import Settings

logger = logging.getLogger(__name__)

DESCRIPTION = "Generative retrieval: a query walks a trie of semantic IDs, so every answer is a document that exists."


def create_app(pipeline: SearchPipeline, settings: Settings) -> FastAPI:
    """Return the application that serves an open pipeline, and owns it from now on."""
    metrics = Metrics()
    readiness = Readiness(metrics)
    engine = Engine(
        pipeline, make_cache(settings), metrics, settings.concurrency, settings.max_in_flight, settings.queue_seconds
    )
    manifest = pipeline.bundle.manifest
    metrics.describe_bundle(manifest.documents, {"digest": manifest.digest, "version": __version__})

    app = FastAPI(
        title="Rhumbline", version=__version__, description=DESCRIPTION, lifespan=_lifespan, redirect_slashes=False
    )
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]  # FastAPI's documented way to change the page
    app.state.settings = settings
    app.state.shared = Shared(engine, readiness, metrics, _request_limits(settings), settings.ready_timeout_seconds)
    routers = [search_router, hamming_router, embeddings_router, service_router]
    if settings.metrics_port is None:
        routers.append(metrics_router)
    for router in routers:
        app.include_router(router)
    app.add_middleware(BodyLimits, max_bytes=settings.max_body_bytes, timeout_seconds=settings.body_timeout_seconds)
    routes = tuple(route for router in routers for route in router.routes)
    app.add_middleware(Observe, metrics=metrics, readiness=readiness, routes=routes)
    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start: metrics port, compile and touch everything, then ready. Stop: not ready, finish, close."""
    shared: Shared = app.state.shared
    settings: Settings = app.state.settings
    stop_metrics = shared.metrics.serve(settings.host, settings.metrics_port) if settings.metrics_port else None
    try:
        with Console(stderr=True).status("compiling kernels, asking a canary"):
            await asyncio.to_thread(shared.engine.warm_up)
        shared.readiness.enter(Phase.READY)
        yield
    finally:
        shared.readiness.enter(Phase.DRAINING)
        await shared.engine.close()
        if stop_metrics:
            await asyncio.to_thread(stop_metrics)


def make_cache(settings: Settings) -> AnswerCache:
    """Return the cache that the settings ask for."""
    if settings.redis_url is None or settings.cache_entries == 0:
        return LocalCache(settings.cache_entries, settings.cache_bytes, settings.cache_ttl_seconds)
    return RedisCache(
        settings.redis_url.get_secret_value(),
        timeout_seconds=settings.redis_timeout_seconds,
        connections=settings.redis_connections,
        ttl_seconds=settings.cache_ttl_seconds,
    )


def _request_limits(settings: Settings) -> RequestLimits:
    return RequestLimits(
        settings.max_queries,
        settings.max_query_characters,
        settings.max_top_k,
        settings.max_hamming_top_k,
        settings.max_embedding_inputs,
    )
