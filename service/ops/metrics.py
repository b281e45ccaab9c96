"""Prometheus metrics of one process: seconds, bounded labels, a registry of our own.

Labels come from closed sets (route templates, stages, outcomes): what a client sends never becomes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
MAX_STAGES = 32  # stages are named by our own pipeline; the bound holds even if one day they are not

CacheOutcome = Literal["hit", "miss", "error"]
Refusal = Literal["overload", "queue", "connections", "late_head", "large_head", "not_http"]


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._stages: set[str] = set()
        registry = self.registry
        self._request_seconds = Histogram(
            "rhumb_request_seconds",
            "Time from when a request's head was read until its answer was sent.",
            ["route", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        self._stage_seconds = Histogram(
            "rhumb_stage_seconds", "Time of one stage of the pipeline.", ["stage"], buckets=SECONDS, registry=registry
        )
        self._queries = Counter("rhumb_queries", "Queries answered, from the cache or not.", registry=registry)
        self._cache = Counter("rhumb_cache_lookups", "Cache look-ups by outcome.", ["outcome"], registry=registry)
        self._refusals = Counter(
            "rhumb_refusals", "Requests refused for want of room, or by their head.", ["reason"], registry=registry
        )
        for counter, labels in ((self._cache, get_args(CacheOutcome)), (self._refusals, get_args(Refusal))):
            for label in labels:
                counter.labels(label)  # there from the start at 0, so that the first event is an increase
        self.in_flight = Gauge("rhumb_in_flight", "Requests computed or waiting for a thread.", registry=registry)
        self.ready = Gauge("rhumb_ready", "1 while the service takes new work.", registry=registry)
        self.documents = Gauge("rhumb_documents", "Documents of the bundle.", registry=registry)
        self._bundle = Info("rhumb_bundle", "The bundle that is served.", registry=registry)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def describe_bundle(self, documents: int, labels: Mapping[str, str]) -> None:
        """Publish the bundle's size and its labels (digest, version)."""
        self.documents.set(documents)
        self._bundle.info(dict(labels))

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request; ``route`` is the template, never the path."""
        self._request_seconds.labels(route, str(status)).observe(seconds)

    def observe_stages(self, timings_seconds: Mapping[str, float]) -> None:
        """Count one pipeline run's stages."""
        for stage, seconds in timings_seconds.items():
            if stage in self._stages or len(self._stages) < MAX_STAGES:
                self._stages.add(stage)
                self._stage_seconds.labels(stage).observe(seconds)

    def count_queries(self, queries: int) -> None:
        """Count answered queries."""
        self._queries.inc(queries)

    def count_cache(self, outcome: CacheOutcome, lookups: int = 1) -> None:
        """Count cache look-ups by outcome."""
        self._cache.labels(outcome).inc(lookups)

    def count_refusal(self, reason: Refusal) -> None:
        """Count a request that was refused, by the reason."""
        self._refusals.labels(reason).inc()

    def exposition(self) -> tuple[bytes, str]:
        """Return the text exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serve the metrics on a port of their own; returns the function that stops it."""
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5)

        return stop
