"""The best K of a stream: a bounded heap whose order is total, so that no result depends on the order of arrival.

Legend: K capacity.

Better is the larger primary, then the larger secondary, then the smaller number. The root holds the worst that is kept:
most candidates of a long stream cost one comparison, and nothing but the K best is ever stored.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.search.kernel import KERNEL


class Best(NamedTuple):
    """Four columns of a bounded heap; how many rows are in use is kept by the caller.

    Attributes:
        primary: (K,) float64.
        secondary: (K,) float64.
        number: (K,) int64, what is selected.
        origin: (K,) int64, the beam that it came from.
    """

    primary: NDArray[np.float64]
    secondary: NDArray[np.float64]
    number: NDArray[np.int64]
    origin: NDArray[np.int64]


def new_best(capacity: int) -> Best:
    """Return an empty heap for the `capacity` best."""
    return Best(*np.empty((2, capacity)), *np.empty((2, capacity), np.int64))


@njit(**KERNEL, inline="always")
def _is_worse(best: Best, row: int, primary: float, secondary: float, number: int) -> bool:
    """Say whether a row of the heap is worse than a candidate."""
    if best.primary[row] != primary:
        return bool(best.primary[row] < primary)
    if best.secondary[row] != secondary:
        return bool(best.secondary[row] < secondary)
    return bool(best.number[row] > number)


@njit(**KERNEL, inline="always")
def _move(best: Best, source: int, target: int) -> None:
    """Copy a row."""
    best.primary[target] = best.primary[source]
    best.secondary[target] = best.secondary[source]
    best.number[target] = best.number[source]
    best.origin[target] = best.origin[source]


@njit(**KERNEL, inline="always")
def _put(best: Best, row: int, primary: float, secondary: float, number: int, origin: int) -> None:
    """Write a row."""
    best.primary[row] = primary
    best.secondary[row] = secondary
    best.number[row] = number
    best.origin[row] = origin


@njit(**KERNEL)
def _sift_down(best: Best, size: int, primary: float, secondary: float, number: int, origin: int) -> None:
    """Put a candidate at the root and let it sink below everything worse."""
    row = 0
    while True:
        child = 2 * row + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _is_worse(best, right, best.primary[child], best.secondary[child], best.number[child]):
            child = right
        if not _is_worse(best, child, primary, secondary, number):
            break
        _move(best, child, row)
        row = child
    _put(best, row, primary, secondary, number, origin)


@njit(**KERNEL)
def offer(best: Best, size: int, primary: float, secondary: float, number: int, origin: int) -> int:
    """Keep a candidate if it is among the best; returns the rows now in use."""
    if size == len(best.primary):
        if _is_worse(best, 0, primary, secondary, number):
            _sift_down(best, size, primary, secondary, number, origin)
        return size
    row = size
    while row > 0:
        parent = (row - 1) // 2
        if _is_worse(best, parent, primary, secondary, number):
            break
        _move(best, parent, row)
        row = parent
    _put(best, row, primary, secondary, number, origin)
    return size + 1


@njit(**KERNEL)
def sort_best(best: Best, size: int) -> None:
    """Sort the rows in use, best first; the heap is a heap no more."""
    for last in range(size - 1, 0, -1):
        primary, secondary = best.primary[last], best.secondary[last]
        number, origin = best.number[last], best.origin[last]
        _move(best, 0, last)
        _sift_down(best, last, primary, secondary, number, origin)
