from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from service.ops.logs import configure_logging


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def test_json_lines_carry_extra_fields_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    logging.getLogger("rhumb.test").info("request", extra={"route": "/v1/search", "status": 200})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("rhumb.test").exception("failed")
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.err.splitlines())
    assert captured.out == ""
    assert (first["message"], first["route"], first["status"], first["level"]) == ("request", "/v1/search", 200, "info")
    assert first["time"].endswith("+00:00")
    assert "ValueError: two\nlines" in second["traceback"]


def test_text_goes_to_stderr_and_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "text")
    logging.getLogger("rhumb.test").info("not this")
    logging.getLogger("rhumb.test").warning("but this")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "but this" in captured.err
    assert "not this" not in captured.err
    assert sys.stdout is not None
