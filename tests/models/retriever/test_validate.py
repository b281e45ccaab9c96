"""What held-out queries decide about guided scoring: the weight of cosine, and how much the decoder says beside it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.retriever import validate


@pytest.mark.parametrize("weight", [4.0, 20.0, 90.0])
def test_the_likeliest_weight_is_the_one_that_drew_the_documents(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_QN = torch.rand((20_000, 30), generator=generator)
    target_Q = torch.multinomial(torch.softmax(weight * scores_QN, dim=1), 1, generator=generator)[:, 0]
    monkeypatch.setattr(validate, "exact_scores", lambda *_: (scores_QN, target_Q))
    found = validate.likeliest_weight(None, [])  # type: ignore[arg-type]  # only exact_scores reads them
    assert abs(math.log2(found / weight)) <= 1 / 8, "to a step of the list"


@pytest.mark.parametrize(("best", "beside", "weight"), [(0.3, 0.9, 32.0), (1.0, 3.0, 32.0), (8.0, 3.0, 4.0)])
def test_calibration_turns_down_what_is_to_count_less(
    best: float, beside: float, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out queries find most where decoder and geometry stand as `best` says; neither becomes surer than it was."""
    retriever = SimpleNamespace(log_beside=torch.tensor([3.0, 3.0]).log(), log_weight=torch.tensor(32.0).log())

    def walked(work: Any, *_: Any) -> Any:
        ratio = float(work.retriever.log_beside[0] - work.retriever.log_weight) - math.log(3.0 / 32.0)
        return np.full(4, 1 + round(20 * abs(ratio - math.log(best))))

    monkeypatch.setattr(validate, "walked_ranks", walked)
    share, gain = validate.calibrate(SimpleNamespace(retriever=retriever), [])  # type: ignore[arg-type]
    assert (share, gain) == (best, 1.0)
    assert retriever.log_beside.exp().tolist() == pytest.approx([beside, beside])
    assert float(retriever.log_weight.exp()) == pytest.approx(weight)


def test_where_all_shares_find_as_much_nothing_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = SimpleNamespace(log_beside=torch.tensor([3.0]).log(), log_weight=torch.tensor(32.0).log())
    monkeypatch.setattr(validate, "walked_ranks", lambda *_: np.array([1, 2]))
    assert validate.calibrate(SimpleNamespace(retriever=retriever), []) == (1.0, 0.75)  # type: ignore[arg-type]
    assert [float(retriever.log_beside.exp()), float(retriever.log_weight.exp())] == pytest.approx([3.0, 32.0])
