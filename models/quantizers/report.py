"""The SID quality report: of a bundle or of an array of codes, as a table, as JSON and as a plot.

Shapes: N documents, D dimensions, L levels, K codes of a level.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from models.arrays import read_array
from models.lines import DataError, lines
from models.quantizers.base import CodeArray, tokens_to_codes
from models.quantizers.quality import SidQuality, measure_sids

SHOWN_COLLISIONS = 8
MAX_BARS = 12


@dataclass(frozen=True, eq=False)
class Sids:
    """Semantic IDs with what is known about their documents.

    Attributes:
        name: where they come from.
        codes: (N, L) int32, -1 where a document has none at a level.
        level_sizes: K of each level.
        cosine: (N,) float32 cosine of each vector to its reconstruction, or None.
        ids: document ids, or None.
    """

    name: str
    codes: CodeArray
    level_sizes: tuple[int, ...]
    cosine: NDArray[np.float32] | None = None
    ids: list[str] | None = None

    def named(self) -> list[str]:
        """Return the documents' ids; raises DataError where none are known."""
        if self.ids is None:
            raise DataError(f"{self.name}: interactions need document ids: give a bundle, or ids with --ids")
        return self.ids


def load_sids(path: Path, level_sizes: tuple[int, ...] = (), ids: Path | None = None) -> Sids:
    """Load a bundle's semantic IDs, or a .npy array (N, L) of codes.

    Args:
        path: a bundle, or a .npy file of whole numbers, -1 where a document has no code.
        level_sizes: of a .npy file; without them each level is as large as its largest code says.
        ids: of a .npy file: one document id a line.

    Raises:
        DataError: the file is no integer array, ids do not fit it, or a bundle is given either: it has its own.
        service.index.artefact.ArtefactError: the bundle is damaged.
    """
    if path.is_dir():
        if level_sizes or ids is not None:
            raise DataError(f"{path} is a bundle and knows its level sizes and ids: leave --level-sizes and --ids out")
        return _bundle_sids(path)
    codes = _load_codes(path)
    sizes = level_sizes or tuple(max(int(k) + 1, 1) for k in codes.max(axis=0))  # a level may have been left out by all
    known = None if ids is None else [id_ for _, id_ in lines(ids)]
    if known is not None and len(known) != len(codes):
        raise DataError(f"{ids} names {len(known)} documents, {path} holds {len(codes)} rows")
    return Sids(str(path), codes, sizes, ids=known)


def report_sids(sids: Sids, interactions: dict[str, int] | None = None) -> SidQuality:
    """Measure semantic IDs; documents without a line in `interactions` count as zero.

    Raises:
        DataError: interactions are given, but no ids to match them.
    """
    counts = None
    if interactions is not None:
        counts = np.array([interactions.get(id_, 0) for id_ in sids.named()], dtype=np.int64)
    return measure_sids(sids.codes, sids.level_sizes, sids.cosine, counts)


def print_report(name: str, quality: SidQuality, console: Console) -> None:
    """Print the report as tables."""
    console.print(_summary(name, quality))
    console.print(_levels(quality))
    if quality.groups:
        console.print(_groups(quality))


def write_json(name: str, quality: SidQuality, path: Path) -> None:
    """Write all figures as JSON."""
    path.write_text(json.dumps({"sids": name, **quality.as_json()}, indent=1) + "\n", encoding="utf-8")


