"""The quality report against figures worked out by hand or by plain Python."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from models.lines import DataError
from models.quantizers.quality import QualityError, entropy_bits, gini, measure_sids
from models.quantizers.report import load_sids, plot_report, print_report, report_sids, write_json
from service.index.bundle import open_bundle
from service.model.quantizer import reconstruct
from tests.tiny import make_bundle

CODES = np.array([[0, 0], [0, 0], [0, 1], [1, 2], [2, -1], [2, -1]], dtype=np.int32)
SIZES = (4, 3)


def test_figures_of_a_set_worked_out_by_hand() -> None:
    quality = measure_sids(CODES, SIZES, np.array([1, 1, 1, 1, 0, 0.5]), np.array([9, 0, 0, 1, 0, 0]))
    assert (quality.documents, quality.distinct, quality.p_unique) == (6, 4, 4 / 6)
    assert quality.collisions == {1: 2, 2: 2}
    assert quality.alone_share == 2 / 6
    assert quality.mean_length == 10 / 6
    assert quality.cosine == 0.75
    first, second = quality.levels
    assert (first.documents, first.dead, first.largest, first.prefixes) == (6, 1, 3, 3)
    assert first.counts == (3, 2, 1, 0)
    assert first.entropy_bits == pytest.approx(
        -(3 / 6 * math.log2(3 / 6) + 2 / 6 * math.log2(2 / 6) + math.log2(1 / 6) / 6)
    )
    assert first.entropy_share == pytest.approx(first.entropy_bits / 2)
    assert first.gini == pytest.approx((0 * -3 + 1 * -1 + 2 * 1 + 3 * 3) / (4 * 6)), "the dead code counts"
    assert first.top_tenth_share == 3 / 6
    assert first.std == pytest.approx(math.sqrt((1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 4))
    assert (second.documents, second.dead, second.prefixes, second.path_share) == (4, 0, 3, 3 / 6)
    assert (second.entropy_bits, second.entropy_share) == (1.5, pytest.approx(1.5 / math.log2(3)))
    assert (second.gini, second.top_tenth_share) == (pytest.approx((1 * -2 + 1 * 0 + 2 * 2) / (3 * 4)), 2 / 4)
    head, tail = quality.groups["head"], quality.groups["tail"]
    assert (head.documents, head.interaction_share, head.unique_share) == (1, 0.9, 0.0)
    assert (head.mean_length, head.cosine) == (2, 1)
    assert (tail.documents, tail.unique_share, tail.cosine) == (5, 0.4, 0.7)
    assert (tail.interaction_share, tail.mean_length) == (0.1, 8 / 5)


def test_the_top_tenth_of_eleven_codes_are_two() -> None:
    """A part of a code counts as one, and the codes that few documents have come last whatever their numbers."""
    codes = np.repeat(np.arange(11), [1, 1, 5, 1, 1, 1, 4, 1, 1, 1, 0])[:, None]
    assert measure_sids(codes, (11,)).levels[0].top_tenth_share == 9 / 17
    assert measure_sids(np.full((3, 1), 10), (11,)).levels[0].top_tenth_share == 1


@settings(max_examples=100)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(sum))
def test_gini_is_the_mean_absolute_difference(counts: list[int]) -> None:
    """The definition: the mean of |x - y| over all pairs, over twice the mean."""
    pairs = sum(abs(a - b) for a in counts for b in counts) / len(counts) ** 2
    assert gini(np.array(counts)) == pytest.approx(pairs / (2 * sum(counts) / len(counts)))


@settings(max_examples=100)
@given(data=st.data())
def test_collisions_and_prefixes_are_those_of_a_dictionary(data: st.DataObject) -> None:
    sizes = (3, 4, 2)
    row = st.tuples(*(st.integers(-1 if level else 0, size - 1) for level, size in enumerate(sizes)))
    rows = data.draw(st.lists(row, min_size=1, max_size=40))
    quality = measure_sids(np.array(rows), sizes)
    held = Counter(rows)
    assert quality.distinct == len(held)
    assert quality.collisions == dict(Counter(held.values()))
    for level, measured in enumerate(quality.levels):
        used = [row for row in rows if row[level] >= 0]
        assert measured.prefixes == len({row[: level + 1] for row in used})
        assert measured.counts == tuple(
            sorted((sum(r[level] == k for r in used) for k in range(sizes[level])), reverse=True)
        )
        assert 0 <= measured.gini <= 1


def test_entropy_of_even_and_single_use() -> None:
    assert entropy_bits(np.array([5, 5, 5, 5])) == pytest.approx(2.0)
    assert entropy_bits(np.array([0, 7, 0])) == 0.0


def test_tokens_taken_for_codes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"1 codes are outside their level, e\.g\. 3 in row 0, level 1 of 3: are these"
    ):
        measure_sids(np.array([[0, 3]]), SIZES)
    with pytest.raises(ValueError, match="have 3 levels, level sizes are"):
        measure_sids(np.zeros((2, 3), dtype=int), SIZES)
    with pytest.raises(ValueError, match=r"cosines of shape \(2,\) for 6 documents"):
        measure_sids(CODES, SIZES, np.zeros(2))


def test_an_array_of_codes_is_loaded_with_ids_and_interactions(tmp_path: Path) -> None:
    np.save(tmp_path / "sids.npy", CODES)
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\ne\nf\n")
    sids = load_sids(tmp_path / "sids.npy", SIZES, tmp_path / "ids.txt")
    assert report_sids(sids, {"a": 9, "d": 1}) == measure_sids(CODES, SIZES, None, np.array([9, 0, 0, 1, 0, 0]))
    assert load_sids(tmp_path / "sids.npy").level_sizes == (3, 3)
    with pytest.raises(DataError, match="interactions need document ids"):
        report_sids(load_sids(tmp_path / "sids.npy"), {"a": 1})
    for options in ((SIZES, None), ((), tmp_path / "ids.txt")):
        with pytest.raises(DataError, match="is a bundle and knows its level sizes and ids"):
            load_sids(tmp_path, *options)
    (tmp_path / "ids.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"names 1 documents, .* holds 6 rows"):
        load_sids(tmp_path / "sids.npy", SIZES, tmp_path / "ids.txt")


@pytest.mark.parametrize("content", [b"", b"not an array", "floats", "pickle"])
def test_a_file_that_is_no_integer_array_is_refused(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "sids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        array = np.array([[{}]], dtype=object) if content == "pickle" else np.zeros((2, 2))
        np.save(path, array, allow_pickle=True)
    with pytest.raises(DataError, match=r"sids\.npy: "):
        load_sids(path)


def test_a_level_that_all_documents_leave_out_is_reported(tmp_path: Path) -> None:
    """The codes of Hourglass with a level removed."""
    np.save(tmp_path / "codes.npy", np.array([[0, -1, 1], [1, -1, 0]]))
    quality = report_sids(load_sids(tmp_path / "codes.npy"))
    assert (quality.p_unique, quality.mean_length) == (1.0, 2.0)
    with pytest.raises(QualityError, match=r"level sizes are \[2, 0, 2\]: each must be at least 1"):
        report_sids(load_sids(tmp_path / "codes.npy", (2, 0, 2)))


def test_the_report_comes_as_table_json_and_picture(tmp_path: Path) -> None:
    quality = measure_sids(CODES, SIZES, np.full(6, 0.5), np.arange(6))
    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    print_report("mine", quality, console)
    text = console.export_text()
    console.file.close()
    assert "4 (0.6667)" in text
    assert "0.5000" in text
    assert "2 x 1, 2 x 2" in text
    write_json("mine", quality, tmp_path / "r.json")
    loaded = json.loads((tmp_path / "r.json").read_text())
    assert loaded["p_unique"] == quality.p_unique
    assert loaded["levels"][0]["counts"] == [3, 2, 1, 0]
    plot_report("mine", quality, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("kind", ["householder", "residual"])
def test_a_bundle_reports_its_own_identifiers(tmp_path: Path, kind: str) -> None:
    """Figures of a bundle against its SID table read by hand; sums of codewords are no unit vectors, cosines divide."""
    folder = make_bundle(tmp_path / "bundle", kind=kind)
    sids = load_sids(folder)
    bundle = open_bundle(folder)
    tokens = [bundle.trie.sid(position) for position in range(bundle.trie.documents)]
    assert sids.ids == [bundle.documents.get(position).id for position in range(len(tokens))]
    rebuilt = reconstruct(np.array(tokens), kind, bundle.model.quantizer_tensors, (8, 8, 8))
    cosines = [float(r @ v / np.linalg.norm(r)) for r, v in zip(rebuilt, bundle.vectors, strict=True)]
    bundle.close()
    assert [tuple(int(c) + 8 * level for level, c in enumerate(row)) for row in sids.codes] == tokens
    quality = report_sids(sids, dict.fromkeys(sids.ids, 1))
    assert quality.distinct == len(set(tokens))
    np.testing.assert_allclose(sids.cosine, cosines, atol=1e-5)
    assert quality.cosine == pytest.approx(np.mean(cosines), abs=1e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 999), documents=st.integers(1, 60))
def test_bits_given_the_code_before_are_those_of_the_code_trees_probabilities(seed: int, documents: int) -> None:
    """Restated: P(code | code before) by counting pairs in a dictionary, its entropy averaged over documents."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (documents, 3))
    codes[rng.random(documents) < 0.2, 2] = -1
    quality = measure_sids(codes, (4, 4, 4))
    for level in (1, 2):
        rows = [(int(row[level - 1]), int(row[level])) for row in codes if row[level] >= 0]
        bits = 0.0
        for before, code in rows:
            followers = [after for first, after in rows if first == before]
            bits -= math.log2(followers.count(code) / len(followers)) / len(rows)
        assert quality.levels[level].given_bits == pytest.approx(bits, abs=1e-9)
    assert quality.levels[0].given_bits == quality.levels[0].entropy_bits
