"""Opening models and bundles: verified files, memory-mapped arrays, and the checks that they belong together.

Letters: N documents, D dimensions, E token dimensions, T tokens, L levels, M trie nodes, C regions, R their
rows, W words, V tokens of the tokenizer, P postings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from service.index.artefact import ArtefactError
from service.index.documents import DocumentStore
from service.index.manifest import BundleManifest, ModelManifest
from service.index.postings import Postings
from service.index.regions import Regions
from service.index.trie import Trie, open_trie, verify_trie
from service.index.verify import read_manifest, verify_files
from service.model.packing import stored_shape

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Model:
    """A model folder: the frozen halves and the manifest that describes them."""

    path: Path
    manifest: ModelManifest

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, in the format of the `tokenizers` library."""
        return self.path / "tokenizer.json"

    @property
    def encoder_file(self) -> Path:
        """The encoder graph."""
        return self.path / "encoder.onnx"

    @property
    def decoder_file(self) -> Path | None:
        """The decoder graph, or None for a model that offers `geometric` scoring only."""
        return self.path / "decoder.onnx" if self.manifest.decoder else None

    @property
    def adapter_file(self) -> Path | None:
        """The QAMA adapter, or None."""
        return self.path / "adapter.safetensors" if self.manifest.adapter else None

    @cached_property
    def tokens_TE(self) -> NDArray[np.float32]:  # noqa: N802 - shape suffix
        """Token embeddings (T+1, E) float32, the start vector in row T; (0, 0) without a decoder."""
        decoder = self.manifest.decoder
        if decoder is None:
            return np.zeros((0, 0), np.float32)
        expected = (self.manifest.tokens + 1, decoder.embedding_dimensions)
        return _array(self.path / "tokens.npy", expected, np.float32, "export the model again")

    @cached_property
    def quantizer_tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors of `quantizer.safetensors` by name, for `service.model.quantizer.assign_sids`."""
        return _opened(self.path / "quantizer.safetensors", load_file)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle, its arrays memory-mapped read-only; positions are in depth-first order.

    Attributes:
        path: the folder.
        manifest: sizes, the model's manifest, the file table.
        model: the model inside.
        trie: all SIDs, `trie.sids_NL` among them.
        vectors: unit vectors (N, D) float32.
        regions: where the documents under the trie's larger nodes lie.
        documents: ids, titles, texts, metadata.
        codes: packed QAMA codes by level name, in the stored form (G, W, 32) uint64 of `service.model.packing`.
        postings: the inverted index; None where the corpus was indexed without.
    """

    path: Path
    manifest: BundleManifest
    model: Model
    trie: Trie
    vectors: NDArray[np.float32]
    regions: Regions
    documents: DocumentStore
    codes: dict[str, NDArray[Any]]
    postings: Postings | None = None

    @property
    def digest(self) -> str:
        """Sha256 over the manifest: file table and settings. Binds cache keys."""
        return self.manifest.digest

    def touch(self) -> int:
        """Read one byte of every page of every mapped array, so that no request waits for the disk; returns bytes."""
        trie = self.trie
        arrays = [trie.token_M, trie.lo_M, trie.child_M, trie.sids_NL, self.vectors, self.regions.rows_RD]
        arrays += [self.regions.start_C, self.regions.rest_C, self.regions.region_M, *self.codes.values()]
        if (words := self.postings) is not None:
            arrays += [words.start_V, words.document_P, words.worth_P]
        for array in arrays:
            data = array.ravel(order="K").view(np.uint8)
            data[::4096].max(initial=0)
            data[-1:].max(initial=0)  # data begin behind a header, so the last page may have been missed
        return sum(array.nbytes for array in arrays)

    def close(self) -> None:
        """Close the document store."""
        self.documents.close()


def open_model(path: Path) -> Model:
    """Open a model folder; every file is hashed first.

    Raises:
        ArtefactError: it is no model, or a file of it cannot be trusted; the message names the file.
    """
    return _checked(Model(path, _manifest(path, ModelManifest)))


