"""What the epochs of a stage share: when the optimizer moves, and which documents are no negatives."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from models.retriever.batches import Texts
from models.retriever.stages import Work, asked_for_several, ends_step, known_relevant

QUERIES = Texts([[1, 2], [3], [1, 2], [4], [1, 2]], 0)
PAIRS = [(0, 7), (1, 8), (2, 9), (3, 7), (4, 7)]


@pytest.mark.parametrize(
    ("batches", "accumulate", "moves"),
    [(4, 1, [1, 2, 3, 4]), (4, 2, [2, 4]), (5, 2, [2, 4, 5]), (3, 100, [3])],
)
def test_no_gradient_waits_for_the_next_epoch(batches: int, accumulate: int, moves: list[int]) -> None:
    assert [count for count in range(1, batches + 1) if ends_step(count, batches, accumulate)] == moves


def test_queries_of_one_text_ask_for_all_of_its_documents() -> None:
    assert asked_for_several(QUERIES, PAIRS) == {0: {7, 9}, 2: {7, 9}, 4: {7, 9}}


def test_what_a_query_asks_for_besides_is_no_negative() -> None:
    work = cast("Work", type("", (), {"relevant": asked_for_several(QUERIES, PAIRS)}))
    documents, label_B = [5, 7, 9], torch.tensor([1, 0, 2])
    known_BK = known_relevant(work, [0, 1, 2], documents, label_B)
    assert known_BK is not None
    assert known_BK.tolist() == [[False, False, True], [False] * 3, [False, True, False]]
    assert known_relevant(work, [1, 3], documents, label_B) is None


def test_documents_outside_the_batch_are_left_alone() -> None:
    work: Any = type("", (), {"relevant": {0: frozenset({7, 9})}})
    known_BK = known_relevant(work, [0], [9, 5], torch.tensor([0]))
    assert known_BK is not None
    assert known_BK.tolist() == [[False, False]]
