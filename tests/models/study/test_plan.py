"""Plans: every cell of the shipped ones is a recipe, and a wrong change is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.retriever.recipe import RecipeError
from models.study.plan import QUICK, SHIPPED, Cell, Plan, cell_recipe, encoder_recipe, load_plan, places

ENCODER = Path("somewhere/encoder")


@pytest.mark.parametrize("path", [SHIPPED, QUICK], ids=["plan", "quick"])
def test_every_cell_is_a_recipe_on_the_shared_encoder(path: Path) -> None:
    plan = load_plan(path)
    for shared in (plan.common, plan.common | plan.history):
        for cell in plan.cell:
            recipe = cell_recipe(cell, ENCODER, 7, shared)
            assert (recipe.seed, recipe.encoder.name) == (7, str(ENCODER))
            assert "contrast" not in [stage.objective for stage in recipe.stage]
            assert {stage.epochs for stage in recipe.stage} == {shared["stage.epochs"]}
            moving = [stage for stage in recipe.stage if stage.encoder_lr]
            assert not moving or recipe.quantizer["system"] == "dgi"
    assert len({cell.name for cell in plan.cell}) == len(plan.cell)
    assert len({(cell.recipe, str(cell.changes)) for cell in plan.cell}) == len(plan.cell), "no cell twice"


def test_cells_are_trained_where_and_with_the_seeds_they_name() -> None:
    shared = {"group": "g", "recipe": "hhq"}
    cells = [
        {"name": "all", **shared},
        {"name": "some", "data": ["b"], **shared},
        {"name": "once", "seeds": [5], **shared},
    ]
    table = {"seeds": [4, 5], "data": ["a", "b"], "beams": [10], "cell": cells}
    plan = Plan.model_validate(table)
    trained = [(place.cell.name, place.data, place.seed) for place in places(plan)]
    assert sorted(trained) == sorted(
        [("all", data, seed) for data in "ab" for seed in (4, 5)]
        + [("some", "b", 4), ("some", "b", 5), ("once", "a", 5), ("once", "b", 5)]
    )
    fewer = [
        (place.cell.name, place.data, place.seed) for place in places(Plan.model_validate(table | {"once": ["b"]}))
    ]
    assert sorted(fewer) == sorted(one for one in trained if one[1:] != ("b", 5))
    with pytest.raises(ValueError, match="once: 'c' is none of the plan's"):
        Plan.model_validate(table | {"once": ["c"]})


def test_the_encoder_is_tuned_and_decodes_nothing() -> None:
    plan = load_plan()
    recipe = encoder_recipe(plan.encoder, "base", plan.common)
    assert {stage.objective for stage in recipe.stage} == {"contrast"}
    assert (recipe.decoder.layers, recipe.encoder.name) == (0, "base")
    assert recipe.pseudo_queries.per_document == plan.common["pseudo_queries.per_document"]


def test_changes_reach_tables_stages_and_whole_tables() -> None:
    whole = {"system": "rq_kmeans", "level_sizes": [8, 8]}
    cell = Cell(
        name="x", group="g", recipe="hhq", changes={"quantizer": whole, "stage.batch": 9, "objective.guided": 0}
    )
    recipe = cell_recipe(cell, ENCODER, 0, {"objective.guided": 3, "decoder.layers": 1})
    assert (recipe.quantizer, recipe.objective.guided, recipe.decoder.layers) == (whole, 0, 1)
    assert {stage.batch for stage in recipe.stage} == {9}


def test_a_wrong_change_is_named() -> None:
    cell = Cell(name="x", group="g", recipe="hhq", changes={"objective.gided": 1})
    with pytest.raises(RecipeError, match=r"objective\.gided: unknown key; allowed here: .*guided"):
        cell_recipe(cell, ENCODER, 0, {})
