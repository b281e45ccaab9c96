"""What a benchmark says to its user instead of measuring."""

from __future__ import annotations


class BenchError(Exception):
    """The measurement cannot be made; the message says why."""
