"""The decoder: one step for the beams of all queries of a batch, with the self-attention caches kept here.

Letters: Q queries, B beams, E token dimensions, H heads, Dh dimensions of a head, t positions in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.model.encoder import Encoded
from service.model.session import EXPORT, Device, ModelError, Session

SHRINK_BEAMS = 512  # of all queries: steps from here on give their memory back, which would be kept for good otherwise


class Decoder:
    """The frozen decoder graph; `start` gives a batch its own caches. Threads may share one object.

    Args:
        model_file: `decoder.onnx`.
        threads: threads of the session; None for every CPU this process may use.
        device: where the graph runs.

    Raises:
        ModelError: the graph cannot be used or does not follow the tensor contract (docs/architecture.md).
    """

    def __init__(self, model_file: Path, threads: int | None = None, *, device: Device = "cpu") -> None:
        self.session = Session(model_file, threads, device)
        self.layers = sum(name.startswith("past_key_") for name in self.session.inputs)
        self.memory_names = cache_names("memory", self.layers)
        self.past_names = cache_names("past", self.layers)
        self.present_names = cache_names("present", self.layers)
        self.bearing = "past_point" in self.session.inputs
        if self.bearing:
            self.past_names, self.present_names = (
                (*self.past_names, "past_point"),
                (*self.present_names, "present_point"),
            )
        vector = ("vector",) if self.bearing else ()
        inputs = ("embedding", "step", "attention_mask", *vector, *self.memory_names, *self.past_names)
        self.session.require(inputs, ("hidden", *self.present_names))
        past = self.session.inputs["past_key_0"] if self.layers else ()
        if len(past) != 5 or past[2] is None or past[4] is None:
            raise ModelError(
                f"'{model_file}' has past_key_0 of shape {past}, expected (Q, B, heads, t, size): {EXPORT}"
            )
        self.heads, self.head_dimensions = past[2], past[4]
        self.embedding_dimensions = self.session.inputs["embedding"][-1]

    def start(self, encoded: Encoded) -> DecoderStep:
        """Return the step function of one batch, before its first step.

        Raises:
            ModelError: the encoder's memories are not those that this decoder reads.
        """
        if encoded.memory.keys() != set(self.memory_names):
            raise ModelError(
                f"'{self.session.path}' reads {list(self.memory_names)}, the encoder gives {sorted(encoded.memory)}: "
                "encoder and decoder belong to different models"
            )
        return DecoderStep(self, encoded)


class DecoderStep:
    """The decoder's state for one batch: memories shared by a query's beams, caches of every beam. One thread only."""

    def __init__(self, decoder: Decoder, encoded: Encoded) -> None:
        self._decoder = decoder
        self._fixed: dict[str, NDArray[Any]] = {**encoded.memory, "attention_mask": encoded.attention_mask_QS}
        if decoder.bearing:
            self._fixed["vector"] = encoded.vectors_QD
        self._queries = len(encoded)
        self._past: list[NDArray[np.float32]] | None = None
        self.steps = 0

    def __call__(
        self, embeddings_QBE: NDArray[np.float32], step: int, parents_QB: NDArray[np.integer] | None = None
    ) -> NDArray[np.float32]:
        """Run one step.

        Args:
            embeddings_QBE: (Q, B, E) float32, the token that each beam just took, or the start vector at step 0.
            step: how many steps ran before, from 0.
            parents_QB: (Q, B) integers, each beam's row among the beams of the step before; None keeps the rows as they
                are (and at step 0, where there is none before).

        Returns:
            Unit hidden states (Q, B, E) float32.

        Raises:
            ValueError: the shapes, the step or a parent do not fit what ran before.
        """
        self._check(embeddings_QBE, step, parents_QB)
        past = self._reordered(embeddings_QBE.shape[1], parents_QB)
        feeds: dict[str, NDArray[Any]] = {
            "embedding": np.ascontiguousarray(embeddings_QBE),
            "step": np.array([step], np.int64),
            **self._fixed,
            **dict(zip(self._decoder.past_names, past, strict=True)),
        }
        self._past = None  # the old caches are free once the run ends
        shrink = embeddings_QBE.shape[0] * embeddings_QBE.shape[1] >= SHRINK_BEAMS
        hidden_QBE, *self._past = self._decoder.session.run(("hidden", *self._decoder.present_names), feeds, shrink)
        self.steps += 1
        return hidden_QBE

    def _reordered(self, beams: int, parents_QB: NDArray[np.integer] | None) -> list[NDArray[np.float32]]:
        """Return every cache (Q, B, H, t, Dh) with the rows of the new beams' parents."""
        if self._past is None:
            return [np.zeros(self._empty(name, beams), np.float32) for name in self._decoder.past_names]
        if parents_QB is None:
            return self._past
        queries_Q1 = np.arange(self._queries)[:, None]
        return [cache[queries_Q1, parents_QB] for cache in self._past]

    def _empty(self, name: str, beams: int) -> tuple[int, ...]:
        """Return the shape of a cache before the first step; a point (Q, B, E) stands at the origin then."""
        if name == "past_point":
            return (self._queries, beams, int(self._decoder.embedding_dimensions or 0))
        return (self._queries, beams, self._decoder.heads, 0, self._decoder.head_dimensions)

    def _check(self, embeddings_QBE: NDArray[np.float32], step: int, parents_QB: NDArray[np.integer] | None) -> None:
        if step != self.steps:
            raise ValueError(f"step {step} was asked for after {self.steps} steps: steps run in order from 0")
        size = self._decoder.embedding_dimensions
        shape = embeddings_QBE.shape
        if embeddings_QBE.ndim != 3 or shape[0] != self._queries or (size is not None and shape[2] != size):
            raise ValueError(f"embeddings of shape {shape}, expected (Q={self._queries}, B, E={size})")
        if embeddings_QBE.dtype != np.float32:
            raise ValueError(f"embeddings are {embeddings_QBE.dtype}, expected float32")
        if parents_QB is not None:
            self._check_parents(shape[:2], parents_QB)
        elif self._past is not None and self._past[0].shape[1] != shape[1]:
            raise ValueError(f"{self._past[0].shape[1]} beams became {shape[1]}: say whose children they are (parents)")

    def _check_parents(self, shape: tuple[int, ...], parents_QB: NDArray[np.integer]) -> None:
        if self._past is None:
            raise ValueError("parents were given at step 0, where no step ran before")
        if parents_QB.shape != shape or not np.issubdtype(parents_QB.dtype, np.integer):
            raise ValueError(
                f"parents are {parents_QB.dtype} of shape {parents_QB.shape}, expected integers of {shape}"
            )
        before = self._past[0].shape[1]
        if parents_QB.size and (parents_QB.min() < 0 or parents_QB.max() >= before):
            raise ValueError(
                f"parents range from {parents_QB.min()} to {parents_QB.max()}, the step before had {before} beams"
            )


def cache_names(kind: str, layers: int) -> tuple[str, ...]:
    """Return the tensor names of a cache in graph order: kind_key_0, kind_value_0, kind_key_1 and so on."""
    return tuple(f"{kind}_{half}_{layer}" for layer in range(layers) for half in ("key", "value"))
