"""RQ-VAE against its equations, and its codes against the service's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.quantizers.base import QuantizerError, codes_to_tokens, make_quantizer
from models.quantizers.residual import residual_codes, sum_codewords
from models.quantizers.rq_vae import RQVAE, RQVAESettings, latent_loss
from service.model.quantizer import assign_sids

SIZES = (16, 12, 8)


def small(**changes: Any) -> RQVAE:
    table = {"level_sizes": SIZES, "hidden": (32, 16), "latent": 8, "epochs": 40, "batch_size": 100}
    return RQVAE(RQVAESettings(**(table | {"learning_rate": 0.01} | changes)))


@pytest.fixture(scope="module")
def fitted(vectors: NDArray[np.float32]) -> RQVAE:
    made = small()
    made.fit(vectors, progress=False)
    return made


def test_training_raises_the_cosine(vectors: NDArray[np.float32]) -> None:
    made = small()
    objective = made.fit(vectors, progress=False).objective
    rebuilt = made.reconstruct(made.encode(vectors))
    lengths = np.linalg.norm(rebuilt, axis=1)
    assert objective[0] < 0.2 < 0.55 < objective[-1]
    assert ((rebuilt * vectors).sum(1) / lengths).mean() == pytest.approx(objective[-1], abs=1e-4)
    assert 0.3 < lengths.mean() < 1.3  # the folded scale leads back to about unit vectors


def test_the_learning_rate_falls_to_zero_on_a_half_cosine(
    vectors: NDArray[np.float32], learning_rates: list[float]
) -> None:
    """600 documents are two steps an epoch."""
    small(epochs=10, batch_size=300).fit(vectors, progress=False)
    epochs = [0.01 * np.cos(np.pi / 2 * epoch / 10) ** 2 for epoch in range(10)]
    assert learning_rates == pytest.approx(np.repeat(epochs, 2).tolist())


def test_the_service_assigns_the_same_codes(fitted: RQVAE, vectors: NDArray[np.float32]) -> None:
    kind, tensors, level_sizes = fitted.state()
    assert kind == "residual"
    assert tensors["projection.weight_0"].shape == (32, 24)
    assert tensors["codebooks"].shape == (sum(SIZES), 8)
    tokens = assign_sids(vectors, kind, tensors, level_sizes)
    np.testing.assert_array_equal(tokens, codes_to_tokens(fitted.encode(vectors), level_sizes))


def test_what_was_learnt_makes_the_same_codes_but_cannot_reconstruct(
    fitted: RQVAE, vectors: NDArray[np.float32]
) -> None:
    again = RQVAE(fitted.settings)
    again.restore(fitted.learnt())
    codes = again.encode(vectors)
    np.testing.assert_array_equal(codes, fitted.encode(vectors))
    with pytest.raises(QuantizerError, match="restored has no decoder"):
        again.reconstruct(codes)
    with pytest.raises(QuantizerError, match="vectors have 23 dimensions, the encoder takes 24"):
        again.encode(vectors[:, :23])
    bare = {name: tensor for name, tensor in fitted.learnt().items() if name.startswith("codebook.")}
    with pytest.raises(QuantizerError, match=r"needs the tensors projection\.\*"):
        RQVAE(fitted.settings).restore(bare)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), beta=st.floats(0, 2))
def test_codes_and_losses_follow_the_definition(seed: int, beta: float) -> None:
    """Every row by itself, every codeword tried."""
    rng = np.random.default_rng(seed)
    books, z = [rng.normal(size=(k, 4)) for k in (5, 3)], rng.normal(size=(6, 4))
    torch_books, latent = [torch.from_numpy(b) for b in books], torch.from_numpy(z)
    codes = residual_codes(torch_books, latent)
    expected_loss, rebuilt = 0.0, np.zeros_like(z)
    for row in range(len(z)):
        residual = z[row]
        for level, book in enumerate(books):
            code = int(((residual - book) ** 2).sum(1).argmin())
            assert codes[row, level] == code
            expected_loss += (1 + beta) * ((residual - book[code]) ** 2).mean() / len(z)
            rebuilt[row] += book[code]
            residual = residual - book[code]
    assert float(latent_loss(torch_books, latent, codes, beta)) == pytest.approx(expected_loss)
    np.testing.assert_allclose(sum_codewords(torch_books, codes), rebuilt, atol=1e-6)


def test_gradients_stop_where_the_loss_says() -> None:
    """The first term moves codewords only, the second, weighted by β, latents only."""
    books = [torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)]
    z = torch.tensor([[0.8, 0.2]], requires_grad=True)
    latent_loss(books, z, torch.tensor([[0]]), 0.25).backward()
    torch.testing.assert_close(books[0].grad, torch.tensor([[0.2, -0.2], [0.0, 0.0]]))
    torch.testing.assert_close(z.grad, 0.25 * torch.tensor([[-0.2, 0.2]]))


def test_dead_codes_are_revived(vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks of copies have dead codes; training with revival uses them, without it most stay dead."""
    start = [torch.ones(size, 8) for size in SIZES]
    used = {}
    for revive in (True, False):
        monkeypatch.setattr("models.quantizers.rq_vae._Trainer._start", lambda _: [book.clone() for book in start])
        made = small(revive=revive)
        report = made.fit(vectors, progress=False)
        assert (report.revived > 0) == revive
        used[revive] = sum(len(np.unique(column)) for column in made.encode(vectors).T)
    assert used[True] > 0.8 * sum(SIZES)
    assert used[False] < 0.5 * sum(SIZES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"hidden": [8, 0]}, r"rq_vae.hidden must be whole numbers of at least 1, got \[8, 0\]"),
        ({"latent": 0}, r"rq_vae.latent is 0, must be at least 1"),
        ({"epochs": 0}, "rq_vae.epochs is 0, must be at least 1"),
        ({"depth": 3}, "rq_vae knows no setting 'depth'; allowed: level_sizes, seed, hidden, latent, beta"),
    ],
)
def test_settings_are_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        make_quantizer({"system": "rq_vae"} | table)
