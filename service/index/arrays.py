"""Writing `.npy` files block by block, so that a full disk is an error and never a file that is a little too short.

`numpy.save` writes through C's buffered streams and does not look at what their last flush says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_array(file: Path, array: NDArray[Any]) -> None:
    """Write an array; raises OSError, with the system's number, when it does not fit on the disk."""
    write_blocks(file, array.shape, array.dtype, [array])


def write_blocks(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[NDArray[Any]]) -> None:
    """Write an array that never is in memory whole.

    Args:
        file: the `.npy` file, format 1.0, C order, little-endian.
        shape: of the whole array.
        dtype: of the whole array; blocks are cast to it.
        blocks: its rows in order, some at a time.

    Raises:
        OSError: as `write_array`.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": shape}
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, stored).reshape(-1).view(np.uint8).data)
