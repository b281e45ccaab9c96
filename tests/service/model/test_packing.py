"""Packed codes against the tables of the paper (eq. 22-23) written out, and against bit counts of unpacked codes."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.layout import LEVELS, CodeError, CodeLayout, Level, code_layout
from service.model.packing import are_packed, from_blocks, pack_values, to_blocks, unpack_bits, unpack_values

# the paper's codebooks, as printed
CODEBOOKS: dict[str, list[list[int]]] = {
    "2": [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]],  # eq. 22
    "1.5": [[0, 0], [0, 1], [1, 1]],  # eq. 23
    "1": [[0], [1]],
    "0.5": [[0], [1]],
}


def column_levels(level: str, dims: int) -> list[str]:
    """Level of every quantised value of a code, restated from section 3.5."""
    if level == "hybrid":
        quarter = dims // 4
        return ["2"] * quarter + ["1.5"] * quarter + ["1"] * quarter + ["0.5"] * (quarter // 2)
    return [level] * (dims // 2 if level == "0.5" else dims)


def random_values(rng: np.random.Generator, rows: int, columns: list[str]) -> npt.NDArray[np.uint8]:
    return np.stack([rng.integers(0, len(CODEBOOKS[level]), rows) for level in columns], axis=1).astype(np.uint8)


def spelled(values_U: npt.NDArray[np.uint8], columns: list[str]) -> list[int]:
    """Bits of one code, value by value from the codebooks."""
    return list(itertools.chain.from_iterable(CODEBOOKS[lv][int(v)] for v, lv in zip(values_U, columns, strict=True)))


STEPS = {"0.5": (2, 2), "hybrid": (8, 2)}  # that full widths, and prefixes, are multiples of


@st.composite
def layouts(draw: st.DrawFn) -> CodeLayout:
    level = draw(st.sampled_from(LEVELS))
    whole, part = STEPS.get(level, (1, 1))
    dims = whole * draw(st.integers(1, 480 // whole))
    cuts = draw(st.sets(st.integers(1, (dims - 1) // part), max_size=4)) if dims > part else set()
    return code_layout(level, [*sorted(part * cut for cut in cuts), dims])


@given(layout=layouts(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_packed_bits_are_the_codebooks_bits_and_padding_is_zero(layout: CodeLayout, seed: int) -> None:
    columns = column_levels(layout.level, layout.dims)
    values = random_values(np.random.default_rng(seed), 3, columns)
    codes = pack_values(values, layout)
    assert codes.dtype == np.uint64
    assert codes.shape == (3, layout.words)
    for row in range(3):
        bits = spelled(values[row], columns)
        assert unpack_bits(codes, layout)[row].tolist() == bits
        assert np.bitwise_count(codes[row]).sum() == sum(bits)  # so padding holds no bit
    np.testing.assert_array_equal(unpack_values(codes, layout), values)


@given(layout=layouts(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_packed_distance_is_the_difference_of_levels_summed(layout: CodeLayout, seed: int) -> None:
    columns = column_levels(layout.level, layout.dims)
    values = random_values(np.random.default_rng(seed), 6, columns).astype(int)
    codes = pack_values(values, layout)
    for a, b in itertools.combinations(range(6), 2):
        packed = int(np.bitwise_count(codes[a] ^ codes[b]).sum())
        assert packed == np.abs(values[a] - values[b]).sum()
        assert packed == (unpack_bits(codes, layout)[a] != unpack_bits(codes, layout)[b]).sum()


@given(layout=layouts(), seed=st.integers(0, 2**32 - 1), flipped=st.integers(0, 2**20))
@settings(max_examples=80)
def test_codes_are_packed_where_every_value_is_spelled_as_in_the_codebook(
    layout: CodeLayout, seed: int, flipped: int
) -> None:
    columns = column_levels(layout.level, layout.dims)
    codes = pack_values(random_values(np.random.default_rng(seed), 3, columns), layout)
    assert are_packed(codes, layout).all()
    word, bit = divmod(flipped % (64 * layout.words), 64)
    codes[1, word] ^= np.uint64(1) << np.uint64(bit)
    bits = iter(unpack_bits(codes, layout)[1].tolist())
    read = [list(itertools.islice(bits, len(CODEBOOKS[level][0]))) for level in columns]
    is_spelled = all(value in CODEBOOKS[level] for value, level in zip(read, columns, strict=True))
    has_no_padding = np.bitwise_count(codes[1]).sum() == sum(map(sum, read))
    assert are_packed(codes, layout).tolist() == [True, is_spelled and has_no_padding, True]


@pytest.mark.parametrize(("level", "dims"), [("0.5", [126]), ("1", [63]), ("1", [64]), ("2", [21]), ("1.5", [96])])
def test_values_may_lie_in_any_order_in_memory(level: Level, dims: list[int]) -> None:
    layout = code_layout(level, dims)
    values = random_values(np.random.default_rng(0), 2, column_levels(layout.level, layout.dims))
    np.testing.assert_array_equal(pack_values(np.asfortranarray(values), layout), pack_values(values, layout))


@given(layout=layouts(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_the_first_words_are_the_code_of_the_prefix(layout: CodeLayout, seed: int) -> None:
    columns = column_levels(layout.level, layout.dims)
    values = random_values(np.random.default_rng(seed), 2, columns)
    codes = pack_values(values, layout)
    for dims in layout.prefix_dims:
        inside = [
            i for i, first in enumerate(first_dimension(columns)) if first < dims
        ]  # values whose dimensions lie in the prefix
        whole = spelled(values[0, inside], [columns[i] for i in inside])
        prefix = codes[0, : layout.words_of(dims)]
        assert layout.bits_of(dims) == len(whole)
        assert np.bitwise_count(prefix).sum() == sum(whole)
        if layout.level != "hybrid":  # hybrid quarters belong to the full width
            alone = code_layout(layout.level, [d for d in layout.prefix_dims if d <= dims])
            np.testing.assert_array_equal(pack_values(values[:, inside], alone)[0], prefix)


def first_dimension(columns: list[str]) -> list[int]:
    steps = [2 if level == "0.5" else 1 for level in columns]
    return [0, *itertools.accumulate(steps)][:-1]


def test_bit_i_of_word_w_is_bit_64w_plus_i() -> None:
    values = np.zeros((1, 130), np.uint8)
    values[0, [0, 63, 64, 129]] = 1
    codes = pack_values(values, code_layout("1", [130]))
    assert codes.tolist() == [[1 | 1 << 63, 1, 1 << 1]]


@pytest.mark.parametrize(
    ("level", "words", "bits"),
    [("1", 12, 768), ("1.5", 24, 1536), ("2", 36, 2304), ("hybrid", 20, 1248), ("0.5", 6, 384)],
)
def test_table_7_storage_at_768_dimensions(level: str, words: int, bits: int) -> None:
    layout = code_layout(level, [768])
    assert (layout.words, layout.bits) == (words, bits)


def test_hybrid_prefixes_take_the_early_quarters_first() -> None:
    layout = code_layout("hybrid", [96, 192, 288, 384])
    assert layout.prefix_bits == (288, 480, 576, 624)
    assert layout.prefix_words == (5, 8, 10, 11)


@pytest.mark.parametrize(
    ("level", "dims", "message"),
    [
        ("3", [64], "choose one of"),
        ("1", [], "ascending"),
        ("1", [64, 64], "ascending"),
        ("1", [0, 64], "ascending"),
        ("0.5", [33, 64], "splits"),
        ("0.5", [63], "splits"),
        ("hybrid", [100], "multiple of 8"),
        ("hybrid", [49, 64], "splits"),
    ],
)
def test_impossible_layouts_are_refused(level: str, dims: list[int], message: str) -> None:
    with pytest.raises(CodeError, match=message):
        code_layout(level, dims)


def test_unknown_prefixes_wrong_widths_and_wild_values_are_refused() -> None:
    layout = code_layout("1.5", [32, 64])
    with pytest.raises(CodeError, match=r"\[32, 64\]"):
        layout.words_of(48)
    with pytest.raises(CodeError, match=r"\(N, 64\)"):
        pack_values(np.zeros((1, 65), np.uint8), layout)
    with pytest.raises(CodeError, match=r"integers"):
        pack_values(np.zeros((1, 64), np.float32), layout)
    with pytest.raises(CodeError, match=r"0\.\.2"):
        pack_values(np.full((1, 64), 3), layout)
    with pytest.raises(CodeError, match=r"0\.\.2"):
        pack_values(np.full((1, 64), -1), layout)
    with pytest.raises(CodeError, match=r"\(N, 2\)"):
        unpack_bits(np.zeros((1, 3), np.uint64), layout)


@given(documents=st.integers(0, 100), words=st.integers(1, 7))
@settings(max_examples=30)
def test_blocks_are_word_major_and_undone_exactly(documents: int, words: int) -> None:
    codes = np.random.default_rng(documents).integers(0, 2**64, (documents, words), dtype=np.uint64)
    blocks = to_blocks(codes)
    assert blocks.flags.c_contiguous
    for document in range(documents):
        assert (blocks[document // 32, :, document % 32] == codes[document]).all()
    np.testing.assert_array_equal(from_blocks(blocks, documents), codes)
    assert blocks.sum(dtype=np.uint64) == codes.sum(dtype=np.uint64)  # padding is zero


def test_blocks_that_hold_another_number_of_documents_are_refused() -> None:
    with pytest.raises(CodeError, match="do not hold 33"):
        from_blocks(np.zeros((1, 2, 32), np.uint64), 33)
    with pytest.raises(CodeError, match=r"\(G, W, 32\)"):
        from_blocks(np.zeros((1, 2, 31), np.uint64), 31)
