"""Building a bundle: model + documents → vectors → semantic IDs → trie → regions → one published folder.

Letters: N documents, D dimensions, L levels.

It reads top to bottom in `build_bundle`. Memory holds the SIDs, the postings, the regions and one chunk of documents;
documents and vectors go through files of the staging folder, because their final order is known only when all SIDs are.
Files are written by `write`, not through memory maps: a full disk is then an error, where under a map it is a killed
process.
"""

from __future__ import annotations

import shutil
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.index.arrays import write_array, write_blocks
from service.index.artefact import ArtefactError, new_artefact, publish
from service.index.bundle import Model, open_model
from service.index.codes import open_binarizer, write_codes
from service.index.documents import Document, DocumentStore, dump_metadata, write_documents, write_rows
from service.index.manifest import BundleManifest, LexicalSettings
from service.index.postings import build_postings, words_of, write_postings
from service.index.regions import build_regions
from service.index.trie import Trie, build_trie, collision_sizes, save_trie
from service.model.binarizer import Binarizer
from service.model.encoder import WINDOW, Encoder
from service.model.quantizer import QuantizerError, assign_sids
from service.model.tokens import WordTokenizer, chunks, read_tokenizer
from service.ops.progress import progress_bar

GIVEN_NORM_TOLERANCE = 1e-2  # of vectors that come from elsewhere, float16 among them; they are normalised again
GIVEN_HELD = 16  # of them, evenly spread, are held against the encoder's own
GIVEN_COSINE = 0.9  # that they must have: float32 vectors have .99 and more to those of an int8 encoder


class Spool(DocumentStore):
    """The documents in the order they came, and how many characters each has, (N,) int64."""

    def __init__(self, path: Path, sizes_N: NDArray[np.int64]) -> None:
        super().__init__(path)
        self.sizes_N = sizes_N

    def chunks(self, rows: NDArray[np.int64]) -> Iterator[list[Document]]:
        """Give the documents of some rows, as many at a time as memory should hold."""
        for window in _windows(rows):
            for chunk in chunks(self.sizes_N[window].tolist()):
                yield self.many(window[chunk].tolist())


def build_bundle(
    model: Path,
    documents: Iterable[Document],
    target: Path,
    *,
    vectors: NDArray[Any] | None = None,
    replace: bool = False,
    threads: int | None = None,
    progress: bool = True,
    corpus: str = "",
    lexical: bool = True,
) -> BundleManifest:
    """Index documents with a model and publish the bundle. Needs no torch.

    The same model, documents and library versions give the same bundle, byte for byte.

    Args:
        model: the model's folder; verified first.
        documents: read once, in order.
        target: the folder to publish.
        vectors: (N, D) unit vectors of the documents in their order, where they are known, as a training keeps
            them; else they are encoded.
        replace: whether an artefact at `target` is replaced.
        threads: threads of the encoder; None for every CPU this process may use.
        progress: whether bars are shown on stderr.
        corpus: the corpus's name, for the manifest.
        lexical: whether an inverted index is built, for the modes `lexical` and `hybrid`.

    Returns:
        The bundle's manifest.

    Raises:
        ArtefactError: the model cannot be trusted, the vectors do not belong to it, an id repeats, there are no
            documents, or the target cannot be written. Nothing is published then.
        CorpusError: from reading `documents`.
    """
    opened = open_model(model)
    binarizer = open_binarizer(opened)  # an adapter that does not fit is refused before anything is encoded
    with new_artefact(target, replace, "bundle") as staging:
        work = staging / "work"
        work.mkdir()
        store = _spool(documents, work, progress)
        try:
            blocks = _vector_blocks(opened, store, vectors, threads, progress)
            _write_vectors(work / "vectors.npy", blocks, len(store), opened)
            manifest = _write_index(opened, binarizer, store, work / "vectors.npy", staging, corpus, lexical, progress)
        finally:
            store.close()
        _copy_model(opened, staging / "model")
        shutil.rmtree(work)
        return publish(staging, manifest)


