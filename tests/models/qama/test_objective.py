"""The whole objective of a batch, restated in plain numpy from the equations of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.qama.batches import Batch, BatchSource
from models.qama.objective import Objective
from models.qama.recipe import LOSSES
from models.qama.train import start_objective
from tests.models.qama.conftest import DIMS, PREFIXES, small_recipe

STEP, STEPS = 3, 6  # progress 0.5
LEVELS = {"0.5": 0.25, "1": 1.0, "1.5": 0.5, "2": 2.0, "hybrid": 0.75}
THRESHOLDS = {"0.5": 1, "1": 1, "1.5": 2, "2": 3}
MOMENTUM, FLOAT_WEIGHT = 0.8, 0.7
CONSTANTS = {
    "temperature": 0.2, "contrast_temperature": 0.3, "rank_sharpness": 7.0, "rank_offsets": 5,
    "bottleneck_threshold": 0.15, "bottleneck_power": 0.4,
    "range_weight": 0.6, "range_lower": -0.3, "range_upper": 0.25,
}  # fmt: skip
WEIGHTS = {name: [0.3 + 0.1 * i, 0.9 - 0.07 * i, 0.5 + 0.03 * i] for i, name in enumerate(LOSSES)}
CASES = {
    "all levels": {},
    "thresholds from both, values as they are": {
        "quantisation": {"thresholds_from": "both"}, "constants": {"value_scale": "one"},
    },
    "two levels in turn": {"quantisation": {"levels_per_step": 2}},
    "no codes": {"quantisation": {"straight_through": False}},
    "levels 1 and 0.5": {"quantisation": {"levels": {"0.5": 0.5, "1": 2.0}}},
}  # fmt: skip


@pytest.fixture(params=CASES)
def recipe(request):
    quantisation = {"levels": LEVELS, "levels_per_step": 0, "momentum": MOMENTUM, "float_weight": FLOAT_WEIGHT}
    changes = CASES[request.param]
    return small_recipe(
        quantisation={**quantisation, **changes.get("quantisation", {})},
        constants={**CONSTANTS, **changes.get("constants", {})},
        losses=WEIGHTS,
        train={"steps": STEPS},
    )


@pytest.fixture
def objective(recipe, vectors) -> Objective:
    """Weights and thresholds away from their start, so that nothing is the identity and no threshold a median."""
    made = start_objective(vectors, recipe)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for level in made.thresholds.levels:
            made.thresholds.of(level).add_(0.04)
    return made


@pytest.fixture
def batch(recipe, vectors) -> Batch:
    drawn = BatchSource(vectors, recipe.batch, seed=1).batch(0)
    others = np.random.default_rng(0).random(drawn.others_QN.shape) < 0.2
    others[np.arange(len(others)), drawn.positives_Q] = False
    return Batch(drawn.queries_QD, drawn.documents_ND, drawn.positives_Q, others)


def softmax(rows):
    powers = np.exp(rows)
    return powers / powers.sum(axis=1, keepdims=True)


def similarity_losses(teacher, student, batch, columns):
    """Eq. 9, 12, 13 and 14 of one student matrix."""
    p, q = softmax(teacher / 0.2), softmax(student / 0.2)
    offsets = {1 + i * (columns - 2) // 4 for i in range(5)}
    ordered = []
    for j in range(columns):
        for offset in offsets:
            k = (j + offset) % columns
            x, y = (1 / (1 + np.exp(-7 * (s[:, j] - s[:, k]))) for s in (teacher, student))
            ordered.append(x * (1 - y) + y * (1 - x))
    negatives = np.where(batch.others_QN, 0, np.exp(student / 0.3))
    own = np.exp(student[np.arange(len(student)), batch.positives_Q] / 0.3)
    return {
        "similarity": np.mean((teacher - student) ** 2),
        "kl": np.mean(np.sum((p * np.log(p / q) + q * np.log(q / p)) / 2, axis=1)),
        "rank": np.mean(ordered),
        "contrast": -np.mean(np.log(own / negatives.sum(axis=1))),
    }


def regularisers(values, thresholds, prefix, scale):
    """Eq. 15-18 of one prefix of all vectors of a batch, halfway through training."""
    dims = PREFIXES[prefix]
    part = values[:, :dims]
    size = np.abs(part * scale)
    added = values[:, PREFIXES[prefix - 1] : dims]
    before = [values[:, :d] for d in PREFIXES[:prefix]]
    across = [added.T @ (b / np.linalg.norm(b, axis=1, keepdims=True)) for b in before]
    outside = np.maximum(0, -0.3 - part * scale) ** 2 + np.maximum(0, part * scale - 0.25) ** 2
    away = []
    for level in thresholds:
        if level != "0.5":
            distances = np.abs(part[:, None] - thresholds[level][:, :dims]) * scale
            away.append(np.mean(np.exp(-distances.min(axis=1)) + 0.6 * outside))
    return {
        "bottleneck": np.mean(np.sum((np.arange(1, dims + 1) / dims) * (size**2 / (0.15 + size)) ** 0.4, axis=1)),
        "orthogonality": sum(np.sqrt(np.sum(matrix**2)) for matrix in across) / len(values),
        "variance": (np.exp(0.5) - 1) / (np.e - 1) * np.sum(np.exp(-np.std(part * scale, axis=0, ddof=1))),
        "quantization": 0.6 * np.mean(away),
    }


def code_bits(values, pairs, thresholds, level, dims):
    """Bits of the code of the first `dims` dimensions, (B, bits); a hybrid has a quarter of all dimensions a level."""
    quarter = DIMS // 4
    runs = [(level, 0, DIMS)]
    if level == "hybrid":
        runs = [(plain, i * quarter, (i + 1) * quarter) for i, plain in enumerate(("2", "1.5", "1", "0.5"))]
    found = []
    for plain, first, last in runs:
        source, step = (pairs, 2) if plain == "0.5" else (values, 1)
        own = slice(first // step, min(last, dims) // step)
        bits = source[:, None, own] > thresholds[plain][:, own]
        found.append(bits.reshape(len(values), -1))
    return np.concatenate(found, axis=1)


def code_matrices(values, pairs, thresholds, level, queries, teacher):
    """Hamming similarities of queries and documents at every prefix, with the teacher's mean and spread."""
    for dims in PREFIXES:
        bits = code_bits(values, pairs, thresholds, level, dims)
        distances = (bits[:queries, None] != bits[None, queries:]).sum(axis=2)
        raw = 1 - 2 * distances / bits.shape[1]
        yield (raw - raw.mean()) / raw.std() * teacher.std() + teacher.mean()


