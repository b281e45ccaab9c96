"""The adapter's form, its starts, and its nested prefixes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.qama.network import Adapter, prefix_slices
from models.qama.recipe import NetworkTable
from models.qama.start import balanced_rotation, nested_rotation
from tests.models.qama.conftest import DIMS, PREFIXES


def adapter(start, vectors, expansion=3):
    table = NetworkTable(prefixes=PREFIXES, expansion=expansion, start=start)
    made = Adapter(table)
    made.initialise(table, vectors.documents, seed=0)
    return made


@pytest.mark.parametrize("start", ["random", "residual"])
def test_the_adapter_is_the_ffn_of_section_3_3_with_its_residual(start, vectors):
    made = adapter(start, vectors)
    with torch.no_grad():
        for part in made.parameters():
            part.normal_(0, 0.3)
    t = {name.split(".")[1]: array for name, array in made.tensors().items()}
    x = vectors.documents[:5].astype(float)
    inner = x @ t["weight_1"].T + t["bias_1"]
    gelu = np.vectorize(lambda u: u * 0.5 * (1 + math.erf(u / math.sqrt(2))))(inner)
    z = float(t["residual"]) * x + gelu @ t["weight_2"].T + t["bias_2"]
    expected = z / np.linalg.norm(z, axis=1, keepdims=True)
    found = made(torch.from_numpy(vectors.documents[:5])).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert float(t["residual"]) == (1.0 if start == "residual" else 0.0)


@pytest.mark.parametrize("start", ["residual", "none"])
def test_an_untrained_adapter_of_these_starts_is_the_identity(start, vectors):
    found = adapter(start, vectors)(torch.from_numpy(vectors.documents)).detach().numpy()
    np.testing.assert_allclose(found, vectors.documents, atol=1e-6)


@pytest.mark.parametrize("start", ["rotation", "nested_rotation"])
def test_an_untrained_rotation_keeps_every_cosine(start, vectors):
    found = adapter(start, vectors)(torch.from_numpy(vectors.documents)).detach().numpy()
    np.testing.assert_allclose(found @ found.T, vectors.documents @ vectors.documents.T, atol=1e-5)
    assert not np.allclose(found, vectors.documents, atol=0.1)


def test_the_rotation_start_passes_exactly_its_rotation(vectors):
    found = adapter("rotation", vectors)(torch.from_numpy(vectors.documents)).detach().numpy()
    np.testing.assert_allclose(found, vectors.documents @ balanced_rotation(vectors.documents, 0), atol=1e-5)


def test_a_balanced_rotation_lowers_the_error_of_sign_codes(vectors):
    centred = vectors.documents - vectors.documents.mean(axis=0)

    def error(rotated):
        return np.square(rotated - np.sign(rotated) * np.abs(rotated).mean()).sum()

    random, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((DIMS, DIMS)))
    assert error(centred @ balanced_rotation(vectors.documents, 0)) < 0.95 * error(centred @ random)


def test_a_nested_rotation_puts_the_principal_components_first(vectors):
    rotation = nested_rotation(vectors.documents, PREFIXES, 0)
    centred = vectors.documents - vectors.documents.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2]
    for dims in PREFIXES:
        kept = np.square(centred @ rotation[:, :dims]).sum()
        assert kept == pytest.approx(np.square(centred @ components[:dims].T).sum(), rel=1e-3)


def test_prefixes_are_slices_of_one_vector(vectors):
    whole = torch.from_numpy(vectors.documents)
    slices = prefix_slices(whole, PREFIXES)
    assert [part.shape[1] for part in slices] == list(PREFIXES)
    for part in slices:
        assert torch.equal(part, whole[:, : part.shape[1]])


def test_thresholds_only_has_nothing_to_train_or_write(vectors):
    made = adapter("none", vectors)
    assert list(made.parameters()) == []
    assert made.tensors() == {}
