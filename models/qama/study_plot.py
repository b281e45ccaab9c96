"""The plot of the study: quality against bytes a document."""

from __future__ import annotations

from pathlib import Path

from models.qama.study_report import LEVEL_TITLES, Results, level_curve


def plot_quality(results: Results, path: Path) -> None:
    """Draw the share of FP32 nDCG@10 (mean of the sets) over bytes a document, one line a level."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for level, title in LEVEL_TITLES.items():
        points = level_curve(results, level)
        if points:
            sizes, shares = zip(*points, strict=True)
            axes.plot(sizes, [100 * share for share in shares], marker="o", label=title)
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes a document")
    axes.set_ylabel("share of FP32 nDCG@10, %")
    axes.set_title("QAMA: quality against memory, mean of " + ", ".join(results.fp32))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
