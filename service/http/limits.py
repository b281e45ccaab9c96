"""What a request body may be: JSON in UTF-8, uncompressed, of bounded size, within a deadline.

Pure ASGI: the body is received here, counted while it streams, and handed on whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.problems import Problem
from service.http.strict_json import check_json

METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
DRAIN_BYTES = 16 << 20  # read and dropped after a 413, so that the client sees the answer and not a reset connection
DECLARED_LENGTH = re.compile(r"[0-9]{1,15}")
CLOSE = {"connection": "close"}  # the rest of the body must not be taken for the next request


class ClientGoneError(Exception):
    """The client hung up before it had its answer."""


@dataclass(frozen=True)
class BodyLimits:
    """ASGI middleware that refuses bodies by media type (415), size (413), time (408) and syntax (400)."""

    app: ASGIApp
    max_bytes: int
    timeout_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request's body, then pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            handed_on = await self._checked(scope, receive)
        except Problem as problem:
            await problem.send(scope, receive, send)
        except ClientGoneError:
            pass
        else:
            await self._answer(scope, handed_on, receive, send)

    async def _answer(self, scope: Scope, handed_on: Receive, receive: Receive, send: Send) -> None:
        """Pass the request on for as long as its client is there: who leaves gives up its place in the queue."""
        if handed_on is receive:  # without a body nothing is computed
            await self.app(scope, handed_on, send)
            return
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(_until_gone(receive))
                await self.app(scope, handed_on, send)
                watch.cancel()
        except* ClientGoneError:
            pass

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Return what the application receives from, once the body is here and is what it may be."""
        headers = Headers(scope=scope)
        if scope["method"] not in METHODS_WITH_BODY:
            check_no_body(headers)
            return receive
        check_media_type(headers)
        body = await self._receive_body(headers, receive)
        check_json(body)
        return _replay(body, receive)

    async def _receive_body(self, headers: Headers, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self.timeout_seconds):
                body = await self._read(headers, receive)
        except TimeoutError:
            detail = f"the body was not complete after {self.timeout_seconds:g} seconds: send it faster"
            raise Problem(408, detail, headers=CLOSE) from None
        if body is None:
            await self._drain(headers, receive)
            detail = f"the body is larger than {self.max_bytes} bytes: send less, in several requests"
            raise Problem(413, detail, headers=CLOSE)
        return body

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body, or None as soon as it is too large."""
        declared = headers.get("content-length", "0")
        if not DECLARED_LENGTH.fullmatch(declared) or int(declared) > self.max_bytes:
            return None
        body, more = bytearray(), True
        while more:
            chunk, more = await _next_chunk(receive)
            body += chunk
            if len(body) > self.max_bytes:
                return None
        return bytes(body)

    async def _drain(self, headers: Headers, receive: Receive) -> None:
        """Read on for a while without keeping anything; who asked with Expect has not sent the body yet."""
        if headers.get("expect", "").lower() == "100-continue":
            return
        dropped, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.timeout_seconds):
                while more and dropped <= DRAIN_BYTES:
                    chunk, more = await _next_chunk(receive)
                    dropped += len(chunk)


def check_no_body(headers: Headers) -> None:
    """Raise a 400 for a body that nobody would read, and a client may send for ever."""
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise Problem(400, "this method takes no body: send none", headers=CLOSE)


def check_media_type(headers: Headers) -> None:
    """Raise a 415 unless the body is plain JSON in UTF-8; parameters that mean nothing here are passed over."""
    kind, *parameters = headers.get("content-type", "").lower().split(";")
    if kind.strip() != "application/json":
        raise Problem(415, "send JSON with the header 'content-type: application/json'", headers=CLOSE)
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8"):
            raise Problem(415, "send JSON in UTF-8", headers=CLOSE)
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise Problem(415, "send the body without content-encoding", headers={**CLOSE, "accept-encoding": "identity"})


async def _next_chunk(receive: Receive) -> tuple[bytes, bool]:
    """Return the next bytes and whether more follow; raises ClientGoneError."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


async def _until_gone(receive: Receive) -> None:
    """Raise ClientGoneError as soon as the client hangs up; the body is here, so nothing else comes from it."""
    while True:
        await _next_chunk(receive)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the whole body once, then what the server has to say (a disconnect)."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
