"""SARQ against the rule of table 1's notes, counted with dictionaries, and against its entropy form."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from models.quantizers.base import Quantizer, QuantizerError, codes_to_tokens, make_quantizer, tokens_to_codes
from models.quantizers.sarq import path_rule
from service.model.lengths import CONTINUED, read_rule
from service.model.quantizer import assign_sids

SIZES = (8, 6, 7)


def fit(vectors: NDArray[np.float32], threshold: float, base: str = "rq_kmeans", **extra: Any) -> Quantizer:
    table = {"system": "sarq", "level_sizes": list(SIZES), "threshold": threshold, "base": base, "base_settings": extra}
    made = make_quantizer(table)
    made.fit(vectors, progress=False)
    return made


def plain_stop(codes: list[list[int]], threshold: float) -> list[list[int]]:
    """Stop at the first length whose path holds no larger share than the threshold."""
    n, levels = len(codes), len(codes[0])
    holders = Counter(tuple(row[:length]) for row in codes for length in range(1, levels + 1))
    result = []
    for row in codes:
        length = 1
        while length < levels and holders[tuple(row[:length])] / n > threshold:
            length += 1
        result.append(row[:length] + [-1] * (levels - length))
    return result


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), documents=st.integers(1, 60), holders=st.integers(1, 60))
def test_paths_end_where_few_items_are_left(seed: int, documents: int, holders: int) -> None:
    """Thresholds that are exact shares: "no larger than" ends a path that has just this share."""
    codes = np.random.default_rng(seed).integers(0, (3, 4, 2, 3), (documents, 4)).astype(np.int32)
    threshold = min(holders, documents) / documents
    rule = read_rule(path_rule(codes, (3, 4, 2, 3), threshold), (3, 4, 2, 3))
    assert rule.arrange(codes).tolist() == plain_stop(codes.tolist(), threshold)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.011, 0.97))
def test_the_share_and_the_entropy_say_the_same(seed: int, threshold: float) -> None:
    """A document goes on behind level l just when its path's information is below the budget −log threshold.

    The information of a path is the sum of −log p(code | codes before), p a share of the documents.
    """
    codes = np.random.default_rng(seed).integers(0, SIZES, (97, 3)).astype(np.int32)
    kept = read_rule(path_rule(codes, SIZES, threshold), SIZES).arrange(codes) >= 0
    holders = Counter(tuple(row[:length]) for row in codes.tolist() for length in range(4))
    shares = [[holders[tuple(row[: n + 1])] / holders[tuple(row[:n])] for n in range(3)] for row in codes.tolist()]
    below = -np.log(shares).cumsum(axis=1) < -np.log(threshold)
    expected = np.logical_and.accumulate(np.concatenate([np.ones((97, 1), bool), below[:, :-1]], axis=1), axis=1)
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("base", ["rq_kmeans", "hhq"])
def test_the_service_follows_the_stored_paths(vectors: NDArray[np.float32], tmp_path: Path, base: str) -> None:
    """New documents too: known dense paths go on, paths that nobody had end."""
    made = fit(vectors[:300], 0.01, base, **({"epochs": 2} if base == "hhq" else {}))
    kind, tensors, sizes = made.state()
    save_file(tensors, tmp_path / "q.safetensors")
    tokens = assign_sids(vectors, kind, load_file(tmp_path / "q.safetensors"), sizes)
    np.testing.assert_array_equal(tokens, codes_to_tokens(made.encode(vectors), sizes))
    assert len(set((tokens >= 0).sum(1).tolist())) > 1


def test_no_sid_begins_another_and_dense_paths_are_longer(vectors: NDArray[np.float32]) -> None:
    made = fit(vectors, 0.02)
    codes = made.encode(vectors)
    sids = {tuple(row[row >= 0].tolist()) for row in codes}
    assert not any(a != b and b[: len(a)] == a for a in sids for b in sids)
    crowd = np.bincount(codes[:, 0])[codes[:, 0]]
    length = (codes >= 0).sum(1)
    assert crowd[length > 1].min() > 0.02 * len(codes) >= crowd[length == 1].max(initial=0)


def test_a_larger_threshold_shortens_and_one_ends_everything(vectors: NDArray[np.float32]) -> None:
    lengths = [(fit(vectors, threshold).encode(vectors) >= 0).sum(1) for threshold in (0.001, 0.02, 0.1, 1.0)]
    assert all((a >= b).all() and a.sum() > b.sum() for a, b in pairwise(lengths))
    assert (lengths[-1] == 1).all()


def test_at_most_one_over_threshold_paths_of_a_length_go_on(vectors: NDArray[np.float32]) -> None:
    table = fit(vectors, 0.02).state().tensors[CONTINUED]
    assert 0 < max(np.bincount((table >= 0).sum(1))) < 1 / 0.02


def test_what_was_learnt_makes_the_same_quantizer_again(vectors: NDArray[np.float32]) -> None:
    made = fit(vectors, 0.02, "hhq", epochs=2)
    again = type(made)(made._settings)
    again.restore(made.learnt())
    np.testing.assert_array_equal(again.encode(vectors), made.encode(vectors))


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(QuantizerError, match=r"threshold is .*, must be a share of the items above 0 and at most 1"):
        make_quantizer({"system": "sarq", "threshold": threshold})


def test_more_codes_than_documents_are_refused_with_numbers(vectors: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="8 codes, but the corpus has 5 documents"):
        fit(vectors[:5], 0.1)


def test_a_base_in_a_space_of_its_own_is_refused() -> None:
    with pytest.raises(QuantizerError, match="base 'rq_vae' has codes in a space of its own"):
        make_quantizer({"system": "sarq", "base": "rq_vae", "level_sizes": [4, 4]})


@pytest.mark.parametrize(("scaled", "kind"), [(True, "residual_cosine"), (False, "residual")])
def test_the_kind_is_what_the_settings_of_the_base_make_it(scaled: bool, kind: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    table = {"system": "sarq", "base": "dgi", "level_sizes": [4, 4], "base_settings": {"scaled_cosine": scaled}}
    made = make_quantizer(table)
    made.fit(vectors, progress=False)
    state = made.state()
    assert state.kind == kind
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    tokens = assign_sids(unit, state.kind, state.tensors, state.level_sizes)
    np.testing.assert_array_equal(tokens_to_codes(tokens, state.level_sizes), made.encode(vectors))