def _write_index(
    model: Model,
    binarizer: Binarizer | None,
    store: Spool,
    vectors_file: Path,
    staging: Path,
    corpus: str,
    lexical: bool,
    progress: bool,
) -> BundleManifest:
    """Write everything of a bundle but the model, in depth-first order."""
    vectors_ND = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
    trie, order_N = build_trie(_assign(model, vectors_ND, progress))
    save_trie(trie, staging)
    with progress_bar("writing", len(store), quiet=not progress) as advance:
        ordered = (vectors_ND[rows] for rows in _windows(order_N))
        _write_vectors(staging / "vectors.npy", ordered, len(store), model)
        write_documents(staging / "documents.sqlite", _reordered(store, order_N, advance))
    ordered_ND = np.load(staging / "vectors.npy", mmap_mode="r", allow_pickle=False)
    region_count, region_rows = _write_regions(trie, ordered_ND, staging, progress)
    adapter = model.manifest.adapter
    levels = write_codes(binarizer, adapter.levels, ordered_ND, staging, progress) if binarizer and adapter else ()
    words = _write_words(model, store, order_N, staging, progress) if lexical else None
    return BundleManifest(
        model=model.manifest,
        documents=len(store),
        distinct_sids=len(collision_sizes(trie.sids_NL)),
        nodes=trie.nodes,
        regions=region_count,
        region_rows=region_rows,
        code_levels=levels,
        lexical=words,
        corpus=corpus,
    )


def _spool(documents: Iterable[Document], work: Path, progress: bool) -> Spool:
    """Write the documents down in the order they come."""
    last = Document("", "", "")
    sizes = array("q")

    def rows(advance: Callable[[int], None]) -> Iterator[tuple[str, str, str, str]]:
        nonlocal last
        for last in documents:
            row = (last.id, last.title, last.text, dump_metadata(last.metadata))
            sizes.append(sum(map(len, row)))
            yield row
            advance(1)

    try:
        with progress_bar("reading", None, quiet=not progress) as advance:
            count = write_rows(work / "spool.sqlite", rows(advance))
    except sqlite3.IntegrityError:
        raise ArtefactError(f"two documents have the id {last.id[:80]!r}: give every document its own id") from None
    except UnicodeEncodeError:
        raise ArtefactError(f"document {last.id[:80]!a} holds a lone surrogate: remove it") from None
    if count == 0:
        raise ArtefactError("there are no documents to index: a bundle holds at least one")
    return Spool(work / "spool.sqlite", np.asarray(sizes, np.int64))


def _vector_blocks(
    model: Model, store: Spool, vectors: NDArray[Any] | None, threads: int | None, progress: bool
) -> Iterator[NDArray[np.float32]]:
    """Give the unit vectors of all documents, window by window: those given, or the encoder's."""
    if vectors is not None:
        return _given_blocks(model, store, vectors, threads)
    return _encoded_blocks(model, store, threads, progress)


def _given_blocks(
    model: Model, store: Spool, vectors: NDArray[Any], threads: int | None
) -> Iterator[NDArray[np.float32]]:
    """Give the vectors that came with the documents; a few of them are held against what the encoder makes."""
    shape = len(store), model.manifest.dimensions
    if vectors.shape != shape:
        raise ArtefactError(
            f"the given vectors have shape {vectors.shape}, {shape[0]} documents and a model of {shape[1]} dimensions "
            f"need {shape}: give one vector per document, made by this model's encoder"
        )
    held = np.unique(np.linspace(0, len(store) - 1, GIVEN_HELD).astype(np.int64))
    documents = store.many(held.tolist())
    texts = [(document.title, document.text) for document in documents]
    made = _encoder(model, threads).encode_documents(texts, lambda _: None)
    for start in range(0, len(vectors), WINDOW):
        block = np.asarray(vectors[start : start + WINDOW], np.float32)
        norms = np.linalg.norm(block, axis=1)
        bad = ~(np.abs(norms - 1) < GIVEN_NORM_TOLERANCE)
        if bad.any():
            row = int(np.argmax(bad))
            raise ArtefactError(
                f"given vector {start + row} has length {norms[row]}, expected 1: normalise the vectors"
            )
        block = block / norms[:, None]
        for row, document, vector_D in zip(held - start, documents, made, strict=True):
            if 0 <= row < len(block) and (cosine := float(block[row] @ vector_D)) < GIVEN_COSINE:
                raise ArtefactError(
                    f"given vector {start + row} has cosine {cosine:.2f} to what this model's encoder makes of "
                    f"{document.id!r}: give the vectors of these documents, in their order, made by this encoder"
                )
        yield block


