"""Quantizers beside each other on the same vectors at the same sizes: the table by which to choose one.

Shapes: N documents, D dimensions, L levels.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from models.arrays import read_array
from models.quantizers.base import FloatArray, Quantizer, make_quantizer
from models.quantizers.hhq import HHQ, HHQSettings, paper_settings
from models.quantizers.points import VectorError
from models.quantizers.quality import measure_sids
from models.unit import unit_rows
from service.ops.progress import progress_bar

HHQ_PAPER = "hhq_paper"  # HHQ without what is ours: see `paper_settings`
SHOWN = ("hhq", HHQ_PAPER, "rq_kmeans")  # unless others are named
HEADER = ("vectors", "system", "dims", "K", "levels", "p_unique", "cosine", "Gini by level")


class Compared(NamedTuple):
    """One row: distinct SIDs per document, mean cosine of the reconstruction, and the Gini coefficient by level.

    Figures are tuples over seeds, `gini` of means by level.
    """

    vectors: str
    system: str
    dims: int
    codes: int
    levels: int
    p_unique: tuple[float, ...]
    cosine: tuple[float, ...]
    gini: tuple[float, ...]

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        gini = " / ".join(f"{value:.2f}" for value in self.gini)
        figures = [_spread(self.p_unique), _spread(self.cosine), gini]
        return [self.vectors, self.system, str(self.dims), str(self.codes), str(self.levels), *figures]


def load_vectors(path: Path) -> FloatArray:
    """Read (N, D) vectors of any float type and make them unit.

    Raises:
        DataError: the file holds no array.
        VectorError: not an array of at least two rows of floats.
    """
    array = read_array(path, "a .npy file of vectors (documents, dimensions)")
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or len(array) < 2:
        raise VectorError(f"{path}: expected floats (documents, dimensions), got {array.dtype} {array.shape}")
    return unit_rows(array.astype(np.float32))


def reduce_dims(vectors_ND: FloatArray, dims: int) -> FloatArray:
    """Turn vectors to their principal directions, keep the first `dims` coordinates, make them unit again.

    What an encoder with Matryoshka prefixes gives for free (HHQ, appendix B), for one without.

    Raises:
        VectorError: more dimensions than the vectors have.
    """
    if not 1 <= dims <= vectors_ND.shape[1]:
        raise VectorError(f"{dims} dimensions asked of vectors with {vectors_ND.shape[1]}: give 1 to that many")
    if dims == vectors_ND.shape[1]:
        return vectors_ND
    _, axes_DD = np.linalg.eigh(vectors_ND.T @ vectors_ND)
    return unit_rows(vectors_ND @ axes_DD[:, ::-1][:, :dims])


def compare(
    path: Path,
    systems: Sequence[str],
    codes: Sequence[int],
    levels: Sequence[int],
    seeds: Sequence[int] = (0,),
    dims: Sequence[int] = (),
) -> list[Compared]:
    """Fit every system at every size with every seed on one file of vectors; no `dims` means all of them.

    Systems are those of recipes, and `hhq_paper`.
    """
    vectors_ND = load_vectors(path)
    name = path.parent.name or path.stem
    reduced = [reduce_dims(vectors_ND, kept) for kept in dims or [vectors_ND.shape[1]]]
    sizes = list(product(reduced, codes, levels, systems))
    rows = []
    with progress_bar(name, len(sizes) * len(seeds)) as advance:
        for points_ND, size, depth, system in sizes:
            found = []
            for seed in seeds:
                found.append(_measure(system, [size] * depth, seed, points_ND))
                advance(1)
            uniques, cosines, ginis = zip(*found, strict=True)
            gini = tuple(statistics.fmean(level) for level in zip(*ginis, strict=True))
            rows.append(Compared(name, system, points_ND.shape[1], size, depth, uniques, cosines, gini))
    return rows


def as_table(rows: Sequence[Compared]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*row.cells())
    return table


def as_markdown(rows: Sequence[Compared]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: Sequence[Compared], path: Path) -> None:
    """Draw p_unique and cosine by depth as a PNG, a line for each system and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys((row.vectors, row.dims) for row in rows))
    figure, panels = pyplot.subplots(2, len(names), figsize=(4 * len(names), 7), squeeze=False, sharex=True)
    for column, (vectors, dims) in enumerate(names):
        here = [row for row in rows if (row.vectors, row.dims) == (vectors, dims)]
        for system, codes in dict.fromkeys((row.system, row.codes) for row in here):
            line = sorted((row for row in here if (row.system, row.codes) == (system, codes)), key=lambda r: r.levels)
            depths = [row.levels for row in line]
            style = {"marker": "o", "label": f"{system}, K = {codes}"}
            panels[0][column].plot(depths, [statistics.fmean(row.p_unique) for row in line], **style)
            panels[1][column].plot(depths, [statistics.fmean(row.cosine) for row in line], **style)
        panels[0][column].set_title(f"{vectors}, {dims} dimensions")
        panels[1][column].set_xlabel("levels")
        panels[1][column].set_xticks(sorted({row.levels for row in here}))
    panels[0][0].set_ylabel("p_unique")
    panels[1][0].set_ylabel("cosine")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _measure(
    system: str, level_sizes: list[int], seed: int, vectors_ND: FloatArray
) -> tuple[float, float, tuple[float, ...]]:
    quantizer = _make(system, level_sizes, seed)
    quantizer.fit(vectors_ND)
    codes_NL = quantizer.encode(vectors_ND)
    quality = measure_sids(codes_NL, quantizer.level_sizes)
    cosine = float((unit_rows(quantizer.reconstruct(codes_NL)) * vectors_ND).sum(1).mean())
    return quality.p_unique, cosine, tuple(level.gini for level in quality.levels)


def _make(system: str, level_sizes: list[int], seed: int) -> Quantizer:
    if system == HHQ_PAPER:
        return HHQ(paper_settings(HHQSettings(level_sizes=tuple(level_sizes), seed=seed)))
    return make_quantizer({"system": system, "level_sizes": level_sizes, "seed": seed})


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
