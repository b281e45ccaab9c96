"""`rhumb bench search`: where a query's time goes, what the constraint costs, and what HTTP adds.

Legend: Q queries, B beams, L levels.

Everything is measured in turns, query by query, with one client and a batch of one; medians count. The server is
`rhumb serve` in a process of its own, on a free port, without an answer cache.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from loadtest.bench.errors import BenchError
from loadtest.bench.timing import Figure, figures_table, medians_of
from loadtest.bench.unconstrained import CONSTRAINT_GOAL, decode_unconstrained
from models.lines import lines
from service.index.bundle import Bundle, open_bundle
from service.model.encoder import Encoded
from service.ops.progress import progress_bar
from service.search.pipeline import Pipeline, SearchOptions
from service.search.walk import walk

STAGES = ("encode", "decode", "walk", "rank", "documents")
HTTP_GOAL = 1.5  # HTTP answer / bare pipeline
START_SECONDS = 120  # for the server to open the bundle and compile


def run(
    bundle_path: Path,
    queries: Path | None = None,
    beams: Sequence[int] = (10, 50, 100),
    limit: int = 100,
    threads: int = 1,
    over_http: bool = True,
    console: Console | None = None,
) -> list[Figure]:
    """Measure a bundle, print tables, and return the figures.

    Args:
        bundle_path: folder of the bundle.
        queries: file with one query per line; None for titles of the bundle's documents.
        beams: beam widths.
        limit: queries to use.
        threads: onnxruntime threads, of the pipeline and of the server.
        over_http: whether to start a server and measure through it.
        console: where to print.

    Raises:
        BenchError: there are no queries, or the server does not start.
        models.lines.DataError: the queries' file is not there, or is not UTF-8.
        service.index.artefact.ArtefactError: the bundle is damaged.
    """
    console = console or Console()
    pipeline = Pipeline(open_bundle(bundle_path), threads)
    try:
        texts = read_queries(queries, pipeline.bundle, limit)
        shares = measure_stages(pipeline, texts, beams)
        console.print(stages_table(shares, len(texts)))
        figures = [walk_share(*key, seconds) for key, seconds in shares.items()]
        figures += measure_constraint(pipeline, texts, beams)
        if over_http:
            with served(bundle_path, threads) as port:
                figures += measure_http(pipeline, texts, port)
    finally:
        pipeline.close()
    console.print(figures_table(f"{bundle_path}, {threads} onnxruntime thread(s)", figures))
    return figures


def read_queries(file: Path | None, bundle: Bundle, limit: int) -> list[str]:
    """Return up to `limit` queries: lines of a file, else titles (or first words) spread over the bundle."""
    if file is not None:
        texts = [line.strip() for _, line in islice(lines(file), limit)]
    else:
        count = len(bundle.documents)
        positions = sorted({number * count // limit for number in range(min(limit, count))})
        documents = bundle.documents.many(positions)
        texts = [document.title or " ".join(document.text.split()[:12]) for document in documents]
    if not texts:
        raise BenchError(f"'{file}' holds no query: one per line is needed")
    return texts


def measure_stages(
    pipeline: Pipeline, texts: Sequence[str], beams: Sequence[int]
) -> dict[tuple[str, int], dict[str, float]]:
    """Return median seconds per stage and in `total`, by (scoring, beam)."""
    offered = pipeline.bundle.model.manifest.scorings
    ways = {(s, beam): SearchOptions(scoring=s, beam_width=beam) for s in offered for beam in beams}
    taken: dict[tuple[str, int], dict[str, list[float]]] = {key: {} for key in ways}
    for options in ways.values():
        pipeline.search(texts[:1], options)  # compile, touch
    with progress_bar("stages", len(texts)) as advance:
        for text in texts:
            for key, options in ways.items():
                started = perf_counter()
                timings = pipeline.search([text], options)[0].timings_seconds
                for stage, seconds in {**timings, "total": perf_counter() - started}.items():
                    taken[key].setdefault(stage, []).append(seconds)
            advance(1)
    return {key: {stage: median(values) for stage, values in stages.items()} for key, stages in taken.items()}


def walk_share(scoring: str, beam: int, seconds: dict[str, float]) -> Figure:
    """Return the walk's share outside onnxruntime, with the goal for the beam where there is one."""
    goal = 10.0 if beam <= 10 else 20.0 if beam <= 100 else None
    share = 100 * seconds["walk"] / seconds["total"]
    return Figure(f"walk outside onnxruntime, {scoring}, beam {beam}", share, "%", goal)


