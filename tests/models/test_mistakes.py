"""The commonest mistakes: each is one line that says what to do, without a traceback or a class of ours."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.qama.test_command import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the TorchScript exporter, about itself

RECIPE = """
name = "tiny"
text = { max_query_tokens = 16, max_document_tokens = 32 }
encoder = { name = "ENCODER" }
quantizer = { system = "hhq", epochs = 1, level_sizes = [8, 8] }
decoder = { layers = 1, heads = 2, width = 16 }
pseudo_queries = { per_document = 1 }
dev_share = 0.1
stage = [ { name = "decode", objective = "decode", queries = "real", epochs = 1, batch = 64 } ]
"""
HHQ = 'system = "hhq", epochs = 1'
PLAN = """
seeds = [0]
data = ["small"]
beams = [5]
[[cell]]
name = "hhq"
group = "systems"
recipe = "hhq"
"""


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A folder with recipes, vectors and a study's data that is too small."""
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("ENCODER", str(tiny_encoder)))
    (tmp_path / "qama.toml").write_text(SMALL)
    (tmp_path / "plan.toml").write_text(PLAN)
    rows = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "narrow.npy", rows[:, :8])
    np.save(tmp_path / "zero.npy", rows * (np.arange(40) != 3)[:, None].astype(np.float32))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "data/small").mkdir(parents=True)
    (tmp_path / "data/small/corpus.jsonl").write_text("\n".join(json.dumps({"_id": str(n)}) for n in range(39)))
    shutil.copytree(tmp_path / "data/small", tmp_path / "data/bare")
    (tmp_path / "data/small/qrels").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"data/small/qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    return tmp_path


def refused(run: Any, words: Sequence[object], *messages: str) -> None:
    code, _, err = run(*map(str, words))
    assert code, err
    assert "Traceback" not in err
    assert not re.search(r"\wError\b", err), err
    for message in messages:
        assert message in err, err


