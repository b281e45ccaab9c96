"""Tables of the study, in markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.qama.measure import Score
from service.model.layout import CodeLayout, code_layout

LEVEL_TITLES = {"float": "FP32", "2": "2 bit", "hybrid": "hybrid", "1.5": "1.5 bit", "1": "1 bit", "0.5": "0.5 bit"}
TARGETS = {"2": 0.98, "hybrid": 0.97, "1.5": 0.96, "1": 0.91}
RESCORED_TARGET = 0.995
ABLATION_LEVELS = ("1", "1.5", "hybrid", "2", "float")
STORED_DIMS = (384, 768)
QUANTISATION_NOTE = "What quantisation alone costs, as a share of the floats of the same adapter."
OURS = """\
From the paper: the FFN and its sliced prefixes (eq. 4-7), quantile thresholds with a moving average (eq. 1-2), the \
levels and the hybrid quarters (eq. 3, 20), every loss (eq. 9-19) with a weight per prefix (eq. 8), the codebooks \
(eq. 22-23). `models/recipes/qama_paper.toml` trains as the paper does.

Ours, in `models/recipes/qama.toml`:

- **Rotation start.** GELU(u) - GELU(-u) = u, so pairs of hidden units can hold an exact rotation. Training starts \
from the one that balances the bits (ITQ) instead of from noise, and twice the width is enough instead of 32 times.
- **Codes in the losses.** Similarities of the codes themselves enter eq. 9-14 through a straight-through gradient, \
stretched to the mean and spread of the cosines; the paper trains floats and keeps them off the thresholds (eq. 18).
- **Neighbourhood batches.** Documents of a batch come from neighbourhoods, where ranking is decided.
- **No relevant negatives.** Other documents that the train pairs hold relevant to a query, which a neighbourhood \
brings in, are left out of the denominator of eq. 14.
- **Settled thresholds.** At the end thresholds are the quantiles of all documents (eq. 1), not of the last batches.
- **The sign of eq. 13.** As printed it grows with agreement; it is used as 1 minus the share that agrees.
- **Hybrid prefixes.** Quarters are those of the full width, so a prefix of a hybrid code is the code of the prefix; \
at half the width and below it is as fine as 2 and 1.5 bit."""


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        command: what was run.
        prefixes: Matryoshka dimensions.
        fp32: set → nDCG@10 of exact cosine search over the original vectors.
        floats: set → format (FP16, Int8) → nDCG@10.
        left_out: set → train queries that were left out because they have the text of a test query.
        cells: variant → set → scores of each seed.
        titles: variant → its name in tables.
    """

    command: str
    prefixes: tuple[int, ...]
    fp32: dict[str, float]
    floats: dict[str, dict[str, float]]
    left_out: dict[str, int]
    cells: dict[str, dict[str, list[list[Score]]]]
    titles: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cells = {
            variant: {name: [[s._asdict() for s in scores] for scores in seeds] for name, seeds in sets.items()}
            for variant, sets in self.cells.items()
        }
        known = {"command": self.command, "fp32": self.fp32, "floats": self.floats, "left_out": self.left_out}
        return {**known, "cells": cells}

    def values(self, variant: str, name: str, level: str, dims: int, rescored: bool = False) -> list[float]:
        """NDCG@10 of every seed."""
        scores = [s for seed in self.cells[variant][name] for s in seed if (s.level, s.dims) == (level, dims)]
        return [s.rescored if rescored and s.rescored is not None else s.ndcg for s in scores]

    def shares(self, variant: str, name: str, level: str, dims: int, rescored: bool = False) -> list[float]:
        """NDCG@10 of every seed as a share of FP32 search over the original vectors."""
        return [value / self.fp32[name] for value in self.values(variant, name, level, dims, rescored)]

    def mean_share(self, variant: str, level: str, dims: int, rescored: bool = False) -> list[float]:
        """Share of every seed, averaged over the sets."""
        by_set = [self.shares(variant, name, level, dims, rescored) for name in self.fp32]
        return [float(np.mean(seed)) for seed in zip(*by_set, strict=True)]


