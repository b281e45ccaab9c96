"""The term that keeps neighbours apart, against its definition in plain loops."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.quantizers.hhq import HHQ, HHQSettings
from models.quantizers.points import Points
from models.quantizers.separation import TEMPERATURE, Separation


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_loss_is_the_mutual_information_of_document_and_code() -> None:
    """I = Σ p(k|d) log(p(k|d) / p(k)) / n, per cell, over log min(n, K)."""
    x, codebook, cell = unit_rows(9, 6, 0), unit_rows(5, 6, 1), [0, 0, 1, 1, 1, 2, 3, 3, 3]
    approximation = unit_rows(4, 6, 2)[torch.tensor(cell)]
    shares = []
    for number in (0, 1, 3):  # cell 2 holds one document
        members = [row for row in range(9) if cell[row] == number]
        gains = [[-2 * float(approximation[r] @ v) * float(x[r] @ v) / TEMPERATURE for v in codebook] for r in members]
        p = [[math.exp(g - max(row)) / sum(math.exp(h - max(row)) for h in row) for g in row] for row in gains]
        n = len(members)
        mean = [sum(row[k] for row in p) / n for k in range(5)]
        information = sum(row[k] * math.log(row[k] / mean[k]) for row in p for k in range(5) if row[k] > 1e-30) / n
        shares.append(information / math.log(min(n, 5)))
    loss = Separation.loss(approximation, x, codebook, torch.tensor(cell))
    assert float(loss) == pytest.approx(-sum(shares) / 3, abs=1e-5)


def test_the_loss_and_its_slope_stay_finite_where_codes_are_out_of_reach() -> None:
    codebook = unit_rows(50, 6, 1).requires_grad_()
    x = unit_rows(4, 6, 0)
    loss = Separation.loss(unit_rows(1, 6, 2).expand(4, 6), x, codebook, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert codebook.grad is not None
    assert torch.isfinite(codebook.grad).all()
    assert -1 <= float(loss.detach()) < 0


def test_cells_are_the_documents_that_share_all_codes_but_the_last(vectors: NDArray[np.float32]) -> None:
    prefixes = torch.randint(0, 6, (600, 2), generator=torch.Generator().manual_seed(0))
    expected = defaultdict(set)
    for row, prefix in enumerate(prefixes.tolist()):
        expected[tuple(prefix)].add(vectors[row].tobytes())
    expected = {prefix: rows for prefix, rows in expected.items() if len(rows) > 1}
    separation = Separation(Points(vectors), 600, torch.Generator().manual_seed(1))
    separation.start_epoch(prefixes)
    x, codes, cell = separation.next_cells()
    found = defaultdict(set)
    for row, prefix, number in zip(x.numpy(), codes.tolist(), cell.tolist(), strict=True):
        found[number, *prefix].add(row.tobytes())
    assert {key[1:]: rows for key, rows in found.items()} == expected
    assert len({key[0] for key in found}) == len(expected)


def test_every_crowded_document_is_handed_out_once_an_epoch(vectors: NDArray[np.float32]) -> None:
    separation = Separation(Points(vectors), 70, torch.Generator())
    separation.start_epoch(torch.arange(600)[:, None] // 3)
    handed = [row.tobytes() for _ in range(9) for row in separation.next_cells()[0].numpy()]
    assert sorted(handed) == sorted(row.tobytes() for row in vectors)
    separation.start_epoch(torch.arange(600)[:, None])  # every document alone
    assert len(separation.next_cells()[0]) == 0


def test_training_with_separation_gives_more_distinct_identifiers(vectors: NDArray[np.float32]) -> None:
    """Codes are few here, so that many documents collide; the mean cosine pays little."""
    distinct, cosine = {}, {}
    for weight in (0.0, 0.1):
        hhq = HHQ(HHQSettings(level_sizes=(8, 8, 8), epochs=30, separation=weight))
        cosine[weight] = hhq.fit(vectors, progress=False).objective[-1]
        distinct[weight] = len(np.unique(hhq.encode(vectors), axis=0))
    assert distinct[0.1] > 1.1 * distinct[0.0]
    assert cosine[0.1] > cosine[0.0] - 0.08
