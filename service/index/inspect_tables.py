"""The tables that `rhumb inspect` prints."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from service.index.inspect import IndexUse, Inspection
from service.index.manifest import ModelManifest, human_bytes


def render(inspection: Inspection) -> RenderableType:
    """Return an inspection as tables for a terminal."""
    manifest = inspection.manifest
    title = Text.assemble((f"{manifest.kind} ", "bold"), (str(inspection.path), "bold cyan"))
    verified = Text(
        f"verified: {len(manifest.files)} files, {human_bytes(inspection.verified_bytes)} "
        f"in {inspection.verified_seconds:.2f} s, digest {manifest.digest[:16]}…",
        style="green",
    )
    parts: list[RenderableType] = [title, verified, _model_table(inspection.model)]
    if inspection.index is not None:
        parts += [_index_table(inspection.index), _level_table(inspection.index), _collision_table(inspection.index)]
        parts += [_code_table(inspection.index)] if inspection.index.codes else []
    return Group(*parts, _file_table(inspection))


def _model_table(model: ModelManifest) -> Table:
    table = Table(title="model", title_justify="left", show_header=False)
    decoder, text, origin = model.decoder, model.text, model.provenance
    shape = (
        "none" if decoder is None else f"{decoder.layers} layers, {decoder.heads} heads of {decoder.head_dimensions}"
    )
    rows = {
        "dimensions": model.dimensions,
        "levels": f"{model.levels}: {' × '.join(map(str, model.level_sizes))}",
        "quantizer": model.quantizer.kind,
        "decoder": shape,
        "scorings": ", ".join(
            f"{name} (default)" if name == model.default_scoring else name for name in model.scorings
        ),
        "normalisation": model.normalisation,
        "precision": model.precision,
        "query / document tokens": f"{text.max_query_tokens} / {text.max_document_tokens}",
        "history": f"last {text.history_count}" if text.history_count else "not used",
        "packed codes": ", ".join(model.adapter.levels) if model.adapter else "none",
        "recipe": origin.recipe,
        "base model": origin.base_model or "unknown",
        "data": ", ".join(origin.data) or "unknown",
        "licences": ", ".join(origin.licences) or "unknown",
        "seed": "unknown" if origin.seed is None else origin.seed,
        "notes": origin.notes,
    }
    return _filled(table, rows)


def _index_table(index: IndexUse) -> Table:
    rows = {
        "documents": f"{index.documents:,}",
        "distinct SIDs": f"{index.distinct_sids:,} (p_unique {index.p_unique:.4f})",
        "largest collision": f"{index.largest_collision} documents on one SID",
        "trie": f"{index.nodes:,} nodes, depth {index.depth}, {index.regions:,} regions",
    }
    return _filled(Table(title="index", title_justify="left", show_header=False), rows)


def _level_table(index: IndexUse) -> Table:
    table = Table(title="code use", title_justify="left")
    for name in ("level", "codes", "used", "documents", "entropy (bits)", "of at most", "Gini", "largest share"):
        table.add_column(name, justify="right")
    for use in index.levels:
        numbers = (f"{use.entropy_bits:.2f}", f"{np.log2(use.size):.2f}", f"{use.gini:.3f}", f"{use.largest_share:.2%}")
        table.add_row(*map(str, (use.level, use.size, use.used, use.documents)), *numbers)
    return table


def _collision_table(index: IndexUse) -> Table:
    table = Table(title="collisions", title_justify="left")
    for name in ("documents on a SID", "SIDs", "share of documents"):
        table.add_column(name, justify="right")
    for label, count, documents in collision_rows(index.collisions):
        table.add_row(label, f"{count:,}", f"{documents / index.documents:.2%}")
    return table


def collision_rows(collisions: dict[int, int]) -> list[tuple[str, int, int]]:
    """Return (sizes, SIDs, documents) in ranges 1, 2, 3-4, 5-8, 9-16, …."""
    rows: list[tuple[str, int, int]] = []
    low = high = 1
    while low <= max(collisions, default=0):
        found = [(size, count) for size, count in collisions.items() if low <= size <= high]
        if found:
            label = str(low) if low == high else f"{low}-{high}"
            rows.append((label, sum(count for _, count in found), sum(size * count for size, count in found)))
        low, high = high + 1, high * 2
    return rows


def _code_table(index: IndexUse) -> Table:
    prefixes = list(index.codes[0].bytes_per_document)
    table = Table(title="packed codes: bytes per document, by dimensions", title_justify="left")
    for name in ("level", *map(str, prefixes), "bits", "of float32"):
        table.add_column(name, justify="right")
    for use in index.codes:
        sizes = [f"{use.bytes_per_document[dims]} B" for dims in prefixes]
        table.add_row(use.level, *sizes, f"{use.bits:,}", f"{use.float_share:.1%}")
    return table


def _file_table(inspection: Inspection) -> Table:
    table = Table(title="files", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    per_document = inspection.index.bytes_per_document if inspection.index else {}
    if per_document:
        table.add_column("per document", justify="right")
    for name, entry in sorted(inspection.manifest.files.items()):
        extra = [f"{per_document[name]:,.1f} B" if name in per_document else "-"] if per_document else []
        table.add_row(name, human_bytes(entry.bytes), *extra)
    return table


def _filled(table: Table, rows: dict[str, Any]) -> Table:
    for name, value in rows.items():
        if value != "":
            table.add_row(name, str(value))
    return table
