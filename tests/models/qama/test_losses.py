"""Every loss against the equation of the paper, written out in plain loops over floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.qama import losses

rng = np.random.default_rng(3)
TEACHER = rng.uniform(-1, 1, (4, 5))
STUDENT = rng.uniform(-1, 1, (4, 5))
VALUES = rng.normal(0, 0.6, (6, 8))
PREFIXES = (2, 4, 8)


def tensor(array):
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def test_cosines_are_dot_products_of_unit_rows():
    a, b = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    found = losses.cosines(tensor(a), tensor(b)).numpy()
    for i in range(3):
        for j in range(5):
            dot = sum(a[i, d] * b[j, d] for d in range(4))
            lengths = math.sqrt(sum(x * x for x in a[i])) * math.sqrt(sum(x * x for x in b[j]))
            assert found[i, j] == pytest.approx(dot / lengths)


def test_similarity_mse_is_eq_9_divided_by_pairs():
    total = sum((TEACHER[i, j] - STUDENT[i, j]) ** 2 for i in range(4) for j in range(5))
    assert float(losses.similarity_mse(tensor(TEACHER), tensor(STUDENT))) == pytest.approx(total / 20)


def test_symmetric_kl_is_eq_12_averaged_over_rows():
    total = 0.0
    for row_x, row_y in zip(TEACHER / 0.3, STUDENT / 0.3, strict=True):
        p, q = softmax(row_x), softmax(row_y)
        total += 0.5 * sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert float(losses.symmetric_kl(tensor(TEACHER), tensor(STUDENT), 0.3)) == pytest.approx(total / 4)


def test_rank_disagreement_is_one_minus_eq_13_over_its_pairs():
    agreement, pairs = 0.0, 0
    for i in range(4):
        for j in range(5):
            for k in range(5):
                if j != k:
                    x = sigmoid((TEACHER[i, j] - TEACHER[i, k]) * 7)
                    y = sigmoid((STUDENT[i, j] - STUDENT[i, k]) * 7)
                    agreement += 2 * x * y  # (j, k) and (k, j) together are the chance that both order it alike
                    pairs += 1
    assert float(losses.rank_disagreement(tensor(TEACHER), tensor(STUDENT), 7.0)) == pytest.approx(
        1 - agreement / pairs
    )


def test_rank_disagreement_of_some_offsets_looks_at_those_pairs_only():
    offsets = torch.tensor([1, 3])
    total = 0.0
    for i in range(4):
        for j in range(5):
            for offset in (1, 3):
                k = (j + offset) % 5
                x = sigmoid((TEACHER[i, j] - TEACHER[i, k]) * 7)
                y = sigmoid((STUDENT[i, j] - STUDENT[i, k]) * 7)
                total += x * (1 - y) + y * (1 - x)
    assert float(losses.rank_disagreement(tensor(TEACHER), tensor(STUDENT), 7.0, offsets)) == pytest.approx(total / 40)


def test_rank_disagreement_falls_to_zero_when_orders_agree_sharply():
    scores = tensor([[0.1, 0.5, 0.9]])
    assert float(losses.rank_disagreement(scores, scores * 2, 1000.0)) < 1e-6
    assert float(losses.rank_disagreement(scores, -scores, 1000.0)) == pytest.approx(1.0)


def test_contrastive_is_eq_14_averaged_over_rows():
    positives = [2, 0, 4, 1]
    total = 0.0
    for row, positive in zip(STUDENT, positives, strict=True):
        powers = [math.exp(x / 0.2) for x in row]
        negatives = sum(power for n, power in enumerate(powers) if n != positive)
        total -= math.log(powers[positive] / (powers[positive] + negatives))
    assert float(losses.contrastive(tensor(STUDENT), torch.tensor(positives), 0.2)) == pytest.approx(total / 4)


def test_contrastive_leaves_other_relevant_columns_out_of_the_denominator():
    positives, others = [2, 0, 4, 1], [{3}, set(), {0, 1}, {4}]
    total = 0.0
    for row, positive, relevant in zip(STUDENT, positives, others, strict=True):
        powers = [math.exp(x / 0.2) for x in row]
        total -= math.log(powers[positive] / sum(power for n, power in enumerate(powers) if n not in relevant))
    mask = torch.tensor([[n in relevant for n in range(5)] for relevant in others])
    student = tensor(STUDENT).requires_grad_()
    found = losses.contrastive(student, torch.tensor(positives), 0.2, mask)
    found.backward()
    assert float(found.detach()) == pytest.approx(total / 4)
    assert torch.equal(student.grad == 0, mask)


def test_information_bottleneck_is_eq_15_averaged_over_vectors():
    total = 0.0
    for row in VALUES:
        for i, x in enumerate(row, start=1):
            total += i / 8 * (abs(x) ** 2 / (0.1 + abs(x))) ** 0.3
    assert float(losses.information_bottleneck(tensor(VALUES))) == pytest.approx(total / 6)


def test_information_bottleneck_has_a_finite_gradient_at_zero():
    values = torch.zeros(2, 3, requires_grad=True)
    losses.information_bottleneck(values).backward()
    assert torch.isfinite(values.grad).all()


def plain_orthogonality(levels):
    """Eq. 16 for some levels l, in loops."""
    total = 0.0
    for level in levels:
        added = VALUES[:, PREFIXES[level - 1] : PREFIXES[level]]
        for j in range(level):
            before = VALUES[:, : PREFIXES[j]]
            squares = 0.0
            for a in range(added.shape[1]):
                for b in range(before.shape[1]):
                    dot = sum(
                        added[n, a] * before[n, b] / math.sqrt(sum(x * x for x in before[n]))
                        for n in range(len(VALUES))
                    )
                    squares += dot * dot
            total += math.sqrt(squares)
    return total


@pytest.mark.parametrize("level", [1, 2])
def test_orthogonality_of_one_level_is_its_terms_of_eq_16(level):
    found = losses.level_orthogonality(tensor(VALUES), PREFIXES, level)
    assert float(found) == pytest.approx(plain_orthogonality([level]) / 6)


def test_the_first_level_has_nothing_to_be_orthogonal_to():
    assert float(losses.level_orthogonality(tensor(VALUES), PREFIXES, 0)) == 0


@pytest.mark.parametrize(("step", "steps"), [(0, 10), (3, 10), (10, 10)])
def test_variance_control_is_eq_17(step, steps):
    ramp = max(0.2, (math.exp(step / steps) - 1) / (math.e - 1))
    total = 0.0
    for column in VALUES.T:
        mean = sum(column) / 6
        total += math.exp(-math.sqrt(sum((x - mean) ** 2 for x in column) / 5))
    assert float(losses.variance_control(tensor(VALUES), step / steps)) == pytest.approx(ramp * total)


def test_quantization_is_eq_18_with_the_range_of_eq_19():
    thresholds = np.sort(rng.normal(0, 0.5, (3, 8)), axis=0)
    total = 0.0
    for row in VALUES:
        for d, x in enumerate(row):
            near = min(abs(x - thresholds[i, d]) for i in range(3))
            outside = max(0, -0.4 - x) ** 2 + max(0, x - 0.5) ** 2
            total += math.exp(-near) + 0.7 * outside
    weight = 0.2 + 0.8 * 0.25
    found = losses.quantization(tensor(VALUES), tensor(thresholds), 0.25, lower=-0.4, upper=0.5, range_weight=0.7)
    assert float(found) == pytest.approx(weight * total / 48)


def test_quantization_pushes_a_value_away_from_its_nearest_threshold():
    values = torch.tensor([[0.1]], requires_grad=True)
    thresholds = torch.tensor([[0.0], [1.0]])
    losses.quantization(values, thresholds, 1.0, lower=-3, upper=3, range_weight=1.0).backward()
    assert values.grad.item() < 0  # a step against the gradient moves 0.1 up, away from 0
