"""SARQ: the length of a SID follows the density of its path (SA2CRQ, section 2.1 and the notes of table 1).

Shapes: N documents, L levels, K codes of a level, P paths.

The text's formulas did not survive; this is what its words say. By the chain rule the information of a path is

    H_l(x) = −Σ_{i ≤ l} log p(c_i | c_1 … c_{i−1}) = −log p(c_1 … c_l),

where p(c_1 … c_l) is the share of the items under the path. Quantisation goes on to level l + 1 while H_l(x) is below
the budget B, else it ends. The notes of table 1 say the same in shares: it stops where the share of items under the
first l codes is no larger than the threshold, so B = −log threshold. Every item has at least one code. Items of dense
regions get long SIDs, items of sparse ones end early and share theirs.

At most 1/threshold paths of a length go on; they are the rule that is stored. A path that no item had when the rule
was made has the share 0, and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.quantizers.base import CodeArray, QuantizerError, register
from models.quantizers.lengths import LengthSettings, Rule, Shortened
from models.quantizers.points import VectorArray
from service.model.lengths import CONTINUED, level_offsets


@dataclass(frozen=True)
class SARQSettings(LengthSettings):
    """Settings of SARQ.

    Attributes:
        threshold: share of the items, above 0 and at most 1; a path with no larger share ends (1: after one code).
        held_out: held-out queries choose the threshold at the end of a training (`models.retriever.lengths`); until
            then a path ends where one item is left, and `threshold` says nothing.
    """

    threshold: float = 0.001
    held_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold("sarq", self.threshold)


@register
class SARQ(Shortened):
    """A base whose paths end where few items are left; its kind is the base's."""

    system = "sarq"
    settings_class = SARQSettings

    def __init__(self, settings: SARQSettings | None = None) -> None:
        self.settings = settings or SARQSettings()
        super().__init__(self.settings)

    def full_codes(self, vectors: VectorArray) -> CodeArray:
        """Give the codes (N, L) that the base chooses for vectors (N, D), before the rule ends any path.

        Raises:
            QuantizerError, VectorError: see `encode`.
        """
        self._fitted()
        return self._chooser().encode(vectors)

    def shorten(self, codes_NL: CodeArray, threshold: float) -> None:
        """Read the rule anew off the documents' full codes, for another threshold.

        Raises:
            QuantizerError: a threshold that is no share.
        """
        check_threshold("sarq", threshold)
        self._rule = path_rule(codes_NL, self.level_sizes, threshold)

    def _read(self, codes_NL: CodeArray) -> Rule:
        threshold = 1 / len(codes_NL) if self.settings.held_out else self.settings.threshold
        return path_rule(codes_NL, self.level_sizes, threshold)


def check_threshold(system: str, threshold: float) -> None:
    """Refuse a threshold that is no share."""
    if not 0 < threshold <= 1:
        raise QuantizerError(
            f"{system}.threshold is {threshold}, must be a share of the items above 0 and at most 1 "
            "(SIDs of full length: use the base alone)"
        )


def path_rule(codes_NL: CodeArray, level_sizes: Sequence[int], threshold: float) -> Rule:
    """Give the paths that go on, the tensor `length_rule.continued` (P, L − 1) of tokens padded with -1.

    Args:
        codes_NL: full-length codes of the items that are counted.
        level_sizes: K of each level.
        threshold: paths with a larger share of the items go on.
    """
    levels = codes_NL.shape[1]
    tokens_NL = codes_NL + level_offsets(level_sizes)
    tables = [np.zeros((0, levels - 1), np.int32)]
    for length, counts_N in enumerate(_holders(codes_NL)[:-1], start=1):
        paths_PL = np.unique(tokens_NL[counts_N / len(codes_NL) > threshold, :length], axis=0)
        tables.append(np.pad(paths_PL, ((0, 0), (0, levels - 1 - length)), constant_values=-1))
    return {CONTINUED: np.concatenate(tables).astype(np.int32)}


def _holders(codes_NL: CodeArray) -> list[NDArray[np.int64]]:
    """Give, for every length, how many documents share each document's path: L arrays of (N,)."""
    path_N = np.zeros(len(codes_NL), np.int64)
    counts = []
    for codes_N in codes_NL.T:
        keys_N = path_N * (int(codes_N.max()) + 1) + codes_N
        _, path_N, holders = np.unique(keys_N, return_inverse=True, return_counts=True)
        path_N = path_N.reshape(-1)
        counts.append(holders[path_N])
    return counts