def _encoder(model: Model, threads: int | None) -> Encoder:
    manifest = model.manifest
    return Encoder(model.encoder_file, model.tokenizer_file, manifest.text, threads, dimensions=manifest.dimensions)


def _encoded_blocks(model: Model, store: Spool, threads: int | None, progress: bool) -> Iterator[NDArray[np.float32]]:
    encoder = _encoder(model, threads)
    with progress_bar("encoding", len(store), quiet=not progress) as advance:
        for rows in _windows(np.arange(len(store))):
            tokens: list[list[int]] = []
            for documents in store.chunks(rows):
                tokens += encoder.tokenizer.documents([(document.title, document.text) for document in documents])
            yield encoder.encode_window(tokens, advance)


def _write_vectors(file: Path, blocks: Iterable[NDArray[np.float32]], count: int, model: Model) -> None:
    """Write a `.npy` file of (N, D) float32 block by block."""
    write_blocks(file, (count, model.manifest.dimensions), np.dtype(np.float32), blocks)


def _assign(model: Model, vectors_ND: NDArray[np.float32], progress: bool) -> NDArray[np.int32]:
    manifest = model.manifest
    with progress_bar("assigning", len(vectors_ND), quiet=not progress) as advance:
        try:
            return assign_sids(
                vectors_ND, manifest.quantizer.kind, model.quantizer_tensors, manifest.level_sizes, advance
            )
        except QuantizerError as error:
            raise ArtefactError(f"model '{model.path}' cannot assign semantic IDs: {error}") from error


def _reordered(store: Spool, order_N: NDArray[np.int64], advance: Callable[[int], None]) -> Iterator[Document]:
    for documents in store.chunks(order_N):
        yield from documents
        advance(len(documents))


def _write_regions(trie: Trie, vectors_ND: NDArray[np.float32], staging: Path, progress: bool) -> tuple[int, int]:
    """Write what the walk knows of the trie's larger nodes; returns how many regions there are, and their rows."""
    with progress_bar("regions", None, quiet=not progress) as advance:
        regions = build_regions(trie, vectors_ND, advance)
    arrays: dict[str, NDArray[Any]] = {
        "regions": regions.rows_RD,
        "region_start": regions.start_C,
        "region_rest": regions.rest_C,
        "trie_region": regions.region_M,
    }
    for name, values in arrays.items():
        write_array(staging / f"{name}.npy", values)
    return regions.count, len(regions.rows_RD)


def _write_words(
    model: Model, store: Spool, order_N: NDArray[np.int64], staging: Path, progress: bool
) -> LexicalSettings:
    """Write the inverted index over titles and texts; returns its sizes."""
    tokenizer = WordTokenizer(read_tokenizer(model.tokenizer_file))

    def rows(advance: Callable[[int], None]) -> Iterator[list[list[int]]]:
        for documents in store.chunks(order_N):
            yield tokenizer.tokens([words_of(document.title, document.text) for document in documents])
            advance(len(documents))

    with progress_bar("words", len(store), quiet=not progress) as advance:
        postings = build_postings(rows(advance), tokenizer.vocabulary)
        write_postings(postings, staging)
    return LexicalSettings(vocabulary=postings.vocabulary, postings=len(postings.document_P))


def _copy_model(model: Model, folder: Path) -> None:
    folder.mkdir()
    for name in model.manifest.files:
        shutil.copyfile(model.path / name, folder / name)


def _windows(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), WINDOW):
        yield rows[start : start + WINDOW]
