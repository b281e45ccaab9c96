"""What the constraint is measured against: a plain beam search over whole levels, and a decoder of realistic cost.

Legend: Q queries, B beams, K tokens of a level, L levels, T tokens, E token dimensions, t steps before.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.search.walk import Step

CONSTRAINT_GOAL = 1.05  # seconds of constrained / unconstrained decoding, at most


def decode_unconstrained(
    step: Step,
    queries: int,
    tokens_TE: NDArray[np.float32],
    scale_T: NDArray[np.float32],
    level_offsets: tuple[int, ...],
    beam_width: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Search with beams over the whole vocabulary of every level, as any decoder without a trie does.

    One matrix product, one log-softmax and one partial selection a step: nothing that a constraint would save.

    Returns:
        tokens (Q, B, L) and log-probabilities (Q, B), best first; most of these SIDs do not exist.
    """
    rows = np.arange(queries)[:, None]
    tokens_QBL = np.zeros((queries, 1, 0), np.int64)
    score_QB = np.zeros((queries, 1))
    embeddings_QBE = np.repeat(tokens_TE[-1:], queries, axis=0)[:, None]
    parents_QB: NDArray[np.int64] | None = None
    for depth, (lo, hi) in enumerate(pairwise(level_offsets)):
        hidden_QBE = step(embeddings_QBE, depth, parents_QB)
        logits_QBK = scale_T[lo:hi] * (hidden_QBE @ tokens_TE[lo:hi].T)
        logits_QBK -= logits_QBK.max(axis=-1, keepdims=True)
        log_QBK = logits_QBK - np.log(np.exp(logits_QBK).sum(axis=-1, keepdims=True))
        flat_QX = (score_QB[..., None] + log_QBK).reshape(queries, -1)
        kept = min(beam_width, flat_QX.shape[1])
        best_QB = np.argpartition(-flat_QX, kept - 1, axis=1)[:, :kept]
        best_QB = best_QB[rows, np.argsort(-flat_QX[rows, best_QB], axis=1, kind="stable")]
        score_QB, parents_QB = flat_QX[rows, best_QB], best_QB // (hi - lo)
        chosen_QB = lo + best_QB % (hi - lo)
        tokens_QBL = np.concatenate([tokens_QBL[rows, parents_QB], chosen_QB[..., None]], axis=2)
        embeddings_QBE = tokens_TE[chosen_QB]
    return tokens_QBL, score_QB


class StandInDecoder:
    """A decoder step with the matrix products and the cache of a small transformer, on random weights.

    Args:
        dimensions: E.
        layers: transformer layers.
        seed: of the weights.
    """

    def __init__(self, dimensions: int, layers: int = 2, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shapes = [
            (1, 3),
            (1, 1),
            (1, 1),
            (1, 1),
            (1, 4),
            (4, 1),
        ]  # self in, self out, cross in, cross out, two of the MLP

        def weight(rows: int, columns: int) -> NDArray[np.float32]:
            shape = (rows * dimensions, columns * dimensions)
            return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), np.float32)

        self._layers = [[weight(*shape) for shape in shapes] for _ in range(layers)]

    def start(self) -> Step:
        """Return the step of a new batch, with caches of its own."""
        caches: list[list[NDArray[np.float32]]] = [[] for _ in self._layers]

        def step(
            embeddings_QBE: NDArray[np.float32], _depth: int, parents_QB: NDArray[np.int64] | None, /
        ) -> NDArray[np.float32]:
            x_QBE: NDArray[np.float32] = embeddings_QBE
            for weights, cache in zip(self._layers, caches, strict=True):
                if parents_QB is not None:
                    cache[:] = [past[np.arange(len(past))[:, None], parents_QB] for past in cache]
                x_QBE = self._layer(x_QBE, weights, cache)
            return _unit(x_QBE)

        return step

    @staticmethod
    def _layer(
        x_QBE: NDArray[np.float32], weights: list[NDArray[np.float32]], cache: list[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        self_in, self_out, cross_in, cross_out, up, down = weights
        query_QBE, key_QBE, value_QBE = np.split(x_QBE @ self_in, 3, axis=-1)
        cache.append(key_QBE + value_QBE)  # one array stands for both: a mean of the past stands for attention
        x_QBE = _unit(x_QBE + (query_QBE + np.mean(cache, axis=0, dtype=np.float32)) @ self_out)
        x_QBE = _unit(x_QBE + (x_QBE @ cross_in) @ cross_out)
        return _unit(x_QBE + np.maximum(x_QBE @ up, 0) @ down)


def _unit(x_QBE: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return unit rows."""
    length_QB = np.sqrt((x_QBE * x_QBE).sum(axis=-1, keepdims=True))
    return np.asarray(x_QBE / np.maximum(length_QB, 1e-12), np.float32)