def stages_table(shares: dict[tuple[str, int], dict[str, float]], queries: int) -> Table:
    """Return median milliseconds per stage."""
    table = Table(title=f"Milliseconds of one query, medians over {queries}; decode is inside onnxruntime")
    for name in ("scoring", "beam", *STAGES, "total"):
        table.add_column(name, justify="left" if name == "scoring" else "right")
    for (scoring, beam), seconds in shares.items():
        table.add_row(scoring, str(beam), *(f"{1e3 * seconds[stage]:.3f}" for stage in (*STAGES, "total")))
    return table


def measure_constraint(pipeline: Pipeline, texts: Sequence[str], beams: Sequence[int]) -> list[Figure]:
    """Compare a walk with a beam search over whole levels, behind the model's own decoder; encoding is left out."""
    tables, decoder = pipeline.tables, pipeline.decoder
    if decoder is None or "generative" not in tables.scorings:
        return []
    figures = []
    encoded = [pipeline.encoder.encode_queries([text]) for text in texts]
    for beam in beams:
        mine, other = cycle(encoded), cycle(encoded)

        def constrained(beam: int = beam, mine: Iterator[Encoded] = mine) -> None:
            query = next(mine)
            walk(tables, "generative", "constrained", beam, query.vectors_QD, decoder.start(query))

        def unconstrained(beam: int = beam, other: Iterator[Encoded] = other) -> None:
            step = decoder.start(next(other))
            decode_unconstrained(step, 1, tables.tokens_TE, tables.token_scale_T, tables.level_offsets, beam)

        ways: dict[str, Callable[[], object]] = {"constrained": constrained, "unconstrained": unconstrained}
        seconds = medians_of(ways, len(texts), f"beam {beam}")
        ratio = seconds["constrained"] / seconds["unconstrained"]
        figures.append(Figure(f"constrained / unconstrained decoding, beam {beam}", ratio, "x", CONSTRAINT_GOAL))
    return figures


def measure_http(pipeline: Pipeline, texts: Sequence[str], port: int) -> list[Figure]:
    """Compare answers over one kept-alive connection with the pipeline called directly, under default options.

    `/livez` answers from the event loop without doing anything: what it takes is the floor of every answer here.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    options = SearchOptions()
    beam_width = options.beams(pipeline.check_scoring(None))
    bare, served_ = cycle(texts), cycle(texts)
    ways: dict[str, Callable[[], object]] = {
        "pipeline": lambda: pipeline.search([next(bare)], options),
        "http": lambda: _ask(connection, {"query": next(served_), "beam_width": beam_width}),
        "livez": lambda: _exchange(connection, "GET", "/livez"),
    }
    seconds = medians_of(ways, len(texts), "HTTP")
    connection.close()
    return [
        Figure(f"bare pipeline, beam {beam_width}", 1e3 * seconds["pipeline"], "ms"),
        Figure(f"HTTP answer, beam {beam_width}", 1e3 * seconds["http"], "ms"),
        Figure("HTTP answer of /livez, the floor", 1e3 * seconds["livez"], "ms"),
        Figure("HTTP answer / bare pipeline", seconds["http"] / seconds["pipeline"], "x", HTTP_GOAL),
    ]


def _ask(connection: http.client.HTTPConnection, body: dict[str, object]) -> None:
    """Send one search and read the whole answer."""
    _exchange(connection, "POST", "/v1/search", json.dumps(body).encode())


def _exchange(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> None:
    """Send one request and read the whole answer; raises BenchError unless it is a 200."""
    connection.request(method, path, body, {} if body is None else {"content-type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise BenchError(f"the server answered {answer.status}: {content[:200].decode(errors='replace')}")


@contextmanager
def served(bundle_path: Path, threads: int) -> Iterator[int]:
    """Run `rhumb serve` on a free loopback port until it is ready; yields the port and ends the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    quiet = {"RHUMB_CACHE_ENTRIES": "0", "RHUMB_DRAIN_SECONDS": "0", "RHUMB_LOG_LEVEL": "warning"}
    # what is set for another service is not this one's, but for the folder of compiled kernels
    theirs = {name for name in os.environ if name.upper().startswith("RHUMB_")} - {"RHUMB_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in theirs} | quiet
    command = [sys.executable, "-m", "service.cli", "serve", str(bundle_path), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--threads", str(threads)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Poll `/readyz`; raises BenchError when the server ends or does not get ready in time."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"`rhumb serve` ended with status {process.returncode} before it was ready")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.1)
    raise BenchError(f"`rhumb serve` was not ready after {START_SECONDS} seconds")
