"""Lengths that held-out queries choose: the best of those tried is what the published model has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import models.retriever.train as training
from models.quantizers.base import QuantizerError, make_quantizer
from models.quantizers.sarq import SARQ
from models.retriever import lengths
from models.retriever.recipe import RecipeError
from service.model.lengths import CONTINUED
from tests.models.retriever.test_train import log_of, tiny_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the TorchScript exporter, about itself

QUANTIZER = {"system": "sarq", "base": "hhq", "level_sizes": [4, 6, 6], "held_out": True}


def rule_of(model: Path) -> NDArray[np.int32]:
    """The paths that go on, as the published model has them."""
    return load_file(model / "quantizer.safetensors")[CONTINUED]


def fitted(run: Path) -> tuple[SARQ, NDArray[np.float32]]:
    """The quantizer of a run, fitted anew on the run's document vectors."""
    kept = load_file(run / "checkpoint.safetensors")
    (name,) = (name for name in kept if name.endswith("vectors"))
    made = make_quantizer(QUANTIZER)
    assert isinstance(made, SARQ)
    made.fit(kept[name], progress=False)
    return made, kept[name]


def test_held_out_queries_choose(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The tried lengths are powers of two; the first best one is the rule of the model."""
    model = training.run(tiny_recipe(tiny_encoder, quantizer=QUANTIZER), [tiny_data], tmp_path)
    rows = [row for row in log_of(tmp_path) if "documents_a_sid" in row]
    names = [f"{walk}_{measure}" for walk in ("generative", "guided") for measure in ("mrr", "recall")]
    tried = {row["documents_a_sid"]: sum(row[name] for name in names) for row in rows}
    assert list(tried) == [1, 2, 4, 8, 16, 32]
    chosen = max(tried, key=lambda holders: (tried[holders], -holders))
    made, vectors = fitted(tmp_path)
    made.shorten(made.full_codes(vectors), chosen / 60)
    np.testing.assert_array_equal(made.state().tensors[CONTINUED], rule_of(model))


def test_of_equal_lengths_the_longest_sids_are_kept(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walks are told to find most with 2 and with 8 documents a SID; 2 it is, and no other rule is the same."""
    scores = iter([0.2, 0.7, 0.3, 0.7, 0.1, 0.0])
    monkeypatch.setattr(lengths, "walked_scores", lambda *_: {"generative_mrr": next(scores)})
    model = training.run(tiny_recipe(tiny_encoder, quantizer=QUANTIZER), [tiny_data], tmp_path)
    made, vectors = fitted(tmp_path)
    for holders in (1, 2, 8, 16):
        made.shorten(made.full_codes(vectors), holders / 60)
        assert np.array_equal(made.state().tensors[CONTINUED], rule_of(model)) == (holders == 2)


def test_without_held_out_queries_documents_are_alone(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Nothing is tried, and every path goes on as far as it would for one document."""
    model = training.run(tiny_recipe(tiny_encoder, quantizer=QUANTIZER, dev_share=0), [tiny_data], tmp_path)
    assert not [row for row in log_of(tmp_path) if "documents_a_sid" in row]
    made, vectors = fitted(tmp_path)
    made.shorten(made.full_codes(vectors), 1 / 60)
    np.testing.assert_array_equal(made.state().tensors[CONTINUED], rule_of(model))


def test_until_then_paths_go_on_until_documents_are_alone() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, 16)).astype(np.float32)
    made = make_quantizer(QUANTIZER)
    made.fit(vectors, progress=False)
    assert isinstance(made, SARQ)
    for holders in (1, 3, 80):
        if holders > 1:
            made.shorten(made.full_codes(vectors), holders / 80)
        sids = [tuple(code for code in row if code >= 0) for row in made.encode(vectors).tolist()]
        holding = Counter(sid[:length] for sid in sids for length in range(1, len(sid) + 1))
        assert all(holding[sid] <= holders or len(sid) == 3 for sid in sids)
        assert all(holding[sid[:length]] > holders for sid in sids for length in range(1, len(sid)))
    with pytest.raises(QuantizerError, match=r"threshold is 2\.0"):
        made.shorten(made.full_codes(vectors), 2.0)


CONTRAST = {"name": "tune", "objective": "contrast", "epochs": 1, "encoder_lr": 1e-3}


def test_without_a_walk_nothing_can_choose(tiny_encoder: Path) -> None:
    with pytest.raises(RecipeError, match=r"held_out lets held-out queries choose .* decoder\.layers must be above 0"):
        tiny_recipe(tiny_encoder, quantizer=QUANTIZER, decoder={"layers": 0}, stage=[CONTRAST])
