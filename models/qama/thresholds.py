"""Thresholds and codes: quantiles, their moving average, and codes that let a gradient through.

Shapes: B vectors, D dimensions, P = D/2 pairs, R hidden units of the pair FFN, U values, T thresholds of a level.

A level with T thresholds has T+1 values, written as T bits of a thermometer code (eq. 22-23): bit t says whether the
value lies above threshold t. As signs ±1 the bits make Hamming similarity a dot product: n - 2·distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from models.qama.start import FloatArray
from service.model.adapter import REDUCE
from service.model.layout import BITS_PER_VALUE, CodeLayout, PlainLevel, Run, code_layout


def even_quantiles(thresholds: int) -> Tensor:
    """q_i of eq. 1: evenly spaced in (0, 1), so that all values of a level are equally frequent."""
    return torch.arange(1, thresholds + 1) / (thresholds + 1)


class PairReducer(nn.Module):
    """The small FFN of eq. 20, one for each pair of dimensions: w2 · GELU(w1 [x_2i, x_2i+1] + b1) + b2.

    It starts as the sum of the pair (GELU(u) - GELU(-u) = u), a projection whose sign is a fair bit.
    """

    def __init__(self, pairs: int, hidden: int) -> None:
        super().__init__()
        self.weight_1 = nn.Parameter(torch.zeros(pairs, hidden, 2))
        self.bias_1 = nn.Parameter(torch.zeros(pairs, hidden))
        self.weight_2 = nn.Parameter(torch.zeros(pairs, hidden))
        self.bias_2 = nn.Parameter(torch.zeros(pairs))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set the start; hidden units beyond the first two begin at random and silent."""
        scale = 10.0  # as network.PASS_SCALE: values near 0.05 reach the bend of GELU
        self.weight_1.normal_(0, scale / 2, generator=generator)
        self.weight_1[:, 0] = scale
        if self.weight_1.shape[1] > 1:
            self.weight_1[:, 1] = -scale
            self.weight_2[:, 1] = -1 / scale
        self.weight_2[:, 0] = 1 / scale

    def forward(self, adapted_BD: Tensor) -> Tensor:
        """Join neighbouring dimensions, (B, P)."""
        pairs_BP2 = adapted_BD.reshape(len(adapted_BD), -1, 2)
        hidden_BPR = F.gelu(torch.einsum("bpi,pri->bpr", pairs_BP2, self.weight_1) + self.bias_1)
        return (hidden_BPR * self.weight_2).sum(dim=-1) + self.bias_2


