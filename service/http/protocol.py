"""uvicorn's HTTP protocol with bounds: on the head of a request, on the reading of answers, on open connections.

uvicorn waits for headers for ever and keeps them all, and waits as long for a client that does not read its answer; one
slow client per connection would hold every one.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.ops.metrics import Metrics, Refusal

MAX_HEAD_BYTES = 64 << 10
LEAST_READ_BYTES = 64 << 10  # of an answer that waits to be read, in each write_timeout_seconds
REASONS: dict[int, Refusal] = {400: "not_http", 408: "late_head", 431: "large_head", 503: "connections"}


class BoundedProtocol(HttpToolsProtocol):
    """Answers 408 to a late head, 431 to a large one, 400 to no HTTP, 503 to a connection too many, and closes.

    Who does not read is cut off: an answer that fills the buffer, or is the connection's last, has to move.
    """

    head_timeout_seconds: ClassVar[float] = 5.0
    write_timeout_seconds: ClassVar[float] = 30.0
    max_connections: ClassVar[int] = 1024
    metrics: ClassVar[Metrics]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._earlier: Any = None  # the request before the newest

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock with the connection: who says nothing has no more time than who dribbles."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "Temporarily unavailable", "too many connections are open: try again", "retry-after: 1")
        else:
            self._await_head()

    def on_message_begin(self) -> None:
        """Start the clock of a further request on the same connection."""
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Stop the clock."""
        self._stop_waiting()
        self._earlier = self.cycle
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Count what arrives before the head is complete; bytes that begin no request do not stop the clock."""
        if self.transport.is_closing():
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", f"headers take more than {MAX_HEAD_BYTES} bytes")

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; drop one whose client has not read its answer in all that time."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        """Start the clock of a client that reads more slowly than it is answered."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Stop that clock, but not where the connection waits for the last bytes to be read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_awaiting_reader()

    def on_response_complete(self) -> None:
        """Start the clock of a client that has its last answer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_waiting()
        self._stop_awaiting_reader()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn calls it with a text of its own
        """Answer what is not HTTP; in place of uvicorn's plain text."""
        self._refuse(400, "Bad Request", "this is not HTTP/1.1")

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_timeout_seconds, self._on_timeout)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reader(self) -> None:
        if self._write_timer is None and (unread := self.transport.get_write_buffer_size()):
            self._write_timer = self.loop.call_later(self.write_timeout_seconds, self._check_reader, unread)

    def _check_reader(self, unread: int) -> None:
        """Cut a client off that has read too little; the others get as long again."""
        self._write_timer = None
        if unread - self.transport.get_write_buffer_size() < LEAST_READ_BYTES:
            self.transport.abort()
        else:
            self._await_reader()

    def _stop_awaiting_reader(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_timeout(self) -> None:
        detail = f"the headers were not complete after {self.head_timeout_seconds:g} seconds"
        self._refuse(408, "Request Timeout", detail)

    def _refuse(self, status: int, title: str, detail: str, *headers: str) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        whole = self.cycle
        if self.pipeline and self.cycle.more_body:  # the newest is what is refused, and one before it is under way
            whole = self._earlier
        if whole is not None and not (whole.more_body or whole.response_complete):
            whole.keep_alive = False  # the answer to what came before goes out whole; then the connection closes
            self.flow.pause_reading()
            return
        body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail})
        head = (
            f"HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        head += "".join(f"{header}\r\n" for header in headers) + "\r\n"
        self.transport.write((head + body).encode("ascii"))
        self.transport.close()
        self._await_reader()
        self.metrics.count_refusal(REASONS[status])


def bounded_protocol(timeout_seconds: float, max_connections: int, metrics: Metrics) -> type[BoundedProtocol]:
    """Return the protocol class with its bounds, and where it counts refusals: uvicorn makes the instances."""
    given = {"head_timeout_seconds": timeout_seconds, "max_connections": max_connections, "metrics": metrics}
    return type("Protocol", (BoundedProtocol,), given)
