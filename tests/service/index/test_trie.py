"""The trie against a dictionary of prefixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.index.trie import (
    FILES,
    Trie,
    build_trie,
    node_ends,
    open_trie,
    padding_of,
    save_trie,
    spans,
    verify_trie,
)

Sid = tuple[int, ...]


@st.composite
def sid_tables(draw: st.DrawFn) -> NDArray[np.int32]:
    """Draw padded rows over a small vocabulary, so that prefixes, repeats and ends at inner nodes are common."""
    levels = draw(st.integers(1, 4))
    wide = draw(st.booleans())
    codes = draw(st.integers(1, 5))
    offset = 70_000 if wide else codes  # wide tokens need int32 files
    row = st.lists(st.integers(0, codes - 1), min_size=1, max_size=levels)
    rows = draw(st.lists(row, min_size=1, max_size=40))
    table = np.full((len(rows), levels), -1, np.int32)
    for i, codes_of_row in enumerate(rows):
        table[i, : len(codes_of_row)] = [level * offset + code for level, code in enumerate(codes_of_row)]
    return table


def sids_of(table: NDArray[np.int32]) -> list[Sid]:
    """Return the rows without padding."""
    return [tuple(int(token) for token in row if token >= 0) for row in table]


def dictionary_nodes(sids: list[Sid]) -> dict[Sid, tuple[int, int]]:
    """Map every prefix that is a node to its document range; `sids` are sorted. Restates the definition, slowly."""
    nodes: dict[Sid, tuple[int, int]] = {(): (0, len(sids))}
    for sid in sids:
        for length in range(1, len(sid) + 1):
            above = {other for other in sids if other[: length - 1] == sid[: length - 1]}
            if len(above) > 1:
                under = [i for i, other in enumerate(sids) if other[:length] == sid[:length]]
                nodes[sid[:length]] = (under[0], under[-1] + 1)
    return nodes


def walked_nodes(trie: Trie) -> dict[Sid, tuple[int, int]]:
    """Collect every node of the trie by following children from the root."""
    ends = node_ends(trie)
    found: dict[Sid, tuple[int, int]] = {}
    stack: list[tuple[int, Sid]] = [(0, ())]
    while stack:
        node, prefix = stack.pop()
        assert prefix not in found
        found[prefix] = (int(trie.lo_M[node]), int(ends[node]))
        children = range(int(trie.child_M[node]), int(trie.child_M[node + 1]))
        tokens = [int(trie.token_M[child]) for child in children]
        assert tokens == sorted(set(tokens)), "children are in token order, each token once"
        stack += [(child, (*prefix, token)) for child, token in zip(children, tokens, strict=True)]
    return found


@settings(max_examples=150)
@given(sid_tables())
def test_trie_holds_exactly_the_prefixes_of_its_sids(table: NDArray[np.int32]) -> None:
    trie, order = build_trie(table)
    sids = sids_of(table)
    expected_order = sorted(range(len(sids)), key=lambda row: (sids[row], row))
    assert order.tolist() == expected_order
    assert [trie.sid(i) for i in range(trie.documents)] == [sids[row] for row in expected_order]
    nodes = walked_nodes(trie)
    assert nodes == dictionary_nodes([sids[row] for row in expected_order])
    assert len(nodes) == trie.nodes
    verify_trie(trie, int(table.max()) + 1)


@settings(max_examples=50)
@given(sid_tables())
def test_nodes_are_numbered_breadth_first(table: NDArray[np.int32]) -> None:
    trie, _ = build_trie(table)
    depth_of = {0: 0}
    for node in range(trie.nodes):
        for child in range(int(trie.child_M[node]), int(trie.child_M[node + 1])):
            depth_of[child] = depth_of[node] + 1
    depths = [depth_of[node] for node in range(trie.nodes)]
    assert depths == sorted(depths)
    assert trie.level_start == (*(depths.index(depth) for depth in range(trie.depth + 1)), trie.nodes)


def test_saved_trie_opens_as_the_same_memory_maps(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    table = (rng.integers(0, 6, (500, 3)) + np.arange(3) * 6).astype(np.int32)
    trie, _ = build_trie(table)
    save_trie(trie, tmp_path)
    again = open_trie(tmp_path)
    for attribute in FILES:
        assert isinstance(getattr(again, attribute), np.memmap)
        np.testing.assert_array_equal(getattr(again, attribute), getattr(trie, attribute))
    assert again.level_start == trie.level_start


def test_small_vocabularies_take_two_bytes_a_token() -> None:
    small, _ = build_trie(np.array([[0, 65_533]], np.int32))
    large, _ = build_trie(np.array([[0, 65_535]], np.int32))
    assert (small.sids_NL.dtype, large.sids_NL.dtype) == (np.uint16, np.int32)
    assert (padding_of(small.sids_NL.dtype), padding_of(large.sids_NL.dtype)) == (65_535, -1)


@pytest.mark.parametrize(
    ("sids", "expected"),
    [
        ([[0, 3, 5], [1, 2, -1]], [(0, 2), (2, 5), (5, 6)]),
        ([[0, 3, 5], [1, 5, -1]], [(0, 2), (2, 6), (5, 6)]),  # the second leaves out a level
        ([[0, 5, -1], [1, 5, -1]], [(0, 2), (5, 6)]),  # both do, and no SID is three long
        ([[2, 0, 5], [4, 1, -1]], [(2, 5), (0, 2), (5, 6)]),  # the levels have changed places
    ],
)
def test_a_step_may_write_the_levels_that_stand_there(sids: list[list[int]], expected: list[tuple[int, int]]) -> None:
    table = np.array(sids)
    assert spans(table, (0, 2, 5, 6)) == expected
    assert spans(build_trie(table)[0].sids_NL, (0, 2, 5, 6)) == expected


def test_random_sids_stay_within_32_bytes_each() -> None:
    rng = np.random.default_rng(5)
    table = (rng.integers(0, 256, (200_000, 5)) + np.arange(5) * 256).astype(np.int32)
    trie, _ = build_trie(table)
    arrays = (trie.token_M, trie.lo_M, trie.child_M, trie.sids_NL)
    assert sum(array.nbytes for array in arrays) / trie.documents <= 32


def test_one_distinct_sid_leaves_only_a_finished_root() -> None:
    trie, order = build_trie(np.array([[4, 7], [4, 7]], np.int32))
    assert (trie.nodes, trie.depth, trie.level_start) == (1, 0, (0, 1))
    assert order.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.array([[0, 1], [-1, -1]], np.int32), r"row 1 is \[-1, -1\]"),
        (np.array([[0, -1, 2]], np.int32), r"row 0 is \[0, -1, 2\]"),
        (np.array([[0, -2]], np.int32), "tokens range from -2"),
        (np.array([[0.5]]), "array of integers"),
        (np.zeros((0, 3), np.int32), "0 documents"),
        (np.zeros(3, np.int32), "array of integers"),
    ],
)
def test_bad_sids_are_refused_with_the_row(table: NDArray[np.int32], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trie(table)


def saved(tmp_path: Path) -> Trie:
    """Save a small trie and return it."""
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4], [1, -1]], np.int32))
    save_trie(trie, tmp_path)
    return trie


@pytest.mark.parametrize("attribute", ["lo_M", "child_M", "token_M", "sids_NL"])
def test_file_of_another_trie_is_refused_by_name(tmp_path: Path, attribute: str) -> None:
    trie = saved(tmp_path)
    array = getattr(trie, attribute)
    np.save(tmp_path / FILES[attribute], array.astype(np.int64))
    with pytest.raises(ValueError, match=r"trie_|sids\.npy"):
        open_trie(tmp_path)


@pytest.mark.parametrize(
    ("attribute", "place", "value"),
    [
        ("child_M", 1, 0),
        ("child_M", 3, 9),
        ("lo_M", 2, 4),
        ("token_M", 1, 60_000),
        ("token_M", 4, 5),  # the model has tokens 0 to 4
        ("sids_NL", (0, 0), 65_535),
        ("sids_NL", (3, 1), 5),
    ],
)
def test_damaged_nodes_are_found_by_verification(attribute: str, place: int | tuple[int, int], value: int) -> None:
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4], [1, -1]], np.int32))
    getattr(trie, attribute)[place] = value
    with pytest.raises(ValueError, match=r"build the bundle again|index the corpus"):
        verify_trie(trie, 5)


@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_node_that_is_its_own_first_child_is_refused(node: int) -> None:
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4], [1, -1]], np.int32))
    trie.child_M[: node + 1] = np.minimum(trie.child_M[: node + 1], node)
    with pytest.raises(ValueError, match=r"trie_child\.npy: the children are not numbered breadth-first"):
        verify_trie(trie, 5)


def test_a_node_that_is_nobodys_child_is_refused() -> None:
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4], [2, -1]], np.int32))
    verify_trie(trie, 5)
    trie.child_M[:2] = 2  # of node 1, which is a leaf, the children begin at the node after
    with pytest.raises(ValueError, match=r"trie_child\.npy: the children are not numbered breadth-first"):
        verify_trie(trie, 5)
    assert node_ends(trie)[1] == 0, "no garbage"


def test_a_node_that_begins_before_its_parent_is_refused() -> None:
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4], [2, -1]], np.int32))
    child = int(trie.child_M[2])
    assert (trie.lo_M[2], trie.lo_M[child]) == (1, 1)
    trie.lo_M[child] = 0
    with pytest.raises(ValueError, match=rf"trie_lo\.npy: node {child} begins at document 0, before its parent 2 at 1"):
        verify_trie(trie, 5)


def test_siblings_with_one_token_are_refused() -> None:
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4], [2, -1]], np.int32))
    verify_trie(trie, 5)
    for node in (2, 3):
        spoilt = replace(trie, token_M=trie.token_M.copy())
        spoilt.token_M[node] = spoilt.token_M[node - 1]
        with pytest.raises(ValueError, match=f"node {node} repeats a token"):
            verify_trie(spoilt, 5)


def test_nodes_deeper_than_the_sids_are_refused() -> None:
    trie, _ = build_trie(np.array([[0, 3], [1, 3], [1, 4]], np.int32))
    with pytest.raises(ValueError, match=r"the nodes are 2 deep, sids\.npy has 1 levels"):
        verify_trie(replace(trie, sids_NL=np.ascontiguousarray(trie.sids_NL[:, :1])), 5)
