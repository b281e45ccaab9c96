"""The comparison of quantizers says what the quantizers themselves say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.quantizers.base import make_quantizer
from models.quantizers.compare import as_markdown, as_table, compare, plot, reduce_dims
from models.quantizers.points import VectorError
from models.quantizers.quality import measure_sids


def some_vectors(folder: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=(120, 12)).astype(np.float16)
    np.save(folder / "docs.npy", vectors)
    return folder / "docs.npy"


def test_rows_hold_the_share_of_distinct_ids_the_mean_cosine_and_the_gini_of_every_level(tmp_path: Path) -> None:
    path = some_vectors(tmp_path)
    rows = compare(path, ["rq_kmeans", "hhq", "hhq_paper"], [4], levels=[2])
    vectors = np.load(path).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in rows:
        plain = {"separation": 0.0, "revive": False} if row.system == "hhq_paper" else {}
        system = row.system.removesuffix("_paper")
        quantizer = make_quantizer({"system": system, "level_sizes": [4, 4], "seed": 0} | plain)
        quantizer.fit(vectors)
        codes = quantizer.encode(vectors)
        assert row.p_unique[0] == pytest.approx(len({tuple(c) for c in codes.tolist()}) / 120)
        rebuilt = quantizer.reconstruct(codes)
        cosines = [float(r @ v / np.linalg.norm(r)) for r, v in zip(rebuilt, vectors, strict=True)]
        assert row.cosine[0] == pytest.approx(np.mean(cosines), rel=1e-4)
        assert row.gini == tuple(level.gini for level in measure_sids(codes, (4, 4)).levels)
    assert as_table(rows).row_count == 3


def test_what_is_no_matrix_of_floats_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(10))
    with pytest.raises(VectorError, match=r"expected floats \(documents, dimensions\), got int64 \(10,\)"):
        compare(tmp_path / "x.npy", ["hhq"], [4], [2])


def test_seeds_give_deviations_and_every_size_a_row(tmp_path: Path) -> None:
    path = some_vectors(tmp_path)
    rows = compare(path, ["rq_kmeans"], [2, 4], [2, 3], seeds=[0, 1], dims=[6, 12])
    assert [(row.dims, row.codes, row.levels) for row in rows] == [
        (dims, codes, levels) for dims in (6, 12) for codes in (2, 4) for levels in (2, 3)
    ]
    assert all(len(row.p_unique) == 2 and len(row.gini) == row.levels for row in rows)
    text = as_markdown(rows)
    assert text.count("±") == 2 * len(rows)
    assert len(text.splitlines()) == len(rows) + 2
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_principal_dimensions_keep_as_much_of_the_products_as_any(tmp_path: Path) -> None:
    """Vectors that lie in a plane keep all cosines in two dimensions; the first two coordinates do not."""
    random = np.random.default_rng(3)
    plane = random.normal(size=(50, 2)) @ np.linalg.qr(random.normal(size=(8, 2)))[0].T
    vectors = (plane / np.linalg.norm(plane, axis=1, keepdims=True)).astype(np.float32)
    kept = reduce_dims(vectors, 2)
    np.testing.assert_allclose(kept @ kept.T, vectors @ vectors.T, atol=1e-5)
    with pytest.raises(VectorError, match="9 dimensions asked of vectors with 8"):
        reduce_dims(vectors, 9)
