"""Whether the service takes work: starting, ready, draining; and the canary behind ``/readyz``."""

from __future__ import annotations

import asyncio
import time
from enum import Enum

from service.http.engine import Engine
from service.ops.metrics import Metrics

CANARY_SECONDS = 1.0  # probes within this time share one canary: health checks must not become load


class Phase(Enum):
    """A service's life, in order."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Readiness:
    """The phase of the service, and the last canary's result."""

    def __init__(self, metrics: Metrics) -> None:
        self.phase = Phase.STARTING
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._answering = False

    @property
    def is_draining(self) -> bool:
        """Whether the service is about to go."""
        return self.phase is Phase.DRAINING

    def enter(self, phase: Phase) -> None:
        """Go on to a phase; draining is for good."""
        if not self.is_draining:
            self.phase = phase
        self._metrics.ready.set(self.phase is Phase.READY)

    async def reason_against(self, engine: Engine, timeout_seconds: float) -> str | None:
        """Return why no work should come here, or None; runs a canary at most once a second."""
        if self.phase is not Phase.READY:
            return f"the service is {self.phase.value}"
        async with self._lock:
            if time.monotonic() - self._checked_at >= CANARY_SECONDS:
                self._answering = await engine.is_answering(timeout_seconds)
                self._checked_at = time.monotonic()
        return None if self._answering else f"the canary query had no answer within {timeout_seconds:g} seconds"