class Thresholds(nn.Module):
    """Thresholds of every plain level, shared by all prefixes, and the pair FFN of 0.5 bit.

    Attributes:
        levels: plain levels, in the order of their bits.
        prefixes: Matryoshka dimensions.
    """

    def __init__(self, levels: Sequence[str], prefixes: tuple[int, ...], pair_hidden: int, momentum: float) -> None:
        super().__init__()
        self.levels: tuple[PlainLevel, ...] = tuple(level for level in BITS_PER_VALUE if level in levels)
        self.prefixes = prefixes
        self.momentum = momentum
        for level in self.levels:
            width = prefixes[-1] // 2 if level == "0.5" else prefixes[-1]
            self.register_buffer(_buffer(level), torch.zeros(BITS_PER_VALUE[level], width))
        if "0.5" in self.levels:
            self.reducer = PairReducer(prefixes[-1] // 2, pair_hidden)

    def of(self, level: PlainLevel) -> Tensor:
        """Thresholds (T, D), or (1, P) at 0.5 bit, ascending along the first axis."""
        thresholds: Tensor = getattr(self, _buffer(level))
        return thresholds

    def values(self, adapted_BD: Tensor, level: PlainLevel) -> Tensor:
        """What the thresholds of a level are compared with: ẑ, or the reduced pairs."""
        reduced: Tensor = self.reducer(adapted_BD) if level == "0.5" else adapted_BD
        return reduced

    @torch.no_grad()
    def start(self, adapted_BD: Tensor) -> None:
        """Set all thresholds to the quantiles of these vectors (eq. 1)."""
        for level, batch in self._quantiles(adapted_BD).items():
            self.of(level).copy_(batch)

    @torch.no_grad()
    def update(self, adapted_BD: Tensor) -> None:
        """Move all thresholds toward the quantiles of a batch (eq. 2): μ old + (1 - μ) batch."""
        for level, batch in self._quantiles(adapted_BD).items():
            self.of(level).mul_(self.momentum).add_(batch, alpha=1 - self.momentum)

    def _quantiles(self, adapted_BD: Tensor) -> dict[PlainLevel, Tensor]:
        """Thresholds of these vectors alone; dimensions are sorted once for all levels."""
        ordered_BD = adapted_BD.sort(dim=0).values
        found = {}
        for level in self.levels:
            ordered = self.values(adapted_BD, level).sort(dim=0).values if level == "0.5" else ordered_BD
            found[level] = sorted_quantiles(ordered, even_quantiles(BITS_PER_VALUE[level]))
        return found

    @torch.no_grad()
    def quantise(self, adapted_BD: Tensor, layout: CodeLayout) -> Tensor:
        """Count the thresholds below each value (eq. 3), (B, U) uint8 in the order that `packing` takes."""
        parts = []
        for block in layout.blocks():
            for run in block:
                values, thresholds = self._cut(adapted_BD, run)
                parts.append((values[:, None, :] > thresholds).sum(dim=1, dtype=torch.uint8))
        return torch.cat(parts, dim=1)

    def _cut(self, adapted_BD: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        own = slice(run.first // 2, run.last // 2) if run.level == "0.5" else slice(run.first, run.last)
        return self.values(adapted_BD, run.level)[:, own], self.of(run.level)[:, own]

    def signs(self, adapted_BD: Tensor, level: PlainLevel, sharpness: float) -> Tensor:
        """Bits of a plain level as ±1 with a straight-through gradient (ours), (B, U, T).

        Forward the sign of x - θ, backward the slope of tanh(sharpness · √D · (x - θ)).
        """
        values_BU = self.values(adapted_BD, level)
        scale = sharpness * adapted_BD.shape[1] ** 0.5
        offset = (values_BU[:, :, None] - self.of(level).T) * scale
        soft = torch.tanh(offset)
        hard = torch.where(offset > 0, 1.0, -1.0)
        return soft + (hard - soft).detach()

    def tensors(self) -> dict[str, FloatArray]:
        """Thresholds and pair FFN as `service.model.adapter` names them."""
        tensors = {f"thresholds.{level}": self.of(level).cpu().numpy().copy() for level in self.levels}
        if "0.5" in self.levels:
            own = (self.reducer.weight_1, self.reducer.bias_1, self.reducer.weight_2, self.reducer.bias_2)
            tensors |= {name: part.detach().cpu().numpy().copy() for name, part in zip(REDUCE, own, strict=True)}
        return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def sorted_quantiles(ordered_BU: Tensor, quantiles_T: Tensor) -> Tensor:
    """Quantiles of columns that are sorted already, by linear interpolation, (T, U)."""
    place = quantiles_T.to(torch.float64) * (len(ordered_BU) - 1)
    below = place.floor().long()
    above = (below + 1).clamp_max(len(ordered_BU) - 1)
    return torch.lerp(ordered_BU[below], ordered_BU[above], (place - below).to(ordered_BU.dtype)[:, None])


def code_similarities(
    signs_q: dict[PlainLevel, Tensor], signs_n: dict[PlainLevel, Tensor], level: str, prefixes: tuple[int, ...]
) -> list[Tensor]:
    """Similarity of codes at every prefix, 1 - 2·distance / bits in [-1, 1] (eq. 24 stretched), each (Q, N).

    Prefixes are nested, so each adds the dot product of its new bits to the one before.
    """
    layout = code_layout(level, prefixes)
    total: Tensor | float = 0.0
    similarities = []
    for block, bits in zip(layout.blocks(), layout.prefix_bits, strict=True):
        for run in block:
            own = slice(run.first // 2, run.last // 2) if run.level == "0.5" else slice(run.first, run.last)
            total = total + signs_q[run.level][:, own].flatten(1) @ signs_n[run.level][:, own].flatten(1).T
        similarities.append(torch.as_tensor(total) / bits)
    return similarities


def _buffer(level: str) -> str:
    return f"bit_{level.replace('.', '_')}"
