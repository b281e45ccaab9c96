"""Checkpoints of an adapter's training, each replaced by one rename."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from models import tensors as files
from models.qama.batches import TrainVectors
from models.qama.objective import Objective
from models.qama.recipe import AdapterRecipe


def fingerprint(recipe: AdapterRecipe, vectors: TrainVectors) -> str:
    """Hex SHA-256 over the recipe and every vector: what a run's outcome depends on."""
    digest = hashlib.sha256(recipe.model_dump_json().encode())
    for array in (vectors.documents, vectors.queries, vectors.pairs):
        digest.update(b"none" if array is None else repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: Path, step: int, print_: str, objective: Objective, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write model, thresholds and AdamW's moments after `step` steps; a crash leaves the old file whole."""
    tensors = {f"model.{name}": value for name, value in objective.state_dict().items()}
    tensors |= files.optimizer_tensors(optimizer)
    files.save_checkpoint(path, tensors, {"step": str(step), "fingerprint": print_})


def load_checkpoint(path: Path, print_: str, objective: Objective, optimizer: torch.optim.Optimizer | None) -> int:
    """Restore everything and give the number of steps done; 0 where there is no checkpoint.

    Raises:
        CheckpointError: damaged, or of another recipe, seed or set of vectors.
    """
    if not path.is_file():
        return 0
    tensors, metadata = files.load_checkpoint(path, print_, "recipe, seed or set of vectors")
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    objective.load_state_dict(model)
    if optimizer is not None:
        files.restore_optimizer(optimizer, tensors)
    return int(metadata["step"])
