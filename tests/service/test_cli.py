from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from service import cli
from service.ops.settings import settings_markdown
from tests.tiny import make_bundle


def test_help_lists_the_commands_of_all_rooms(run: Any) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("serve", "demo", "settings", "index", "inspect"):
        assert re.search(rf"^\W*{command}\b", out, re.MULTILINE), out
    assert "RHUMB_DEBUG=1" in out


def test_the_version_is_that_of_the_package(run: Any) -> None:
    assert run("--version") == (0, f"rhumbline {version('rhumbline')}\n", "")


def test_settings_shows_values_in_force_and_hides_secrets(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_REDIS_URL", "redis://:hunter2@redis:6379")
    monkeypatch.setenv("RHUMB_MAX_TOP_K", "77")
    _, out, _ = run("settings")
    assert re.search(r"RHUMB_MAX_TOP_K\W+77", out)
    assert "hunter2" not in out
    assert run("settings", "--markdown")[1] == settings_markdown()


def test_bad_setting_is_named_in_a_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_PORT", "http")
    code, out, err = run("demo")
    assert (code, out) == (1, "")
    assert err.startswith("error: RHUMB_PORT: ")
    assert len(err.splitlines()) == 1


def test_serve_without_a_bundle_says_what_to_give(run: Any) -> None:
    code, _, err = run("serve")
    assert code == 2
    assert "RHUMB_BUNDLE" in err


def test_serve_of_what_is_no_bundle_is_one_line(run: Any, tmp_path: Path) -> None:
    code, _, err = run("serve", str(tmp_path / "nothing"), "--port", "0")
    assert code == 1
    assert err.startswith(f"error: '{tmp_path}/nothing' is not a folder")


@pytest.mark.parametrize(
    ("precision", "device", "warned"), [("int8", "cuda", True), ("float32", "cuda", False), ("int8", "cpu", False)]
)
def test_an_int8_model_on_a_gpu_is_warned_of(
    run: Any, monkeypatch: pytest.MonkeyPatch, precision: str, device: str, warned: bool
) -> None:
    """onnxruntime leaves its int8 products to the CPU without a word."""
    model = SimpleNamespace(precision=precision)
    monkeypatch.setattr(
        "service.index.bundle.open_bundle", lambda _: SimpleNamespace(manifest=SimpleNamespace(model=model))
    )
    monkeypatch.setattr("service.search.pipeline.Pipeline", lambda *_: sys.exit(0))
    monkeypatch.setenv("RHUMB_DEVICE", device)
    _, _, err = run("serve", "bundle", "--port", "0")
    assert ("index the float32 model for a GPU" in err) == warned


def test_taken_port_is_known_before_the_bundle_is_opened(run: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", str(tmp_path / "nothing"), "--port", str(port))
    assert code == 1
    assert f"127.0.0.1:{port}" in err
    assert "RHUMB_PORT" in err


def test_missing_extra_is_one_line_with_the_remedy(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that imports torch where torch is not installed."""

    def register(app: typer.Typer) -> None:
        app.command("train")(train)
        app.command("other")(lambda: __import__("a_module_that_nobody_has"))

    def train() -> None:
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    monkeypatch.setattr(cli, "ROOMS", ("fake_room",))
    monkeypatch.setattr(cli, "_is_installed", lambda room: True)
    monkeypatch.setitem(sys.modules, "fake_room", type(sys)("fake_room"))
    sys.modules["fake_room"].register = register  # type: ignore[attr-defined]
    code, _, err = run("train")
    assert (code, err) == (1, "error: this command needs the extra 'train': pip install 'rhumbline[train]'\n")
    monkeypatch.setattr(sys, "argv", ["rhumb", "other"])
    with pytest.raises(ModuleNotFoundError):  # a bug keeps its traceback
        cli.main()


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(cli.EXTRAS.values()) <= set(project["optional-dependencies"])


def test_room_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ROOMS", ("no_such_package.cli", "service.no_such_module"))
    result = CliRunner().invoke(cli.make_app(), ["--help"])
    assert result.exit_code == 0
    assert "inspect" not in result.output


# ---------------------------------------------------------------- a process of its own


def test_a_signal_ends_a_service_that_still_opens_its_bundle() -> None:
    """The first process of a container ignores signals that it has no handler for, and indexing takes a minute."""
    script = (
        "import os, signal, time; from service import cli; from service.ops.settings import Settings\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "cli._serve(Settings(port=0), lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(20)), print)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


@contextmanager
def serving(*arguments: str, cache: Path, **variables: str) -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """Run `rhumb`; gives the address that it announces, the process and its lines (stdout and stderr)."""
    environment = {**os.environ, "RHUMB_CACHE_DIR": str(cache), "RHUMB_LOG_FORMAT": "json", **variables}
    environment.pop("NUMBA_CACHE_DIR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *arguments, "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    lines: list[str] = []
    address: list[str] = []
    announced = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if (found := re.search(r"http://127\.0\.0\.1:\d+", line)) and not address:
                address.append(found.group())
                announced.set()
        announced.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert announced.wait(200)
        assert address, "".join(lines)
        yield address[0], process, lines
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()


def test_serve_answers_and_leaves_in_order(tmp_path_factory: pytest.TempPathFactory) -> None:
    """From the command to an answer; SIGTERM drains and exits with 0; kernels are in a private folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"  # shared with the demo's test: kernels compile once
    bundle = make_bundle(tmp_path_factory.mktemp("serve") / "bundle")
    with serving("serve", str(bundle), cache=cache, RHUMB_DRAIN_SECONDS="0.5", RHUMB_PROT="1") as running:
        url, process, lines = running
        answer = httpx.post(f"{url}/v1/search", json={"query": "north star"}, timeout=60)
        assert len(answer.json()["results"]) == 10
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    text = "".join(lines)
    assert "did you mean RHUMB_PORT?" in text
    assert '"route": "/v1/search", "status": 200' in text
    assert "north star" not in text, "queries are not logged"
    assert "Traceback" not in text
    (kernels,) = (cache / "kernels").iterdir()
    assert kernels.stat().st_mode & 0o777 == 0o700
    assert list(kernels.rglob("*.nbi"))
