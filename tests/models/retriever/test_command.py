"""`rhumb train` with a recipe of retrievers: what it makes of its options, and what it says at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import models.retriever.train as training
from models.cli import register
from models.retriever.recipe import Recipe, load_recipe


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that a training was asked for; none is run."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(training, "run", lambda recipe, *_: recipes.append(recipe))
    return recipes


def call(*words: str) -> str:
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, ["train", *words, "--out", "runs/mine"])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(("given", "items"), [((), 10), (("--history", "0"), 0), (("--history", "3"), 3)])
def test_history_is_the_recipes_unless_it_is_given(trained: list[Recipe], given: tuple[str, ...], items: int) -> None:
    """Recipe dgi reads ten earlier items."""
    call("data", "--recipe", "dgi", "--encoder", "some/encoder", *given)
    assert [recipe.text.history_count for recipe in trained] == [items]


def test_a_training_reads_as_much_history_as_its_recipe_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[Any] = []
    monkeypatch.setattr(training, "load_dataset", lambda folder, splits, history: read.append(history))
    monkeypatch.setattr(training, "train", lambda *_: tmp_path)
    for recipe in ("dgi", "hhq"):
        training.run(load_recipe(recipe), [tmp_path], tmp_path)
    assert read == [10, 0]


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(("data", "corpus"), [(("one",), "one"), (("one", "two"), "DATA")])
def test_the_next_command_is_the_readmes(data: tuple[str, ...], corpus: str) -> None:
    command = (
        f"rhumb index --model runs/mine/model-int8 --corpus {corpus} --vectors runs/mine/vectors/{corpus}.npy --out "
    )
    assert call(*data).endswith(f"next: {command}runs/mine/bundle\n")
    assert command.replace(corpus, "DATA") in (Path(__file__).parents[3] / "README.md").read_text("utf-8")
