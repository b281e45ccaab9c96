"""What surrounds the service: image, compose file, Prometheus, load test, Makefile. No container engine runs here."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from service.ops.settings import settings_table

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
SETTINGS = {name for name, _, _ in settings_table()}
# keys of a service in the Compose specification that this project uses; a misspelt key is none of them
SERVICE_KEYS = set(
    "build image command environment ports volumes depends_on read_only tmpfs cap_drop security_opt stop_grace_period "  # noqa: SIM905
    "restart healthcheck user profiles pull_policy".split()
)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return document


def test_yaml_files_are_clean() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "--config-file", "deploy/yamllint.yml"]
    done = subprocess.run([*command, "docker-compose.yml", "deploy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- compose


def test_compose_has_the_services_and_only_known_keys(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"service", "redis", "prometheus", "locust"}
    assert set(compose) <= {"name", "services", "volumes"}
    for service in compose["services"].values():
        assert set(service) <= SERVICE_KEYS
        assert ("image" in service) or ("build" in service)
    assert compose["services"]["locust"]["profiles"] == ["load"]


def test_compose_names_what_exists(compose: dict[str, Any]) -> None:
    """Services that are waited for, volumes, mounted files and settings are all there."""
    for service in compose["services"].values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in compose["services"]
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][needed] or "HEALTHCHECK" in DOCKERFILE
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]
    assert set(compose["services"]["service"]["environment"]) <= SETTINGS


def test_compose_gives_no_more_rights_than_needed(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert compose["services"]["service"]["read_only"] is True


def test_service_gets_longer_to_stop_than_it_takes(compose: dict[str, Any]) -> None:
    defaults = {name: default for name, default, _ in settings_table()}
    grace = float(compose["services"]["service"]["stop_grace_period"].removesuffix("s"))
    assert grace > float(defaults["RHUMB_DRAIN_SECONDS"]) + float(defaults["RHUMB_SHUTDOWN_SECONDS"])


def test_prometheus_scrapes_the_port_that_the_service_opens(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text("utf-8"))
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert jobs["rhumbline"] == [f"service:{compose['services']['service']['environment']['RHUMB_METRICS_PORT']}"]


# ---------------------------------------------------------------- image


def test_image_runs_as_nobody_special_and_checks_its_health() -> None:
    user = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert user == ["10001:10001"]
    assert DOCKERFILE.index("\nUSER ") > DOCKERFILE.rindex("\nRUN ")
    assert "/readyz" in DOCKERFILE
    assert re.search(r"^ARG EXTRA=cpu$", DOCKERFILE, re.MULTILINE)


def test_image_sets_only_settings_that_exist() -> None:
    assert set(re.findall(r"RHUMB_[A-Z_]+", DOCKERFILE)) <= SETTINGS


def test_image_copies_only_what_exists_and_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    assert set(copied) == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_image_installs_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {"cpu", "gpu"} <= set(extras)
    assert extras["gpu"] == ["onnxruntime-gpu[cuda,cudnn]>=1.25"], "the image has no CUDA of its own"


def test_health_check_is_python_that_compiles_and_notices() -> None:
    command = json.loads(re.findall(r"HEALTHCHECK.*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)[0])
    assert command[:2] == ["python", "-c"]
    done = subprocess.run(
        [sys.executable, "-c", command[2]], capture_output=True, env={**os.environ, "RHUMB_PORT": "1"}, timeout=30
    )
    assert done.returncode != 0, "nothing listens on port 1"


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_health_check_is_as_the_service_says(status: int, healthy: bool) -> None:
    """A service that is up but not ready is not healthy; anything but /readyz is answered by 404."""
    asked = []

    class Ready(FakeService):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status if self.path == "/readyz" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

    command = json.loads(re.findall(r"HEALTHCHECK.*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)[0])
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            environment = {**os.environ, "RHUMB_PORT": str(server.server_port)}
            done = subprocess.run([sys.executable, *command[1:]], capture_output=True, env=environment, timeout=30)
        finally:
            server.shutdown()
            thread.join(10)
    assert asked == ["/readyz"]
    assert (done.returncode == 0) == healthy, done.stderr


# ---------------------------------------------------------------- make, CI


def test_make_knows_its_targets() -> None:
    """And takes nothing from whoever's variables: `ARGS=--collect-only` of a host would pass tests that never ran."""
    if shutil.which("make") is None:
        pytest.skip("no make on PATH")
    environment = {**os.environ, "ARGS": "--nothing", "OUT": "/nowhere"}
    for target in ("serve", "test", "lint", "bench", "results", "answers", "train", "clean"):
        command = ["make", "--dry-run", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "--nothing" not in done.stdout
        assert "/nowhere" not in done.stdout
    done = subprocess.run(["make", "--dry-run", "results", "OUT=here", "ARGS=--quick"], cwd=ROOT, capture_output=True)
    assert b"study --out here --quick" in done.stdout


@pytest.mark.parametrize(
    ("failing", "expected"), [("", 0), ("test", 1), ("lint", 1), ("results", 1), ("answers", 1), ("test lint", 1)]
)
def test_ci_runs_all_and_fails_with_any(tmp_path: Path, failing: str, expected: int) -> None:
    fake = tmp_path / "make"
    fake.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/ran"\ncase " {failing} " in *" $1 "*) exit 2;; esac\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run")], cwd="/", env=environment, capture_output=True)
    assert done.returncode == expected
    assert (tmp_path / "ran").read_text().split() == ["test", "lint", "results", "answers"]


