"""The two limits of a Hamming scan on this machine: reading memory, and counting bits in the first-level cache.

One query compares each word once, so it cannot be faster than memory is read. Many queries compare a word that is in
the cache again and again, so they cannot be faster than load, xor, popcount and add.
"""

# ruff: noqa: ARG001 (an intrinsic takes numba types for its arguments; its code generator gets their values)

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from service.search.popcount import I32, I64, LANES, V8, add_to, broadcast, load_vectors, popcount_lanes

Words = npt.NDArray[np.uint64]
CACHE_WORDS = 2048  # 16 KB
LINE_BYTES = 64  # of the cache; the codes of a bundle begin on one, as mapped .npy files do
ACCUMULATORS = 8
_TURN = LANES * ACCUMULATORS  # words of one turn of the loop
_READ_BYTES = 1 << 25
_CACHE_PASSES = 4_000  # a millisecond at 65 GB/s
_TRIES = 5  # the best of them counts: whatever disturbs the loop makes it slower


def _reduce(builder: Any, slots: list[Any]) -> Any:
    """Sum all lanes of all accumulators, so that no work can be optimised away."""
    total = builder.load(slots[0])
    for slot in slots[1:]:
        total = builder.add(total, builder.load(slot))
    result = builder.extract_element(total, I32(0))
    for lane in range(1, LANES):
        result = builder.add(result, builder.extract_element(total, I32(lane)))
    return result


def _summing(combine: Callable[[Any, Any, Any], Any]) -> Any:
    """Make an intrinsic that sums combine(builder, vector, query) over the vectors of an array, pass after pass.

    The query of a pass is its number. Lanes are added up once, behind all passes: a peak has no work but its own.
    """

    @intrinsic
    def sum_vectors(_: Any, codes: Any, passes: Any) -> Any:
        """Sum over a C-contiguous uint64 array of a multiple of 64 words, `passes` times."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            turns = builder.udiv(array.nitems, I64(_TURN))
            slots = [cgutils.alloca_once_value(builder, ir.Constant(V8, None)) for _ in range(ACCUMULATORS)]
            for slot in slots:
                builder.store(ir.Constant(V8, None), slot)
            with cgutils.for_range(builder, arguments[1]) as each_pass:
                query = broadcast(builder, each_pass.index)
                with cgutils.for_range(builder, turns) as loop:
                    start = builder.gep(array.data, [builder.mul(loop.index, I64(_TURN))])
                    for slot, vector in zip(slots, load_vectors(builder, start, ACCUMULATORS), strict=True):
                        add_to(builder, slot, combine(builder, vector, query))
            return _reduce(builder, slots)

        return types.uint64(codes, types.int64), codegen

    return sum_vectors


_sum_words = _summing(lambda _builder, vector, _query: vector)
_sum_differing_bits = _summing(lambda builder, vector, query: popcount_lanes(builder, builder.xor(vector, query)))


@njit(nogil=True)
def read_all(words: Words) -> int:
    """Sum an array of a multiple of 64 words: as little work as reading needs."""
    total: int = _sum_words(words, 1)
    return total


@njit(nogil=True)
def count_all(words: Words, passes: int) -> int:
    """Count the bits in which a multiple of 64 words differ from the queries 0, 1 … `passes` - 1."""
    total: int = _sum_differing_bits(words, passes)
    return total


def read_bandwidth(codes_GWV: Words) -> float:
    """Bytes a second at which one core reads these codes, memory map and all; small ones come from the caches."""
    flat = codes_GWV.reshape(-1)
    flat = flat[: len(flat) // _TURN * _TURN]
    passes = 1 + _READ_BYTES // flat.nbytes
    started = time.perf_counter()
    for _ in range(passes):
        read_all(flat)
    return flat.nbytes * passes / (time.perf_counter() - started)


def popcount_peak() -> float:
    """Bytes a second that one core xors with a query and counts, out of the first-level cache."""
    words = aligned_words(CACHE_WORDS)
    return words.nbytes * _CACHE_PASSES / min(_seconds(words) for _ in range(_TRIES))


def _seconds(words: Words) -> float:
    started = time.perf_counter()
    count_all(words, _CACHE_PASSES)
    return time.perf_counter() - started


def aligned_words(count: int) -> Words:
    """Return 0, 1 … count - 1 (count,) uint64 from the beginning of a cache line on."""
    spare = np.empty(count + LINE_BYTES // 8, np.uint64)
    first = -spare.ctypes.data % LINE_BYTES // 8
    words = spare[first : first + count]
    words[:] = np.arange(count)
    return words


def warm_up() -> None:
    """Compile both loops."""
    words = np.zeros(CACHE_WORDS, np.uint64)
    words.flags.writeable = False
    read_all(words)
    count_all(np.zeros(CACHE_WORDS, np.uint64), 1)