def level_curve(results: Results, level: str) -> list[tuple[int, float]]:
    """(bytes, mean share) of a level at every prefix, of the recipe."""
    seed = next(iter(results.cells["qama"].values()))[0]
    sizes = {s.dims: s.bytes for s in seed if s.level == level}
    return [(sizes[d], float(np.mean(results.mean_share("qama", level, d)))) for d in results.prefixes if d in sizes]


def render(results: Results, plot: str = "quality.png") -> str:
    """All tables as one markdown page."""
    parts = [
        "# QAMA: multi-level binary codes",
        f"Made by `{results.command}`; the data sets stand in [results.md](../results.md).",
        _how(results),
        "## Share of FP32 at full width",
        _headline(results),
        QUANTISATION_NOTE,
        _quantisation(results),
        f"![quality against bytes]({plot})",
        "## Dimensions and levels",
        *(_dimensions(results, name) for name in results.fp32),
        "## Storage",
        _storage(results),
        "## What is the paper's and what is ours",
        OURS,
    ]
    ablation = [variant for variant in results.cells if variant not in ("qama", "documents", "thresholds")]
    if ablation:
        parts += ["## Ablation", _ablation_note(), *(_ablation(results, ablation, d) for d in _ablation_dims(results))]
    return "\n\n".join(parts) + "\n"


def _how(results: Results) -> str:
    seeds = len(next(iter(results.cells["qama"].values())))
    sets = ", ".join(f"{name} {value:.4f}" for name, value in results.fp32.items())
    left_out = ", ".join(f"{name} {count}" for name, count in results.left_out.items())
    return (
        "Vectors: all-MiniLM-L6-v2, 384 dimensions, not tuned. 100 % is the nDCG@10 of exact cosine search over these "
        f"vectors on the test queries ({sets}). An adapter is trained for each set on its documents and its train "
        "queries with their documents; `documents only` sees no query and no judgement. No adapter sees a test "
        f"query: train queries that have the text of one are left out ({left_out}). "
        f"Mean ± population standard deviation of {seeds} seed{'s' if seeds > 1 else ''}. Train queries teach the "
        "adapter the task as well, which is why floats of the adapter (FP32 columns) can pass 100 %: the loss to "
        "quantisation alone is the distance between a level and the FP32 column of the same row."
    )


def _headline(results: Results) -> str:
    rows = []
    full = results.prefixes[-1]
    for variant in ("thresholds", "documents", "qama"):
        for level in ("2", "hybrid", "1.5", "1", "0.5", "float"):
            if level == "float" and variant == "thresholds":
                continue
            cells = [_percent(results.shares(variant, name, level, full)) for name in results.fp32]
            mean = _percent(results.mean_share(variant, level, full))
            target = f"{100 * TARGETS[level]:.0f} %" if level in TARGETS else ""
            rows.append([results.titles[variant], LEVEL_TITLES[level], *cells, mean, target])
        cells = [_percent(results.shares(variant, name, "1", full, rescored=True)) for name in results.fp32]
        mean = _percent(results.mean_share(variant, "1", full, rescored=True))
        title = "1 bit, 40 candidates rescored"
        rows.append([results.titles[variant], title, *cells, mean, f"{100 * RESCORED_TARGET:.1f} %"])
    return _table(["", "level", *results.fp32, "mean", "to reach"], rows)


def _quantisation(results: Results) -> str:
    """The recipe's levels as a share of the same adapter's floats."""
    full = results.prefixes[-1]
    rows = []
    for level in ("2", "hybrid", "1.5", "1", "0.5"):
        by_set = []
        for name in results.fp32:
            pairs = (results.values("qama", name, x, full) for x in (level, "float"))
            by_set.append([code / own for code, own in zip(*pairs, strict=True)])
        mean = [float(np.mean(seed)) for seed in zip(*by_set, strict=True)]
        rows.append([LEVEL_TITLES[level], *(_percent(shares) for shares in by_set), _percent(mean)])
    return _table(["level", *results.fp32, "mean"], rows)