def plot_report(name: str, quality: SidQuality, path: Path) -> None:
    """Draw the code use of every level, entropy and Gini by level (the hourglass), and the collisions, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and only plots need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    use, hourglass, collisions = figure.subplots(1, 3)
    _plot_use(use, quality)
    _plot_hourglass(hourglass, quality)
    _plot_collisions(collisions, quality)
    figure.suptitle(f"{name}: {quality.documents:,} documents, p_unique {quality.p_unique:.4f}")
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _bundle_sids(path: Path) -> Sids:
    from service.index.bundle import open_bundle
    from service.index.trie import padding_of
    from service.model.quantizer import reconstruct

    bundle = open_bundle(path)
    try:
        settings = bundle.manifest.model
        tokens = np.asarray(bundle.trie.sids_NL)
        padded = tokens.astype(np.int32)
        padded[tokens == padding_of(tokens.dtype)] = -1
        ids = [document.id for document in bundle.documents.many(range(len(padded)), whole=False)]
        cosine = None
        tensors = bundle.model.quantizer_tensors
        if not any(name.startswith("projection.") for name in tensors):  # else codes live in another space
            rebuilt = reconstruct(padded, settings.quantizer.kind, tensors, settings.level_sizes)
            cosine = _cosine(rebuilt, bundle.vectors)
        codes = tokens_to_codes(padded, settings.level_sizes)
    finally:
        bundle.close()
    return Sids(str(path), codes, settings.level_sizes, cosine, ids)


def _cosine(rebuilt_ND: NDArray[np.float32], vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rebuilt_ND, axis=1) * np.linalg.norm(vectors_ND, axis=1)
    cosine: NDArray[np.float32] = np.einsum("nd,nd->n", rebuilt_ND, vectors_ND) / np.maximum(norms, 1e-12)
    return cosine


def _load_codes(path: Path) -> CodeArray:
    array = read_array(path, "a .npy file of codes or a bundle's folder")
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{path}: holds {array.dtype} {array.shape}, need whole numbers (documents, levels)")
    if 0 in array.shape or array.min() < -1 or array.max() >= np.iinfo(np.int32).max:
        raise DataError(f"{path}: shape {array.shape}: need at least one row, and codes of at least -1")
    return array.astype(np.int32)


def _summary(name: str, quality: SidQuality) -> Table:
    table = Table("measure", "value", title=name)
    sizes = sorted(quality.collisions.items())
    shown = ", ".join(f"{count} x {size}" for size, count in sizes[:SHOWN_COLLISIONS])
    more = f", … up to {sizes[-1][0]} documents" if len(sizes) > SHOWN_COLLISIONS else ""
    table.add_row("documents", f"{quality.documents:,}")
    table.add_row("distinct SIDs (p_unique)", f"{quality.distinct:,} ({quality.p_unique:.4f})")
    table.add_row("documents alone on their SID", f"{quality.alone_share:.4f}")
    table.add_row("SIDs by documents held", shown + more)
    table.add_row("mean codes of a SID", f"{quality.mean_length:.2f}")
    table.add_row("mean cosine", "unknown" if quality.cosine is None else f"{quality.cosine:.4f}")
    return table


def _levels(quality: SidQuality) -> Table:
    columns = (
        "level",
        "codes",
        "dead",
        "entropy",
        "of max",
        "given previous",
        "gini",
        "std",
        "largest",
        "top 10 %",
        "paths",
        "path use",
    )
    table = Table(*columns, title="Code use by level")
    for number, level in enumerate(quality.levels, start=1):
        table.add_row(
            str(number),
            str(level.codes),
            str(level.dead),
            f"{level.entropy_bits:.2f}",
            f"{level.entropy_share:.3f}",
            f"{level.given_bits:.2f}",
            f"{level.gini:.3f}",
            f"{level.std:.1f}",
            str(level.largest),
            f"{level.top_tenth_share:.3f}",
            f"{level.prefixes:,}",
            f"{level.path_share:.3f}",
        )
    return table


def _groups(quality: SidQuality) -> Table:
    table = Table("group", "documents", "interactions", "alone on SID", "codes", "cosine", title="Head and tail")
    for name, group in quality.groups.items():
        table.add_row(
            name,
            f"{group.documents:,}",
            f"{group.interaction_share:.3f}",
            f"{group.unique_share:.4f}",
            f"{group.mean_length:.2f}",
            "unknown" if group.cosine is None else f"{group.cosine:.4f}",
        )
    return table


def _plot_use(axes: Any, quality: SidQuality) -> None:
    for number, level in enumerate(quality.levels, start=1):
        rank = np.arange(1, level.codes + 1) / level.codes
        axes.plot(rank, np.array(level.counts) / max(level.documents, 1) * level.codes, label=f"level {number}")
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="codes, most used first (share)", ylabel="use, 1 = even", yscale="symlog")
    axes.legend()


def _plot_hourglass(axes: Any, quality: SidQuality) -> None:
    numbers = range(1, len(quality.levels) + 1)
    axes.plot(numbers, [level.gini for level in quality.levels], "o-", label="Gini")
    axes.plot(numbers, [level.entropy_share for level in quality.levels], "s-", label="entropy / max")
    axes.plot(numbers, [level.path_share for level in quality.levels], "^-", label="path use")
    axes.set(xlabel="level", ylim=(0, 1.05), xticks=list(numbers))
    axes.legend()


def _plot_collisions(axes: Any, quality: SidQuality) -> None:
    sizes = sorted(quality.collisions)
    bars = {str(size): quality.collisions[size] for size in sizes[:MAX_BARS]}
    if rest := sizes[MAX_BARS:]:
        bars[f"{rest[0]}+"] = sum(quality.collisions[size] for size in rest)
    axes.bar(list(bars), list(bars.values()))
    axes.set(xlabel="documents on a SID", ylabel="SIDs", yscale="log")
    axes.set_ylim(bottom=0.8)  # a single SID is a visible bar
