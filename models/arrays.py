"""Reading `.npy` files, with errors that name the file and what to give."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from models.lines import DataError


def read_array(path: Path, wanted: str, mapped: bool = False) -> NDArray[Any]:
    """Read a `.npy` file.

    Args:
        path: the file.
        wanted: what to give instead, for the error.
        mapped: leave it on the disk and read what is asked for.

    Raises:
        DataError: missing, or no array.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: no .npy array ({error}): give {wanted}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: holds an archive, not one array: give {wanted}")
    return array