def _dimensions(results: Results, name: str) -> str:
    rows = []
    for dims in reversed(results.prefixes):
        cells = []
        for level in ("1", "1.5", "hybrid", "2", "float"):
            value = float(np.mean(results.values("qama", name, level, dims)))
            cells.append(f"{value:.4f} ({100 * value / results.fp32[name]:.1f})")
        rescored = float(np.mean(results.shares("qama", name, "1", dims, rescored=True)))
        untuned = float(np.mean(results.values("thresholds", name, "2", dims)))
        rows.append([str(dims), *cells, f"{100 * rescored:.1f}", f"{untuned:.4f}"])
    heads = ["dimensions", "1 bit", "1.5 bit", "hybrid", "2 bit", "FP32", "1 bit rescored, %", "untuned 2 bit"]
    return f"### {name}\n\nnDCG@10 (percent of FP32 at 384, original vectors).\n\n" + _table(heads, rows)


def _storage(results: Results) -> str:
    full = results.prefixes[-1]
    rows = [["FP32", "32", *_sizes([4 * d for d in STORED_DIMS]), "0.0", "100.0"]]
    for title, size in (("FP16", 2), ("Int8", 1)):
        share = float(np.mean([results.floats[name][title] / results.fp32[name] for name in results.fp32]))
        sizes = _sizes([size * d for d in STORED_DIMS])
        rows.append([title, str(8 * size), *sizes, f"{100 - 25 * size:.1f}", f"{100 * share:.1f}"])
    for level in ("2", "1.5", "hybrid", "1", "0.5"):
        layouts = [_stored_layout(level, results.prefixes, d) for d in STORED_DIMS]
        code_bytes = [8 * layout.words for layout in layouts]
        bits = layouts[0].bits / layouts[0].dims
        share = float(np.mean(results.mean_share("qama", level, full)))
        saved = 100 * (1 - code_bytes[0] / (4 * STORED_DIMS[0]))
        rows.append([LEVEL_TITLES[level], f"{bits:g}", *_sizes(code_bytes), f"{saved:.1f}", f"{100 * share:.1f}"])
    heads = ["format", "bits a dimension"]
    heads += [text for d in STORED_DIMS for text in (f"bytes at {d}", f"1 M documents at {d}")]
    prefixes = ", ".join(map(str, results.prefixes))
    note = (
        "Bits are those of the code; bytes are those that are served, where the dimensions that each prefix "
        f"({prefixes}, and the full width) adds start on a word of 64 bits."
    )
    return _table([*heads, "saved, %", "share of FP32, %"], rows) + f"\n\n{note}"


def _stored_layout(level: str, prefixes: tuple[int, ...], dims: int) -> CodeLayout:
    """Layout of served codes of the recipe's prefixes, the last of them or a further one being the full width."""
    return code_layout(level, (*(prefix for prefix in prefixes if prefix < dims), dims))


def _sizes(sizes: list[int]) -> list[str]:
    return [text for size in sizes for text in (str(size), f"{size} MB")]


def _ablation_note() -> str:
    return (
        "Mean nDCG@10 of the sets and seeds. Rows add up. The first seven are the paper's, trained as the paper "
        "trains (random start, losses on float prefixes, random batches) with the recipe's steps and train queries; "
        'but settled thresholds (`settle`), values times √D (`value_scale = "root_d"`), an FFN of twice the width '
        "(`expansion = 2`, the paper's is 32) and cosine decay are the recipe's in these rows too, and ours. The last "
        "three rows are ours. Regularisers without a weight in the recipe are taken out again by its last row."
    )


def _ablation_dims(results: Results) -> list[int]:
    return [dims for dims in (384, 192, 96) if dims in results.prefixes] or [results.prefixes[-1]]


def _ablation(results: Results, rows: list[str], dims: int) -> str:
    lines = []
    for variant in ("thresholds", *rows, "qama"):
        cells = []
        for level in ABLATION_LEVELS:
            by_set = [results.values(variant, name, level, dims) for name in results.fp32]
            cells.append(f"{np.mean(by_set):.4f}")
        lines.append([results.titles[variant], *cells])
    heads = ["", *(LEVEL_TITLES[level] for level in ABLATION_LEVELS)]
    return f"### {dims} dimensions\n\n" + _table(heads, lines)


def _percent(shares: list[float]) -> str:
    spread = f" ± {100 * np.std(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * np.mean(shares):.1f}{spread}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
