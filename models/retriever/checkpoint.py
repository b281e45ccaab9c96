"""Checkpoints of a training run: network, optimizer, what a stage changes, and the place that was reached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models import tensors as files


@dataclass(frozen=True)
class Place:
    """Where a run stands: `epoch` epochs of stage `stage` are done, `steps` optimizer steps taken in it.

    `logged` are the bytes of its log: what a run wrote after its last checkpoint, it will write again.
    """

    stage: int = 0
    epoch: int = 0
    steps: int = 0
    logged: int = 0


def save_checkpoint(
    path: Path,
    place: Place,
    fingerprint: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Tensor],
) -> None:
    """Write a checkpoint; a crash leaves the old one whole."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"extra.{name}": value for name, value in extra.items()}
    tensors |= files.optimizer_tensors(optimizer)
    metadata = {"place": json.dumps(vars(place)), "fingerprint": fingerprint}
    files.save_checkpoint(path, tensors, metadata)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    place: Place
    model: dict[str, Tensor]
    extra: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the moments into an optimizer that was made for the same parameters."""
        files.restore_optimizer(optimizer, self.optimizer)


def load_checkpoint(path: Path, fingerprint: str) -> Checkpoint | None:
    """Read a checkpoint, or None where there is none.

    Raises:
        CheckpointError: the checkpoint is damaged, of another recipe or of other data.
    """
    if not path.is_file():
        return None
    tensors, metadata = files.load_checkpoint(path, fingerprint, "recipe, seed or data set")
    return Checkpoint(
        Place(**json.loads(metadata["place"])),
        {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")},
        {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")},
        {name: value for name, value in tensors.items() if name.startswith("optimizer.")},
    )
