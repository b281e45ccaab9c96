"""Checkpoints of a training run: tensors as safetensors, counters as JSON, replaced by one rename. No pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where a run stands: `epoch` epochs of stage `stage` are done, `steps` optimizer steps taken in it."""

    stage: int = 0
    epoch: int = 0
    steps: int = 0


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
    tensors |= _optimizer_tensors(optimizer)
    metadata = {"place": json.dumps(vars(place)), "fingerprint": fingerprint}
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    if optimizer is None:
        return {}
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(v) for index, entry in state.items() for key, v in entry.items()
    }


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    place: Place
    model: dict[str, Tensor]
    extra: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the moments into an optimizer that was made for the same parameters."""
        state: dict[str, Any] = optimizer.state_dict()
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": state["param_groups"]})


def load_checkpoint(path: Path, fingerprint: str) -> Checkpoint | None:
    """Read a checkpoint, or None where there is none.

    Raises:
        ValueError: the checkpoint is of another recipe or of other data.
    """
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"checkpoint {path} is of another recipe, seed or data set: remove it or choose another --out"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, key = rest.split(".", 1)
            optimizer.setdefault(int(index), {})[key] = value
    return Checkpoint(
        Place(**json.loads(metadata["place"])),
        {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")},
        {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")},
        optimizer,
    )
