"""Files of tensors, safetensors and no pickle: a checkpoint is replaced by one rename, and errors give the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not continue this run: the message names the file and the remedy."""


class WriteError(ValueError):
    """A file of tensors that could not be written: the message names the file and the remedy."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Let a file of tensors that cannot be written, usually for lack of space, be a message to the user."""
    try:
        yield
    except SafetensorError as error:
        raise WriteError(
            f"{path} could not be written ({error}): free disk space or mend the folder, then give the same command "
            "again; a training goes on from its last checkpoint"
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """An optimizer's moments by name, for a checkpoint; nothing for none."""
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": torch.as_tensor(v) for i, moments in state.items() for key, v in moments.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer that was made for the same parameters the moments of `optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a checkpoint; a crash leaves the old one whole.

    Raises:
        WriteError: there is no room for it.
    """
    partial = path.with_suffix(".partial")
    with write_errors(path):
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, partial, dict(metadata))
    os.replace(partial, path)


def load_checkpoint(path: Path, fingerprint: str, same: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a checkpoint.

    Args:
        path: the file.
        fingerprint: that its metadata must have.
        same: what the fingerprint stands for, named where it differs.

    Raises:
        CheckpointError: damaged, or of another fingerprint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("fingerprint") != fingerprint:
                raise CheckpointError(
                    f"checkpoint {path} is of another {same}: remove it, choose another --out, or give --no-resume"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}; it has {path.stat().st_size:,} bytes): remove it, and the "
            "training begins anew"
        ) from None
