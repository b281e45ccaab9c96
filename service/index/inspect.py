"""What a model or a bundle is: sizes, levels, collisions, code use, provenance; verified before it is described.

Letters: N documents, L levels, K codes of a level, T tokens.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.index.bundle import Bundle, open_bundle, open_model
from service.index.manifest import BundleManifest, ModelManifest
from service.index.trie import collision_sizes, padding_of
from service.index.verify import read_manifest
from service.model.layout import WORD_BITS, code_layout


@dataclass(frozen=True)
class LevelUse:
    """How the codes of one level are used.

    Attributes:
        level: from 1, as people count.
        size: K.
        used: codes that at least one document has.
        documents: documents whose SID reaches the level.
        entropy_bits: entropy of the codes over those documents; log2 K at best.
        gini: Gini coefficient of the documents per code, unused codes among them; 0 is even, 1 is one code for all.
        largest_share: share of those documents on the most frequent code.
    """

    level: int
    size: int
    used: int
    documents: int
    entropy_bits: float
    gini: float
    largest_share: float


@dataclass(frozen=True)
class CodeUse:
    """What packed codes of one level take.

    Attributes:
        level: its name.
        bits: information bits of a whole code.
        bytes_per_document: of a code, by the dimensions that it is cut to; padding to whole words included.
        float_share: bytes of a whole code / bytes of a float32 vector.
    """

    level: str
    bits: int
    bytes_per_document: dict[int, int]
    float_share: float


@dataclass(frozen=True)
class IndexUse:
    """What a bundle's index looks like.

    Attributes:
        collisions: number of SIDs by how many documents they hold: `{1: 900, 2: 40, …}`.
        p_unique: distinct SIDs / documents (HHQ appendix C).
        bytes_per_document: of every file that grows with the corpus.
        codes: packed codes by level; none for a bundle without.
    """

    documents: int
    distinct_sids: int
    p_unique: float
    largest_collision: int
    collisions: dict[int, int]
    nodes: int
    regions: int
    depth: int
    levels: tuple[LevelUse, ...]
    bytes_per_document: dict[str, float]
    codes: tuple[CodeUse, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """A verified artefact: its manifest, its files, and for a bundle the use of its codes."""

    path: Path
    manifest: ModelManifest | BundleManifest
    verified_bytes: int
    verified_seconds: float
    index: IndexUse | None = None

    @property
    def model(self) -> ModelManifest:
        """The manifest of the model, or of the model inside the bundle."""
        return self.manifest.model if isinstance(self.manifest, BundleManifest) else self.manifest

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values for `--json`."""
        return {
            "path": str(self.path),
            "manifest": self.manifest.model_dump(mode="json"),
            "verified_bytes": self.verified_bytes,
            "verified_seconds": self.verified_seconds,
            "index": asdict(self.index) if self.index else None,
        }


def inspect_artefact(path: Path) -> Inspection:
    """Verify an artefact and return what it is.

    Raises:
        ArtefactError: it cannot be trusted; the message names the file, the numbers and the remedy.
    """
    started = time.perf_counter()
    manifest = read_manifest(path)
    bundle = open_bundle(path) if isinstance(manifest, BundleManifest) else None
    if bundle is None:
        open_model(path)
    seconds = time.perf_counter() - started
    total = sum(entry.bytes for entry in manifest.files.values())
    if bundle is None:
        return Inspection(path, manifest, total, seconds)
    with closing(bundle):
        return Inspection(path, manifest, total, seconds, describe_index(bundle))


def describe_index(bundle: Bundle) -> IndexUse:
    """Count collisions and code use of an open bundle."""
    trie, manifest = bundle.trie, bundle.manifest
    sizes = collision_sizes(trie.sids_NL)
    files = {name: entry.bytes for name, entry in manifest.files.items() if not name.startswith("model/")}
    return IndexUse(
        documents=trie.documents,
        distinct_sids=len(sizes),
        p_unique=len(sizes) / trie.documents,
        largest_collision=int(sizes.max()),
        collisions={int(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True), strict=True)},
        nodes=trie.nodes,
        regions=bundle.regions.count,
        depth=trie.depth,
        levels=level_use(trie.sids_NL, manifest.model.level_offsets),
        bytes_per_document={name: size / trie.documents for name, size in sorted(files.items())},
        codes=code_use(manifest),
    )


def code_use(manifest: BundleManifest) -> tuple[CodeUse, ...]:
    """Return what the packed codes of every level take."""
    adapter, uses = manifest.model.adapter, []
    prefixes = adapter.prefixes if adapter else ()
    for level in manifest.code_levels:
        layout = code_layout(level, prefixes)
        sizes = {dims: layout.words_of(dims) * WORD_BITS // 8 for dims in layout.prefix_dims}
        uses.append(CodeUse(level, layout.bits, sizes, sizes[layout.dims] / (4 * layout.dims)))
    return tuple(uses)


def level_use(sids_NL: NDArray[Any], level_offsets: tuple[int, ...]) -> tuple[LevelUse, ...]:
    """Return the use of every level's codes; tokens say which level they are of, whatever column they stand in."""
    tokens = sids_NL[sids_NL != padding_of(sids_NL.dtype)].astype(np.int64)
    counts_T = np.bincount(tokens, minlength=level_offsets[-1])
    ranges = enumerate(pairwise(level_offsets), start=1)
    return tuple(_use(level, counts_T[first:last]) for level, (first, last) in ranges)


def _use(level: int, counts_K: NDArray[np.int64]) -> LevelUse:
    total, size = int(counts_K.sum()), len(counts_K)
    shares = counts_K[counts_K > 0] / max(total, 1)
    ranks = np.arange(1, size + 1)
    gini = 2 * float((ranks * np.sort(counts_K)).sum()) / (size * total) - (size + 1) / size if total else 0.0
    return LevelUse(
        level=level,
        size=size,
        used=int((counts_K > 0).sum()),
        documents=total,
        entropy_bits=abs(float(-(shares * np.log2(shares)).sum())),  # abs: no minus zero
        gini=gini,
        largest_share=float(shares.max(initial=0.0)),
    )
