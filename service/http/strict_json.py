"""JSON as RFC 8259 means it: no duplicate keys, no NaN, UTF-8 only, bounded nesting and objects of bounded size."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from service.http.problems import Problem

MAX_CONTAINERS = 20_000  # objects and arrays of one body; a batch has at most 10,000 histories or vectors
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # one without an end goes on to the end
SHAPE = bytes.maketrans(b"123456789E", b"000000000e")  # every digit as 0
MAX_MEMBERS = 100  # of one object; every unknown one would become an error with a place and a text


def check_json(body: bytes) -> None:
    """Refuse a body that Python's parser would read differently from others, or not at all.

    Raises:
        Problem: 400, with the reason and the byte or character position, without quoting the body.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8 (byte {error.start}): send UTF-8") from None
    if _containers(body) > MAX_CONTAINERS and (count := _containers(STRING.sub(b"", body))) > MAX_CONTAINERS:
        raise Problem(400, f"the body has {count} objects and arrays, more than {MAX_CONTAINERS}: see /openapi.json")
    parse_float = _finite if _may_overflow(body) else float  # json is fast with its own alone
    try:
        json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=parse_float)
    except json.JSONDecodeError as error:
        raise Problem(400, f"the body is not JSON (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise Problem(400, "the body is nested too deeply: send a flat object") from None
    except ValueError:  # int() refuses thousands of digits
        raise Problem(400, "the body holds a number with too many digits") from None


def _containers(body: bytes) -> int:
    """Return how many objects and arrays begin here, and in strings seem to."""
    return body.count(b"[") + body.count(b"{")


def _may_overflow(body: bytes) -> bool:
    """Say whether some number has an exponent of three digits, or 200 digits in a row: others are below 1e300."""
    shape = body.translate(SHAPE)
    return b"e000" in shape or b"e+000" in shape or b"0" * 200 in shape


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise Problem(400, f"an object has {len(pairs)} members, more than {MAX_MEMBERS}: see /openapi.json")
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Problem(400, f"an object repeats a key ({len(pairs)} members, {len(members)} names): send each once")
    return members


def _refuse_constant(_: str) -> NoReturn:
    raise Problem(400, "NaN and infinities are not JSON: send a number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Problem(400, "a number is too large for double precision")
    return number
