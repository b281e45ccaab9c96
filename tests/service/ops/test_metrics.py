from __future__ import annotations

import socket
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from service.ops.metrics import MAX_STAGES, Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    text = metrics.exposition()[0].decode()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items()) if key != "le"): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_and_stages_are_histograms_in_seconds() -> None:
    metrics = Metrics()
    metrics.observe_request("/v1/search", 200, 0.25)
    metrics.observe_stages({"encode": 0.125, "walk": 0.5})
    seen = samples(metrics)
    assert seen["rhumb_request_seconds_sum route=/v1/search status=200"] == 0.25
    assert seen["rhumb_request_seconds_count route=/v1/search status=200"] == 1
    assert seen["rhumb_stage_seconds_sum stage=encode"] == 0.125
    assert seen["rhumb_stage_seconds_sum stage=walk"] == 0.5


def test_what_never_happened_is_counted_as_0() -> None:
    """Else the first refusal would be no increase to whoever watches the series."""
    seen = samples(Metrics())
    assert seen["rhumb_refusals_total reason=queue"] == 0
    assert seen["rhumb_cache_lookups_total outcome=error"] == 0


def test_counters_count() -> None:
    metrics = Metrics()
    metrics.count_queries(3)
    metrics.count_cache("hit", 2)
    metrics.count_refusal("overload")
    metrics.describe_bundle(7, {"digest": "abc"})
    seen = samples(metrics)
    assert seen["rhumb_queries_total"] == 3
    assert seen["rhumb_cache_lookups_total outcome=hit"] == 2
    assert seen["rhumb_refusals_total reason=overload"] == 1
    assert seen["rhumb_documents"] == 7
    assert seen["rhumb_bundle_info digest=abc"] == 1


def test_stage_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(10 * MAX_STAGES):
        metrics.observe_stages({f"stage{number}": 0.1})
    assert sum(name.startswith("rhumb_stage_seconds_count") for name in samples(metrics)) == MAX_STAGES


def test_two_applications_do_not_share_a_registry() -> None:
    first, second = Metrics(), Metrics()
    first.count_queries(1)
    assert samples(second)["rhumb_queries_total"] == 0


def test_port_of_its_own_serves_and_stops() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = Metrics()
    metrics.count_queries(5)
    stop = metrics.serve("127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert b"rhumb_queries_total 5.0" in answer.read()
    stop()
    with socket.socket() as again:  # the port is free again
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
