"""Packing: quantised values to bits to uint64 words, and the form in which a bundle stores them.

Shapes: N documents, U quantised values, W words, G blocks of V = 32 documents. `layout.py` says which bit lies where.

**Stored form.** Word-major in blocks of 32 documents, `(G, W, 32)`, the last block padded with zero codes: eight
documents of one word fill a vector register, and a prefix of the words is contiguous in each block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from service.model.layout import BITS_PER_VALUE, WORD_BITS, CodeError, CodeLayout, PlainLevel

BLOCK_DOCUMENTS = 32

CodeArray = npt.NDArray[np.uint64]
LevelArray = npt.NDArray[np.uint8]


def stored_shape(documents: int, words: int) -> tuple[int, int, int]:
    """Return the shape (G, W, 32) of a level's stored codes."""
    return -(-documents // BLOCK_DOCUMENTS), words, BLOCK_DOCUMENTS


def pack_values(values_NU: npt.NDArray[np.integer[Any]], layout: CodeLayout) -> CodeArray:
    """Pack quantised values into words.

    Args:
        values_NU: level numbers (eq. 3) in the order of the dimensions, 0..3 at 2 bit, 0..2 at 1.5, 0..1 below;
            at 0.5 bit one value stands for a pair.
        layout: from `code_layout`.

    Returns:
        codes_NW, uint64.

    Raises:
        CodeError: another number of values, or a value outside its level.
    """
    if values_NU.ndim != 2 or values_NU.shape[1] != layout.values or values_NU.dtype.kind not in "iub":
        raise CodeError(
            f"level {layout.level} at {layout.dims} dimensions packs (N, {layout.values}) integers, "
            f"got {values_NU.shape} {values_NU.dtype}"
        )
    documents = len(values_NU)
    parts: list[LevelArray] = []
    first = 0
    for block in layout.blocks():
        for run in block:
            parts.append(_thermometer(values_NU[:, first : first + run.values], run.level))
            first += run.values
        padding = -sum(run.bits for run in block) % WORD_BITS
        parts.append(np.zeros((documents, padding), np.uint8))
    packed = np.packbits(np.concatenate(parts, axis=1), axis=1, bitorder="little")
    rows = np.ascontiguousarray(packed)  # of values in Fortran order, the bits are in Fortran order too
    return rows.view("<u8").astype(np.uint64, copy=False)


def _thermometer(values_NU: npt.NDArray[np.integer[Any]], level: PlainLevel) -> LevelArray:
    """Expand values to bits in the order that eq. 22 and 23 write them: the highest step first."""
    bits = BITS_PER_VALUE[level]
    if values_NU.size and (values_NU.min() < 0 or values_NU.max() > bits):
        raise CodeError(f"level {level} has values 0..{bits}, got {values_NU.min()}..{values_NU.max()}")
    steps = np.arange(bits, 0, -1)
    expanded: LevelArray = (values_NU[:, :, None] >= steps).astype(np.uint8)
    return expanded.reshape(len(values_NU), -1)


def unpack_bits(codes_NW: CodeArray, layout: CodeLayout) -> LevelArray:
    """Give back the information bits of full codes, (N, bits) 0/1, padding removed."""
    check_codes(codes_NW, layout.words)
    every = np.unpackbits(codes_NW.astype("<u8").view(np.uint8), axis=1, bitorder="little")
    bounds = zip((0, *layout.prefix_words[:-1]), (0, *layout.prefix_bits[:-1]), layout.prefix_bits, strict=True)
    return np.concatenate([every[:, 64 * w : 64 * w + last - first] for w, first, last in bounds], axis=1)


def unpack_values(codes_NW: CodeArray, layout: CodeLayout) -> LevelArray:
    """Give back the quantised values of full codes, (N, U) uint8."""
    bits = unpack_bits(codes_NW, layout)
    parts, first = [], 0
    for block in layout.blocks():
        for run in block:
            cut = bits[:, first : first + run.bits]
            parts.append(cut.reshape(len(bits), run.values, -1).sum(axis=2, dtype=np.uint8))
            first += run.bits
    return np.concatenate(parts, axis=1)


def are_packed(codes_NW: CodeArray, layout: CodeLayout) -> npt.NDArray[np.bool_]:
    """Whether `pack_values` makes each of these full codes of some values, (N,): no padding, no step without the lower.

    A code that is cut to a prefix is checked with zeros in the place of the rest.
    """
    are_same_N: npt.NDArray[np.bool_] = (pack_values(unpack_values(codes_NW, layout), layout) == codes_NW).all(axis=1)
    return are_same_N


def check_codes(codes_NW: npt.NDArray[Any], words: int, name: str = "codes") -> None:
    """Raise CodeError unless the array is (N, words) uint64."""
    if codes_NW.dtype != np.uint64 or codes_NW.ndim != 2 or codes_NW.shape[1] != words:
        raise CodeError(f"{name} must be (N, {words}) uint64, got {codes_NW.shape} {codes_NW.dtype}")


def to_blocks(codes_NW: CodeArray) -> CodeArray:
    """Reorder codes into the stored form (G, W, 32), C-contiguous, the tail padded with zero codes."""
    check_codes(codes_NW, codes_NW.shape[-1])
    documents, words = codes_NW.shape
    blocks = -(-documents // BLOCK_DOCUMENTS)
    stored = np.zeros((blocks, words, BLOCK_DOCUMENTS), np.uint64)
    whole = documents // BLOCK_DOCUMENTS
    head = codes_NW[: whole * BLOCK_DOCUMENTS].reshape(whole, BLOCK_DOCUMENTS, words)
    stored[:whole] = head.transpose(0, 2, 1)
    if whole < blocks:
        stored[whole, :, : documents % BLOCK_DOCUMENTS] = codes_NW[whole * BLOCK_DOCUMENTS :].T
    return stored


def from_blocks(blocks_GWV: CodeArray, documents: int) -> CodeArray:
    """Undo `to_blocks`: codes_NW of the first `documents` documents."""
    if blocks_GWV.dtype != np.uint64 or blocks_GWV.ndim != 3 or blocks_GWV.shape[2] != BLOCK_DOCUMENTS:
        raise CodeError(f"stored codes must be (G, W, 32) uint64, got {blocks_GWV.shape} {blocks_GWV.dtype}")
    if -(-documents // BLOCK_DOCUMENTS) != len(blocks_GWV):
        raise CodeError(f"{len(blocks_GWV)} blocks do not hold {documents} documents")
    rows = blocks_GWV.transpose(0, 2, 1).reshape(-1, blocks_GWV.shape[1])
    return np.ascontiguousarray(rows[:documents])