def float_matrices(values, queries):
    for dims in PREFIXES:
        part = values[:, :dims] / np.linalg.norm(values[:, :dims], axis=1, keepdims=True)
        yield part[:queries] @ part[queries:].T


def expected_turn(quantisation):
    """Levels of the step and their weights."""
    if not quantisation.straight_through:
        return {}
    if not quantisation.levels_per_step:
        return quantisation.levels
    names = list(LEVELS)
    return {names[(STEP * 2 + i) % 5]: LEVELS[names[(STEP * 2 + i) % 5]] * 5 / 2 for i in range(2)}


def expected_thresholds(objective, values, pairs, queries):
    """Eq. 2 with the quantiles of eq. 1."""
    documents_only = objective.recipe.quantisation.thresholds_from == "documents"
    found = {}
    for level in objective.thresholds.levels:
        count = THRESHOLDS[level]
        source = (pairs if level == "0.5" else values)[queries if documents_only else 0 :]
        quantiles = np.quantile(source, [(i + 1) / (count + 1) for i in range(count)], axis=0)
        found[level] = MOMENTUM * objective.thresholds.of(level).numpy() + (1 - MOMENTUM) * quantiles
    return found


@torch.no_grad()
def restated(objective, batch):
    """Parts of the loss by name, and the thresholds after the step, in float64."""
    both = objective.adapter(torch.from_numpy(np.concatenate([batch.queries_QD, batch.documents_ND])))
    pairs = objective.thresholds.reducer(both).numpy().astype(float)
    values, queries = both.numpy().astype(float), len(batch.queries_QD)
    thresholds = expected_thresholds(objective, values, pairs, queries)
    teacher = batch.queries_QD.astype(float) @ batch.documents_ND.astype(float).T
    matrices = [(FLOAT_WEIGHT, float_matrices(values, queries))]
    for level, share in expected_turn(objective.recipe.quantisation).items():
        matrices.append((share, code_matrices(values, pairs, thresholds, level, queries, teacher)))
    parts = dict.fromkeys(LOSSES, 0.0)
    for share, students in matrices:
        for prefix, student in enumerate(students):
            for name, loss in similarity_losses(teacher, student, batch, teacher.shape[1]).items():
                parts[name] += share * WEIGHTS[name][prefix] * loss
    scale = 4.0 if objective.recipe.constants.value_scale == "root_d" else 1.0
    for prefix in range(len(PREFIXES)):
        for name, loss in regularisers(values, thresholds, prefix, scale).items():
            parts[name] += WEIGHTS[name][prefix] * loss
    return parts, thresholds


def test_the_objective_is_eq_8_of_all_its_losses(objective, batch):
    parts, thresholds = restated(objective, batch)
    total, found = objective(batch, STEP)
    assert found == pytest.approx(parts, rel=1e-4)
    assert float(total.detach()) == pytest.approx(sum(parts.values()), rel=1e-4)
    for level, expected in thresholds.items():
        np.testing.assert_allclose(objective.thresholds.of(level).numpy(), expected, atol=1e-6)


def test_only_losses_with_a_weight_are_in_the_total(vectors):
    recipe = small_recipe(losses=dict.fromkeys(LOSSES, 0.0) | {"kl": 1.0})
    batch = BatchSource(vectors, recipe.batch, seed=1).batch(0)
    total, parts = start_objective(vectors, recipe)(batch, 0)
    assert {name for name, part in parts.items() if part} == {"kl"}
    assert float(total.detach()) == pytest.approx(parts["kl"])


def test_every_loss_of_the_codes_has_a_gradient_to_every_weight(objective, batch):
    """With codes in the losses, the FFN learns from them, and so does the pair FFN of 0.5 bit."""
    total, _ = objective(batch, STEP)
    total.backward()
    trained = {name for name, weight in objective.named_parameters() if weight.grad is not None and weight.grad.any()}
    turn = objective.levels_of(STEP)
    wanted = {name for name, _ in objective.named_parameters() if {"0.5", "hybrid"} & set(turn) or "adapter" in name}
    assert trained == wanted
