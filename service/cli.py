"""The command line: `serve`, `demo`, `settings`, and the commands that other rooms register."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from service import __version__
from service.ops.kernels import prepare_kernel_cache
from service.ops.logs import configure_logging
from service.ops.settings import Settings, load_settings, settings_markdown, settings_table
from service.ops.settings import unknown_variables as find_unknown_variables

if TYPE_CHECKING:
    from service.index.bundle import Bundle

logger = logging.getLogger(__name__)

OUR_PACKAGES = ("service", "models", "loadtest")
ROOMS = ("service.index.commands", "models.cli", "loadtest.cli")  # each has register(app)
EXTRAS = {  # module that is missing: extra that brings it
    "onnxruntime": "cpu",
    **dict.fromkeys(("torch", "transformers", "onnx", "onnxscript", "bm25s", "Stemmer"), "train"),
    **dict.fromkeys(("ir_measures", "matplotlib"), "train"),
}

Host = Annotated[str | None, typer.Option(help="Address to listen on [RHUMB_HOST, 127.0.0.1].")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on [RHUMB_PORT, 8080].")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one inference [RHUMB_THREADS, all CPUs].")]


def serve(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle [RHUMB_BUNDLE].")] = None,
    host: Host = None,
    port: Port = None,
    threads: Threads = None,
) -> None:
    """Serve a bundle over HTTP."""
    settings = load_settings(bundle=bundle, host=host, port=port, threads=threads)
    if settings.bundle is None:
        raise typer.BadParameter("give a bundle's folder, or set RHUMB_BUNDLE; `rhumb demo` needs none")
    folder = settings.bundle
    from service.http.server import address

    def open_it() -> Bundle:
        from service.index.bundle import open_bundle

        return open_bundle(folder)

    _serve(settings, open_it, lambda port: logger.info("serving %s on %s", folder, address(settings.host, port)))


def demo(
    model: Annotated[Path | None, typer.Option(help="Folder of the model; the shipped one by default.")] = None,
    host: Host = None,
    port: Port = None,
    threads: Threads = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Index again, even if the cache has the bundle.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Index, print the bundle's folder, and stop.")] = False,
) -> None:
    """Serve this Python's standard library documentation: ask in your own words."""
    from service.demo import curl_command, library_name, open_demo_bundle, shipped_model
    from service.http.server import address

    settings = load_settings(host=host, port=port, threads=threads)

    def open_it() -> Bundle:
        return open_demo_bundle(model or shipped_model(), settings.cache_dir, settings.threads, rebuild)

    if prepare:
        bundle = open_it()
        typer.echo(str(bundle.path))
        bundle.close()
        return

    def announce(port: int) -> None:
        typer.echo(f"\nThe {library_name()} answers on {address(settings.host, port)} (its API: /docs). Ask it:\n")
        typer.echo(f"  {curl_command(settings.host, port)}\n")

    _serve(settings, open_it, announce)


def _serve(settings: Settings, open_it: Callable[[], Bundle], announce: Callable[[int], None]) -> None:
    """Take the port, open the bundle, serve; in this order, so that a taken port is known before the work."""
    from service.http.app import create_app
    from service.http.server import bind, run_server
    from service.search.pipeline import Pipeline

    configure_logging(settings.log_level, settings.log_format)
    for warning in find_unknown_variables(os.environ):
        logger.warning(warning)
    if settings.metrics_port is not None:
        bind(settings.host, settings.metrics_port, "RHUMB_METRICS_PORT").close()
    with bind(settings.host, settings.port) as bound:
        signal.signal(signal.SIGTERM, _leave)  # until uvicorn has its own: the first process of a container ignores it
        bundle = open_it()
        if settings.device != "cpu" and bundle.manifest.model.precision == "int8":
            logger.warning("an int8 model is for CPUs, and runs there in large part: index the float32 model for a GPU")
        pipeline = Pipeline(bundle, settings.threads, settings.device)
        port = bound.getsockname()[1]
        run_server(create_app(pipeline, settings), settings, bound, lambda: announce(port))


def _leave(sig: int, _: object) -> NoReturn:
    """End at once, but tidily: what is half written is removed on the way."""
    sys.exit(128 + sig)


def show_settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
) -> None:
    """Print every setting, the value in force and what it means."""
    if markdown:
        typer.echo(settings_markdown(), nl=False)
        return
    settings = load_settings()
    table = Table("variable", "value", "meaning", title="Settings")
    for name, _, meaning in settings_table():
        value = getattr(settings, name.removeprefix("RHUMB_").lower())
        table.add_row(name, "" if value is None else str(value), meaning)
    Console().print(table)


def print_version(wanted: bool) -> None:
    """Print the version and stop, if that is wanted."""
    if wanted:
        print(f"rhumbline {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Rhumbline: generative retrieval. Train, index, evaluate and serve."""


def make_app() -> typer.Typer:
    """Return the command line with the commands of all rooms that are installed."""
    app = typer.Typer(
        name="rhumb",
        epilog="`rhumb settings` prints the environment variables of the service; RHUMB_DEBUG=1 shows tracebacks.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    app.command("serve")(serve)
    app.command("demo")(demo)
    app.command("settings")(show_settings)
    for room in ROOMS:
        if _is_installed(room):
            importlib.import_module(room).register(app)
    return app


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there
        return False


def main() -> None:
    """Run the command line; what a user can mend is one message, without a traceback (unless RHUMB_DEBUG is set)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads spin when idle; ours are our own
    try:
        prepare_kernel_cache(load_settings().cache_dir)
        make_app()(prog_name="rhumb")
    except Exception as error:
        if os.environ.get("RHUMB_DEBUG") or not _is_for_the_user(error):
            raise
        _fail(_message(error))


def _is_for_the_user(error: Exception) -> bool:
    """Our own exception classes speak to users, and so do the system and a missing extra; anything else is a bug."""
    ours = type(error).__module__.split(".")[0] in OUR_PACKAGES
    return ours or isinstance(error, OSError) or _missing_extra(error) is not None


def _message(error: Exception) -> str:
    if extra := _missing_extra(error):
        return f"this command needs the extra '{extra}': pip install 'rhumbline[{extra}]'"
    return str(error)


def _missing_extra(error: Exception) -> str | None:
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    return EXTRAS.get(error.name.split(".")[0])


def _fail(message: str) -> NoReturn:
    print(f"error: {message.encode(errors='backslashreplace').decode()}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
