"""Decoding without the trie: which share of what a decoder writes by itself are valid semantic IDs.

Shapes: Q queries, B beams, K tokens of a span, T tokens (row T of the table is the start vector), E token dimensions,
L levels.

The Hourglass paper (section 4.4) reports the share for the first k beams, SA2CRQ (section 3.1) its complement, Hallu.
The beam search is a plain one: a step may write every code of the levels that stand at its depth, whatever was written
before. Levels have codebooks of their own, so a code of another level is no answer that a decoder could give. There is
no end token: a beam ends where what it wrote is a whole semantic ID of the index, as in the walk (decision 2). Were it
to go on, short IDs would be written many times over, with endings that mean nothing, and each would count as made up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Step = Callable[[FloatArray, int, NDArray[np.int64] | None], FloatArray]
Sid = tuple[int, ...]
ENDED = -1  # stands for no token, behind a beam's end


@dataclass(frozen=True, eq=False)
class FreeBeams:
    """What free decoding wrote: tokens (Q, B, L) int64, best first, -1 behind a beam's end; log P (Q, B) float32."""

    tokens: NDArray[np.int64]
    log_probabilities: FloatArray


def decode_freely(
    step: Step,
    queries: int,
    tokens_TE: FloatArray,
    scale_T: FloatArray,
    beam_width: int,
    spans: Sequence[tuple[int, int]],
    valid: Collection[Sid],
) -> FreeBeams:
    """Beam search over each step's span of tokens, normalised over it; a beam that wrote a whole SID keeps its score.

    Args:
        step: one decoder step: embeddings (Q, B, E), step number, parents (Q, B) → hidden (Q, B, E).
        queries: Q.
        tokens_TE: token table (T + 1, E), the start vector last.
        scale_T: (T,) the logit of token t is scale[t] · hidden · token.
        beam_width: B; fewer where there are fewer continuations.
        spans: for each step the tokens [lo, hi) that it may write, see `WalkTables.spans`.
        valid: the SIDs of the index, as tokens.
    """
    tokens_QBL = np.zeros((queries, 1, 0), dtype=np.int64)
    score_QB = np.zeros((queries, 1), dtype=np.float32)
    embeddings_QBE = np.broadcast_to(tokens_TE[-1], (queries, 1, tokens_TE.shape[1])).astype(np.float32)
    parents_QB: NDArray[np.int64] | None = None
    ended_QB = np.zeros((queries, 1), dtype=np.bool_)
    for number, (lo, hi) in enumerate(spans):
        hidden_QBE = step(np.ascontiguousarray(embeddings_QBE), number, parents_QB)
        total_QBK = score_QB[..., None] + log_softmax(hidden_QBE @ tokens_TE[lo:hi].T * scale_T[lo:hi])
        total_QBK[ended_QB] = -np.inf
        total_QBK[..., 0][ended_QB] = score_QB[ended_QB]  # its one way on: to stay what it is
        flat_QX = total_QBK.reshape(queries, -1)
        best_QB = np.argsort(-flat_QX, axis=1, kind="stable")[:, :beam_width]
        score_QB = np.take_along_axis(flat_QX, best_QB, axis=1)
        parents_QB = best_QB // (hi - lo)
        ended_QB = np.take_along_axis(ended_QB, parents_QB, axis=1)
        chosen_QB = np.where(ended_QB, ENDED, lo + best_QB % (hi - lo))
        before_QBL = np.take_along_axis(tokens_QBL, parents_QB[..., None], axis=1)
        tokens_QBL = np.concatenate([before_QBL, chosen_QB[..., None]], axis=2)
        ended_QB |= np.array([[_written(row) in valid for row in rows] for rows in tokens_QBL.tolist()])
        embeddings_QBE = tokens_TE[chosen_QB]  # of an ended beam some vector: its hidden state is not read
    return FreeBeams(tokens_QBL, score_QB)


def log_softmax(logits: FloatArray) -> FloatArray:
    """Normalise the last axis, stably."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def valid_share(tokens_QBL: NDArray[np.int64], valid: Collection[Sid], widths: Sequence[int]) -> dict[int, float]:
    """Give, for each width, the share of the first so many beams that are semantic IDs of the index.

    No beam writes what another wrote: see `decode_freely`. Queries with fewer beams than a width are judged by those.
    """
    hit_QB = np.array([[_written(row) in valid for row in rows] for rows in tokens_QBL.tolist()])
    return {width: float(hit_QB[:, :width].mean()) for width in widths}


def _written(row: Sequence[int]) -> Sid:
    """The tokens of a beam without what stands behind its end."""
    return tuple(token for token in row if token != ENDED)
