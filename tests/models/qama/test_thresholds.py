"""Thresholds, codes, and the gradient through them, against numpy and the packed codes that serve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.qama.thresholds import PairReducer, Thresholds, code_similarities
from service.model.layout import BITS_PER_VALUE, LEVELS, code_layout
from service.model.packing import pack_values, unpack_bits
from tests.models.qama.conftest import PREFIXES

ALL = tuple(BITS_PER_VALUE)


@pytest.fixture
def thresholds(vectors):
    made = Thresholds(ALL, PREFIXES, pair_hidden=4, momentum=0.9)
    made.reducer.initialise(torch.Generator().manual_seed(0))
    made.start(torch.from_numpy(vectors.documents))
    return made


@pytest.mark.parametrize("level", ["1", "1.5", "2"])
def test_thresholds_start_as_evenly_spaced_quantiles(level, thresholds, vectors):
    count = BITS_PER_VALUE[level]
    expected = np.quantile(vectors.documents, [i / (count + 1) for i in range(1, count + 1)], axis=0)
    np.testing.assert_allclose(thresholds.of(level).numpy(), expected, atol=1e-6)


def test_half_bit_thresholds_are_medians_of_the_reduced_pairs(thresholds, vectors):
    reduced = thresholds.reducer(torch.from_numpy(vectors.documents)).detach().numpy()
    np.testing.assert_allclose(thresholds.of("0.5").numpy()[0], np.median(reduced, axis=0), atol=1e-6)


def test_an_update_is_the_moving_average_of_eq_2(thresholds, vectors):
    before = {level: thresholds.of(level).clone().numpy() for level in ALL}
    batch = vectors.documents[:30]
    thresholds.update(torch.from_numpy(batch))
    for level in ("1", "1.5", "2"):
        count = BITS_PER_VALUE[level]
        quantiles = np.quantile(batch, [i / (count + 1) for i in range(1, count + 1)], axis=0)
        np.testing.assert_allclose(thresholds.of(level).numpy(), 0.9 * before[level] + 0.1 * quantiles, atol=1e-6)


def test_a_value_counts_the_thresholds_below_it(thresholds, vectors):
    layout = code_layout("2", PREFIXES)
    found = thresholds.quantise(torch.from_numpy(vectors.documents), layout).numpy()
    limits = thresholds.of("2").numpy()
    for n in range(0, 120, 17):
        for d in range(16):
            assert found[n, d] == sum(vectors.documents[n, d] > limits[i, d] for i in range(3))
    assert set(np.unique(found)) == {0, 1, 2, 3}


def test_hybrid_quantises_its_quarters_at_falling_levels(thresholds, vectors):
    layout = code_layout("hybrid", PREFIXES)
    found = thresholds.quantise(torch.from_numpy(vectors.documents), layout).numpy()
    plain = {
        level: thresholds.quantise(torch.from_numpy(vectors.documents), code_layout(level, PREFIXES)).numpy()
        for level in ALL
    }
    expected = np.concatenate(
        [plain["2"][:, :4], plain["1.5"][:, 4:8], plain["1"][:, 8:12], plain["0.5"][:, 6:8]], axis=1
    )
    np.testing.assert_array_equal(found, expected)


def test_the_pair_ffn_is_eq_20(vectors):
    reducer = PairReducer(8, 3)
    with torch.no_grad():
        for part in reducer.parameters():
            part.normal_(generator=torch.Generator().manual_seed(1))
    w1, b1, w2, b2 = (part.detach().numpy().astype(float) for part in reducer.parameters())
    row = vectors.documents[0].astype(float)
    found = reducer(torch.from_numpy(vectors.documents[:1]))[0].detach().numpy()
    for pair in range(8):
        total = b2[pair]
        for unit in range(3):
            u = w1[pair, unit, 0] * row[2 * pair] + w1[pair, unit, 1] * row[2 * pair + 1] + b1[pair, unit]
            total += w2[pair, unit] * u * 0.5 * (1 + math.erf(u / math.sqrt(2)))
        assert found[pair] == pytest.approx(total, abs=1e-5)


def test_an_untrained_pair_ffn_adds_its_pair(vectors):
    reducer = PairReducer(8, 4)
    reducer.initialise(torch.Generator().manual_seed(0))
    found = reducer(torch.from_numpy(vectors.documents)).detach().numpy()
    np.testing.assert_allclose(found, vectors.documents[:, ::2] + vectors.documents[:, 1::2], atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_code_similarities_are_those_of_the_packed_bits_at_every_prefix(level, thresholds, vectors):
    queries, documents = torch.from_numpy(vectors.queries[:6]), torch.from_numpy(vectors.documents[:9])
    signs = [{x: thresholds.signs(part, x, 3.0) for x in ALL} for part in (queries, documents)]
    found = code_similarities(*signs, level, PREFIXES)
    for prefix, dims in enumerate(PREFIXES):
        layout = code_layout(level, PREFIXES)
        bits = [
            unpack_bits(pack_values(thresholds.quantise(part, layout).numpy(), layout), layout)[
                :, : layout.bits_of(dims)
            ]
            for part in (queries, documents)
        ]
        distances = (bits[0][:, None, :] != bits[1][None]).sum(axis=2)
        expected = 1 - 2 * distances / layout.bits_of(dims)
        np.testing.assert_allclose(found[prefix].detach().numpy(), expected, atol=1e-6)


def test_signs_pass_the_slope_of_tanh(thresholds):
    value = torch.full((1, 16), 0.07, requires_grad=True)
    signs = thresholds.signs(value, "2", 3.0)
    assert set(signs.detach().unique().tolist()) <= {-1.0, 1.0}
    signs.sum().backward()
    offsets = (0.07 - thresholds.of("2").numpy()) * 3.0 * 4.0
    np.testing.assert_allclose(value.grad[0].numpy(), (12.0 / np.cosh(offsets) ** 2).sum(axis=0), rtol=1e-4)
