"""RQ-VAE: residual quantization in the latent space of an autoencoder, the identifiers of TIGER (Rajput et al. 2023).

Shapes: N documents, D dimensions, Z latent dimensions, K codes of a level, L levels, B rows of a batch.

An MLP maps a vector to a latent point z; level l takes the codeword nearest to what the levels before left over; an MLP
back to D learns from the sum of the codewords (Lee et al. 2022; van den Oord et al. 2017 for the two middle terms):

    |x − x̂|² + Σ_l ( |sg[r_l] − e_l|² + β |r_l − sg[e_l]|² )

Vectors enter scaled by √D, so that coordinates have variance one and the first term is a mean over D; the latent terms
are means over Z. The published state folds the scale into the first layer: codes need nothing but the MLP and the
codebooks. Beyond TIGER: k-means starts from all latents (TIGER: the first batch), codes that nothing chose in an epoch
are revived, the learning rate falls on a half cosine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn

from models.quantizers.base import FitReport, Quantizer, QuantizerError, QuantizerSettings, mean_cosine, register
from models.quantizers.kmeans import KMeansSettings, kmeans
from models.quantizers.points import Points
from models.quantizers.residual import residual_codes, sum_codewords, without_nearest
from models.quantizers.settings import check_least, check_positive

Layer = tuple[Tensor, Tensor]  # weight (out, in) and bias (out)


@dataclass(frozen=True)
class RQVAESettings(QuantizerSettings):
    """Settings of RQ-VAE.

    Attributes:
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        latent: Z.
        beta: weight of the commitment term.
        epochs: passes of the training.
        batch_size: rows of a step.
        learning_rate: of Adam.
        kmeans_iterations: upper bound of k-means iterations a level at the start.
        revive: codes that no document chose in an epoch move to residuals of the batch served worst.
    """

    hidden: tuple[int, ...] = (512, 256, 128)
    latent: int = 32
    beta: float = 0.25
    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 0.001
    kmeans_iterations: int = 25
    revive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in self.hidden):
            raise QuantizerError(f"rq_vae.hidden must be whole numbers of at least 1, got {list(self.hidden)}")
        check_least("rq_vae", self, latent=1, beta=0, epochs=1, batch_size=1, kmeans_iterations=1)
        check_positive("rq_vae", self, "learning_rate")


@register
class RQVAE(Quantizer):
    """Autoencoder with residual quantization; kind "residual" after the tensors `projection.*` of its encoder."""

    system = "rq_vae"
    kind = "residual"
    settings_class = RQVAESettings
    in_vector_space = False

    def __init__(self, settings: RQVAESettings | None = None) -> None:
        super().__init__(settings)
        self.settings = settings or RQVAESettings()
        self.encoder: list[Layer] = []
        self.decoder: list[Layer] = []  # of training only: a state does not hold it

    def _fit(self, points: Points, bar: Progress) -> FitReport:
        trainer = _Trainer(self.settings, points)
        objective = trainer.run(bar)
        self.codebooks = [codebook.detach().clone() for codebook in trainer.codebooks]
        scale = math.sqrt(points.dim)
        self.encoder = _scaled(_layers(trainer.encoder), first=scale)
        self.decoder = _scaled(_layers(trainer.decoder), last=1 / scale)
        return FitReport((*objective, mean_cosine(self, points)), trainer.revived)

    def _encode(self, block_ND: Tensor) -> Tensor:
        return residual_codes(self.codebooks, through_layers(block_ND, self.encoder))

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        if not self.decoder:
            raise QuantizerError("an RQ-VAE that was restored has no decoder: fit it again to reconstruct")
        return through_layers(sum_codewords(self.codebooks, codes_NL), self.decoder)

    def _extra_tensors(self) -> dict[str, NDArray[Any]]:
        named = {}
        for number, (weight, bias) in enumerate(self.encoder):
            named[f"projection.weight_{number}"] = weight.cpu().numpy()
            named[f"projection.bias_{number}"] = bias.cpu().numpy()
        return named

    def _take_extra_tensors(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        count = sum(name.startswith("projection.weight_") for name in tensors)
        if not count:
            raise QuantizerError(f"a state of rq_vae needs the tensors projection.*, got {sorted(tensors)}")
        names = [(f"projection.weight_{number}", f"projection.bias_{number}") for number in range(count)]
        device = self.codebooks[0].device
        self.encoder = [(_tensor(tensors[w]).to(device), _tensor(tensors[b]).to(device)) for w, b in names]

    def _check_dim(self, dim: int) -> None:
        expected = self.encoder[0][0].shape[1]
        if dim != expected:
            raise QuantizerError(f"vectors have {dim} dimensions, the encoder takes {expected}: use the same encoder")


def through_layers(x_BD: Tensor, layers: list[Layer]) -> Tensor:
    """Apply an MLP with ReLU between its layers, as `service.model.quantizer` does."""
    for number, (weight, bias) in enumerate(layers):
        x_BD = F.linear(x_BD if number == 0 else F.relu(x_BD), weight, bias)
    return x_BD


def latent_loss(codebooks: list[Tensor], z_BZ: Tensor, codes_BL: Tensor, beta: float) -> Tensor:
    """Codebook and commitment terms of all levels, mean over rows and latent dimensions."""
    loss, residual_BZ = z_BZ.new_zeros(()), z_BZ
    for codebook_KZ, codes_B in zip(codebooks, codes_BL.T, strict=True):
        word_BZ = codebook_KZ[codes_B]
        loss = loss + F.mse_loss(word_BZ, residual_BZ.detach()) + beta * F.mse_loss(residual_BZ, word_BZ.detach())
        residual_BZ = residual_BZ - word_BZ.detach()
    return loss


class _Trainer:
    """Trains an autoencoder and its codebooks on unit points, scaled to variance one."""

    def __init__(self, settings: RQVAESettings, points: Points) -> None:
        scale = math.sqrt(points.dim)
        self._settings, self._points = settings, points.through(lambda block: block * scale)
        self._generator = torch.Generator().manual_seed(settings.seed)
        widths = [points.dim, *settings.hidden, settings.latent]
        self.encoder = _mlp(widths, self._generator).to(points.device)
        self.decoder = _mlp(widths[::-1], self._generator).to(points.device)
        self.codebooks = [codebook.requires_grad_() for codebook in self._start()]
        modules = [*self.encoder.parameters(), *self.decoder.parameters()]
        self._adam = torch.optim.Adam([*modules, *self.codebooks], lr=settings.learning_rate)
        self.revived = 0

    def _start(self) -> list[Tensor]:
        """K-means of all latents, then of what every level leaves over."""
        latents = [self.encoder(block) for _, block in self._points.blocks()]
        residual_NZ, codebooks = torch.cat(latents), []
        for level, codes in enumerate(self._settings.level_sizes):
            settings = KMeansSettings(iterations=self._settings.kmeans_iterations, seed=self._settings.seed + level)
            codebooks.append(kmeans(Points(residual_NZ, residual_NZ.device), codes, settings).centres)
            residual_NZ = without_nearest(codebooks[-1])(residual_NZ)
        return codebooks

    def run(self, bar: Progress) -> list[float]:
        """Train all epochs; gives the mean reconstruction cosine of each."""
        objective = []
        task = bar.add_task("rq-vae", total=self._settings.epochs)
        for epoch in range(self._settings.epochs):
            rate = (1 + math.cos(math.pi * epoch / self._settings.epochs)) / 2
            for group in self._adam.param_groups:
                group["lr"] = self._settings.learning_rate * rate
            objective.append(self._epoch(last=epoch == self._settings.epochs - 1))
            bar.update(task, advance=1, description=f"rq-vae (cosine {objective[-1]:.4f})")
        return objective

    def _epoch(self, last: bool) -> float:
        used = [torch.zeros(len(c), dtype=torch.bool, device=c.device) for c in self.codebooks]
        total, worst, worst_rows = 0.0, math.inf, torch.empty(0, dtype=torch.int64)
        shuffled = torch.randperm(self._points.rows, generator=self._generator)
        for rows in torch.split(shuffled, self._settings.batch_size):
            codes_BL, cosine_B = self._step(self._points.take(rows))
            total += float(cosine_B.double().sum())
            for level_used, codes_B in zip(used, codes_BL.T, strict=True):
                level_used[codes_B] = True
            if float(cosine_B.mean()) < worst:
                worst, worst_rows = float(cosine_B.mean()), rows
        if self._settings.revive and not last:  # what is revived needs an epoch to settle
            self._revive(used, self._points.take(worst_rows))
        return total / self._points.rows

    def _step(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z_BZ = self.encoder(x_BD)
            codes_BL = residual_codes(self.codebooks, z_BZ.detach())
            quantized_BZ = sum_codewords(self.codebooks, codes_BL)
            rebuilt_BD = self.decoder(z_BZ + (quantized_BZ - z_BZ).detach())  # straight through
            loss = F.mse_loss(rebuilt_BD, x_BD) + latent_loss(self.codebooks, z_BZ, codes_BL, self._settings.beta)
        self._adam.zero_grad()
        torch.autograd.backward(loss)
        self._adam.step()
        return codes_BL, F.cosine_similarity(rebuilt_BD.detach(), x_BD)

    def _revive(self, used: list[Tensor], x_BD: Tensor) -> None:
        """Move unused codes of every level to residuals of the given rows, those that are left with the most first."""
        residual_BZ = self.encoder(x_BD)
        for codebook_KZ, level_used in zip(self.codebooks, used, strict=True):
            dead = torch.nonzero(~level_used)[:, 0][: len(x_BD)]
            far = without_nearest(codebook_KZ)(residual_BZ).norm(dim=1)
            codebook_KZ[dead] = residual_BZ[far.argsort(descending=True)[: len(dead)]]
            for moment in ("exp_avg", "exp_avg_sq"):
                self._adam.state[codebook_KZ][moment][dead] = 0
            self.revived += len(dead)
            residual_BZ = without_nearest(codebook_KZ)(residual_BZ)


def _mlp(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between, He-initialised by the generator, biases zero."""
    modules: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        layer = nn.Linear(inside, outside)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _layers(mlp: nn.Sequential) -> list[Layer]:
    linear = (module for module in mlp if isinstance(module, nn.Linear))
    return [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linear]


def _scaled(layers: list[Layer], first: float = 1.0, last: float = 1.0) -> list[Layer]:
    """Fold a factor of the input into the first weight, and one of the output into the last layer."""
    weight, bias = layers[0]
    layers = [(weight * first, bias), *layers[1:]]
    weight, bias = layers[-1]
    return [*layers[:-1], (weight * last, bias * last)]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
