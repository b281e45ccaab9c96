"""Packed QAMA codes of a bundle, written level by level while a bundle is built.

Letters: N documents, D dimensions, W uint64 words, G blocks of 32 documents (`service.model.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.index.arrays import write_blocks
from service.index.artefact import ArtefactError
from service.index.bundle import Model
from service.model.adapter import AdapterError
from service.model.binarizer import Binarizer
from service.model.layout import CodeError
from service.model.packing import BLOCK_DOCUMENTS, CodeArray, stored_shape, to_blocks
from service.ops.progress import progress_bar

CHUNK = 128 * BLOCK_DOCUMENTS  # documents binarised together


def open_binarizer(model: Model) -> Binarizer | None:
    """Return the model's binarizer, or None for a model without an adapter.

    Raises:
        ArtefactError: the adapter belongs to another encoder, other dimensions, or offers other levels than the
            manifest says.
    """
    if model.adapter_file is None or model.manifest.adapter is None:
        return None
    try:
        binarizer = Binarizer.open(model.adapter_file, encoder=model.manifest.files["encoder.onnx"].sha256)
    except (AdapterError, CodeError) as error:
        raise ArtefactError(f"'{model.adapter_file}' cannot be used: {error}") from error
    if binarizer.dims != model.manifest.dimensions:
        raise ArtefactError(
            f"'{model.adapter_file}' adapts {binarizer.dims} dimensions, its model's encoder gives "
            f"{model.manifest.dimensions}: train the adapter on this model's vectors"
        )
    if missing := sorted(set(model.manifest.adapter.levels) - set(binarizer.levels)):
        raise ArtefactError(
            f"'{model.adapter_file}' lacks levels {missing} that the manifest names, "
            f"it offers {list(binarizer.levels)}: export the model again"
        )
    if binarizer.prefixes != model.manifest.adapter.prefixes:
        raise ArtefactError(
            f"'{model.adapter_file}' has prefixes {list(binarizer.prefixes)}, the manifest says "
            f"{list(model.manifest.adapter.prefixes)}: export the model again"
        )
    return binarizer


def write_codes(
    binarizer: Binarizer, levels: tuple[str, ...], vectors_ND: NDArray[np.float32], folder: Path, progress: bool
) -> tuple[str, ...]:
    """Write `codes_<level>.npy` (G, W, 32) uint64 for every level of a model's adapter; returns the levels."""
    with progress_bar("packing", len(vectors_ND) * len(levels), quiet=not progress) as advance:
        for level in levels:
            shape = stored_shape(len(vectors_ND), binarizer.layout(level).words_of(None))
            blocks = _packed(binarizer, vectors_ND, level, advance)
            write_blocks(folder / f"codes_{level}.npy", shape, np.dtype(np.uint64), blocks)
    return levels


def _packed(
    binarizer: Binarizer, vectors_ND: NDArray[np.float32], level: str, advance: Callable[[int], None]
) -> Iterator[CodeArray]:
    """Yield the codes of a level in the stored form, `CHUNK` documents at a time."""
    for start in range(0, len(vectors_ND), CHUNK):
        codes_NW = binarizer.codes(np.asarray(vectors_ND[start : start + CHUNK]), level)
        yield to_blocks(codes_NW)
        advance(len(codes_NW))
