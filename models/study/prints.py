"""What a figure of a study rests on, as fingerprints: another spelling of a path is nothing, other data are another.

Options of a recipe at their defaults are left out, so that a new option changes no fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import models
import service
from models.retriever.recipe import Recipe


def encoder_print(recipe: Recipe, data: Path) -> str:
    """Of a tuned encoder: its recipe, the encoder that it starts from (the files of a local folder), and the data."""
    start = Path(recipe.encoder.name)
    began = _files(start, start.iterdir()) if start.is_dir() else recipe.encoder.name
    return _hash(_nameless(recipe), began, data_print(data))


def cell_print(recipe: Recipe, encoder: str, asked: object = None) -> str:
    """Of a model on a tuned encoder; with what is asked of it, of its figures."""
    return _hash(_nameless(recipe), encoder, repr(asked))


def data_print(folder: Path) -> str:
    """Of every file of a data set in the BEIR layout."""
    return _files(folder, [*folder.glob("*.jsonl"), *folder.glob("qrels/*.tsv")])


def source_print() -> str:
    """Of the code that trains and measures: every module of the packages `models` and `service`."""
    packages = Path(models.__file__).parent, Path(service.__file__).parent
    return _hash(*(_files(package.parent, package.rglob("*.py")) for package in packages))[:12]


def _nameless(recipe: Recipe) -> str:
    """The recipe without its encoder's name, which is a path."""
    encoder = recipe.encoder.model_copy(update={"name": ""})
    return recipe.model_copy(update={"encoder": encoder}).model_dump_json(exclude_defaults=True)


def _files(root: Path, paths: Iterable[Path]) -> str:
    contents = (
        [path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(paths)
        if path.is_file()
    )
    return _hash(*(part for pair in contents for part in pair))


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()
