"""`rhumb demo`: the standard library's documentation, indexed with the shipped model and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from service import stdlib_corpus
from service.http.server import address
from service.index.artefact import ArtefactError
from service.index.build import build_bundle
from service.index.bundle import Bundle, open_bundle, open_model
from service.index.corpus import read_corpus
from service.ops.sources import sources_digest

COLLECT_TIMEOUT_SECONDS = 300
EXAMPLE_QUERY = "count how often each element occurs in a list"


class DemoError(Exception):
    """The demo cannot be prepared; the message says what to do."""


def shipped_model() -> Path:
    """Return the folder of the model that is shipped with the package, without importing the offline half."""
    found = importlib.util.find_spec("models")
    for location in (found.submodule_search_locations or []) if found else []:
        folder = Path(location) / "pretrained" / "model"
        if folder.is_dir():
            return folder
    raise DemoError("the shipped model is not installed: give a model's folder with --model, or install rhumbline anew")


def open_demo_bundle(model: Path, cache_folder: Path, threads: int, rebuild: bool = False) -> Bundle:
    """Open the demo's bundle, building it first if the cache has none for this interpreter, model and collector.

    A cached bundle that cannot be trusted any more is built anew.

    Args:
        model: folder of the model to index with.
        cache_folder: where the bundle is kept, in ``demo/``.
        threads: threads of the encoder while indexing.
        rebuild: build even if the cache has the bundle.

    Raises:
        ArtefactError: the model cannot be used.
        DemoError: the corpus cannot be collected, or the cache folder not be written to.
    """
    folder = cache_folder / "demo" / demo_key(open_model(model).manifest.digest)
    if not rebuild:
        try:
            return open_bundle(folder)
        except ArtefactError:
            shutil.rmtree(folder, ignore_errors=True)  # our own cache: absent, or damaged
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"'{folder.parent}' cannot be made ({error.strerror}): set RHUMB_CACHE_DIR") from None
    with collected_corpus() as corpus:
        build_bundle(model, read_corpus(corpus), folder, threads=threads, replace=True, corpus=library_name())
    return open_bundle(folder)


def demo_key(model_digest: str) -> str:
    """Return the name of the cached bundle: the interpreter, and a digest of all that the bundle depends on."""
    ours = sources_digest("index", "model")
    parts = (sys.version, sys.platform, model_digest, ours, Path(stdlib_corpus.__file__).read_text("utf-8"))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{sys.implementation.name}-{platform.python_version()}-{digest[:16]}"


def library_name() -> str:
    """Return what the corpus is, for people."""
    return f"standard library of {platform.python_implementation()} {platform.python_version()}"


@contextlib.contextmanager
def collected_corpus() -> Iterator[Path]:
    """Give the file of the freshly collected corpus for as long as the block lasts.

    The collector imports the whole library, so it gets a process, a folder and a standard input of its own.

    Raises:
        DemoError: the collector failed or took too long.
    """
    folder = Path(tempfile.mkdtemp(prefix="rhumb-demo-"))
    corpus = folder / "corpus.jsonl"
    try:
        with Console(stderr=True).status(f"collecting the {library_name()}"), corpus.open("wb") as output:
            _collect(output.fileno(), folder)
        yield corpus
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _collect(output: int, folder: Path) -> None:
    command = [sys.executable, "-I", "-W", "ignore", str(Path(stdlib_corpus.__file__).resolve())]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and our own file
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            cwd=folder,
            timeout=COLLECT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"the standard library was not collected within {COLLECT_TIMEOUT_SECONDS} seconds: try again"
        raise DemoError(message) from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise DemoError(f"collecting the standard library failed: {lines[-1] if lines else done.returncode}")


def curl_command(host: str, port: int) -> str:
    """Return a command line that asks the running demo."""
    host = re.sub(r"^0\.0\.0\.0$", "127.0.0.1", host)
    body = f'{{"query": "{EXAMPLE_QUERY}", "top_k": 5}}'
    return f"curl -s {address(host, port)}/v1/search -H 'content-type: application/json' -d '{body}'"
