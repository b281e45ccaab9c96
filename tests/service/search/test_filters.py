"""The rank directory against a plain sum over booleans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.search.filters import DocumentFilter


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), documents=st.integers(0, 300), share=st.sampled_from([0.0, 0.03, 0.5, 1.0]))
@example(seed=0, documents=64, share=0.5)
@example(seed=0, documents=128, share=1.0)
def test_counts_equal_a_plain_sum(seed: int, documents: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(documents) < share
    built = DocumentFilter.from_mask(mask)
    assert len(built.words_W) == len(built.ranks_W) > documents // 64, "a range may end in the word of document N"
    for lo, hi in rng.integers(0, documents + 1, (20, 2)):
        lo, hi = min(lo, hi), max(lo, hi)
        assert built.count(int(lo), int(hi)) == int(mask[lo:hi].sum())
    assert built.count(0, documents) == int(mask.sum())
    assert [built.count(place, place + 1) for place in range(documents)] == mask.tolist()


def test_positions_may_repeat_and_come_in_any_order() -> None:
    built = DocumentFilter.from_positions([70, 3, 3, 64], 128)
    assert [p for p in range(128) if built.count(p, p + 1)] == [3, 64, 70]
    assert DocumentFilter.from_positions([], 5).count(0, 5) == 0


@pytest.mark.parametrize(
    ("positions", "message"), [([5], "there are 5 documents"), ([-1], "from -1"), ([0.5], "integers")]
)
def test_positions_outside_the_index_are_refused(positions: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentFilter.from_positions(positions, 5)


def test_masks_and_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="one boolean per document"):
        DocumentFilter.from_mask(np.zeros(4, np.int64))  # type: ignore[arg-type]
    built = DocumentFilter.from_mask(np.ones(4, np.bool_))
    with pytest.raises(ValueError, match=r"\[2, 5\)"):
        built.count(2, 5)
