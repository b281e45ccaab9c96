"""The commands of this room: `rhumb index` makes a bundle, `rhumb inspect` says what an artefact is.

Imports are local: `rhumb --help` shall not wait for onnxruntime and numba.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def register(app: typer.Typer) -> None:
    """Add `index` and `inspect` to the command line."""
    app.command("index")(index)
    app.command("inspect")(inspect)


def index(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    corpus: Annotated[Path, typer.Option(help="BEIR corpus: a .jsonl file, or a folder with corpus.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to make.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace the artefact at OUT.")] = False,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help=".npy of the documents' unit vectors in corpus order, as `rhumb train` writes it; without it they are "
            "encoded."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the encoder; every CPU by default.")] = None,
    lexical: Annotated[bool, typer.Option(help="Also index the words, for the modes lexical and hybrid.")] = True,
) -> None:
    """Index a corpus with a model and publish the bundle. Needs no torch."""
    from service.index.build import build_bundle
    from service.index.corpus import read_corpus
    from service.index.manifest import human_bytes

    given = None if vectors is None else _load_vectors(vectors)
    manifest = build_bundle(
        model, read_corpus(corpus), out, vectors=given, replace=replace, threads=threads, corpus=corpus.name,
        lexical=lexical,
    )  # fmt: skip
    size = human_bytes(sum(entry.bytes for entry in manifest.files.values()))
    typer.echo(
        f"{out}: {manifest.documents} documents on {manifest.distinct_sids} semantic IDs, {size}. "
        f"Serve it: rhumb serve {out}"
    )


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a model or bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Verify a model or bundle and print what it is."""
    from rich.console import Console

    from service.index.inspect import inspect_artefact
    from service.index.inspect_tables import render

    inspection = inspect_artefact(path)
    if as_json:
        typer.echo(json.dumps(inspection.as_json(), indent=1))
    else:
        Console().print(render(inspection))


def _load_vectors(file: Path) -> NDArray[np.floating]:
    import numpy as np

    from service.index.artefact import ArtefactError

    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtefactError(f"'{file}' is not a .npy file of numbers ({error}): write it with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ArtefactError(f"'{file}' does not hold an array of floats: write it with numpy.save")
    return array
