"""Vectors on their way to a quantizer: checked, normalised, in float32 blocks on one device.

Shapes: N documents, D dimensions, B rows of a block.

An array that fits the budget is moved to the device once; a larger one (usually a memory map) is read block by block
at every pass, and what is derived from it (residuals) is derived again, so no pass needs memory for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VectorArray = NDArray[Any] | Tensor
Transform = Callable[[Tensor], Tensor]

HELD_BYTES = 1 << 30  # one gibibyte of float32 stays on the device; more is read in blocks
BLOCK_ROWS = 16_384


class VectorError(ValueError):
    """Vectors that no quantizer can learn from: the message gives the numbers and the remedy."""


class Points:
    """Rows of vectors as float32 tensors of one device.

    Args:
        array: (N, D) floats, numpy array, memory map or tensor. Not copied when larger than `held_bytes`.
        device: where the blocks go.
        transforms: applied to every block in order, (B, D) to (B, D), row by row.
        held_bytes: up to this size all rows are kept on the device after the transforms.
    """

    def __init__(
        self,
        array: VectorArray,
        device: torch.device | str = "cpu",
        transforms: tuple[Transform, ...] = (),
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self._array, self.device, self._transforms = array, torch.device(device), transforms
        self._held_bytes = held_bytes
        self.rows, self.dim = int(array.shape[0]), int(array.shape[1])
        self._held: Tensor | None = None
        if self.rows * self.dim * 4 <= held_bytes:
            self._held = torch.cat([self._load(start) for start in range(0, self.rows, BLOCK_ROWS)])

    def through(self, transform: Transform) -> Points:
        """Give the same rows after one more transform (held when this one is, derived block by block otherwise)."""
        if self._held is not None:
            blocks = [transform(self._held[start : start + BLOCK_ROWS]) for start in range(0, self.rows, BLOCK_ROWS)]
            return Points(torch.cat(blocks), self.device, held_bytes=self._held_bytes)
        return Points(self._array, self.device, (*self._transforms, transform), self._held_bytes)

    def longer_than(self, length: float, least: int) -> Points:
        """Give the rows that are longer, if they are at least so many and held; else all.

        What a quantizer left of a vector that it reached is rounding, and its direction chance. Rows that are derived
        block by block are far more than codes, and few of them are reached.
        """
        if self._held is None:
            return self
        kept = self._held[torch.linalg.vector_norm(self._held, dim=1) > length]
        return Points(kept, self.device, held_bytes=self._held_bytes) if least <= len(kept) < self.rows else self

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block (B, D) float32) over all rows in order."""
        for start in range(0, self.rows, BLOCK_ROWS):
            yield start, (self._load(start) if self._held is None else self._held[start : start + BLOCK_ROWS])

    def take(self, rows: Tensor) -> Tensor:
        """Give the named rows as a (B, D) float32 tensor; `rows` is a (B,) int64 tensor of the CPU."""
        if self._held is not None:
            return self._held[rows.to(self.device)]
        order = torch.sort(rows)  # a memory map likes to be read forwards
        taken = self._transform(_tensor(self._array[order.values.numpy()], self.device))
        return taken[torch.argsort(order.indices).to(self.device)]

    def _load(self, start: int) -> Tensor:
        return self._transform(_tensor(self._array[start : start + BLOCK_ROWS], self.device))

    def _transform(self, block: Tensor) -> Tensor:
        for transform in self._transforms:
            block = transform(block)
        return block


def unit(vectors: Tensor) -> Tensor:
    """Normalise the last axis to length one; a zero vector stays zero (eq. 1 of HHQ for the rest)."""
    return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-12)


def unit_or_random(rows_KD: Tensor, seed: int) -> Tensor:
    """Normalise rows, and give random directions to those of length zero (a level where most are already exact)."""
    generator = torch.Generator().manual_seed(seed)
    noise_KD = unit(torch.randn(rows_KD.shape, generator=generator)).to(rows_KD.device)
    return torch.where(rows_KD.square().sum(dim=1, keepdim=True) > 0.25, unit(rows_KD), noise_KD)


def unit_points(vectors: VectorArray, device: torch.device | str = "cpu", held_bytes: int = HELD_BYTES) -> Points:
    """Check vectors in one pass and give them as unit rows.

    Args:
        vectors: (N, D) float16/32/64 array, memory map or tensor; need not be normalised.
        device: where blocks go.
        held_bytes: see `Points`.

    Raises:
        VectorError: wrong shape or type, no rows, a NaN or infinity, a zero vector: with count and first row.
    """
    _check_shape(vectors)
    _check_rows(vectors)
    return Points(vectors, device, (unit,), held_bytes)


def check_enough(vectors: VectorArray, codes: int) -> None:
    """Refuse a corpus with fewer distinct vectors than a level has codes; stops reading as soon as there are enough.

    Raises:
        VectorError: with the number of documents, distinct vectors and codes.
    """
    rows = int(vectors.shape[0])
    seen: set[bytes] = set()
    for start in range(0, rows, BLOCK_ROWS):
        block = np.ascontiguousarray(_numpy(vectors[start : start + BLOCK_ROWS]))
        for row in block:
            seen.add(row.tobytes())
            if len(seen) >= codes:
                return
    raise VectorError(
        f"a level asks for {codes} codes, but the corpus has {rows} documents with {len(seen)} distinct vectors: "
        f"use at most {len(seen)} codes a level, or more documents"
    )


def _check_shape(vectors: VectorArray) -> None:
    shape = tuple(vectors.shape)
    if len(shape) != 2 or 0 in shape:
        raise VectorError(f"vectors must be a non-empty (documents, dimensions) array, got shape {shape}")
    floating = vectors.is_floating_point() if isinstance(vectors, Tensor) else np.issubdtype(vectors.dtype, np.floating)
    if not floating:
        raise VectorError(f"vectors must be floating point, got {vectors.dtype}: did you pass codes or ids?")


def _check_rows(vectors: VectorArray) -> None:
    broken, zero = [], []
    for start in range(0, int(vectors.shape[0]), BLOCK_ROWS):
        norms = torch.linalg.vector_norm(_tensor(vectors[start : start + BLOCK_ROWS], torch.device("cpu")), dim=1)
        broken += [start + int(row) for row in torch.nonzero(~torch.isfinite(norms))[:, 0]]
        zero += [start + int(row) for row in torch.nonzero(norms == 0)[:, 0]]
    for rows, what in ((broken, "NaN or infinite values"), (zero, "length zero")):
        if rows:
            raise VectorError(
                f"{len(rows)} of {vectors.shape[0]} vectors have {what} (first rows: {rows[:5]}): they have no "
                "direction; check the encoder's output for these documents or drop them"
            )


def _tensor(block: VectorArray, device: torch.device) -> Tensor:
    if isinstance(block, Tensor):
        return block.detach().to(device, torch.float32)
    return torch.from_numpy(np.array(block, dtype=np.float32)).to(device)


def _numpy(block: VectorArray) -> NDArray[Any]:
    return block.detach().cpu().numpy() if isinstance(block, Tensor) else block
