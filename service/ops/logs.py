"""Logging to stderr, for people or for machines. Queries, documents and keys are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler

STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, RFC 3339), level, logger, message, then the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in STANDARD_FIELDS}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str, line_format: Literal["text", "json"]) -> None:
    """Send all logging to stderr in one format; libraries' own chatter only from warnings up."""
    logging.basicConfig(level=level.upper(), handlers=[_handler(line_format)], force=True)
    logging.captureWarnings(True)
    for name in ("asyncio", "httpx", "httpcore", "numba", "redis"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # start, stop and requests are logged by our own lines


def _handler(line_format: Literal["text", "json"]) -> logging.Handler:
    if line_format == "json":
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
        return handler
    rich_handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
    rich_handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    return rich_handler
