"""SIDs of variable length from training to answers: the same tokens in training, index and service."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import models.retriever.train as training
from models.data import load_dataset
from models.quantizers.base import make_quantizer, tokens_to_codes
from models.quantizers.lengths import RuledQuantizer
from models.retriever.recipe import load_recipe
from service.index.build import build_bundle
from service.index.bundle import Bundle, open_bundle
from service.search.pipeline import Pipeline, SearchOptions
from tests.models.retriever.test_train import log_of, tiny_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the TorchScript exporter, about itself

STAGES = [
    {"name": "tune", "objective": "contrast", "epochs": 8, "batch": 60, "encoder_lr": 5e-3},
    {"name": "decode", "objective": "decode", "epochs": 8, "batch": 64, "decoder_lr": 5e-3},
]
TABLES: dict[str, dict[str, Any]] = {
    "variable": {"system": "hourglass", "level_sizes": [6, 6, 6], "mode": "variable", "top": 2},
    "remove": {"system": "hourglass", "level_sizes": [6, 6, 6], "mode": "remove", "base": "hhq"},
    "exchange": {"system": "hourglass", "level_sizes": [6, 5, 7], "mode": "exchange"},
    "sarq": {"system": "sarq", "level_sizes": [6, 6, 6], "threshold": 0.1},
    "sa2crq": {"system": "sa2crq", "level_sizes": [4, 6, 8], "threshold": 0.05, "head_share": 0.5, "epochs": 3},
}
LENGTHS = {"variable": {2, 3}, "remove": {2}, "exchange": {3}, "sarq": {1, 2, 3}, "sa2crq": {1, 2, 3}}


@pytest.fixture(scope="module", params=list(TABLES))
def made(
    request: pytest.FixtureRequest, tiny_encoder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """The name of a table, the run that trained with it, and a bundle of the model."""
    out = tmp_path_factory.mktemp(request.param)
    recipe = tiny_recipe(tiny_encoder, quantizer=TABLES[request.param], stage=STAGES)
    model = training.run(recipe, [tiny_data], out)
    documents = load_dataset(tiny_data, splits=["train"]).documents
    build_bundle(model, documents, out / "bundle", threads=1, progress=False)
    return request.param, out, out / "bundle"


def tokens_of(bundle: Bundle) -> np.ndarray:
    rows = [bundle.trie.sid(position) for position in range(bundle.trie.documents)]
    levels = bundle.manifest.model.levels
    return np.array([list(row) + [-1] * (levels - len(row)) for row in rows])


def test_the_index_holds_sids_of_the_lengths_that_the_system_gives(made: tuple[str, Path, Path]) -> None:
    name, out, path = made
    trained = make_quantizer(TABLES[name])
    kept, prefix = load_file(out / "checkpoint.safetensors"), "extra.quantizer."
    trained.restore({key.removeprefix(prefix): tensor for key, tensor in kept.items() if key.startswith(prefix)})
    with closing(open_bundle(path)) as bundle:
        tokens = tokens_of(bundle)
        sizes = bundle.manifest.model.level_sizes
        np.testing.assert_array_equal(trained.encode(np.asarray(bundle.vectors)), tokens_to_codes(tokens, sizes))
    lengths = set((tokens >= 0).sum(1).tolist())
    assert lengths <= LENGTHS[name]
    assert len(lengths) == min(2, len(LENGTHS[name])) or lengths == LENGTHS[name]


def test_losses_fall_and_every_scoring_finds_documents(made: tuple[str, Path, Path], tiny_data: Path) -> None:
    """A wide beam reaches every document; train queries find theirs near the top far more often than by chance."""
    _, out, path = made
    losses = [row["guided_loss"] for row in log_of(out) if "guided_loss" in row]
    assert losses[-1] < losses[0]
    dataset = load_dataset(tiny_data, splits=["train"])
    pairs = dataset.pairs("train")[:40]
    texts = [dataset.queries[query] for query, _ in pairs]
    with closing(open_bundle(path)) as bundle, closing(Pipeline(bundle, threads=1)) as pipeline:
        sizes = bundle.manifest.model.level_sizes
        codes = tokens_to_codes(tokens_of(bundle), sizes)
        for scoring in ("geometric", "generative", "guided"):
            answers = pipeline.search(texts, SearchOptions(top_k=60, beam_width=100, scoring=scoring))  # type: ignore[arg-type]
            assert all(len(answer.hits) == 60 for answer in answers)
            for hit in answers[0].hits:
                padded = [*hit.sid, *[-1] * (len(sizes) - len(hit.sid))]
                assert padded == codes[hit.position].tolist()
        ids = [dataset.documents[document].id for _, document in pairs]
        ranks = [[hit.id for hit in answer.hits].index(id_) for id_, answer in zip(ids, answers, strict=True)]
        assert np.mean(np.array(ranks) < 15) > 0.5


@pytest.mark.parametrize("name", ["hourglass", "sa2crq"])
def test_shipped_recipes_make_their_quantizers(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(make_quantizer(recipe.quantizer), RuledQuantizer)
    assert recipe.name == name == recipe.quantizer["system"]


UNMASKED = {"constraint": "none", "guided": 0, "distillation": 0}


@pytest.mark.parametrize("name", ["sarq", "variable", "exchange"])
def test_sids_of_any_shape_train_without_a_mask(name: str, tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Plain next-token training of SIDs that end early or leave out a level: losses fall, the walk finds all."""
    recipe = tiny_recipe(
        tiny_encoder, quantizer=TABLES[name], stage=STAGES, objective=UNMASKED, default_scoring="generative"
    )
    model = training.run(recipe, [tiny_data], tmp_path)
    losses = [row["generative_loss"] for row in log_of(tmp_path) if "generative_loss" in row]
    assert losses[-1] < losses[0]
    dataset = load_dataset(tiny_data, splits=["train"])
    build_bundle(model, dataset.documents, tmp_path / "bundle", threads=1, progress=False)
    with closing(open_bundle(tmp_path / "bundle")) as bundle, closing(Pipeline(bundle, threads=1)) as pipeline:
        assert bundle.manifest.model.normalisation == "full"
        (answer,) = pipeline.search(
            [dataset.documents[0].text], SearchOptions(top_k=60, beam_width=100, scoring="generative")
        )
    assert len({hit.id for hit in answer.hits}) == 60
