"""docs/http.md names every route and every metric, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

from service.http.app import create_app
from service.ops.metrics import Metrics
from tests.service.http.fakes import FakePipeline, make_settings

PAGE = (Path(__file__).parents[3] / "docs" / "http.md").read_text("utf-8")


def test_every_route_is_documented() -> None:
    paths = create_app(FakePipeline(), make_settings()).openapi()["paths"]
    routes = {f"{method.upper()} {path}".replace(":path", "") for path, methods in paths.items() for method in methods}
    assert set(re.findall(r"^\| `((?:GET|POST) [^`]+)`", PAGE, re.MULTILINE)) == routes


def test_every_metric_is_documented() -> None:
    """Counters bear their `_total` and the bundle its `_info`, as they are scraped."""
    suffix = {"counter": "_total", "info": "_info"}
    families = [family for family in Metrics().registry.collect() if family.name.startswith("rhumb_")]
    ours = {family.name + suffix.get(family.type, "") for family in families}
    assert set(re.findall(r"`(rhumb_\w+)`", PAGE)) == ours