def open_bundle(path: Path) -> Bundle:
    """Open a bundle by memory map; every file is hashed first.

    Raises:
        ArtefactError: it is no bundle, or a file of it cannot be trusted; the message names the file.
    """
    manifest = _manifest(path, BundleManifest)
    _check_model_files(path, manifest)
    model = _checked(Model(path / "model", manifest.model))
    bundle = Bundle(
        path=path,
        manifest=manifest,
        model=model,
        trie=_opened(path, open_trie),
        vectors=_vectors(path, manifest),
        regions=_regions(path, manifest),
        codes={level: _codes(path, level, manifest) for level in manifest.code_levels},
        documents=_opened(path / "documents.sqlite", DocumentStore),
        postings=_postings(path, manifest),
    )
    try:
        _check_sizes(bundle)
        _check_references(bundle)
        if read_manifest(path).digest != manifest.digest:
            raise ArtefactError(f"'{path}' was replaced while it was opened: open it again")
    except ArtefactError:
        bundle.close()
        raise
    return bundle


REINDEX = "index the corpus again with this model"


def _manifest(path: Path, kind: type[Opened]) -> Opened:
    manifest = read_manifest(path)
    if not isinstance(manifest, kind):
        wanted = "model" if kind is ModelManifest else "bundle"
        raise ArtefactError(f"'{path}' is a {manifest.kind}, and a {wanted} is needed here: give a {wanted}'s folder")
    verify_files(path, manifest)
    return manifest


def _checked(model: Model) -> Model:
    """Open what a model's tensors are made of: refused now, not at the first query."""
    _ = model.tokens_TE, model.quantizer_tensors
    adapter, encoder = model.manifest.adapter, model.manifest.files["encoder.onnx"].sha256
    if adapter is not None and adapter.encoder_sha256 != encoder:
        raise ArtefactError(
            f"'{model.adapter_file}' belongs to the encoder {adapter.encoder_sha256[:12]}, "
            f"this model's is {encoder[:12]}: train the adapter on this model's vectors"
        )
    return model


def _check_model_files(path: Path, manifest: BundleManifest) -> None:
    """Hold the model inside against the manifest of the model that the index was made with."""
    if missing := sorted(manifest.model.expected_files() - manifest.model.files.keys()):
        raise ArtefactError(f"bundle '{path}' says nothing of its model's files {missing}: {REINDEX}")
    for name, entry in manifest.model.files.items():
        found = manifest.files.get(f"model/{name}")
        if found != entry:
            raise ArtefactError(
                f"'{path / 'model' / name}' is not the file the index was made with: its sha256 is "
                f"{found.sha256 if found else 'missing'}, the model's was {entry.sha256}: {REINDEX}"
            )


def _vectors(path: Path, manifest: BundleManifest) -> NDArray[np.float32]:
    file = path / "vectors.npy"
    vectors: NDArray[np.float32] = _opened(file, _map)
    given = manifest.model.dimensions
    if vectors.ndim == 2 and vectors.shape[1] != given:
        raise ArtefactError(
            f"bundle '{path}' has vectors of {vectors.shape[1]} dimensions, its encoder gives {given}: {REINDEX}"
        )
    return _array(file, (manifest.documents, given), np.float32, REINDEX)


def _codes(path: Path, level: str, manifest: BundleManifest) -> NDArray[Any]:
    file = path / f"codes_{level}.npy"
    codes_GWV: NDArray[Any] = _opened(file, _map)
    words = codes_GWV.shape[1] if codes_GWV.ndim == 3 else 0
    shape = stored_shape(manifest.documents, words)
    if codes_GWV.dtype != np.uint64 or codes_GWV.shape != shape:
        raise ArtefactError(
            f"'{file}' holds {codes_GWV.dtype} of shape {codes_GWV.shape}, "
            f"{manifest.documents} documents need uint64 of shape {shape}: {REINDEX}"
        )
    return codes_GWV


def _check_sizes(bundle: Bundle) -> None:
    manifest, trie = bundle.manifest, bundle.trie
    found = {
        "documents in sids.npy": (trie.documents, manifest.documents),
        "documents in documents.sqlite": (len(bundle.documents), manifest.documents),
        "nodes in trie_lo.npy": (trie.nodes, manifest.nodes),
        "levels in sids.npy": (trie.sids_NL.shape[1], manifest.model.levels),
    }
    for what, (actual, expected) in found.items():
        if actual != expected:
            raise ArtefactError(f"bundle '{bundle.path}' has {actual} {what}, the manifest says {expected}: {REINDEX}")


