"""Training an adapter on the vectors of any model, and putting it into a model artefact.

    train_adapter(documents, queries, recipe, out)   vectors → out/adapter.safetensors
    add_adapter(model, adapter, out)                 model artefact + adapter → a new model artefact
    run(recipe, data or vectors, out)                what `rhumb train --recipe qama` calls

A run writes `checkpoint.safetensors` and `history.json` beside the adapter. It depends on recipe and vectors only: a
resumed run gives the same adapter, bit for bit, as an uninterrupted one on the same machine.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.kept import save_json
from models.qama.batches import BatchSource, IntArray, TrainVectors, unit_vectors
from models.qama.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from models.qama.objective import Objective
from models.qama.recipe import AdapterRecipe, RecipeError, load_recipe
from models.qama.start import FloatArray
from models.qama.variants import with_seed
from models.qama.vectors import read_all
from models.tensors import write_errors
from service.index.artefact import ArtefactError, check_outside, hash_file, new_artefact, publish
from service.index.bundle import open_model
from service.index.manifest import AdapterSettings, ModelManifest
from service.model.adapter import AdapterError, AdapterInfo, load_adapter, save_adapter
from service.model.binarizer import Binarizer
from service.ops.progress import progress_bar

ADAPTER_NAME = "adapter.safetensors"
CHECKPOINT_NAME = "checkpoint.safetensors"
HISTORY_NAME = "history.json"
ROWS = 4096  # vectors adapted at once


def train_adapter(
    vectors_docs: npt.NDArray[Any],
    vectors_queries_train: npt.NDArray[Any] | None,
    recipe: AdapterRecipe,
    out: Path,
    *,
    pairs: IntArray | None = None,
    encoder: str = "",
    resume: bool = False,
    quiet: bool = False,
) -> Path:
    """Train an adapter and write `out/adapter.safetensors`.

    Args:
        vectors_docs: (N, D) floats; rows are brought to unit length.
        vectors_queries_train: (Q, D) floats of train queries, or None. Never give test queries.
        recipe: `network.prefixes` must end with D.
        out: folder, made if missing.
        pairs: (P, 2) rows of queries and documents that belong together, for eq. 14; None lets the objective work on
            queries mixed from documents alone.
        encoder: hex SHA-256 of the encoder.onnx that the vectors come from; empty binds the adapter to none yet.
        resume: continue from `out/checkpoint.safetensors` if it is there.
        quiet: no progress bar.

    Raises:
        RecipeError: vectors of another width than the recipe's.
        DataError: vectors that are no floats, not finite, or zero.
        CheckpointError: a checkpoint that is damaged or of another run.
    """
    queries = None if vectors_queries_train is None else unit_vectors(vectors_queries_train)
    vectors = TrainVectors(unit_vectors(vectors_docs), queries, pairs)
    _check_width("vectors have", vectors.documents.shape[1], recipe)
    out.mkdir(parents=True, exist_ok=True)
    objective = _optimise(vectors, recipe, out, resume, quiet)
    if recipe.quantisation.settle or not recipe.train.steps:
        objective.thresholds.start(adapt(objective, _threshold_vectors(vectors, recipe)))
    path = out / ADAPTER_NAME
    tensors = {**objective.adapter.tensors(), **objective.thresholds.tensors()}
    with write_errors(path):
        save_adapter(path, tensors, AdapterInfo(recipe.network.prefixes, encoder))
    return path


def _optimise(vectors: TrainVectors, recipe: AdapterRecipe, out: Path, resume: bool, quiet: bool) -> Objective:
    """The training loop; with thresholds only there is nothing to train, the pair FFN keeps its start."""
    objective = start_objective(vectors, recipe)
    if not objective.adapter.has_ffn or not recipe.train.steps:
        return objective
    weights = list(objective.parameters())
    table, checkpoint = recipe.train, out / CHECKPOINT_NAME
    optimizer = torch.optim.AdamW(weights, lr=table.learning_rate, weight_decay=table.weight_decay)
    print_ = fingerprint(recipe, vectors)
    done = load_checkpoint(checkpoint, print_, objective, optimizer) if resume else 0
    history = _read_history(out, done)
    source = BatchSource(vectors, recipe.batch, table.seed)
    with progress_bar("adapter", table.steps, quiet) as advance:
        advance(done)
        for step in range(done, table.steps):
            for group in optimizer.param_groups:
                group["lr"] = table.learning_rate * rate(step, recipe)
            loss, parts = objective(source.batch(step), step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, table.gradient_clip)
            optimizer.step()
            history.append({"step": step, "loss": float(loss.detach()), **parts})
            if (step + 1) % table.checkpoint_every == 0 or step + 1 == table.steps:
                save_json(out / HISTORY_NAME, history)
                save_checkpoint(checkpoint, step + 1, print_, objective, optimizer)
            advance(1)
    return objective


def start_objective(vectors: TrainVectors, recipe: AdapterRecipe) -> Objective:
    """Adapter and thresholds as they are before the first step."""
    objective = Objective(recipe)
    seed = recipe.train.seed
    objective.adapter.initialise(recipe.network, vectors.documents, seed)
    if "0.5" in objective.thresholds.levels:
        objective.thresholds.reducer.initialise(torch.Generator().manual_seed(seed))
    objective.thresholds.start(adapt(objective, _threshold_vectors(vectors, recipe)))
    return objective


def rate(step: int, recipe: AdapterRecipe) -> float:
    """Learning rate of a step as a share of the recipe's.

    Linear warm-up times, with `decay`, a half cosine that falls to 0 over all steps, those of the warm-up included.
    """
    table = recipe.train
    warmup = max(1, round(table.warmup * table.steps))
    rise = min(1.0, (step + 1) / warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * step / table.steps)) if table.decay else rise


@torch.no_grad()
def adapt(objective: Objective, vectors_ND: FloatArray) -> torch.Tensor:
    """ẑ of many vectors, (N, D)."""
    parts = [objective.adapter(torch.from_numpy(vectors_ND[i : i + ROWS])) for i in range(0, len(vectors_ND), ROWS)]
    return torch.cat(parts)


def _threshold_vectors(vectors: TrainVectors, recipe: AdapterRecipe) -> FloatArray:
    if recipe.quantisation.thresholds_from == "documents" or vectors.queries is None:
        return vectors.documents
    return np.concatenate([vectors.documents, vectors.queries])


def _read_history(out: Path, steps: int) -> list[dict[str, float]]:
    path = out / HISTORY_NAME
    if not steps or not path.is_file():
        return []
    history: list[dict[str, float]] = json.loads(path.read_text())[:steps]
    return history


def add_adapter(model_dir: Path, adapter: Path, out_dir: Path, *, replace: bool = False) -> ModelManifest:
    """Write a model artefact that is `model_dir` with an adapter, bound to its encoder.

    Args:
        model_dir: a model artefact.
        adapter: `adapter.safetensors`, unbound or bound to this model's encoder.
        out_dir: where the new artefact appears, whole or not at all.
        replace: replace an artefact that is there.

    Raises:
        AdapterError: not an adapter, of another width, or bound to another encoder.
        service.index.artefact.ArtefactError: no model there, or `out_dir` exists.
    """
    model = open_model(model_dir)
    tensors, info = load_adapter(adapter)
    encoder = hash_file(model.path / "encoder.onnx").sha256
    if info.encoder not in ("", encoder):
        raise AdapterError(
            f"{adapter} was trained on vectors of the encoder {info.encoder[:12]}, {model_dir} has {encoder[:12]}: "
            "train an adapter on this model's vectors"
        )
    if info.prefixes[-1] != model.manifest.dimensions:
        raise AdapterError(
            f"{adapter} is for {info.prefixes[-1]} dimensions, {model_dir} gives {model.manifest.dimensions}"
        )
    bound = AdapterInfo(info.prefixes, encoder)
    settings = AdapterSettings(prefixes=info.prefixes, levels=Binarizer(tensors, bound).levels, encoder_sha256=encoder)
    with new_artefact(out_dir, replace, "model") as staging:
        for name in sorted(model.manifest.expected_files() - {ADAPTER_NAME}):
            shutil.copyfile(model.path / name, staging / name)
        with write_errors(out_dir / ADAPTER_NAME):
            save_adapter(staging / ADAPTER_NAME, tensors, bound)
        return publish(staging, model.manifest.model_copy(update={"adapter": settings}))


def run(
    recipe_path: str | Path,
    data: Sequence[Path],
    out: Path,
    resume: bool = False,
    *,
    model: Path | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> Path:
    """Train by a recipe on data folders or `.npy` files of vectors.

    Args:
        recipe_path: a TOML file, or the name of a shipped recipe.
        data: each as `models.qama.vectors.read_vectors` takes it; together they are one corpus.
        out: folder of the run; with `model`, the artefact `out/model` is written too.
        resume: continue an interrupted run.
        model: model artefact whose encoder makes vectors that the folder lacks, and that gets the adapter.
        seed: instead of the recipe's.
        quiet: no progress bars.

    Returns:
        The path of the adapter, or of the model artefact that has it.

    Raises:
        service.index.artefact.ArtefactError: `out` is or lies in an artefact, or `model` is none, or is `out/model`.
        RecipeError: a bad recipe, or one for vectors of another width than the model's.
        DataError: as `read_all` and `train_adapter`.
    """
    recipe = load_recipe(recipe_path)
    if seed is not None:
        recipe = with_seed(recipe, seed)
    check_outside(out)
    encoder = "" if model is None else _checked_encoder(model, recipe, out)
    found = read_all(data, model, quiet=quiet)
    adapter = train_adapter(
        found.documents,
        found.queries,
        recipe,
        out,
        pairs=found.pairs,
        encoder=encoder,
        resume=resume,
        quiet=quiet,
    )
    if model is None:
        return adapter
    add_adapter(model, adapter, out / "model", replace=True)
    return out / "model"


def _checked_encoder(model: Path, recipe: AdapterRecipe, out: Path) -> str:
    """Hex SHA-256 of the encoder of a model that the recipe fits and that `out/model` does not replace."""
    if model.resolve() == (out / "model").resolve():
        raise ArtefactError(f"'{model}' would be replaced by the model with its adapter: choose another --out")
    opened = open_model(model)
    _check_width(f"'{model}' gives", opened.manifest.dimensions, recipe)
    return opened.manifest.files["encoder.onnx"].sha256


def _check_width(whose: str, dims: int, recipe: AdapterRecipe) -> None:
    wanted = recipe.network.prefixes[-1]
    if dims != wanted:
        raise RecipeError(
            f"{whose} {dims} dimensions, the recipe's prefixes end with {wanted}: give a recipe whose "
            f"network.prefixes end with {dims} (models/recipes/qama.toml is one to copy)"
        )
