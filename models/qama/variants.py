"""What the study compares: the recipe, baselines, and the ablation's rows, each as a change to the row before.

The rows follow the paper's tables 3-6 (thresholds, FFN, quantization loss, Matryoshka, orthogonality, bottleneck,
variance control), trained as the paper trains: random start, losses on float prefixes, random batches. Settled
thresholds, the scale of values, the expansion and the decay of the learning rate are the recipe's in every row. Then
come the parts that are ours, one by one, until the row is the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.qama.recipe import LOSSES, AdapterRecipe, parse_recipe

SIMILARITY = ("similarity", "kl", "rank", "contrast")
PAPER_WEIGHTS = {"quantization": 0.1, "orthogonality": 0.1, "bottleneck": 0.001, "variance": 0.001}


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        key: names its folder.
        title: names it in tables.
        recipe: what is trained.
        queries: whether training sees train queries.
    """

    key: str
    title: str
    recipe: AdapterRecipe
    queries: bool = True


def main_variants(recipe: AdapterRecipe) -> list[Variant]:
    """Untuned thresholds, the recipe without train queries, the recipe."""
    return [
        Variant("thresholds", "Untuned thresholds", _change(recipe, network={"start": "none"}, train={"steps": 0})),
        Variant("documents", "QAMA, documents only", recipe, queries=False),
        Variant("qama", "QAMA", recipe),
    ]


def ablation_variants(recipe: AdapterRecipe) -> list[Variant]:
    """Rows of the ablation, cumulative; the first and the last are `main_variants`' own."""
    prefixes = len(recipe.network.prefixes)
    last = (0.0,) * (prefixes - 1)
    losses: dict[str, Any] = {name: (*last, recipe.weight(name, prefixes - 1)) for name in SIMILARITY}
    losses |= dict.fromkeys(PAPER_WEIGHTS, 0.0)
    row = _change(
        recipe,
        network={"start": "random"},
        quantisation={"straight_through": False, "settle": True},
        batch={"groups": 0},
        losses=losses,
    )
    rows = [Variant("ffn", "+ trainable FFN", row)]
    row = _change(row, losses={"quantization": (*last, _weight(recipe, "quantization"))})
    rows.append(Variant("quantization", "+ quantization loss", row))
    nested = {name: getattr(recipe.losses, name) for name in SIMILARITY}
    row = _change(row, losses={**nested, "quantization": _weight(recipe, "quantization")})
    rows.append(Variant("matryoshka", "+ Matryoshka losses", row))
    for name in ("orthogonality", "bottleneck", "variance"):
        row = _change(row, losses={name: _weight(recipe, name)})
        rows.append(Variant(name, f"+ {_TITLES[name]}", row))
    row = _change(row, network={"start": recipe.network.start})
    rows.append(Variant("rotation", "+ rotation start (ours)", row))
    row = _change(row, quantisation=recipe.quantisation.model_dump())
    rows.append(Variant("codes", "+ codes in the losses (ours)", row))
    row = _change(row, batch=recipe.batch.model_dump())
    rows.append(Variant("neighbourhoods", "+ neighbourhood batches (ours)", row))
    return rows


_TITLES = {
    "orthogonality": "orthogonality",
    "bottleneck": "information bottleneck",
    "variance": "adaptive variance control",
}


def _weight(recipe: AdapterRecipe, name: str) -> Any:
    """The recipe's weights of a loss; where it does without, those that the paper's row is trained with."""
    weights = getattr(recipe.losses, name)
    used = any(weights) if isinstance(weights, tuple) else weights
    return weights if used else PAPER_WEIGHTS[name]


def _change(recipe: AdapterRecipe, **tables: dict[str, Any]) -> AdapterRecipe:
    fields = recipe.model_dump()
    for table, changes in tables.items():
        fields[table] = {**fields[table], **changes}
    return parse_recipe(fields)


def with_seed(recipe: AdapterRecipe, seed: int) -> AdapterRecipe:
    """The recipe with another seed."""
    return _change(recipe, train={"seed": seed})


__all__ = ["LOSSES", "Variant", "ablation_variants", "main_variants", "with_seed"]
