"""The encoder: one pass over a text gives its unit vector and the decoder's cross-attention memory.

Letters: Q queries, N documents, D vector dimensions, S source tokens, H heads, Dh dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.model.session import Device, ModelError, Session
from service.model.text import TextSettings
from service.model.tokens import TextTokenizer
from service.ops.progress import progress_bar

BATCH_TOKENS = 1024  # padded tokens of a batch of documents: larger ones leave the caches (1.3x slower at 4,096)
WINDOW = 4096  # documents sorted by length together: little padding, bounded memory
LENGTH_STEP = 8  # lengths are rounded up to multiples, so that few distinct shapes occur
SHRINK_TOKENS = 512  # batches from here on give their memory back
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded queries.

    Attributes:
        vectors_QD: unit vectors (Q, D) float32.
        memory: `memory_key_i`, `memory_value_i` (Q, H, S, Dh) float32 per decoder layer; empty where no decoder reads
            it.
        attention_mask_QS: (Q, S) int64, 1 for tokens and 0 for padding.
        texts: what was encoded, without prefixes and histories: lexical search reads the words.
    """

    vectors_QD: NDArray[np.float32]
    memory: dict[str, NDArray[np.float32]]
    attention_mask_QS: NDArray[np.int64]
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.vectors_QD)


class Encoder:
    """Encodes queries and documents with the frozen encoder graph. Threads may share one object.

    Args:
        model_file: `encoder.onnx`.
        tokenizer_file: `tokenizer.json`.
        text_settings: limits, prefixes and history of the model.
        threads: threads of the session; None for every CPU this process may use.
        dimensions: D that the manifest states, None to take the graph's.
        device: where the graph runs.

    Raises:
        ModelError: the graph or the tokenizer cannot be used, or the graph gives other dimensions.
    """

    def __init__(
        self,
        model_file: Path,
        tokenizer_file: Path,
        text_settings: TextSettings,
        threads: int | None = None,
        *,
        dimensions: int | None = None,
        device: Device = "cpu",
    ) -> None:
        self.tokenizer = TextTokenizer(tokenizer_file, text_settings)
        self._session = Session(model_file, threads, device)
        self._session.require(["input_ids", "attention_mask"], ["vector"])
        self.memory_names = tuple(name for name in self._session.outputs if name.startswith("memory_"))
        self.dimensions = self._dimensions(dimensions)

    def encode_queries(
        self, texts: Sequence[str], histories: Sequence[Sequence[str]] | None = None, memory: bool = True
    ) -> Encoded:
        """Encode queries, as one batch.

        Args:
            texts: Q queries; prefixes are added here.
            histories: for each query the titles of past items, oldest first; models without history ignore them.
            memory: whether a decoder will read the result; without, only the vectors are computed.

        Returns:
            Vectors, memory and attention mask.

        Raises:
            ValueError: a text holds a lone surrogate, or has no tokens at all.
            ModelError: the graph gives vectors that are not unit vectors.
        """
        ids_QS, mask_QS = self.tokenizer.pad(self.tokenizer.queries(texts, histories))
        names = self.memory_names if memory else ()
        vectors_QD, *rest = self._run(("vector", *names), ids_QS, mask_QS)
        return Encoded(vectors_QD, dict(zip(names, rest, strict=True)), mask_QS, tuple(texts))

    def encode_documents(
        self, documents: Sequence[tuple[str, str]], advance: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Return the unit vectors (N, D) float32 of documents given as (title, text).

        Documents are sorted by length within windows and run in batches of at most `BATCH_TOKENS` padded tokens; their
        order is kept in the result. `advance` is called with the number of documents done; without it a progress bar
        is shown on stderr.
        """
        with progress_bar("encoding", len(documents), quiet=advance is not None) as own_advance:
            return self._encode_documents(documents, advance or own_advance)

    def _encode_documents(
        self, documents: Sequence[tuple[str, str]], advance: Callable[[int], None]
    ) -> NDArray[np.float32]:
        vectors_ND = np.empty((len(documents), self.dimensions), np.float32)
        for start in range(0, len(documents), WINDOW):
            rows = self.tokenizer.documents(documents[start : start + WINDOW])
            vectors_ND[start : start + WINDOW] = self.encode_window(rows, advance)
        return vectors_ND

    def encode_window(self, rows: Sequence[Sequence[int]], advance: Callable[[int], None]) -> NDArray[np.float32]:
        """Return the unit vectors (N, D) float32 of the token ids of N documents; see `encode_documents`."""
        vectors_ND = np.empty((len(rows), self.dimensions), np.float32)
        most = self.tokenizer.settings.max_document_tokens
        for batch in length_batches([len(row) for row in rows], BATCH_TOKENS):
            ids_QS, mask_QS = self.tokenizer.pad([rows[i] for i in batch], LENGTH_STEP, most)
            vectors_ND[batch] = self._run(("vector",), ids_QS, mask_QS)[0]
            advance(len(batch))
        return vectors_ND

    def _run(
        self, names: Sequence[str], ids_QS: NDArray[np.int64], mask_QS: NDArray[np.int64]
    ) -> list[NDArray[np.float32]]:
        feeds = {"input_ids": ids_QS, "attention_mask": mask_QS}
        results = self._session.run(names, feeds, shrink=ids_QS.size >= SHRINK_TOKENS)
        _check_unit(results[0], self.dimensions, self._session.path)
        return results

    def _dimensions(self, stated: int | None) -> int:
        """Run one short text: shows the vectors' size, and makes the first, unshrinkable region of the arena small."""
        size = min(LENGTH_STEP, self.tokenizer.settings.max_query_tokens)
        ids = np.full((1, size), self.tokenizer.pad_id, np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        found = int(self._session.run(("vector",), feeds)[0].shape[-1])
        if stated is not None and stated != found:
            raise ModelError(
                f"'{self._session.path}' gives vectors of {found} dimensions, the manifest says {stated}: "
                "this encoder belongs to another model; copy or export the model again"
            )
        return found


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of row numbers, longest rows first, whose padded size stays within `max_tokens`.

    Lengths count as rounded up to `LENGTH_STEP`; a row longer than `max_tokens` is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        longest = -(-lengths[order[start]] // LENGTH_STEP) * LENGTH_STEP
        size = max(1, max_tokens // max(longest, 1))
        yield order[start : start + size]
        start += size


def _check_unit(vectors_QD: NDArray[np.float32], dimensions: int, file: Path) -> None:
    if vectors_QD.dtype != np.float32 or vectors_QD.ndim != 2 or vectors_QD.shape[1] != dimensions:
        raise ModelError(
            f"'{file}' gives {vectors_QD.dtype} vectors of shape {vectors_QD.shape}, "
            f"expected float32 of (Q, {dimensions}): export the model again"
        )
    norms = np.linalg.norm(vectors_QD, axis=1)
    if not np.all(np.abs(norms - 1) < NORM_TOLERANCE):
        worst = int(np.argmax(np.where(np.isfinite(norms), np.abs(norms - 1), np.inf)))
        raise ModelError(
            f"'{file}' gives a vector of length {norms[worst]} for text {worst}, expected 1: export it again"
        )
