"""Errors as RFC 9457 problem details. A problem says what is wrong and the remedy, and never quotes the request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 10  # of one answer; a client that sends a thousand mistakes need not read them all

TITLES = {
    400: "Malformed request",
    404: "Not found",
    405: "Method not allowed",
    408: "Request took too long to arrive",
    413: "Request too large",
    415: "Unsupported media type",
    422: "Invalid request",
    500: "Internal error",
    503: "Temporarily unavailable",
}


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """An error for the client.

    Args:
        status: HTTP status.
        detail: what is wrong with which limit, and what to do; written by us, without the client's words.
        errors: (JSON pointer, detail) of each part that is wrong.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.errors, self.headers = errors, dict(headers or {})

    def response(self) -> Response:
        """Return the problem as a response."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in self.errors[:MAX_ERRORS]]
        return Response(json.dumps(body), self.status, self.headers, MEDIA_TYPE)

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request with the problem."""
        await self.response()(scope, receive, send)


def overloaded(reason: str) -> Problem:
    """Return the 503 of a full service."""
    return Problem(503, f"{reason}: try again in a second", headers={"retry-after": "1"})


def invalid(pointer: str, detail: str) -> Problem:
    """Return the 422 of one bad field."""
    return Problem(422, "the request breaks a rule: see errors", errors=[(pointer, detail)])


async def on_problem(_: Request, error: Exception) -> Response:
    """Answer a problem that was raised."""
    if not isinstance(error, Problem):
        raise error
    return error.response()


async def on_http_exception(_: Request, error: Exception) -> Response:
    """Answer the framework's own errors (unknown path, wrong method) as problems."""
    if not isinstance(error, HTTPException):
        raise error
    details = {404: "there is nothing at this path: see /openapi.json", 405: "this path does not know this method"}
    detail = details.get(error.status_code, TITLES.get(error.status_code, "the request failed"))
    return Problem(error.status_code, detail, headers=error.headers).response()


async def on_validation_error(_: Request, error: Exception) -> Response:
    """Answer schema errors by pointer and rule; the input, and names that the client made up, stay out."""
    if not isinstance(error, RequestValidationError):
        raise error
    return Problem(422, "the request breaks a rule: see errors", errors=describe_errors(error.errors())).response()


def describe_errors(errors: Iterable[Any]) -> list[tuple[str, str]]:
    """Return (pointer, detail) of pydantic's errors.

    The last part of an unknown field's location is the client's own word: the pointer stops above it.
    """
    described = []
    for error in errors:
        location = [part for part in error["loc"] if part != "body"]
        if error["type"] == "extra_forbidden":
            described.append((_pointer(location[:-1]), "has a field that does not exist: see /openapi.json"))
        else:
            described.append((_pointer(location), str(error["msg"]).removeprefix("Value error, ")))
    return described


def _pointer(location: Iterable[object]) -> str:
    """Return an RFC 6901 fragment; field names are our schema's, indices are numbers."""
    return "#" + "".join(f"/{part}" for part in location)
