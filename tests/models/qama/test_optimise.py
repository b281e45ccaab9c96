"""The training loop against AdamW written out, and what must change a run or be noticed by it."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from models.qama.batches import BatchSource, TrainVectors
from models.qama.checkpoint import fingerprint
from models.qama.train import _optimise, adapt, rate, start_objective, train_adapter
from models.tensors import CheckpointError
from service.model.adapter import load_adapter
from tests.models.qama.conftest import small_recipe

RATE, DECAY = 0.01, 0.3


def train(vectors, recipe, out, **options):
    return train_adapter(vectors.documents, vectors.queries, recipe, out, pairs=vectors.pairs, quiet=True, **options)


def adamw(vectors, recipe, clip):
    """An objective after the recipe's steps of clipped AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
    objective = start_objective(vectors, recipe)
    weights = list(objective.parameters())
    source = BatchSource(vectors, recipe.batch, recipe.train.seed)
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    for step in range(recipe.train.steps):
        gradients = torch.autograd.grad(objective(source.batch(step), step)[0], weights)
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
        lr = RATE * rate(step, recipe)
        for weight, gradient, (first, second) in zip(weights, gradients, moments, strict=True):
            gradient = gradient * min(1.0, clip / norm)
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient.square())
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            with torch.no_grad():
                weight.mul_(1 - lr * DECAY).sub_(lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
    return objective


@pytest.mark.parametrize("clip", [1e-6, 1e3])  # 1e-6 lies near AdamW's 1e-8, so that the length of a gradient counts
def test_training_is_clipped_adamw_on_every_weight(clip, vectors, tmp_path):
    recipe = small_recipe(
        train={"steps": 3, "learning_rate": RATE, "weight_decay": DECAY, "gradient_clip": clip},
        quantisation={"levels_per_step": 0},
    )
    expected = adamw(vectors, recipe, clip)
    found = _optimise(vectors, recipe, tmp_path, resume=False, quiet=True)
    start = start_objective(vectors, recipe).state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=2e-5, rtol=1e-4, msg=name)
        assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("thresholds_from", ["documents", "both"])
@pytest.mark.parametrize("settle", [True, False])
def test_settled_thresholds_are_quantiles_and_others_the_moving_average(settle, thresholds_from, vectors, tmp_path):
    recipe = small_recipe(quantisation={"settle": settle, "thresholds_from": thresholds_from})
    objective = _optimise(vectors, recipe, tmp_path, resume=False, quiet=True)
    rows = [vectors.documents] + [vectors.queries] * (thresholds_from == "both")
    quantiles = np.quantile(adapt(objective, np.concatenate(rows)).numpy(), [0.25, 0.5, 0.75], axis=0)
    average = objective.thresholds.of("2").numpy()
    written = load_adapter(train(vectors, recipe, tmp_path))[0]["thresholds.2"]
    np.testing.assert_allclose(written, quantiles if settle else average, atol=1e-6)
    assert np.abs(average - quantiles).max() > 1e-4


def other_vectors(vectors):
    documents, queries, pairs = vectors.documents.copy(), vectors.queries.copy(), vectors.pairs.copy()
    documents[[0, 1]], queries[[0, 1]] = documents[[1, 0]], queries[[1, 0]]
    pairs[3, 1] = (pairs[3, 1] + 1) % len(documents)
    return {
        "a document": dataclasses.replace(vectors, documents=documents),
        "a query": dataclasses.replace(vectors, queries=queries),
        "a pair": dataclasses.replace(vectors, pairs=pairs),
        "no queries": TrainVectors(vectors.documents),
    }


@pytest.mark.parametrize("what", ["a document", "a query", "a pair", "no queries"])
def test_a_run_on_other_vectors_is_not_continued(what, vectors, tmp_path):
    other = other_vectors(vectors)[what]
    recipe = small_recipe(train={"steps": 2})
    assert fingerprint(recipe, vectors) == fingerprint(recipe, dataclasses.replace(vectors))
    train(vectors, recipe, tmp_path)
    with pytest.raises(CheckpointError, match="is of another recipe, seed or set of vectors"):
        train(other, recipe, tmp_path, resume=True)


def test_a_history_whose_write_is_cut_off_stays_as_it_was(vectors, tmp_path, monkeypatch):
    recipe = small_recipe(train={"steps": 2, "checkpoint_every": 1})
    train(vectors, recipe, tmp_path)
    before = (tmp_path / "history.json").read_bytes()

    def cut_off(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(vectors, small_recipe(train={"steps": 3, "checkpoint_every": 1}), tmp_path)
    assert (tmp_path / "history.json").read_bytes() == before
    assert [step["step"] for step in json.loads(before)] == [0, 1]
