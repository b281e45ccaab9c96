"""`rhumb train` with a recipe of adapters: what it takes, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from models.cli import register
from service.model.adapter import load_adapter

SMALL = (
    "[network]\nprefixes = [4, 8, 16]\nexpansion = 2\n"
    "[quantisation]\nmomentum = 0.9\n"
    "[batch]\ndocuments = 16\ngroups = 4\nqueries = 8\nneighbours = 8\n[train]\nsteps = 2\n"
)


@pytest.fixture
def train(vectors, tmp_path: Path):
    """Call `rhumb train DATA --out OUT --recipe small.toml …`."""
    np.save(tmp_path / "vectors.npy", vectors.documents)
    (tmp_path / "small.toml").write_text(SMALL)
    app = typer.Typer()
    register(app)

    def call(out: str, *options: str) -> Result:
        words = ["train", str(tmp_path / "vectors.npy"), "--out", str(tmp_path / out)]
        recipe = ["--recipe", str(tmp_path / "small.toml")]
        return CliRunner(env={"COLUMNS": "400"}).invoke(app, [*words, *recipe, *options])

    return call


def test_the_seed_of_the_command_line_replaces_the_recipes(train, tmp_path):
    def weights(out: str, *options: str):
        assert train(out, *options).exit_code == 0
        return load_adapter(tmp_path / out / "adapter.safetensors")[0]["ffn.weight_2"]

    plain = weights("plain")
    np.testing.assert_array_equal(plain, weights("zero", "--seed", "0"))
    assert not np.array_equal(plain, weights("one", "--seed", "1"))


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--encoder", "some/encoder", "give --model"),
        ("--device", "cuda", "trained on the CPU"),
        ("--history", "3", "without earlier items"),
    ],
)
def test_options_without_a_meaning_for_adapters_are_refused_with_the_remedy(option, value, remedy, train, tmp_path):
    result = train("out", option, value)
    assert result.exit_code == 2
    assert option in result.output
    assert remedy in result.output
    assert not (tmp_path / "out").exists()
