"""Length rules against dictionaries and sets: what a document's codes become, one document at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.lengths import CONTINUED, DROPPED, ORDER, QuantizerError, pack, read_rule, unpack
from service.model.quantizer import assign_sids, reconstruct
from tests.tiny import unit_rows

SIZES = (3, 4, 2)
OFFSETS = (0, 3, 7)
Path = tuple[int, ...]


def table_of(paths: set[Path]) -> np.ndarray:
    """Paths as tokens, padded with -1."""
    rows = [[o + c for o, c in zip(OFFSETS, path, strict=False)] + [-1] * (2 - len(path)) for path in sorted(paths)]
    return np.array(rows, np.int32).reshape(-1, 2)


def plain_sid(chosen: list[int], order: list[int], continued: set[Path] | None, dropped: set[int]) -> list[int]:
    """The rule in words: put codes at their levels, stop where the path does not go on, leave tokens out."""
    codes = [chosen[order.index(level)] for level in range(3)]
    length = 1
    while length < 3 and (continued is None or tuple(codes[:length]) in continued):
        length += 1
    tokens = [OFFSETS[level] + code for level, code in enumerate(codes[:length])]
    return [token for token in tokens if token not in dropped]


@st.composite
def rules(draw: st.DrawFn) -> tuple[list[int], set[Path] | None, set[int]]:
    order = list(draw(st.permutations(range(3))))
    first = draw(st.sets(st.integers(0, 2)))
    second = draw(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3))))
    continued: set[Path] = {(code,) for code in first} | {path for path in second if path[0] in first}
    return order, draw(st.sampled_from([None, continued])), draw(st.sets(st.integers(3, 8)))


def tensors_of(rule: tuple[list[int], set[Path] | None, set[int]]) -> dict[str, np.ndarray]:
    order, continued, dropped = rule
    tensors = {ORDER: np.array(order, np.int32), DROPPED: np.array(sorted(dropped), np.int32)}
    return tensors if continued is None else tensors | {CONTINUED: table_of(continued)}


@settings(max_examples=100)
@given(rule=rules(), seed=st.integers(0, 1000))
def test_sids_are_those_of_the_rule_in_words(rule: tuple[list[int], set[Path] | None, set[int]], seed: int) -> None:
    order = rule[0]
    chosen = np.random.default_rng(seed).integers(0, [SIZES[level] for level in order], (30, 3))
    tokens = pack(read_rule(tensors_of(rule), SIZES).arrange(chosen), SIZES)
    expected = [plain_sid(row, *rule) for row in chosen.tolist()]
    assert [[token for token in row if token >= 0] for row in tokens.tolist()] == expected
    assert tokens.dtype == np.int32


@settings(max_examples=60)
@given(rule=rules())
def test_no_sid_is_the_beginning_of_another(rule: tuple[list[int], set[Path] | None, set[int]]) -> None:
    """Over all paths there are; dropped tokens take a whole level or leave the token of a deeper one in its place."""
    every = np.stack(np.meshgrid(*(np.arange(SIZES[level]) for level in rule[0]), indexing="ij"), -1).reshape(-1, 3)
    order, continued, dropped = rule
    only_cut = (order, continued, set()) if continued is not None else (order, None, dropped & set(range(3, 7)))
    tokens = pack(read_rule(tensors_of(only_cut), SIZES).arrange(every), SIZES)
    sids = {tuple(token for token in row if token >= 0) for row in tokens.tolist()}
    assert not any(a != b and b[: len(a)] == a for a in sids for b in sids)


@given(st.lists(st.tuples(*(st.integers(-1, size - 1) for size in SIZES)), min_size=1, max_size=9))
def test_packing_is_undone_by_the_tokens_alone(rows: list[tuple[int, ...]]) -> None:
    codes = np.array(rows, np.int32)
    np.testing.assert_array_equal(unpack(pack(codes, SIZES), SIZES), codes)


@pytest.mark.parametrize("kind", ["householder", "residual", "residual_cosine"])
def test_an_exchange_changes_the_order_of_tokens_and_not_the_point(kind: str) -> None:
    """The same codebooks in exchanged places choose the same codewords and stand for the same points."""
    table, vectors = unit_rows(9, 6, 3), unit_rows(40, 6, 4)
    first, second, third = np.split(table, [3, 7])
    plain = assign_sids(vectors, kind, {"codebooks": table}, SIZES)
    exchanged = {"codebooks": np.concatenate([second, first, third]), ORDER: np.array([1, 0, 2], np.int32)}
    sizes = (4, 3, 2)
    tokens = assign_sids(vectors, kind, exchanged, sizes)
    np.testing.assert_array_equal(tokens, np.stack([plain[:, 1] - 3, plain[:, 0] + 4, plain[:, 2]], 1))
    np.testing.assert_allclose(
        reconstruct(tokens, kind, exchanged, sizes), reconstruct(plain, kind, {"codebooks": table}, SIZES), atol=1e-6
    )


def test_a_short_sid_stands_for_the_codes_it_keeps() -> None:
    """Level 2 left out: the point is the sum of the first and the third codeword."""
    table = unit_rows(9, 6, 3)
    tensors = {"codebooks": table, DROPPED: np.arange(3, 7)}
    tokens = assign_sids(unit_rows(20, 6, 4), "residual", tensors, SIZES)
    assert (tokens[:, 2] == -1).all()
    np.testing.assert_allclose(
        reconstruct(tokens, "residual", tensors, SIZES), table[tokens[:, 0]] + table[tokens[:, 1]], rtol=1e-6
    )


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({ORDER: np.array([0, 1])}, r"order is int64 \(2,\), must be integers \(3\)"),
    ({ORDER: np.array([0, 1, 1])}, r"order is \[0, 1, 1\], must name each of 3 levels once"),
    ({ORDER: np.zeros(3)}, "order is float64"),
    ({DROPPED: np.array([9])}, "dropped holds tokens 9 to 9, the quantizer has 9"),
    ({DROPPED: np.array([0, 3, 7])}, "leaves some document without any token"),
    ({DROPPED: np.array([0]), CONTINUED: np.zeros((0, 2), int)}, "leaves some document without any token"),
    ({CONTINUED: np.array([[0, 1]])}, r"rows that are no paths of levels \[3, 4, 2\]"),
    ({CONTINUED: np.array([[-1, 3]])}, "rows that are no paths"),
    ({CONTINUED: np.array([[0, 3]])}, r"goes on behind \[0, 3\], but not behind its beginning"),
    ({CONTINUED: np.array([[0]])}, r"continued is int64 \(1, 1\), must be integers \(any, 2\)"),
]


@pytest.mark.parametrize(("tensors", "words"), MISTAKES)
def test_a_damaged_rule_is_refused(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(QuantizerError, match=words):
        read_rule(tensors, SIZES)
