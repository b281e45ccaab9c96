"""Running the application: the socket is bound before anything is loaded, and shutdown has a named order.

1. A signal: ``/readyz`` says 503, every answer says ``connection: close``; requests are served as before.
2. After ``drain_seconds``: no new connections; running requests finish, for at most ``shutdown_seconds``.
3. The application closes: threads, cache, pipeline.

An interrupt from the keyboard, or a second signal, skips to step 2. Before the service has started, any signal ends it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http.protocol import bounded_protocol
from service.http.readiness import Phase, Readiness
from service.ops.settings import Settings

logger = logging.getLogger(__name__)

SPARE_FILES = 256  # beside connections: documents, Redis, logs
BACKLOG = 2048  # connections that wait to be accepted
STARTUP_FAILURE = 3  # uvicorn's exit status of an application that did not start
KEEP_ALIVE_SECONDS = 75  # longer than the usual idle time of load balancers, so that they close first


class ListenError(Exception):
    """The address cannot be listened on."""


def bind(host: str, port: int, variable: str = "RHUMB_PORT") -> socket.socket:
    """Return a socket that listens; raises ListenError with the remedy, the variable that sets the port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no name of a host"
        raise ListenError(f"cannot listen on {host}: {reason}: choose another with RHUMB_HOST") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # two may bind to one address, and only one of them listens
    except OSError as error:
        bound.close()
        reason = f"cannot listen on {host}:{port}: {error.strerror}"
        raise ListenError(f"{reason}: stop what uses it, or choose another with {variable}") from None
    return bound


def address(host: str, port: int) -> str:
    """Return the URL of a listener as people and browsers write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server with our shutdown."""

    def __init__(
        self, config: uvicorn.Config, readiness: Readiness, drain_seconds: float, on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._readiness, self._drain_seconds, self._on_started = readiness, drain_seconds, on_started
        self._leave_at = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell whoever waits for it; older versions of uvicorn return from a start that failed."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a handler
        """Begin to drain, or to leave, or stop waiting for what runs: a step further with every signal."""
        if not self.started:
            os._exit(128 + sig)  # nothing was promised yet, and a kernel that compiles cannot be interrupted
        self._readiness.enter(Phase.DRAINING)
        if self._leave_at == math.inf:
            drain_seconds = 0.0 if sig == signal.SIGINT else self._drain_seconds
            self._leave_at = time.monotonic() + drain_seconds
        elif not self.should_exit:
            self.should_exit = True
        else:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Leave when the draining is over."""
        if time.monotonic() >= self._leave_at:
            self.should_exit = True
        return await super().on_tick(counter)


def raise_file_limit(wanted: int) -> None:
    """Let this process open so many files and sockets, as far as its hard limit goes: many systems begin with 1,024."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (ValueError, OSError):  # a limit of the system (macOS), or a sandbox
        allowed = soft
    if allowed < wanted:
        logger.warning(
            "this process may open %d files, RHUMB_MAX_CONNECTIONS wants %d: raise its limit (ulimit -n)",
            allowed,
            wanted,
        )


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for the application."""
    metrics = app.state.shared.metrics
    return uvicorn.Config(
        app,
        http=bounded_protocol(settings.body_timeout_seconds, settings.max_connections, metrics),
        backlog=BACKLOG,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )


def run_server(app: FastAPI, settings: Settings, bound: socket.socket, on_started: Callable[[], None]) -> None:
    """Serve until a signal ends it; raises SystemExit with status 3 where the application does not start."""
    readiness: Readiness = app.state.shared.readiness
    raise_file_limit(settings.max_connections + SPARE_FILES)
    server = Server(server_config(app, settings), readiness, settings.drain_seconds, on_started)
    server.run(sockets=[bound])
    if not server.started:
        raise SystemExit(STARTUP_FAILURE)
