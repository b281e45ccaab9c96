"""What a search is asked for and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from service.index.documents import Document
from service.index.manifest import MAX_LEXICAL_WEIGHT
from service.search.filters import DocumentFilter
from service.search.ranking import RANKINGS, Ranking
from service.search.walk import MAX_BEAM_WIDTH

Mode = Literal["generative", "hamming", "lexical", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_TOP_K = 1000
DEFAULT_BEAM_WIDTH = 20
GEOMETRIC_BEAM_WIDTH = 100  # a geometric walk runs no decoder: five times the beams cost less than one decoder step


@dataclass(frozen=True)
class SearchOptions:
    """How to search; the same for every query of a batch.

    Attributes:
        top_k: documents wanted, 1 to 1,000.
        beam_width: beams of the walk, 1 to 1,000; None for 20 (`geometric`: 100), or `top_k` where that is more: a beam
            may lead to one document only.
        scoring: `generative`, `geometric` or `guided`; None for the bundle's default.
        ranking: `lexicographic`, `cosine` or `fused`; of `generative` only, the other modes have their own. With
            `cosine`, `hybrid` leaves the decoder out.
        explain: whether the answer carries the beams.
        eligible: the documents that may be found; None for all.
        mode: `generative` walks the trie, `hamming` scans the packed codes and ranks by cosine, `lexical` looks for the
            query's words, `hybrid` does what the bundle can of these and ranks by cosine, by the decoder (scoring
            `guided`) and by words.
        level: level of the packed codes that are scanned; None for the bundle's default.
        lexical_weight: weight of words in `hybrid`, 0 to 100; None for the model's. At 0 they are not looked for.
        whole: whether the documents of hits have text and metadata; without, they have id and title.

    Raises:
        ValueError: a value is outside of its range.
    """

    top_k: int = 10
    beam_width: int | None = None
    scoring: str | None = None
    ranking: Ranking = "lexicographic"
    explain: bool = False
    eligible: DocumentFilter | None = None
    mode: Mode = "generative"
    level: str | None = None
    lexical_weight: float | None = None
    whole: bool = True

    def __post_init__(self) -> None:
        _check_range("top_k", self.top_k, MAX_TOP_K)
        if self.beam_width is not None:
            _check_range("beam_width", self.beam_width, MAX_BEAM_WIDTH)
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking {self.ranking!r} does not exist: choose one of {', '.join(RANKINGS)}")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} does not exist: choose one of {', '.join(MODES)}")
        if self.lexical_weight is not None and not 0 <= self.lexical_weight <= MAX_LEXICAL_WEIGHT:
            raise ValueError(f"lexical_weight {self.lexical_weight} is not between 0 and {MAX_LEXICAL_WEIGHT:g}")

    def beams(self, scoring: str) -> int:
        """The beam width to walk with under a scoring."""
        usual = GEOMETRIC_BEAM_WIDTH if scoring == "geometric" else DEFAULT_BEAM_WIDTH
        return self.beam_width if self.beam_width is not None else max(usual, self.top_k)


def _check_range(name: str, value: object, largest: int) -> None:
    """Refuse what is no whole number between 1 and `largest`; True is no number here."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a whole number between 1 and {largest}")
    if not 1 <= value <= largest:
        raise ValueError(f"{name} {value} is not between 1 and {largest}")


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        position: its position in the bundle.
        document: what the bundle stores of it.
        score: what it was ranked by.
        cosine: query · document.
        beam_score: the score of the beam that led to it, with the document's cosine in the place of the node's reach
            (`service.search.walk.Beams`); NaN for a document that no beam led to.
        sid: its semantic ID, one code per level.
        lexical: the share of the query's words that it holds; NaN where words were not looked for.
    """

    position: int
    document: Document
    score: float
    cosine: float
    beam_score: float
    sid: tuple[int, ...]
    lexical: float = math.nan

    @property
    def id(self) -> str:
        """The document's id."""
        return self.document.id


@dataclass(frozen=True)
class Beam:
    """A beam at the end of the walk, for explanations.

    Attributes:
        sid: the semantic ID, one code per level.
        score: log P(SID | query), under `geometric` the node's reach, under `guided` weight · reach plus what the
            decoder changed.
        level_scores: what each walked level added (`geometric`: the reach at that level); shorter than the SID where
            the rest was certain.
        documents: how many documents hold this SID.
    """

    sid: tuple[int, ...]
    score: float
    level_scores: list[float]
    documents: int


@dataclass(frozen=True)
class Answer:
    """The answer to one query.

    Attributes:
        hits: the documents, best first.
        timings_seconds: `encode`, `decode` (inside the decoder), `walk` (the rest of the walk), `hamming` and `lexical`
            (in the modes that do so), `rank`, `documents`; of the whole batch that the query was in.
        beams: the walk's beams, best first, when explained.
        decoder_steps: decoder steps that this query needed; 0 under `geometric`.
    """

    hits: list[Hit]
    timings_seconds: dict[str, float] = field(default_factory=dict)
    beams: list[Beam] | None = None
    decoder_steps: int = 0
