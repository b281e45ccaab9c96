"""What an encoder made of texts, kept from one training to the next: the cells of a study share a frozen encoder.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import hashlib
import json

from torch import Tensor, nn

from models.retriever.batches import StateCache, Texts, embed


class Shelf:
    """The last pooled vectors of documents and the last token states of queries, each bound to what it was made of."""

    def __init__(self) -> None:
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


def made_from(encoder: nn.Module, texts: Texts, device: str, bf16: bool) -> str:
    """Digest of everything that an encoder's output depends on."""
    digest = hashlib.sha256(json.dumps([texts.ids, device, bf16]).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