def _check_references(bundle: Bundle) -> None:
    """Check every node, token and region, so that no kernel can leave its arrays."""
    manifest, regions = bundle.manifest, bundle.regions
    _opened(bundle.path, lambda _: verify_trie(bundle.trie, manifest.model.tokens))
    lowest, highest = int(regions.region_M.min()), int(regions.region_M.max())
    if lowest < -1 or highest >= manifest.regions:
        file = bundle.path / "trie_region.npy"
        raise ArtefactError(f"'{file}' names regions {lowest} to {highest} of {manifest.regions}: {REINDEX}")
    start_C = regions.start_C
    if start_C[0] != 0 or start_C[-1] != manifest.region_rows or (np.diff(start_C) < 1).any():
        file = bundle.path / "region_start.npy"
        raise ArtefactError(f"'{file}' does not divide {manifest.region_rows} rows among the regions: {REINDEX}")
    if not (regions.rest_C >= 0).all():  # a root is taken of it
        raise ArtefactError(f"'{bundle.path / 'region_rest.npy'}' holds numbers below 0: {REINDEX}")
    if bundle.postings is not None:
        _check_postings(bundle.path, bundle.postings, manifest.documents)


def _check_postings(path: Path, postings: Postings, documents: int) -> None:
    start_V, document_P = postings.start_V, postings.document_P
    if start_V[0] != 0 or start_V[-1] != len(document_P) or (np.diff(start_V) < 0).any():
        raise ArtefactError(
            f"'{path / 'postings_start.npy'}' does not divide {len(document_P)} postings among the tokens: {REINDEX}"
        )
    lowest, highest = (int(document_P.min()), int(document_P.max())) if len(document_P) else (0, 0)
    if lowest < 0 or highest >= documents:
        file = path / "postings_document.npy"
        raise ArtefactError(f"'{file}' names documents {lowest} to {highest} of {documents}: {REINDEX}")
    rises = np.diff(document_P) > 0
    rises[start_V[(start_V > 0) & (start_V < len(document_P))] - 1] = True  # the next token begins anew
    if not rises.all():
        raise ArtefactError(f"'{path / 'postings_document.npy'}' has a token's documents out of order: {REINDEX}")
    if not ((postings.worth_P > 0) & np.isfinite(postings.worth_P)).all():  # the search takes 0 for not met
        raise ArtefactError(f"'{path / 'postings_worth.npy'}' holds numbers that are not above 0: {REINDEX}")


def _regions(path: Path, manifest: BundleManifest) -> Regions:
    """Map the four files of the regions."""
    rows = (manifest.region_rows, manifest.model.dimensions)
    return Regions(
        rows_RD=_array(path / "regions.npy", rows, np.float32, REINDEX),
        start_C=_array(path / "region_start.npy", (manifest.regions + 1,), np.int64, REINDEX),
        rest_C=_array(path / "region_rest.npy", (manifest.regions,), np.float32, REINDEX),
        region_M=_array(path / "trie_region.npy", (manifest.nodes,), np.int32, REINDEX),
    )


def _postings(path: Path, manifest: BundleManifest) -> Postings | None:
    """Map the three files of the inverted index, where there is one."""
    if (sizes := manifest.lexical) is None:
        return None
    return Postings(
        start_V=_array(path / "postings_start.npy", (sizes.vocabulary + 1,), np.int64, REINDEX),
        document_P=_array(path / "postings_document.npy", (sizes.postings,), np.int32, REINDEX),
        worth_P=_array(path / "postings_worth.npy", (sizes.postings,), np.float32, REINDEX),
    )


def _array(file: Path, shape: tuple[int, ...], dtype: type[np.generic], remedy: str) -> NDArray[Any]:
    array: NDArray[Any] = _opened(file, _map)
    if array.shape != shape or array.dtype != dtype:
        raise ArtefactError(
            f"'{file}' holds {array.dtype} of shape {array.shape}, "
            f"the manifest asks for {np.dtype(dtype)} of shape {shape}: {remedy}"
        )
    return array


def _map(file: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _opened(path: Path, opener: Callable[[Path], Opened]) -> Opened:
    """Call `opener(path)`; whatever it raises about the content becomes an ArtefactError that names the path."""
    try:
        return opener(path)
    except Exception as error:  # numpy, safetensors and SQLite raise types of their own
        raise ArtefactError(f"'{path}' cannot be opened ({error}): make the artefact again") from error
