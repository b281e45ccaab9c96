"""What the service tells about itself and its documents."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from service.index.manifest import Scoring
from service.search.options import Mode


class StoredDocument(BaseModel):
    """A document of the bundle."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]
    position: int = Field(description="Its place in depth-first order of the trie.")


class CodeLevel(BaseModel):
    """Packed codes of one level."""

    level: str
    bytes_per_document: dict[str, int] = Field(description="Bytes of a code by its dimensions.")


class CodesInfo(BaseModel):
    """The packed codes that can be searched by Hamming distance."""

    prefixes: list[int] = Field(description="Dimensions that a code can be cut to.")
    default_level: str
    levels: list[CodeLevel]


class ServiceInfo(BaseModel):
    """What is served, and within which limits."""

    version: str
    digest: str = Field(description="Of the bundle: changes whenever an answer may.")
    documents: int
    distinct_sids: int = Field(description="Semantic IDs in use; fewer than documents when some share one.")
    dimensions: int
    level_sizes: list[int]
    scorings: list[Scoring]
    default_scoring: Scoring
    recipe: str
    history_count: int = Field(description="Items of a history that the model reads; 0: a history changes nothing.")
    max_queries: int
    max_query_characters: int
    max_top_k: int
    max_hamming_top_k: int
    max_embedding_inputs: int
    modes: list[Mode] = Field(description="What `mode` of a search can be with this bundle.")
    lexical_weight: float | None = Field(None, description="Of words in `hybrid`; none where words are not indexed.")
    codes: CodesInfo | None = Field(None, description="None where the bundle has no packed codes.")
