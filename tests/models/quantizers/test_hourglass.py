"""Hourglass against counting by hand, and against the service, which sees the state alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from models.quantizers.base import Quantizer, QuantizerError, codes_to_tokens, make_quantizer
from models.quantizers.hourglass import top_codes
from models.quantizers.quality import measure_sids
from service.model.quantizer import assign_sids, reconstruct

SIZES = (8, 6, 7)
MODES: list[dict[str, Any]] = [{"mode": "remove"}, {"mode": "variable", "top": 2}, {"mode": "exchange"}]
BASES = [("rq_kmeans", {}), ("hhq", {"epochs": 3})]


def fit(vectors: NDArray[np.float32], base: str = "rq_kmeans", **table: Any) -> Quantizer:
    made = make_quantizer({"system": "hourglass", "level_sizes": list(SIZES), "base": base, **table})
    made.fit(vectors, progress=False)
    return made


def plain_codes(vectors: NDArray[np.float32], base: str, extra: dict[str, Any]) -> NDArray[np.int32]:
    made = make_quantizer({"system": base, "level_sizes": list(SIZES), **extra})
    made.fit(vectors, progress=False)
    return made.encode(vectors)


@pytest.mark.parametrize(("base", "extra"), BASES)
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["mode"])
def test_codes_are_the_bases_codes_changed_as_the_paper_says(
    vectors: NDArray[np.float32], base: str, extra: dict[str, Any], mode: dict[str, Any]
) -> None:
    codes = fit(vectors, base, base_settings=extra, **mode).encode(vectors)
    plain = plain_codes(vectors, base, extra)
    expected = []
    crowded = {code for code, _ in Counter(sorted(plain[:, 1].tolist())).most_common(2)}
    for first, second, third in plain.tolist():
        if mode["mode"] == "exchange":
            expected.append([second, first, third])
        else:
            drops = mode["mode"] == "remove" or second in crowded
            expected.append([first, -1 if drops else second, third])
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(("base", "extra"), BASES)
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["mode"])
def test_the_service_assigns_the_same_sids_to_documents_it_never_saw(
    vectors: NDArray[np.float32], tmp_path: Path, base: str, extra: dict[str, Any], mode: dict[str, Any]
) -> None:
    made = fit(vectors[:400], base, base_settings=extra, **mode)
    kind, tensors, sizes = made.state()
    save_file(tensors, tmp_path / "q.safetensors")
    tensors = load_file(tmp_path / "q.safetensors")
    tokens = assign_sids(vectors[400:], kind, tensors, sizes)
    np.testing.assert_array_equal(tokens, codes_to_tokens(made.encode(vectors[400:]), sizes))
    rebuilt = reconstruct(tokens, kind, tensors, sizes)
    np.testing.assert_allclose(rebuilt, made.reconstruct(made.encode(vectors[400:])), atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["mode"])
def test_what_was_learnt_makes_the_same_quantizer_again(vectors: NDArray[np.float32], mode: dict[str, Any]) -> None:
    made = fit(vectors, **mode)
    again = type(made)(made._settings)
    again.restore(made.learnt())
    np.testing.assert_array_equal(again.encode(vectors), made.encode(vectors))
    assert again.level_sizes == made.level_sizes == ((6, 8, 7) if mode["mode"] == "exchange" else SIZES)
    assert again.state().tensors.keys() == made.state().tensors.keys()


def test_removing_differs_from_never_having_had_the_level(vectors: NDArray[np.float32]) -> None:
    """Section 4.1: the third codebook describes what the second left over, so its codes are others than a second's."""
    removed = fit(vectors, mode="remove").encode(vectors)[:, [0, 2]]
    two = make_quantizer({"system": "rq_kmeans", "level_sizes": [8, 7]})
    two.fit(vectors, progress=False)
    assert not np.array_equal(removed, two.encode(vectors))


def test_dropping_top_codes_evens_the_level(vectors: NDArray[np.float32]) -> None:
    """What is left of the level is less concentrated, and fewer documents are under its largest code."""
    plain = measure_sids(plain_codes(vectors, "rq_kmeans", {}), SIZES).levels[1]
    thinned = measure_sids(fit(vectors, mode="variable", top=3).encode(vectors), SIZES).levels[1]
    assert thinned.largest < plain.largest
    assert thinned.documents < plain.documents == 600
    assert thinned.dead == plain.dead + 3


def test_top_codes_are_those_that_most_documents_have() -> None:
    codes = np.array([3, 1, 1, 0, 3, 3, 2])
    assert top_codes(codes, 5, 2).tolist() == [3, 1]
    assert top_codes(codes, 5, 4).tolist() == [3, 1, 0, 2]
    with pytest.raises(QuantizerError, match="the top 6 of 5 codes: give 1 to 5"):
        top_codes(codes, 5, 6)


def test_codebooks_without_their_rule_are_refused(vectors: NDArray[np.float32]) -> None:
    """A run that restores codebooks alone must not go on with SIDs of another length."""
    made = make_quantizer({"system": "hourglass", "level_sizes": list(SIZES)})
    made.codebooks = fit(vectors).codebooks
    with pytest.raises(QuantizerError, match="has codebooks but no length rule"):
        made.encode(vectors)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mode": "squash"}, "mode is 'squash', must be one of remove, variable, exchange"),
        ({"mode": "variable"}, "top is 0, level 2 has 6 codes: give 1 to 6"),
        ({"mode": "variable", "top": 7}, "top is 7, level 2 has 6 codes"),
        ({"mode": "exchange", "top": 2}, "mode 'exchange' takes none: set mode = 'variable'"),
        ({"level": 1}, "level is 1, must be 2 to the 3 levels"),
        ({"level": 4}, "level is 4, must be 2 to the 3 levels"),
        ({"base": "nope"}, "system is 'nope', must be one of"),
        ({"base": "hourglass"}, "base 'hourglass' has a length rule of its own"),
        ({"base_settings": {"epochs": 3}}, "rq_kmeans knows no setting 'epochs'"),
        ({"base_settings": {"level_sizes": [4]}}, r"base_settings.level_sizes is set"),
        ({"base_settings": 3}, "base_settings must be dict"),
    ],
)
def test_contradictory_recipes_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        make_quantizer({"system": "hourglass", "level_sizes": list(SIZES), **table})
