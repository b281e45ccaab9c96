"""What trainings have in common, kept from one to the next: the cells of a study share a frozen encoder and codebooks.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from models.quantizers.base import Quantizer
from models.retriever.batches import StateCache, Texts, embed

KEPT_CODEBOOKS = 8  # sets of them


class Shelf:
    """The last pooled vectors of documents, the last token states of queries, the last codebooks.

    Each is bound to what it was made of.
    """

    def __init__(self) -> None:
        self._learnt: dict[str, dict[str, Tensor]] = {}
        self._vectors: tuple[str, Tensor] | None = None
        self._states: tuple[str, StateCache] | None = None

    def vectors(self, encoder: nn.Module, texts: Texts, device: str, bf16: bool) -> Tensor:
        """Unit vectors (N, D) float32 of documents, a copy that may be changed."""
        made_of = made_from(encoder, texts, device, bf16)
        if self._vectors is None or self._vectors[0] != made_of:
            self._vectors = made_of, embed(encoder, texts, device, bf16, "documents")
        return self._vectors[1].clone()

    def states(self, encoder: nn.Module, texts: Texts, device: str, bf16: bool) -> StateCache:
        """Token states of queries."""
        made_of = made_from(encoder, texts, device, bf16)
        if self._states is None or self._states[0] != made_of:
            self._states = None  # before the next ones are made: only one of them fits into memory
            self._states = made_of, StateCache(encoder, texts, device, bf16)
        return self._states[1]

    def fit(self, quantizer: Quantizer, table: Mapping[str, Any], vectors_ND: NDArray[np.float32], device: str) -> None:
        """Learn a quantizer's codebooks, or give it those that the same table learnt from the same unit vectors (N, D).

        `table` holds all settings of the quantizer, its seed among them.
        """
        digest = hashlib.sha256(json.dumps([table, device], sort_keys=True).encode())
        for array in (vectors_ND, getattr(quantizer, "interactions_N", None)):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).data)
        made_of = digest.hexdigest()
        if made_of in self._learnt:
            quantizer.restore({name: tensor.clone() for name, tensor in self._learnt[made_of].items()})
            return
        quantizer.fit(vectors_ND, device)
        self._learnt[made_of] = {name: tensor.clone() for name, tensor in quantizer.learnt().items()}
        for oldest in list(self._learnt)[:-KEPT_CODEBOOKS]:
            del self._learnt[oldest]


def made_from(encoder: nn.Module, texts: Texts, device: str, bf16: bool) -> str:
    """Digest of everything that an encoder's output depends on."""
    digest = hashlib.sha256(json.dumps([texts.ids, device, bf16]).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
