"""What clients send and get: strict, closed schemas; the OpenAPI page is made from them.

Bounds written here hold always; tighter ones that an operator sets are checked by ``check_request_limits``.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.index.corpus import MAX_ID_CHARACTERS
from service.index.manifest import MAX_LEXICAL_WEIGHT, Scoring
from service.model.layout import Level
from service.search.options import DEFAULT_BEAM_WIDTH, GEOMETRIC_BEAM_WIDTH, MAX_TOP_K, Mode
from service.search.ranking import Ranking
from service.search.walk import MAX_BEAM_WIDTH

Include = Literal["documents", "codes", "scores"]

CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, newline, return
INVISIBLE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})  # unknown to this Python is not invisible
LONE_SURROGATES: Final = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot carry them
MAX_QUERIES: Final = 10_000
MAX_HISTORY: Final = 100
MAX_FILTER_IDS: Final = 10_000
MARK: Final = "~"  # stands for any combining character while they are counted
MAX_MARKS: Final = 64  # combining characters in a row: putting them in order takes the square of their number


def clean_text(text: str) -> str:
    """Return the text in NFC; refuse what is no text: lone surrogates, control characters, nothing visible."""
    if found := LONE_SURROGATES.search(text):
        raise ValueError(f"has half of a surrogate pair at position {found.start()}: send whole characters")
    if found := CONTROL_CHARACTERS.search(text):
        raise ValueError(f"has control characters, the first at position {found.start()}: remove them")
    if not text[:1].isalnum() and all(unicodedata.category(character) in INVISIBLE for character in set(text)):
        raise ValueError("is empty: give at least one visible character")
    if text.isascii():
        return text
    if len(text) > MAX_MARKS and MARK * (MAX_MARKS + 1) in _marks(text):
        raise ValueError(f"has more than {MAX_MARKS} combining characters in a row: remove them")
    return unicodedata.normalize("NFC", text)


def _marks(text: str) -> str:
    """Return the text with `MARK` for combining characters and spaces for others; asks once for each distinct one."""
    return text.translate({ord(each): MARK if unicodedata.combining(each) else " " for each in set(text)})


QueryText = Annotated[str, AfterValidator(clean_text), Field(min_length=1)]
History = Annotated[list[QueryText], Field(max_length=MAX_HISTORY, fail_fast=True)]

SEARCH_EXAMPLES: Final[dict[str, Any]] = {
    "query": {
        "summary": "One query",
        "value": {"query": "count how often each element occurs in a list", "top_k": 3},
    },
    "batch": {
        "summary": "A batch, with texts and metadata",
        "value": {"queries": ["open a file", "sort a list by a key"], "beam_width": 10, "include": ["documents"]},
    },
    "history": {
        "summary": "With a history, explained",
        "value": {"query": "the next one", "history": ["first item", "second item"], "explain": True},
    },
    "hybrid": {
        "summary": "By meaning and by words",
        "value": {"query": "argparse add_subparsers required", "mode": "hybrid", "include": ["scores"]},
    },
    "filter": {
        "summary": "Among some documents only",
        "value": {"query": "count things", "filter": {"ids": ["collections.Counter"]}},
    },
}


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DocumentIds(Strict):
    """The documents that may be found: those with these ids."""

    ids: Annotated[
        list[Annotated[str, Field(max_length=MAX_ID_CHARACTERS)]],
        Field(min_length=1, max_length=MAX_FILTER_IDS, fail_fast=True),
    ] = Field(description="Ids of documents of this bundle; one that no document has is refused.")


class SearchRequest(Strict):
    """One query, or a batch of them, and how to search."""

    query: QueryText | None = Field(None, description="What to search for. Give this or `queries`.")
    queries: Annotated[list[QueryText], Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)] | None = Field(
        None, description="A batch of queries, answered in order."
    )
    top_k: int = Field(10, ge=1, le=MAX_TOP_K, description="Results per query.")
    beam_width: int | None = Field(
        None,
        ge=1,
        le=MAX_BEAM_WIDTH,
        description=f"Trie nodes kept per step: wider finds more, slower. If left out, {DEFAULT_BEAM_WIDTH} "
        f"(`geometric`: {GEOMETRIC_BEAM_WIDTH}), and never fewer than `top_k`.",
    )
    scoring: Scoring | None = Field(
        None, description="How a step is scored; the bundle's default if left out. `/info` says what is offered."
    )
    ranking: Ranking | None = Field(
        None,
        description="Order of the results: by beam score then cosine (`lexicographic`, if left out), by cosine, or by "
        "both added (`fused`). Of `generative` only; `hybrid` takes `cosine`, which leaves words and decoder out.",
    )
    history: History | None = Field(
        None, description="Titles of the last items, oldest first, for `query`; `/info` says how many the model reads."
    )
    histories: Annotated[list[History], Field(max_length=MAX_QUERIES, fail_fast=True)] | None = Field(
        None, description="One history for each of `queries`."
    )
    include: Annotated[list[Include], Field(max_length=8)] = Field(
        default_factory=list,
        description="Also give text and metadata (`documents`), semantic IDs (`codes`), cosine, log P and the share of "
        "words (`scores`).",
    )
    mode: Mode = Field(
        "generative",
        description="`generative` walks the trie of semantic IDs; `hamming` scans packed codes, four candidates a "
        "result, and ranks by cosine; `lexical` looks for the query's words (BM25 over the model's tokens); `hybrid` "
        "joins what all that the bundle offers find, and ranks by cosine (with scoring `guided` also by what the "
        "decoder made of it) + `lexical_weight` · share of words.",
    )
    lexical_weight: float | None = Field(
        None,
        ge=0,
        le=MAX_LEXICAL_WEIGHT,
        description="Weight of words in `hybrid`; the model's if left out, and 0 leaves them out.",
    )
    level: Level | None = Field(
        None, description="Level of the packed codes of `hamming` and `hybrid`; the bundle's default if left out."
    )
    filter: DocumentIds | None = Field(None, description="Find only some documents.")
    explain: bool = Field(False, description="Also give the walk's beams, with what each level added to their scores.")

    @model_validator(mode="after")
    def _one_kind_of_question(self) -> Self:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        if self.query is None and self.history is not None:
            raise ValueError("history belongs to query: give histories with queries")
        if self.queries is None and self.histories is not None:
            raise ValueError("histories belongs to queries: give history with query")
        if self.queries is not None and self.histories is not None and len(self.histories) != len(self.queries):
            raise ValueError(f"there are {len(self.histories)} histories for {len(self.queries)} queries: give as many")
        return self

    def texts(self) -> list[str]:
        """Return the queries, one or many."""
        return [self.query] if self.query is not None else list(self.queries or [])

    def text_histories(self) -> list[list[str]] | None:
        """Return each query's history, or None when there is none."""
        if self.history is not None:
            return [self.history]
        return self.histories


