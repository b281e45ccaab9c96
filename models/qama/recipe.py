"""The recipe of an adapter: a TOML file that is checked before anything runs.

Every loss has its weight per prefix (eq. 8): a list with one number for each of `network.prefixes`, or one number
for all. `qama_paper.toml` beside `qama.toml` holds the setting of the paper.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from models.retriever.recipe import RecipeError, Table, check_table, read_table
from service.model.layout import LEVELS, CodeError, code_layout

__all__ = ["LOSSES", "AdapterRecipe", "LossTable", "RecipeError", "load_recipe", "parse_recipe"]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weights = Weight | tuple[Weight, ...]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class NetworkTable(Table):
    """`[network]`: prefixes D, hidden units as a multiple of d, and where training starts.

    start: `random` is the paper's FFN; `residual` adds the input and starts as the identity; `rotation` starts as an
    orthogonal rotation that balances the bits (ours, `start.py`); `nested_rotation` also orders dimensions by variance;
    `none` has no FFN at all (thresholds only).
    """

    prefixes: tuple[Count, ...] = (48, 96, 128, 192, 384)
    expansion: Count = 4
    start: Literal["random", "residual", "rotation", "nested_rotation", "none"] = "rotation"

    @model_validator(mode="after")
    def _possible(self) -> NetworkTable:
        if not self.prefixes or any(a >= b for a, b in pairwise(self.prefixes)):
            raise ValueError(f"prefixes must ascend, got {list(self.prefixes)}")
        if "rotation" in self.start and self.expansion < 2:
            raise ValueError(f"start {self.start!r} needs expansion 2 or more, got {self.expansion}")
        return self


class QuantisationTable(Table):
    """`[quantisation]`: levels that are trained for and written, thresholds, and how codes enter the losses.

    levels: level → weight of its codes' similarities in the losses; all plain levels are needed for `hybrid`.
    levels_per_step: take so many levels in turn at each step (their weights grow to match); 0 takes all of them.
    straight_through: feed the codes into the losses with a straight-through gradient (ours); the paper trains on the
        float prefixes only and leaves the rest to eq. 18.
    float_weight: weight of the float prefixes' similarities in the same losses.
    sharpness: how steep the straight-through slope is, in standard deviations of a dimension.
    momentum: μ of eq. 2.
    settle: at the end, take the quantiles of all vectors (eq. 1) instead of the moving average of batches.
    thresholds_from: whose quantiles thresholds follow.
    """

    levels: dict[str, Weight] = Field(default_factory=lambda: {"0.5": 0.25, "1": 1, "1.5": 1, "2": 1, "hybrid": 1})
    levels_per_step: int = Field(default=2, ge=0)
    straight_through: bool = True
    float_weight: Weight = 1.0
    sharpness: Positive = 3.0
    momentum: float = Field(default=0.95, ge=0, le=1)
    pair_hidden: Count = 8
    settle: bool = True
    thresholds_from: Literal["documents", "both"] = "documents"


class BatchTable(Table):
    """`[batch]`: what a step sees.

    documents: of a batch.
    groups: neighbourhoods that they come from; 0 draws documents at random, as the paper does.
    neighbours: size of a neighbourhood.
    queries: rows of the similarity matrix, real train queries first, the rest mixed from documents.
    real_share: share of real train queries among them (0 where there are none).
    mixup: greatest share of a second document in a mixed query.
    noise: length of the Gaussian noise added to it.
    """

    documents: int = Field(default=384, ge=4)
    groups: int = Field(default=32, ge=0)
    neighbours: int = Field(default=64, ge=2)
    queries: int = Field(default=256, ge=2)
    real_share: float = Field(default=0.5, ge=0, le=1)
    mixup: float = Field(default=0.5, ge=0, le=0.5)
    noise: float = Field(default=0.0, ge=0)


class TrainTable(Table):
    """`[train]`: AdamW with warm-up, cosine decay and gradient clipping; `steps` 0 trains nothing."""

    steps: int = Field(default=400, ge=0)
    learning_rate: Positive = 3e-4
    weight_decay: Weight = 0.0
    warmup: float = Field(default=0.1, ge=0, lt=1)
    decay: bool = True
    gradient_clip: Positive = 1.0
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    checkpoint_every: Count = 100


class LossTable(Table):
    """`[losses]`: weight of each loss per prefix, the w of eq. 8."""

    similarity: Weights = 0.0  # eq. 9-10
    kl: Weights = 1.0  # eq. 11-12
    rank: Weights = 0.0  # eq. 13
    contrast: Weights = 0.2  # eq. 14
    bottleneck: Weights = 0.0  # eq. 15
    orthogonality: Weights = 0.0  # eq. 16
    variance: Weights = 0.0  # eq. 17
    quantization: Weights = 0.0  # eq. 18-19


class ConstantTable(Table):
    """`[constants]`: the letters of eq. 11-19.

    value_scale: what values are multiplied by before eq. 15, 17, 18 see them: `root_d` makes 1 the standard deviation
        of a dimension of an isotropic unit vector (ours), so that exp(-x) and x0 = 0.1 act on numbers of their own
        size; `one` is the paper's.
    """

    temperature: Positive = 0.05
    contrast_temperature: Positive = 0.05
    rank_sharpness: Positive = 20.0
    rank_offsets: Count = 16
    bottleneck_threshold: Positive = 0.1
    bottleneck_power: Positive = 0.3
    range_weight: Weight = 0.1
    range_lower: float = -3.0
    range_upper: float = 3.0
    value_scale: Literal["root_d", "one"] = "root_d"


LOSSES: tuple[str, ...] = tuple(LossTable.model_fields)


class AdapterRecipe(Table):
    """A whole recipe."""

    name: str = "qama"
    notes: str = ""
    network: NetworkTable = NetworkTable()
    quantisation: QuantisationTable = QuantisationTable()
    batch: BatchTable = BatchTable()
    train: TrainTable = TrainTable()
    losses: LossTable = LossTable()
    constants: ConstantTable = ConstantTable()

    @model_validator(mode="after")
    def _levels_fit_the_prefixes(self) -> AdapterRecipe:
        levels = self.quantisation.levels
        if unknown := sorted(set(levels) - set(LEVELS)):
            raise ValueError(f"quantisation.levels: unknown {unknown}; allowed: {list(LEVELS)}")
        plain = [level for level in LEVELS if level != "hybrid"]
        if not levels or ("hybrid" in levels and not set(plain) <= set(levels)):
            raise ValueError(f"quantisation.levels: hybrid needs all of {plain}, got {sorted(levels)}")
        try:
            for level in levels:
                code_layout(level, self.network.prefixes)
        except CodeError as error:
            raise ValueError(f"network.prefixes: {error}") from None
        return self

    @model_validator(mode="after")
    def _one_weight_per_prefix(self) -> AdapterRecipe:
        for name in LOSSES:
            weights = getattr(self.losses, name)
            if isinstance(weights, tuple) and len(weights) != len(self.network.prefixes):
                raise ValueError(
                    f"losses.{name}: {len(weights)} weights for {len(self.network.prefixes)} prefixes; "
                    "give one for each, or one number for all"
                )
        return self

    @model_validator(mode="after")
    def _eq_18_has_thresholds(self) -> AdapterRecipe:
        weights = [self.weight("quantization", prefix) for prefix in range(len(self.network.prefixes))]
        if any(weights) and set(self.quantisation.levels) == {"0.5"}:
            raise ValueError(
                "losses.quantization: eq. 18 keeps single dimensions off their thresholds, and level 0.5 cuts pairs; "
                "add level 1, 1.5 or 2 to quantisation.levels, or set the weight to 0"
            )
        return self

    def weight(self, loss: str, prefix: int) -> float:
        """Weight of a loss at the prefix with this index (eq. 8)."""
        weights: Weights = getattr(self.losses, loss)
        return float(weights[prefix]) if isinstance(weights, tuple) else float(weights)


def load_recipe(name_or_path: str | Path) -> AdapterRecipe:
    """Read a shipped recipe by name, or any TOML file.

    Raises:
        RecipeError: no such file, not TOML, unknown or contradictory keys (named, with what is allowed).
    """
    path, table = read_table(str(name_or_path))
    try:
        return parse_recipe(table)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def parse_recipe(table: dict[str, Any]) -> AdapterRecipe:
    """Check a recipe given as a dictionary; see `load_recipe`."""
    return check_table(AdapterRecipe, table)
