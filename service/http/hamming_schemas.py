"""What clients send to and get from Hamming search: texts, vectors or packed codes in, nearest documents out."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.http.schemas import MAX_QUERIES, DocumentIds, QueryText, Strict, Timings
from service.model.layout import Level
from service.search.codes import MAX_NEAREST, MAX_OVERSAMPLING

MAX_DIMENSIONS: Final = 65_536
MAX_CODE_CHARACTERS: Final = 40_000  # base64 of the widest code: 3 bits for each of 65,536 dimensions
FORMS: Final = ("query", "queries", "vector", "vectors", "code", "codes")

Vector = Annotated[list[float], Field(min_length=1, max_length=MAX_DIMENSIONS, fail_fast=True)]
Code = Annotated[str, Field(max_length=MAX_CODE_CHARACTERS)]

HAMMING_EXAMPLES: Final[dict[str, Any]] = {
    "text": {"summary": "By text", "value": {"query": "count how often each element occurs", "top_k": 5}},
    "rescored": {
        "summary": "A batch, four candidates a result ranked by cosine",
        "value": {"queries": ["open a file", "sort a list"], "rescore": 4, "include": ["documents"]},
    },
}


class CascadeRequest(Strict):
    """Compare a prefix of every code, then the rest of the nearest few: not exact, faster for small shares."""

    dims: int = Field(ge=1, le=MAX_DIMENSIONS, description="Dimensions of the prefix; `/info` lists them.")
    share: float = Field(gt=0, le=1, description="Part of the documents whose whole codes are compared.")


class HammingRequest(Strict):
    """One query or a batch of them, as text, vector or packed code, and how to search."""

    query: QueryText | None = Field(None, description="A text. Give exactly one of the first six fields.")
    queries: Annotated[list[QueryText], Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)] | None = Field(
        None, description="Texts, answered in order."
    )
    vector: Vector | None = Field(None, description="A vector of this model's encoder, of any length but zero.")
    vectors: Annotated[list[Vector], Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)] | None = None
    code: Code | None = Field(
        None,
        description="A packed code of this level: base64 of its uint64 words, little-endian, whole or cut to `dims`. "
        "Bit i of word w, least significant first, is bit 64w + i of the code.",
    )
    codes: Annotated[list[Code], Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)] | None = None
    level: Level | None = Field(None, description="Level of the codes; the bundle's default if left out.")
    dims: int | None = Field(
        None, ge=1, le=MAX_DIMENSIONS, description="Compare the codes of so many dimensions only; `/info` lists them."
    )
    top_k: int = Field(
        10,
        ge=1,
        le=MAX_NEAREST,
        description="Results per query, at most as many as there are documents; if left out, 10 or all documents.",
    )
    rescore: int | None = Field(
        None,
        ge=1,
        le=MAX_OVERSAMPLING,
        description="Rank so many times `top_k` candidates by the cosine of their float vectors; not with codes.",
    )
    cascade: CascadeRequest | None = None
    filter: DocumentIds | None = Field(None, description="Find only some documents.")
    include: Annotated[list[Literal["documents"]], Field(max_length=8)] = Field(
        default_factory=list, description="Also give text and metadata (`documents`)."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(FORMS)}: there are {len(given)}")
        if self.rescore is not None and given[0] in ("code", "codes"):
            raise ValueError("rescore needs more than a code: send the text or the vector, or leave rescore out")
        if self.cascade is not None and self.dims is not None:
            raise ValueError("a cascade ends with whole codes: leave dims out, or the cascade")
        return self

    @property
    def form(self) -> str:
        """The one of `FORMS` that was given."""
        return next(name for name in FORMS if getattr(self, name) is not None)

    @property
    def is_batch(self) -> bool:
        """Whether a list of queries was given."""
        return self.form in ("queries", "vectors", "codes")

    def given(self) -> list[Any]:
        """Return the texts, vectors or codes, one or many."""
        value = getattr(self, self.form)
        return list(value) if self.is_batch else [value]

    def pointer(self, row: int) -> str:
        """Return the JSON pointer of one query."""
        return f"#/{self.form}/{row}" if self.is_batch else f"#/{self.form}"


class HammingResult(BaseModel):
    """One document that is near."""

    id: str
    distance: int = Field(description="Bits that differ.")
    similarity: float = Field(description="1 - distance / bits of the code (QAMA eq. 24).")
    cosine: float | None = Field(None, description="Cosine of the query's and the document's vector, with `rescore`.")
    title: str | None = None
    text: str | None = Field(None, description="With `documents`.")
    metadata: dict[str, Any] | None = Field(None, description="With `documents`.")


class HammingResults(BaseModel):
    """The answer to one query of a batch: by distance, or by cosine with `rescore`; ties by document order."""

    results: list[HammingResult]


class HammingAnswer(HammingResults):
    """The answer to one query."""

    level: str
    dims: int
    timings: Timings

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "results": [{"id": "collections.Counter", "distance": 61, "similarity": 0.841}],
                    "level": "1",
                    "dims": 384,
                    "timings": {"encode": 0.0041, "hamming": 0.0001, "total": 0.0049},
                }
            ]
        }
    )


class HammingBatchAnswer(BaseModel):
    """The answers to a batch, in its order."""

    answers: list[HammingResults]
    level: str
    dims: int
    timings: Timings
