"""Vector instructions of the Hamming scan, emitted as LLVM IR because numba has no words for them.

Shapes: W words, V = 32 documents of a block, held as 4 vectors of 8 × 64 bit.

`llvm.ctpop.v8i64` becomes one VPOPCNTQ where the processor has AVX-512 VPOPCNTDQ, and a table look-up by shuffles on
older ones: same source, same answers. The kernels that call these trust their arguments; `hamming.py` checks them.
"""

# ruff: noqa: ARG001 (an intrinsic takes numba types for its arguments; its code generator gets their values)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
VECTORS = 4  # of one block: four accumulators hide the latency of the additions
UNROLL = 4  # words a turn of the loop; the rest has a loop of its own
I32 = ir.IntType(32)
I64 = ir.IntType(64)
V8 = ir.VectorType(I64, LANES)


def broadcast(builder: Any, scalar: Any) -> Any:
    """Copy a 64-bit scalar into all lanes."""
    one = builder.insert_element(ir.Constant(V8, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(V8, ir.Undefined), zeros)


def popcount_lanes(builder: Any, vector: Any) -> Any:
    """Set bits of each 64-bit lane."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(V8, [V8]), "llvm.ctpop.v8i64")
    return builder.call(function, [vector])


def load_vectors(builder: Any, pointer: Any, count: int) -> list[Any]:
    """Load `count` neighbouring vectors; maps promise 8-byte alignment only."""
    vectors = builder.bitcast(pointer, V8.as_pointer())
    return [builder.load(builder.gep(vectors, [I64(j)]), align=8) for j in range(count)]


def add_to(builder: Any, slot: Any, vector: Any) -> None:
    """Add a vector to the one on the stack; the optimiser keeps such slots in registers."""
    builder.store(builder.add(builder.load(slot), vector), slot)


def _add_word(builder: Any, block: Any, queries: list[Any], word: Any, sums: list[list[Any]]) -> None:
    """Add the differing bits of one word of 32 documents to each query's sums; the documents are loaded once."""
    documents = load_vectors(builder, builder.gep(block, [builder.mul(word, I64(LANES * VECTORS))]), VECTORS)
    for query, slots in zip(queries, sums, strict=True):
        bits = broadcast(builder, builder.load(builder.gep(query, [word])))
        for document, slot in zip(documents, slots, strict=True):
            add_to(builder, slot, popcount_lanes(builder, builder.xor(document, bits)))


def _add_all_words(builder: Any, block: Any, queries: list[Any], words: Any) -> list[list[Any]]:
    """Sum over all words, four a turn and then the remaining W mod 4 one by one."""
    zero = ir.Constant(V8, None)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(VECTORS)] for _ in queries]
    for slots in sums:
        for slot in slots:
            builder.store(zero, slot)
    turns = builder.udiv(words, I64(UNROLL))
    with cgutils.for_range(builder, turns) as loop:
        first = builder.mul(loop.index, I64(UNROLL))
        for step in range(UNROLL):
            _add_word(builder, block, queries, builder.add(first, I64(step)), sums)
    with cgutils.for_range(builder, words, start=builder.mul(turns, I64(UNROLL))) as loop:
        _add_word(builder, block, queries, loop.index, sums)
    return sums


def _below(builder: Any, slots: list[Any], limit: Any) -> Any:
    """Bit d of the result says that document d of the block is nearer than the threshold."""
    mask = I32(0)
    for j, slot in enumerate(slots):
        compared = builder.icmp_unsigned("<", builder.load(slot), limit)
        byte = builder.zext(builder.bitcast(compared, ir.IntType(LANES)), I32)
        mask = builder.or_(mask, builder.shl(byte, I32(LANES * j)))
    return mask


def _any_below(builder: Any, sums: list[list[Any]], limits: list[Any]) -> Any:
    """Non-zero where any document is nearer than its threshold: one comparison a query, of its lanes' minima."""
    found = ir.Constant(ir.VectorType(ir.IntType(1), LANES), None)
    for slots, limit in zip(sums, limits, strict=True):
        least = builder.load(slots[0])
        for slot in slots[1:]:
            other = builder.load(slot)
            least = builder.select(builder.icmp_unsigned("<", other, least), other, least)
        found = builder.or_(found, builder.icmp_unsigned("<", least, limit))
    return builder.zext(builder.bitcast(found, ir.IntType(LANES)), I32)


def _scan(builder: Any, block: Any, rows: list[Any], words: Any, thresholds: Any, outputs: tuple[Any, Any]) -> Any:
    """Emit one block's scan: sums, comparison, and the rare store of what was found."""
    sums = _add_all_words(builder, block, rows, words)
    limits = [broadcast(builder, builder.load(builder.gep(thresholds, [I64(j)]))) for j in range(len(rows))]
    any_found = _any_below(builder, sums, limits)
    distances, masks = outputs
    with builder.if_then(builder.icmp_unsigned("!=", any_found, I32(0)), likely=False):
        for j, slots in enumerate(sums):
            builder.store(_below(builder, slots, limits[j]), builder.gep(masks, [I64(j)]))
            for v, slot in enumerate(slots):
                builder.store(builder.load(slot), builder.gep(distances, [I64(VECTORS * j + v)]), align=8)
    return any_found


def _scan_block_for(queries: int) -> Any:
    """Make the intrinsic that scans one block for `queries` queries at once."""

    @intrinsic
    def scan_block(
        _: Any, codes: Any, block: Any, words: Any, query_words: Any, query: Any, thresholds: Any, out: Any, masks: Any
    ) -> Any:
        """See the names made below; the parameters are numba types here."""
        signature = types.uint32(codes, types.intp, types.intp, query_words, types.intp, thresholds, out, masks)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def data(index: int) -> Any:
                return context.make_array(signature.args[index])(context, builder, arguments[index]).data

            first_word, words, query = arguments[1], arguments[2], arguments[4]
            starts = [builder.mul(builder.add(query, I64(j)), words) for j in range(queries)]
            rows = [builder.gep(data(3), [start]) for start in starts]
            outputs = (builder.bitcast(data(6), V8.as_pointer()), data(7))
            thresholds_at = builder.gep(data(5), [query])
            return _scan(builder, builder.gep(data(0), [first_word]), rows, words, thresholds_at, outputs)

        return signature, codegen

    return scan_block


# scan_block(codes, first_word, words, queries_QW, query, thresholds_Q, distances, masks) -> uint32
#   codes: any uint64 array; the block is its elements first_word .. first_word + 32 words - 1, word-major.
#   queries_QW: C-contiguous, exactly `words` wide; the rows query, query + 1, ... are compared.
#   Non-zero where a document is nearer than its query's threshold. Only then masks[j] (uint32) marks the documents of
#   row query + j, and distances[32 j : 32 j + 32] (uint64) holds all its distances.
scan_block_for_one = _scan_block_for(1)
scan_block_for_four = _scan_block_for(4)


@intrinsic
def count_bits(_: Any, word: Any) -> Any:
    """Set bits of a uint64."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), codegen


@intrinsic
def trailing_zeros(_: Any, mask: Any) -> Any:
    """Index of the lowest set bit of a non-zero uint32."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), I64)

    return types.intp(types.uint32), codegen


@intrinsic
def prefetch(_: Any, codes: Any, at: Any) -> Any:
    """Ask for the cache line of element `at`; an address past the end is harmless."""
    signature = types.void(codes, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # a read, for all cache levels, of data
        return context.get_dummy_value()

    return signature, codegen
