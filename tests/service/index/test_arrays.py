"""Arrays on the disk: the format that numpy reads, and a disk that is full at any byte."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.index.arrays import write_array, write_blocks

DTYPES = st.sampled_from([np.dtype(name) for name in ("<f4", ">f4", "<u8", "<u2", "<i4", "|i1")])


@given(array=arrays.arrays(DTYPES, arrays.array_shapes(max_dims=3, min_side=0), elements=st.integers(0, 100)))
def test_numpy_reads_what_was_written(array: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("arrays") / "a.npy"
    write_array(file, array)
    for read in (np.load(file, allow_pickle=False), np.asarray(np.load(file, mmap_mode="r" if array.size else None))):
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype.newbyteorder("<")


@given(cuts=st.lists(st.integers(0, 9), max_size=4))
def test_blocks_make_one_array(cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = np.arange(27, dtype=np.int64).reshape(9, 3)
    file = tmp_path_factory.mktemp("arrays") / "a.npy"
    write_blocks(file, whole.shape, np.dtype(np.uint16), np.split(whole, sorted(cuts)))
    np.testing.assert_array_equal(np.load(file, allow_pickle=False), whole)


LIMITED = """
    import errno, resource, signal, sys
    from pathlib import Path
    import numpy as np
    from service.index.arrays import write_array
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    for floats in (4064, *range(4065, 4100), 5000, 8192, 20000):
        try:
            write_array(Path(sys.argv[1]), np.zeros(floats, np.float32))
            fits = True
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            fits = False
        assert fits == (128 + 4 * floats <= 16384), floats
    print("done")
"""


def test_a_file_that_does_not_fit_is_an_error_at_every_size(tmp_path: Path) -> None:
    """Files may not grow past 16 KiB, which looks to the writer like a disk that fills up there."""
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "a.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout == "done\n"
