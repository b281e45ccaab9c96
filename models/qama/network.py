"""The adapter: z = residual · x + W2 GELU(W1 x + b1) + b2, and its Matryoshka prefixes (section 3.3, eq. 4-7).

Shapes: B vectors, D dimensions, H = expansion · D hidden units.

The prefixes are slices of one ẑ = z / ‖z‖ (eq. 6), which makes them nested without a constraint (eq. 5). The paper's
FFN starts at random. A **rotation start** is exact within the same form: GELU(u) - GELU(-u) = u, so two hidden
units of opposite sign pass a dimension on unchanged, and W2 may rotate it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from models.qama.recipe import NetworkTable
from models.qama.start import FloatArray, balanced_rotation, nested_rotation
from service.model.adapter import FFN

# how far into the curve of GELU the passing units work: with values near 0.05, 10 puts them where it bends, so that
# training can bend it; the identity is exact at any scale
PASS_SCALE = 10.0


class Adapter(nn.Module):
    """The FFN. With `none` as its start it has no weights and gives its input.

    Attributes:
        prefixes: Matryoshka dimensions, ascending; the last is D.
        residual: what the input is multiplied by (a constant: 1 for a residual start, else 0).
    """

    def __init__(self, table: NetworkTable) -> None:
        super().__init__()
        self.prefixes = table.prefixes
        self.has_ffn = table.start != "none"
        dims = self.prefixes[-1]
        self.residual = 1.0 if table.start in ("none", "residual") else 0.0
        if self.has_ffn:
            self.expand = nn.Linear(dims, dims * table.expansion)
            self.contract = nn.Linear(dims * table.expansion, dims)

    def forward(self, unit_BD: Tensor) -> Tensor:
        """Unit vectors to ẑ, the adapted unit vectors that are quantised, (B, D)."""
        if not self.has_ffn:
            return unit_BD
        z_BD: Tensor = self.contract(F.gelu(self.expand(unit_BD)))
        return F.normalize(z_BD + self.residual * unit_BD if self.residual else z_BD, dim=1)

    @torch.no_grad()
    def initialise(self, table: NetworkTable, vectors_ND: FloatArray, seed: int) -> None:
        """Set the weights that training starts from.

        Args:
            table: its `start` says which.
            vectors_ND: unit vectors that rotations are fitted to.
            seed: of every random choice.
        """
        if not self.has_ffn:
            return
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.expand, self.contract):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
        if table.start == "residual":
            self.contract.weight.zero_()
        elif table.start == "rotation":
            self._pass_through(balanced_rotation(vectors_ND, seed))
        elif table.start == "nested_rotation":
            self._pass_through(nested_rotation(vectors_ND, self.prefixes, seed))

    def _pass_through(self, rotation_DD: FloatArray) -> None:
        """Let the first 2·D hidden units carry x @ rotation exactly; the others start silent."""
        dims = len(rotation_DD)
        identity = PASS_SCALE * torch.eye(dims)
        turned = torch.from_numpy(rotation_DD).T / PASS_SCALE
        self.contract.weight.zero_()
        self.expand.weight[: 2 * dims] = torch.cat([identity, -identity])
        self.contract.weight[:, : 2 * dims] = torch.cat([turned, -turned], dim=1)

    def tensors(self) -> dict[str, FloatArray]:
        """Weights as `service.model.adapter` names them; nothing without an FFN."""
        if not self.has_ffn:
            return {}
        parts = (self.expand.weight, self.expand.bias, self.contract.weight, self.contract.bias)
        arrays = [part.detach().cpu().numpy().astype(np.float32) for part in parts]
        return dict(zip(FFN, [*arrays, np.array(self.residual, np.float32)], strict=True))


def prefix_slices(adapted_BD: Tensor, prefixes: tuple[int, ...]) -> list[Tensor]:
    """e_k of every prefix (eq. 6-7): nested slices, not normalised again."""
    return [adapted_BD[:, :d] for d in prefixes]
