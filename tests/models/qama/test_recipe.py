"""Recipes are refused by the name of what is wrong."""

from __future__ import annotations

import pytest

from models.qama.recipe import LOSSES, RecipeError, load_recipe, parse_recipe


def test_the_shipped_recipes_are_valid_and_differ():
    assert load_recipe("qama") != load_recipe("qama_paper")


def test_the_paper_recipe_has_the_papers_setting():
    paper = load_recipe("qama_paper")
    assert (paper.network.start, paper.network.expansion) == ("random", 32)
    assert not paper.quantisation.straight_through
    assert not paper.quantisation.settle
    assert paper.batch.groups == 0
    assert paper.train.learning_rate == 1e-4
    assert paper.constants.value_scale == "one"
    assert all(paper.weight(loss, 0) > 0 for loss in LOSSES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"losses": {"hinge": 1.0}}, r"losses\.hinge: unknown key; allowed here: bottleneck, contrast"),
        ({"colour": 1}, r"colour: unknown key; allowed here: batch"),
        ({"losses": {"kl": [1.0, 2.0]}}, r"losses\.kl: 2 weights for 5 prefixes"),
        ({"losses": {"kl": -1.0}}, r"losses\.kl"),
        ({"network": {"prefixes": [8, 4]}}, r"prefixes must ascend, got \[8, 4\]"),
        ({"network": {"prefixes": [6, 12]}}, r"hybrid codes need a multiple of 8 dimensions"),
        ({"network": {"expansion": 1}}, r"start 'rotation' needs expansion 2 or more, got 1"),
        ({"quantisation": {"levels": {"3": 1.0}}}, r"unknown \['3'\]; allowed: \['0\.5', '1', '1\.5', '2', 'hybrid'\]"),
        ({"quantisation": {"levels": {"hybrid": 1.0}}}, r"hybrid needs all of"),
        (
            {"quantisation": {"levels": {"0.5": 1.0}}, "losses": {"quantization": 0.1}},
            r"losses\.quantization: eq\. 18 .* add level 1, 1\.5 or 2 to quantisation\.levels, or set the weight to 0",
        ),
        ({"train": {"steps": -1}}, r"train\.steps"),
    ],
)
def test_bad_recipes_name_the_key_and_what_is_allowed(table, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(table)


def test_weights_are_one_a_prefix_or_one_for_all():
    recipe = parse_recipe({"losses": {"kl": [1, 2, 3, 4, 5], "rank": 0.5}})
    assert [recipe.weight("kl", i) for i in range(5)] == [1, 2, 3, 4, 5]
    assert [recipe.weight("rank", i) for i in range(5)] == [0.5] * 5


def test_half_a_bit_alone_is_a_recipe_without_eq_18():
    assert parse_recipe({"quantisation": {"levels": {"0.5": 1.0}}}).weight("quantization", 0) == 0


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no recipe 'nowhere'"):
        load_recipe("nowhere")
    bad = tmp_path / "bad.toml"
    bad.write_text("steps = = 1")
    with pytest.raises(RecipeError, match=r"bad\.toml is not TOML"):
        load_recipe(bad)
