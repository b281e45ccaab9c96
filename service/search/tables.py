"""What a walk reads: the bundle's arrays, checked once when it is loaded.

Legend: N documents, L levels, T tokens, M nodes, R children of the root, X rows of their regions, D vector dimensions,
E token dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.index.manifest import Normalisation, Scoring
from service.index.regions import Regions
from service.index.trie import Trie, padding_of, spans
from service.search.filters import DocumentFilter
from service.search.walk_state import GENERATIVE, GEOMETRIC, GUIDED, Rules, Tables

SCORINGS: dict[str, int] = {"generative": GENERATIVE, "guided": GUIDED, "geometric": GEOMETRIC}

_NO_TOKENS = np.zeros((0, 0), np.float32)
_NO_SCALE = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class WalkTables:
    """The trie with everything that scores its nodes; arrays may be memory maps.

    Attributes:
        trie: the semantic IDs.
        vectors: (N, D) float32 unit vectors of the documents, in the trie's order.
        regions: where the documents under the larger nodes lie.
        level_offsets: (L + 1,) the first token of every level, then T.
        tokens_TE: (T + 1, E) float32, token embeddings, the start vector last; empty for a model without decoder.
        token_scale_T: (T,) float32, what turns hidden · token into a logit; empty without `generative`.
        guided_scale_T: (T,) float32, the same for `guided`; empty without.
        guided_weight: of a node's reach beside the logits (`guided`).
    """

    trie: Trie
    vectors: NDArray[np.float32]
    regions: Regions
    level_offsets: tuple[int, ...]
    tokens_TE: NDArray[np.float32] = field(default_factory=lambda: _NO_TOKENS)
    token_scale_T: NDArray[np.float32] = field(default_factory=lambda: _NO_SCALE)
    guided_scale_T: NDArray[np.float32] = field(default_factory=lambda: _NO_SCALE)
    guided_weight: float = 0.0

    def __post_init__(self) -> None:
        tokens, nodes = self.level_offsets[-1], self.trie.nodes
        self._check("vectors", self.vectors, np.float32, (self.trie.documents, None))
        regions = self.regions
        self._check("regions", regions.rows_RD, np.float32, (None, self.vectors.shape[1]))
        self._check("region_start", regions.start_C, np.int64, (regions.count + 1,))
        self._check("trie_region", regions.region_M, np.int32, (nodes,))
        if self.tokens_TE.size:
            self._check("tokens_TE", self.tokens_TE, np.float32, (tokens + 1, None))
        for name in ("token_scale_T", "guided_scale_T"):
            if getattr(self, name).size:
                self._check(name, getattr(self, name), np.float32, (tokens,))
        if len(self.level_offsets) != self.trie.sids_NL.shape[1] + 1:
            raise ValueError(
                f"semantic IDs have {self.trie.sids_NL.shape[1]} levels, the model {len(self.level_offsets) - 1}: "
                "index the corpus with this model"
            )

    @property
    def scorings(self) -> tuple[Scoring, ...]:
        """The scorings that these tables can serve."""
        offered: list[Scoring] = ["geometric"]
        if self.tokens_TE.size and self.token_scale_T.size:
            offered.append("generative")
        if self.tokens_TE.size and self.guided_scale_T.size:
            offered.append("guided")
        return tuple(offered)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The tokens [lo, hi) among which `full` normalises at every depth."""
        return spans(self.trie.sids_NL, self.level_offsets)

    @cached_property
    def root(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """What every query meets in one matrix product: the rows (X, D) of the root's children, first to last.

        Then start (R + 1,), each child's first row, and rest (R,): -1 where the rows are a handful of documents.
        """
        regions, first, last = self.regions, int(self.trie.child_M[0]), int(self.trie.child_M[1])
        bounds = [*(int(lo) for lo in self.trie.lo_M[first:last]), self.trie.documents]
        rows: list[NDArray[np.float32]] = [np.zeros((0, self.vectors.shape[1]), np.float32)]
        rest = []
        for child, region in enumerate(regions.region_M[first:last]):
            own = region >= 0
            rows.append(
                regions.rows_RD[regions.start_C[region] : regions.start_C[region + 1]]
                if own
                else self.vectors[bounds[child] : bounds[child + 1]]
            )
            rest.append(float(regions.rest_C[region]) if own else -1.0)
        start = np.cumsum([0, *(len(part) for part in rows[1:])]).astype(np.int64)
        return np.concatenate(rows), start, np.array(rest, np.float32)

    def kernel_rules(self, scoring: Scoring, normalisation: Normalisation) -> Rules:
        """Return the constants of a walk.

        `guided` is normalised over children always: a token without a node has no region, so no logit.
        """
        full = scoring == "generative" and normalisation == "full"
        padding = padding_of(self.trie.sids_NL.dtype)
        weight = {"generative": 0.0, "geometric": 1.0, "guided": float(self.guided_weight)}[scoring]
        return Rules(SCORINGS[scoring], full, padding, self.level_offsets[-1], weight)

    def kernel_tables(self, scoring: Scoring, eligible: DocumentFilter | None) -> Tables:
        """Return the read-only arrays of a walk."""
        tables = self._tables[scoring]
        if eligible is None:
            return tables
        return tables._replace(words_W=frozen(eligible.words_W), ranks_W=frozen(eligible.ranks_W))

    @cached_property
    def _tables(self) -> dict[str, Tables]:
        scales = {"generative": self.token_scale_T, "guided": self.guided_scale_T, "geometric": _NO_SCALE}
        trie = self.trie
        return {
            scoring: Tables(
                token_M=frozen(trie.token_M),
                lo_M=frozen(trie.lo_M),
                child_M=frozen(trie.child_M),
                sids_NL=frozen(trie.sids_NL),
                tokens_TE=frozen(self.tokens_TE),
                scale_T=frozen(scales[scoring]),
                region_M=frozen(self.regions.region_M),
                start_C=frozen(self.regions.start_C),
                rest_C=frozen(self.regions.rest_C),
                rows_RD=frozen(self.regions.rows_RD),
                vectors_ND=frozen(self.vectors),
                words_W=frozen(np.zeros(0, np.uint64)),
                ranks_W=frozen(np.zeros(0, np.uint32)),
            )
            for scoring in scales
        }

    @staticmethod
    def _check(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
        fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
        if not fits or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of {shape}")


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only plain view: numba compiles one kernel for memory maps and for arrays in memory."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
