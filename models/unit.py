"""Rows of unit length."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unit_rows(vectors_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Scale every row to length 1, (N, D) float32; a row of zeros stays one."""
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    unit_ND: NDArray[np.float32] = (vectors_ND / np.maximum(lengths_N1, 1e-30)).astype(np.float32)
    return unit_ND
