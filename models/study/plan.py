"""What the study trains: recipes with changes, on data sets, with seeds. `plan.toml` is the one that is shipped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.retriever.publish import Precision
from models.retriever.recipe import Recipe, RecipeError, check_table, parse_recipe, read_table, read_toml
from models.task import MAX_BEAM

SHIPPED = Path(__file__).with_name("plan.toml")
QUICK = Path(__file__).with_name("quick.toml")


class Cell(BaseModel):
    """One system: a recipe with changes.

    Attributes:
        name: how tables call it.
        group: the table that it stands in.
        recipe: a shipped recipe, or a TOML file.
        changes: dotted key → value; `stage.` changes every stage that is left, a whole table may be given at once.
        data: only on these of the plan's data sets; empty for all.
        seeds: only with these of the plan's seeds; empty for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    group: str
    recipe: str
    changes: dict[str, Any] = Field(default_factory=dict)
    data: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Plan(BaseModel):
    """All cells with what they share.

    Attributes:
        seeds: every cell is trained with each, unless it names some.
        data: names of folders in the BEIR layout.
        once: those of them where the first seed is enough, since a training takes long there.
        beams: beam widths that are measured; deep measures are taken at the widest, which the decoder alone walks.
        queries: so many judged test queries are asked, a sample; 0 for all.
        precision: of the model that is measured; training exports both.
        encoder: the recipe whose contrast stages tune a data set's encoder.
        common: changes to every cell, before its own.
        history: further changes on data sets whose queries have earlier items.
        cell: the cells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[int, ...] = Field(min_length=1)
    data: tuple[str, ...] = Field(min_length=1)
    once: tuple[str, ...] = ()
    beams: tuple[int, ...] = Field(min_length=1)
    queries: int = Field(default=0, ge=0)
    precision: Precision = "float32"
    encoder: str = "hhq"
    common: dict[str, Any] = Field(default_factory=dict)
    history: dict[str, Any] = Field(default_factory=dict)
    cell: tuple[Cell, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if out := [beam for beam in self.beams if not 1 <= beam <= MAX_BEAM]:
            raise ValueError(f"beams: {out[0]} is not from 1 to {MAX_BEAM:,}")
        if unknown := [name for name in self.once if name not in self.data]:
            raise ValueError(f"once: {unknown[0]!r} is none of the plan's {list(self.data)}")
        folders: dict[str, str] = {}
        for cell in self.cell:
            if unknown := [name for name in cell.data if name not in self.data]:
                raise ValueError(f"cell {cell.name!r}: data {unknown[0]!r} is none of the plan's {list(self.data)}")
            if more := [seed for seed in cell.seeds if seed not in self.seeds]:
                raise ValueError(f"cell {cell.name!r}: seed {more[0]} is none of the plan's {list(self.seeds)}")
            if not cell.folder:
                raise ValueError(f"cell {cell.name!r}: its name needs a letter or a digit, it names a folder")
            if cell.folder in folders:
                raise ValueError(f"cells {folders[cell.folder]!r} and {cell.name!r} would share a folder: rename one")
            folders[cell.folder] = cell.name
        return self


@dataclass(frozen=True)
class Place:
    """One training of the study."""

    data: str
    cell: Cell
    seed: int

    def under(self, out: Path) -> Path:
        """Where it is trained."""
        return out / self.data / self.cell.folder / str(self.seed)

    def file(self, figures: Path) -> Path:
        """Where its figures stay."""
        return self.under(figures).with_suffix(".json")


def places(plan: Plan) -> Iterator[Place]:
    """Go over all trainings: first every system once, so that tables fill from the top."""
    for seed in plan.seeds:
        for data in plan.data:
            if seed != plan.seeds[0] and data in plan.once:
                continue
            for cell in plan.cell:
                if data in (cell.data or plan.data) and seed in (cell.seeds or plan.seeds):
                    yield Place(data, cell, seed)


def load_plan(path: Path = SHIPPED) -> Plan:
    """Read a plan.

    Raises:
        RecipeError: not TOML, unknown or wrong keys (named, with what is allowed).
    """
    table = read_toml("plan", path)
    try:
        return check_table(Plan, table)
    except RecipeError as error:
        raise RecipeError(f"plan {path}: {error}") from None


def cell_recipe(cell: Cell, encoder: Path, seed: int, shared: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a cell on a tuned encoder: without its contrast stages, changed.

    Raises:
        RecipeError: the changed recipe is none; the cell is named.
    """
    try:
        table, stages = _with_stages(cell.recipe)
        table["stage"] = [stage for stage in stages if stage.get("objective") != "contrast"]
        for key, value in (dict(shared) | cell.changes).items():
            change(table, key, value)
        table["seed"] = seed
        change(table, "encoder.name", str(encoder))
        return parse_recipe(table)
    except RecipeError as error:
        raise RecipeError(f"cell {cell.name!r}: {error}") from None


def encoder_recipe(recipe: str, encoder: str, shared: Mapping[str, Any]) -> Recipe:
    """Return the recipe that tunes a data set's encoder: the contrast stages of a recipe, and nothing to decode."""
    table, stages = _with_stages(recipe)
    table["stage"] = [stage for stage in stages if stage.get("objective") == "contrast"]
    if not table["stage"]:
        raise RecipeError(f"recipe {recipe!r} has no contrast stage, and the plan's `encoder` names it to tune one")
    for key, value in shared.items():
        if not key.startswith("stage."):
            change(table, key, value)
    table |= {"name": "encoder", "decoder": {"layers": 0}, "default_scoring": "geometric"}
    table["quantizer"] = {"system": "rq_kmeans", "level_sizes": [2]}  # nobody reads its codes
    change(table, "encoder.name", encoder)
    return parse_recipe(table)


def _with_stages(recipe: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The unchecked table of a recipe, and its stages."""
    path, table = read_table(recipe)
    stages = table.get("stage")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(f"recipe {path} has no [[stage]]: a study trains recipes of retrievers")
    return table, stages


def change(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; `stage.` sets it in every stage.

    Raises:
        RecipeError: a part of the key before the last is no table.
    """
    first, _, rest = key.partition(".")
    if not rest:
        table[first] = value
    elif first == "stage":
        for stage in table["stage"]:
            stage[rest] = value
    elif not isinstance(inner := table.setdefault(first, {}), dict):
        raise RecipeError(f"change {key!r}: {first!r} is {inner!r}, not a table")
    else:
        change(inner, rest, value)
