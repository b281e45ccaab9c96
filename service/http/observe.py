"""The outermost middleware: request ids, timing, access log, and the last line against exceptions. Pure ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.problems import Problem
from service.http.readiness import Readiness
from service.ops.metrics import Metrics

logger = logging.getLogger("rhumb.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})  # probes would drown the log
CLIENT_CLOSED = 499  # nginx's number for a client that hung up before its answer


@dataclass(frozen=True)
class Observe:
    """ASGI middleware that times and counts every request by its route's template."""

    app: ASGIApp
    metrics: Metrics
    readiness: Readiness
    routes: Sequence[BaseRoute]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and see what becomes of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(_request_id(Headers(scope=scope)), self.readiness, send)
        begin = time.perf_counter()
        try:
            await self.app(scope, receive, answer.send)
        except asyncio.CancelledError:  # the time for shutting down is over
            if answer.status == CLIENT_CLOSED:
                gone = Problem(503, "the service is shutting down: try again", headers={"connection": "close"})
                await gone.send(scope, receive, answer.send)
            raise
        except Exception:
            logger.exception("request %s failed", answer.request_id, extra={"request_id": answer.request_id})
            if answer.status == CLIENT_CLOSED:
                fault = Problem(500, f"the service failed; its log has the reason under {answer.request_id}")
                await fault.send(scope, receive, answer.send)
        finally:
            self._report(scope, answer, time.perf_counter() - begin)

    def _report(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        route = self._template(scope)
        self.metrics.observe_request(route, answer.status, seconds)
        if route not in QUIET_ROUTES:
            fields = {"route": route, "status": answer.status, "seconds": round(seconds, 6)}
            line = f"{scope['method'] if route != 'unmatched' else 'request'} {route} {answer.status} {seconds:.4f} s"
            logger.info(line, extra=fields | {"request_id": answer.request_id})

    def _template(self, scope: Scope) -> str:
        """Return the template of the route, also of a request that was refused before it came to one."""
        if (route := scope.get("route")) is None:
            route = next((known for known in self.routes if known.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path", "unmatched")


class _Answer:
    """Watches a response go out, and adds the headers that every response has."""

    def __init__(self, request_id: str, readiness: Readiness, send: Send) -> None:
        self.request_id, self.status = request_id, CLIENT_CLOSED
        self._readiness, self._send = readiness, send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
            if self._readiness.is_draining:
                headers["connection"] = "close"  # so that no client reuses a connection that is about to go
        await self._send(message)


def _request_id(headers: Headers) -> str:
    """Return the client's request id if it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