def edited(path: Path, old: str, new: str) -> Path:
    """Exchange a part of a file that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 16", "width = 33", "decoder: width is 33, no multiple of heads, 2: give e.g. width 34"),
        (HHQ, 'system = "rq_kmeans", start = "foo"', "quantizer: rq_kmeans.start is 'foo', must be one of kmeans++, "),
        (HHQ, 'system = ["hhq"]', "quantizer: quantizer.system is ['hhq'], must be one of"),
        (HHQ, 'system = "hhq", batch_size = 0', "quantizer: hhq.batch_size is 0, must be at least 1"),
        (HHQ, 'system = "hhq", learning_rate = nan', "quantizer: hhq.learning_rate is nan, must be above 0"),
        (HHQ, 'system = "rq_kmeans", iterations = -1', "quantizer: rq_kmeans.iterations is -1, must be at least 1"),
        (HHQ, 'system = "dgi", kmeans_iterations = 0', "quantizer: dgi.kmeans_iterations is 0, must be at least 1"),
        (HHQ, 'system = "hhq", seed = -1', "quantizer: seed is -1, must be at least 0"),
        ("dev_share = 0.1", "seed = -1", "seed: Input should be greater than or equal to 0"),
        ("dev_share = 0.1", f"seed = {10**23}", "seed: Input should be less than 9223372036854775808"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_read(
    run: Any, folder: Path, tiny_data: Path, old: str, new: str, message: str
) -> None:
    path = edited(folder / "tiny.toml", old, new)
    refused(run, ["train", tiny_data, "--recipe", path, "--out", folder / "run"], message)
    assert not (folder / "run").exists()


def test_a_negative_seed_is_refused(run: Any, folder: Path, tiny_data: Path) -> None:
    words = ["train", tiny_data, "--recipe", folder / "tiny.toml", "--out", folder / "run", "--seed", "-1"]
    refused(run, words, "--seed", "0")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "nonsense", "--device nonsense cannot be used here (Expected one of cpu, cuda"),
        ("--device", "cuda:99", "--device cuda:99 cannot be used here ("),
        ("--encoder", "data", "encoder '{folder}/data': no tokenizer.json in this folder"),
        ("--encoder", "nowhere", "encoder '{folder}/nowhere' is no folder here, and the hub did not give it"),
    ],
)
def test_what_a_training_cannot_start_from_is_refused(
    run: Any, folder: Path, tiny_data: Path, option: str, value: str, message: str
) -> None:
    given = str(folder / value) if option == "--encoder" else value
    words = ["train", tiny_data, "--recipe", folder / "tiny.toml", "--out", folder / "run", option, given]
    refused(run, words, message.replace("{folder}", str(folder)))
    assert not (folder / "run").exists()


def test_train_queries_that_a_later_stage_needs_are_missed_before_the_first(
    run: Any, folder: Path, tiny_data: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, folder / "untrained"))
    (data / "qrels/train.tsv").unlink()
    first = 'stage = [ { name = "warm", objective = "decode", queries = "pseudo", epochs = 1, batch = 64 },'
    recipe = edited(folder / "tiny.toml", "stage = [", first)
    words = ["train", data, "--recipe", recipe, "--out", folder / "run"]
    missed = "stage 'decode' asks for real queries, and the data have none: add qrels/train.tsv"
    refused(run, words, missed, "hhq_frozen")
    assert not (folder / "run").exists()


def test_a_model_for_a_recipe_that_makes_its_own_is_refused(run: Any, folder: Path, tiny_data: Path) -> None:
    words = ["train", tiny_data, "--recipe", folder / "tiny.toml", "--out", folder / "run", "--model", folder]
    refused(run, words, "--model is for recipes of adapters (qama)", "give --encoder")
    assert not (folder / "run").exists()


def test_a_run_that_cannot_go_on_says_what_to_remove(run: Any, folder: Path, tiny_data: Path) -> None:
    """One training, then: another seed, a checkpoint that was cut, one of another program, no room for the next."""
    out = folder / "run"
    words = ["train", tiny_data, "--recipe", folder / "tiny.toml", "--out", out]
    assert run(*map(str, words))[0] == 0
    checkpoint = out / "checkpoint.safetensors"
    remedy = f"checkpoint {checkpoint} is of another recipe, seed or data set: remove it, choose another --out"
    refused(run, [*words, "--seed", "1"], remedy)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    refused(run, words, f"checkpoint {checkpoint} is damaged", "bytes): remove it")
    checkpoint.write_bytes(b"")
    refused(run, words, f"checkpoint {checkpoint} is damaged", "it has 0 bytes")
    save_file({"x": np.zeros(1)}, checkpoint)
    refused(run, words, remedy)
    checkpoint.unlink()
    (out / "checkpoint.partial").mkdir()  # no file can be written there, as on a full disk
    refused(run, words, f"{checkpoint} could not be written", "free disk space")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ("narrow.npy", "vectors have 8 dimensions, the recipe's prefixes end with 16: give a recipe whose"),
        ("zero.npy", "1 of 40 vectors are zero, NaN or infinite, the first is row 3: leave them out"),
        ("text.npy", "text.npy: no .npy array"),
    ],
)
def test_vectors_that_an_adapter_cannot_learn_from_are_refused(
    run: Any, folder: Path, vectors: str, message: str
) -> None:
    words = ["train", folder / vectors, "--recipe", folder / "qama.toml", "--out", folder / "run"]
    refused(run, words, message)


def test_an_adapter_that_cannot_be_written_is_refused(run: Any, folder: Path) -> None:
    words = ["train", folder / "rows.npy", "--recipe", folder / "qama.toml", "--out", folder / "run"]
    (folder / "run/checkpoint.partial").mkdir(parents=True)
    refused(run, words, "run/checkpoint.safetensors could not be written", "free disk space")
    (folder / "run/checkpoint.partial").rmdir()
    (folder / "run/adapter.safetensors").mkdir()
    refused(run, words, "run/adapter.safetensors could not be written", "free disk space")


def test_what_is_no_array_is_not_quantized(run: Any, folder: Path) -> None:
    refused(run, ["quantize", folder / "text.npy"], "text.npy: no .npy array", "give a .npy file of vectors")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("beams = [5]", "beans = [5]", "plan.toml: beams: Field required; beans: unknown key; allowed here: beams,"),
        ("beams = [5]", "beams = 5 5", "plan.toml is not TOML: "),
        ('group = "systems"', 'colour = "red"', "cell.0.colour: unknown key; allowed here: changes, data, group"),
        ('recipe = "hhq"', 'recipe = "qama"', "qama.toml has no [[stage]]: a study trains"),
        (
            'recipe = "hhq"',
            'recipe = "hhq"\nchanges = {"name.x" = 1}',
            "cell 'hhq': change 'name.x': 'name' is 'hhq', not",
        ),
        ("[[cell]]", 'encoder = "hhq_lean"\n[[cell]]', "small/corpus.jsonl: 39 documents are too few"),
        ('data = ["small"]', 'data = ["bare"]', "bare: no qrels/train.tsv there: a study learns from train"),
        ("beams = [5]", "beams = [5, 2000]", "beams: 2000 is not from 1 to 1,000"),
        (
            'recipe = "hhq"',
            'recipe = "hhq"\ndata = ["smal"]',
            "cell 'hhq': data 'smal' is none of the plan's",
        ),
        ('recipe = "hhq"', 'recipe = "hhq"\nseeds = [7]', "cell 'hhq': seed 7 is none of the plan's"),
        (
            'recipe = "hhq"',
            'recipe = "hhq"\n[[cell]]\nname = "HHQ!"\ngroup = "systems"\nrecipe = "hhq"',
            "cells 'hhq' and 'HHQ!' would share a folder: rename one",
        ),
        ("[[cell]]", 'encoder = "hhq_frozen"\n[[cell]]', "recipe 'hhq_frozen' has no contrast stage"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_anything_is_trained(
    run: Any, folder: Path, old: str, new: str, message: str
) -> None:
    path = edited(folder / "plan.toml", old, new)
    words = ["study", "--plan", path, "--data", folder / "data", "--encoder", "none", "--out", folder / "study"]
    refused(run, words, message)
    assert not (folder / "study").exists()


def test_a_quick_study_takes_no_data(run: Any, tmp_path: Path) -> None:
    words = ["study", "--quick", "--data", tmp_path, "--out", tmp_path / "out"]
    refused(run, words, "makes its own data and encoder", "leave --data and")
    assert not (tmp_path / "out").exists()
