"""Quantizers beside each other on the same vectors at the same sizes: the table by which to choose one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from models.quantizers.base import FloatArray, make_quantizer
from models.quantizers.points import VectorError
from models.quantizers.quality import measure_sids


class Compared(NamedTuple):
    """One row: distinct SIDs per document, mean cosine of the reconstruction, and the Gini coefficient by level."""

    vectors: str
    system: str
    codes: int
    levels: int
    p_unique: float
    cosine: float
    gini: tuple[float, ...]


def load_vectors(path: Path) -> FloatArray:
    """Read (N, D) vectors of any float type and make them unit.

    Raises:
        VectorError: not an array of at least two rows of floats.
    """
    array: NDArray[np.floating] = np.load(path, allow_pickle=False)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or len(array) < 2:
        raise VectorError(f"{path}: expected floats (documents, dimensions), got {array.dtype} {array.shape}")
    vectors = array.astype(np.float32)
    unit: FloatArray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def compare(path: Path, systems: Sequence[str], codes: Sequence[int], levels: int, seed: int = 0) -> list[Compared]:
    """Fit every system at every size on one file of vectors."""
    vectors_ND = load_vectors(path)
    name = path.parent.name or path.stem
    rows = []
    for size in codes:
        for system in systems:
            quantizer = make_quantizer({"system": system, "level_sizes": [size] * levels, "seed": seed})
            quantizer.fit(vectors_ND)
            codes_NL = quantizer.encode(vectors_ND)
            quality = measure_sids(codes_NL, quantizer.level_sizes)
            rebuilt_ND = quantizer.reconstruct(codes_NL)
            norms_N = np.maximum(np.linalg.norm(rebuilt_ND, axis=1), 1e-12)
            cosine = float(((rebuilt_ND * vectors_ND).sum(1) / norms_N).mean())
            gini = tuple(level.gini for level in quality.levels)
            rows.append(Compared(name, system, size, levels, quality.p_unique, cosine, gini))
    return rows


def as_table(rows: Sequence[Compared]) -> Table:
    """The rows as a table for the terminal."""
    table = Table("vectors", "system", "K", "levels", "p_unique", "cosine", "Gini by level")
    for row in rows:
        gini = " / ".join(f"{value:.2f}" for value in row.gini)
        figures = (str(row.codes), str(row.levels), f"{row.p_unique:.4f}", f"{row.cosine:.4f}", gini)
        table.add_row(row.vectors, row.system, *figures)
    return table