class Scores(BaseModel):
    """What a result's score is made of."""

    cosine: float = Field(description="Cosine of the query's and the document's vector.")
    log_probability: float | None = Field(
        None, description="log P of the semantic ID; scoring `generative` only, and none if no beam found it."
    )
    lexical: float | None = Field(
        None, description="Share of the query's words that the document holds, each weighed by how rare it is."
    )


class Result(BaseModel):
    """One document that was found."""

    model_config = ConfigDict(extra="forbid")

    id: str
    score: float = Field(description="What the ranking sorts by first; comparable within one answer only.")
    title: str | None = None
    text: str | None = Field(None, description="With `documents`.")
    metadata: dict[str, Any] | None = Field(None, description="With `documents`.")
    codes: list[int] | None = Field(None, description="With `codes`: the document's semantic ID, a code per level.")
    scores: Scores | None = Field(None, description="With `scores`.")


class ExplainedBeam(BaseModel):
    """One beam of the walk's end."""

    codes: list[int] = Field(description="The path from the root, a code per level.")
    score: float = Field(
        description="log P of the path; under `geometric` the node's reach, an estimate of its best document's cosine; "
        "under `guided` weight · reach plus what the decoder changed."
    )
    level_scores: list[float] = Field(
        description="What each walked level added to the score (`geometric`: the reach at that level); shorter than "
        "the codes where the rest was certain."
    )
    documents: int = Field(description="How many documents lie under the beam's node.")


class Explanation(BaseModel):
    """How an answer came about."""

    scoring: str
    decoder_steps: int = Field(description="How deep the decoder had to run.")
    beams: list[ExplainedBeam]


Timings = Annotated[dict[str, float], Field(description="Seconds per stage; `total` is the time in this service.")]


class QueryAnswer(BaseModel):
    """The answer to one query of a batch."""

    results: list[Result]
    cached: bool = Field(description="Whether the answer comes from the cache.")
    explanation: Explanation | None = None


class SearchAnswer(QueryAnswer):
    """The answer to one query."""

    timings: Timings

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "results": [{"id": "collections.Counter", "score": -1.3, "title": "collections.Counter"}],
                    "cached": False,
                    "timings": {"encode": 0.0041, "walk": 0.0023, "total": 0.0071},
                }
            ]
        }
    )


class BatchAnswer(BaseModel):
    """The answers to a batch, in its order."""

    answers: list[QueryAnswer]
    timings: Timings


class ProblemDetails(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] | None = Field(None, description="JSON pointer and rule of each part that is wrong.")
