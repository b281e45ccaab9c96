"""From texts to the encoder's input ids: `tokenizer.json`, the model's text settings, padding.

Letters: Q texts, S tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from service.model.session import ModelError
from service.model.text import TextKind, TextSettings, document_text, query_text


class TextError(ValueError):
    """A text cannot be encoded by this model.

    Attributes:
        reason: why, without which text of the batch it is.
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"{text} {reason}")
        self.reason = reason


CHUNK_CHARACTERS = 4_000_000  # tokenised at once: this takes some thirty bytes of memory a character, for a while
PADDING_NAMES = ("[PAD]", "<pad>", "<|endoftext|>")
UNKNOWN_NAMES = ("[UNK]", "<unk>")


class TextTokenizer:
    """Turns queries and documents into token ids, cut to the model's limits.

    A text that is too long loses its end. Queries of a model with history lose their beginning, the oldest history
    first, since the query itself comes last; they do so whether or not there is a history, as in training. Threads may
    share one object.
    """

    def __init__(self, file: Path, settings: TextSettings) -> None:
        self.settings = settings
        self._query = _load(file, settings.max_query_tokens, "left" if settings.history_count else "right")
        self._document = _load(file, settings.max_document_tokens, "right")
        self.pad_id = padding_id(self._query)

    def queries(self, texts: Sequence[str], histories: Sequence[Sequence[str]] | None = None) -> list[list[int]]:
        """Return the ids of each query; `histories` holds each query's past titles, oldest first."""
        if histories is None or self.settings.history_count == 0:
            histories = [()] * len(texts)
        if len(histories) != len(texts):
            raise ValueError(f"{len(histories)} histories for {len(texts)} queries: give one each, empty where none")
        pairs = zip(texts, histories, strict=True)
        return _ids(_encode(self._query, [query_text(text, past, self.settings) for text, past in pairs], "query"))

    def documents(self, documents: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Return the ids of each document, given as (title, text)."""
        texts = [document_text(*document, self.settings) for document in documents]
        return _ids(_encode(self._document, texts, "document"))

    def lengths(self, texts: Sequence[str], kind: TextKind) -> list[int]:
        """Return how many tokens each text has before it is cut, special tokens included.

        Queries have no history here, documents no title.
        """
        if kind == "query":
            rows = _encode(self._query, [query_text(text, (), self.settings) for text in texts], kind)
        else:
            rows = _encode(self._document, [document_text("", text, self.settings) for text in texts], kind)
        return [len(row.ids) + sum(map(_own_tokens, row.overflowing)) for row in rows]

    def pad(
        self, rows: Sequence[Sequence[int]], multiple: int = 1, most: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ids and attention mask (Q, S) int64; S is the longest row, rounded up to a multiple, not past `most`.

        An encoder may have no positions beyond its limit, even for padding.
        """
        longest = max(map(len, rows), default=0)
        rounded = -(-longest // multiple) * multiple
        longest = rounded if most is None else max(longest, min(rounded, most))
        ids_QS = np.full((len(rows), longest), self.pad_id, np.int64)
        mask_QS = np.zeros_like(ids_QS)
        for row, ids in enumerate(rows):
            ids_QS[row, : len(ids)] = ids
            mask_QS[row, : len(ids)] = 1
        return ids_QS, mask_QS


class WordTokenizer:
    """Turns texts into the tokens that lexical search counts: of the whole text, without special and unknown ones.

    A text begins with a space, so that a tokenizer that reads spaces as parts of words finds its first word like any
    other. Threads may share one object.

    Args:
        tokenizer: of the model; it is set up for this, so give one that nobody else uses.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # what a text spells like a special token is text
        unknown = (self._tokenizer.token_to_id(name) for name in UNKNOWN_NAMES)
        self._unknown = {number for number in unknown if number is not None}

    @property
    def vocabulary(self) -> int:
        """V: every id is below."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, none for a text without words that the tokenizer knows."""
        spaced = [f" {text}" for text in texts]
        rows: list[list[int]] = []
        for chunk in chunks(map(len, spaced)):
            found = self._tokenizer.encode_batch_fast(spaced[chunk], add_special_tokens=False)
            rows.extend([number for number in row.ids if number not in self._unknown] for row in found)
        return rows


def _load(file: Path, max_tokens: int, direction: Literal["left", "right"]) -> Tokenizer:
    tokenizer = read_tokenizer(file)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens, direction=direction)
    return tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a `tokenizer.json`; raises ModelError for what is none."""
    try:
        return Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"'{file}' is not a tokenizer that this version of tokenizers reads: {error}") from error


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the padding id, 0 where it has none: masked out everywhere, but some encoders count positions by it."""
    ids = [tokenizer.token_to_id(name) for name in PADDING_NAMES]
    return next((number for number in ids if number is not None), 0)


def _encode(tokenizer: Tokenizer, texts: list[str], what: TextKind) -> Iterator[Encoding]:
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"holds a lone surrogate at character {error.start}: remove it"
            raise TextError(f"{what} {number}", reason) from None
    for chunk in chunks(map(len, texts)):
        for number, row in enumerate(tokenizer.encode_batch_fast(texts[chunk]), chunk.start):
            if not row.ids:
                raise TextError(f"{what} {number}", "has no tokens for this model's tokenizer: give it a word")
            yield row


def chunks(sizes: Iterable[int]) -> Iterator[slice]:
    """Cut texts of these sizes into runs of at most `CHUNK_CHARACTERS` together; a longer text is one of its own."""
    start = stop = total = 0
    for size in sizes:
        if total + size > CHUNK_CHARACTERS and stop > start:
            yield slice(start, stop)
            start, total = stop, 0
        stop, total = stop + 1, total + size
    if stop > start:
        yield slice(start, stop)


def _ids(rows: Iterable[Encoding]) -> list[list[int]]:
    return [row.ids for row in rows]


def _own_tokens(part: Encoding) -> int:
    """Count the tokens of a part that was cut off, without the special ones that every part has."""
    return len(part.ids) - sum(part.special_tokens_mask)
