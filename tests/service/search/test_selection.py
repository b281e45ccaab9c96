"""The bounded heap against Python's sort."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.search.selection import new_best, offer, sort_best

ROW = st.tuples(st.integers(0, 4), st.integers(0, 3))


@settings(max_examples=200)
@given(rows=st.lists(ROW, max_size=60), capacity=st.integers(1, 20), seed=st.integers(0, 999))
def test_best_rows_come_out_sorted_whatever_the_order_of_arrival(
    rows: list[tuple[int, int]], capacity: int, seed: int
) -> None:
    best, size = new_best(capacity), 0
    for number in np.random.default_rng(seed).permutation(len(rows)):
        primary, secondary = rows[number]
        size = offer(best, size, float(primary), float(secondary), int(number), int(number) + 100)
    sort_best(best, size)
    expected = sorted(range(len(rows)), key=lambda n: (-rows[n][0], -rows[n][1], n))[:capacity]
    assert best.number[:size].tolist() == expected
    assert best.origin[:size].tolist() == [number + 100 for number in expected]
    assert best.primary[:size].tolist() == [rows[number][0] for number in expected]