# ---------------------------------------------------------------- load test


class FakeService(BaseHTTPRequestHandler):
    """Answers like the service, and remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    opened: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        answer = {"results": [{"id": "a/b c", "score": 1.0}]}
        self._answer({"answers": [answer] * len(body["queries"])} if "queries" in body else answer)

    def do_GET(self) -> None:
        self.opened.append(self.path)
        self._answer({"id": "a/b c"})

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def fake_service() -> Iterator[str]:
    FakeService.asked.clear()
    FakeService.opened.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeService)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def run_locust(host: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("locust") is None:  # importing it here would patch this process's sockets
        pytest.skip("the extra 'load' is not installed")
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--host", host]
    command += ["--headless", "-u", "8", "-r", "8", "-t", "4s", "--csv", str(folder / "run"), "--only-summary"]
    return subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, timeout=90)


def test_load_test_runs_headless_with_its_mix(fake_service: str, tmp_path: Path) -> None:
    """Zipf: the first query comes most often; misses never repeat, nor in a second test; nothing fails."""
    queries = tmp_path / "queries.txt"
    queries.write_text("".join(f"query {number}\n" for number in range(20)))
    for _ in range(2):
        done = run_locust(fake_service, tmp_path, "--queries", str(queries), "--misses", "0.3", "--zipf", "1.5")
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run_stats.csv").read_text("utf-8").splitlines()
    rows = {row["Name"]: row for row in csv.DictReader(lines)}
    assert int(rows["Aggregated"]["Failure Count"]) == 0
    assert {"search (hit)", "search (miss)"} <= set(rows)
    single = [body["query"] for body in FakeService.asked if "query" in body]
    misses = [query for query in single if not query.startswith("query ")]
    hits = [query for query in single if query.startswith("query ")]
    assert 0.05 < len(misses) / len(single) < 0.7
    assert len(set(misses)) == len(misses)
    assert max(set(hits), key=hits.count) == "query 0"


def test_load_test_reports_refusals_as_failures(tmp_path: Path) -> None:
    class Refusing(FakeService):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b'{"detail": "32 requests are in flight: ask again"}'
            self.send_response(503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    done = run_locust(f"http://127.0.0.1:{server.server_port}", tmp_path)
    server.shutdown()
    server.server_close()
    thread.join(10)
    assert done.returncode == 1
    assert "503: N requests are in flight: ask again" in (tmp_path / "run_failures.csv").read_text()


def test_a_load_test_whose_queries_cannot_be_read_asks_nothing(fake_service: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for file in (tmp_path / "nowhere.txt", empty):
        done = run_locust(fake_service, tmp_path, "--queries", str(file))
        assert done.returncode != 0
        assert str(file) in done.stderr
    assert FakeService.asked == []
