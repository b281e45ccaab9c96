"""The comparison of quantizers says what the quantizers themselves say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.quantizers.base import make_quantizer
from models.quantizers.compare import as_table, compare
from models.quantizers.points import VectorError


def some_vectors(folder: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=(120, 12)).astype(np.float16)
    np.save(folder / "docs.npy", vectors)
    return folder / "docs.npy"


def test_rows_hold_the_share_of_distinct_ids_and_the_mean_cosine(tmp_path: Path) -> None:
    path = some_vectors(tmp_path)
    rows = compare(path, ["rq_kmeans", "hhq"], [4], levels=2)
    vectors = np.load(path).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in rows:
        quantizer = make_quantizer({"system": row.system, "level_sizes": [4, 4], "seed": 0})
        quantizer.fit(vectors)
        codes = quantizer.encode(vectors)
        assert row.p_unique == pytest.approx(len({tuple(c) for c in codes.tolist()}) / 120)
        rebuilt = quantizer.reconstruct(codes)
        cosines = [float(r @ v / np.linalg.norm(r)) for r, v in zip(rebuilt, vectors, strict=True)]
        assert row.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert as_table(rows).row_count == 2


def test_what_is_no_matrix_of_floats_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(10))
    with pytest.raises(VectorError, match=r"expected floats \(documents, dimensions\), got int64 \(10,\)"):
        compare(tmp_path / "x.npy", ["hhq"], [4], 2)
