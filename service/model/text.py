"""What text the encoder sees: prefixes, history, token limits. Training and serving share these functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TextKind = Literal["query", "document"]


class TextSettings(BaseModel):
    """How queries and documents become encoder input; part of a model's manifest.

    Attributes:
        max_query_tokens: longest query in tokens, special tokens included.
        max_document_tokens: longest document in tokens, special tokens included.
        query_prefix: text before every query (before its history).
        document_prefix: text before every document.
        history_separator: text between history items and before the query.
        history_count: how many of the last history items are used; 0 ignores history.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_query_tokens: int = Field(ge=4, le=8192)
    max_document_tokens: int = Field(ge=4, le=8192)
    query_prefix: str = ""
    document_prefix: str = ""
    history_separator: str = " ; "
    history_count: int = Field(default=0, ge=0, le=1000)

    def max_tokens(self, kind: TextKind) -> int:
        """Return the longest text of a kind in tokens, special tokens included."""
        return self.max_query_tokens if kind == "query" else self.max_document_tokens


def query_text(query: str, history: Sequence[str], settings: TextSettings) -> str:
    """Return the encoder input of a query: prefix, the last history items, the query (DGI section 5.1.1)."""
    recent = history[len(history) - settings.history_count :] if settings.history_count < len(history) else history
    items = recent if settings.history_count else ()
    return settings.query_prefix + settings.history_separator.join([*items, query])


def document_text(title: str, text: str, settings: TextSettings) -> str:
    """Return the encoder input of a document: prefix, title, text."""
    return settings.document_prefix + f"{title} {text}".strip()
