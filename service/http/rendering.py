"""From the pipeline's hits to what clients get."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol

from service.http.schemas import ExplainedBeam, Explanation, Result, Scores
from service.index.bundle import Bundle
from service.model.encoder import Encoder
from service.search.codes import CodeSearch
from service.search.lexical import LexicalSearch
from service.search.modes import Has
from service.search.options import Answer, Hit, SearchOptions


class SearchPipeline(Protocol):
    """What the service needs of ``service.search.pipeline.Pipeline``."""

    @property
    def bundle(self) -> Bundle:
        """The open bundle."""

    @property
    def encoder(self) -> Encoder:
        """The bundle's encoder."""

    @property
    def codes(self) -> CodeSearch | None:
        """Hamming search over the bundle's packed codes; None where it has none."""

    @property
    def words(self) -> LexicalSearch | None:
        """Lexical search over the bundle's inverted index; None where it has none."""

    @property
    def has(self) -> Has:
        """What the bundle has to search in beside its trie."""

    def search(
        self,
        queries: Sequence[str],
        options: SearchOptions | None = None,
        histories: Sequence[Sequence[str]] | None = None,
    ) -> list[Answer]:
        """Answer the queries; blocks, and may be called from several threads."""

    def close(self) -> None:
        """Let go of sessions and files."""


def render_results(answer: Answer, options: SearchOptions, include: Collection[str]) -> list[Result]:
    """Return the hits with what ``include`` asks for."""
    is_probability = options.scoring == "generative"  # the others' scores hold the cosine
    return [_result(hit, include, is_probability) for hit in answer.hits]


def explain(answer: Answer, options: SearchOptions) -> Explanation:
    """Return how an answer came about."""
    beams = [
        ExplainedBeam(codes=list(beam.sid), score=beam.score, level_scores=beam.level_scores, documents=beam.documents)
        for beam in answer.beams or ()
    ]
    return Explanation(scoring=options.scoring or "", decoder_steps=answer.decoder_steps, beams=beams)


def _result(hit: Hit, include: Collection[str], is_probability: bool) -> Result:
    document, whole = hit.document, "documents" in include
    has_probability = is_probability and not math.isnan(hit.beam_score)
    scores = Scores(
        cosine=hit.cosine,
        log_probability=hit.beam_score if has_probability else None,
        lexical=None if math.isnan(hit.lexical) else hit.lexical,
    )
    return Result(
        id=document.id,
        score=hit.score,
        title=document.title or None,
        text=document.text if whole else None,
        metadata=document.metadata if whole else None,
        codes=list(hit.sid) if "codes" in include else None,
        scores=scores if "scores" in include else None,
    )
