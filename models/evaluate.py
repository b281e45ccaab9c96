"""Evaluation of a bundle at item level: every scoring, ranking and beam of the walk beside its baselines, in one run.

Shapes: Q queries, N documents (in the order of the bundle), D dimensions, T tokens.

The walk is measured through the serving pipeline itself. A walk is run once per scoring and beam; the rankings reorder
the same candidates, as the pipeline would (service.search.ranking), which the tests hold against the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.baselines import BM25, Ranked, dense_search
from models.comparison import Comparison, Row
from models.data import DataError, load_dataset
from models.evaluate_codes import hamming_results, measure_cascades
from models.free_decoding import decode_freely, valid_share
from models.measures import DEPTH, measure
from models.runs import write_run
from models.task import SAMPLED, EncodedQueries, Settings, Task, make_task, seen_in_train, untuned_vectors
from service.index.bundle import Bundle, open_bundle
from service.ops.progress import progress_bar
from service.search.codes import CodeSearch
from service.search.modes import served
from service.search.options import MAX_TOP_K
from service.search.pipeline import Answer, Hit, Pipeline, SearchOptions

CANDIDATES = MAX_TOP_K  # asked of the pipeline, so that every ranking can reorder all of a walk's documents
FREE_BATCH = 8  # queries decoded together without the trie: Q·B·T scores stay in the cache

Result = list[tuple[str, float]]  # document ids with scores, best first


def evaluate(
    bundle_path: Path, data: Path, settings: Settings, observe: Callable[[Walk], None] | None = None
) -> Comparison:
    """Evaluate a bundle on a split of a data set; `observe` sees every walk's candidates.

    Raises:
        DataError: the data cannot be used, or the bundle lacks judged documents or a scoring.
        service.index.artefact.ArtefactError: the bundle is damaged.
    """
    bundle = open_bundle(bundle_path)
    pipeline = Pipeline(bundle, threads=settings.threads)
    try:
        _check_scorings(bundle, settings)
        dataset = load_dataset(data, [settings.split], history=bundle.manifest.model.text.history_count)
        task = make_task(dataset, settings, bundle)
        codes = pipeline.codes if settings.codes else None
        queries = EncodedQueries(pipeline.encoder, task, settings.batch)
        wanted = settings.baselines or codes
        vectors_QD = queries.vectors() if wanted else np.zeros((0, 0), np.float32)
        rows = [*(_baseline_rows(bundle, vectors_QD, task, settings) if settings.baselines else ())]
        if codes:
            rows += _hamming_rows(codes, vectors_QD, task, settings)
        rows += _walk_rows(bundle, pipeline, task, queries, settings, observe or (lambda _: None))
        if settings.words and pipeline.words is not None:
            rows += _word_rows(pipeline, task, queries, settings)
        free = min(settings.free_queries, len(task.ids))
        facts = (str(bundle_path), bundle.digest, data.resolve().name, settings.split)
        cascades = list(measure_cascades(codes, vectors_QD)) if codes else []
        seen = seen_in_train(data, task) if settings.split != "train" else 0
        return Comparison(*facts, len(task.documents), len(task.ids), free, seen, rows, cascades)
    finally:
        pipeline.close()


def _check_scorings(bundle: Bundle, settings: Settings) -> None:
    offered = bundle.manifest.model.scorings
    if missing := [scoring for scoring in settings.scorings if scoring not in offered]:
        raise DataError(f"bundle '{bundle.path}' does not offer scoring {missing[0]!r}: it offers {', '.join(offered)}")


def _baseline_rows(bundle: Bundle, vectors_QD: NDArray[np.float32], task: Task, settings: Settings) -> Iterator[Row]:
    started = time.perf_counter()
    bm25 = BM25([f"{document.title} {document.text}" for document in task.documents])
    yield _ranked_row("BM25", bm25.search(task.texts, DEPTH), task, settings, time.perf_counter() - started)
    started = time.perf_counter()
    found = dense_search(vectors_QD, bundle.vectors, DEPTH)
    yield _ranked_row("dense, bundle", found, task, settings, time.perf_counter() - started)
    if settings.untuned is not None:
        vectors_QD, vectors_ND = untuned_vectors(settings.untuned, task, settings)
        started = time.perf_counter()
        found = dense_search(vectors_QD, vectors_ND, DEPTH)
        yield _ranked_row("dense, untuned", found, task, settings, time.perf_counter() - started)


def _hamming_rows(codes: CodeSearch, vectors_QD: NDArray[np.float32], task: Task, settings: Settings) -> Iterator[Row]:
    for level, ranking, found, seconds in hamming_results(codes, vectors_QD, settings.batch):
        yield _ranked_row("Hamming", found, task, settings, seconds, level, ranking)


def _ranked_row(
    system: str, found: Ranked, task: Task, settings: Settings, seconds: float, scoring: str = "", ranking: str = ""
) -> Row:
    results: list[Result] = [
        [(task.documents[p].id, float(s)) for p, s in zip(row, scores, strict=True) if p >= 0]
        for row, scores in zip(found.positions, found.scores, strict=True)
    ]
    row = Row(system, _measured(task, results), scoring, ranking, milliseconds=1000 * seconds / len(task.ids))
    _write(row, task, results, settings)
    return row


def _walk_rows(
    bundle: Bundle,
    pipeline: Pipeline,
    task: Task,
    queries: EncodedQueries,
    settings: Settings,
    observe: Callable[[Walk], None],
) -> list[Row]:
    scorings = settings.scorings or tuple(bundle.manifest.model.scorings)
    sids = {bundle.trie.sid(position) for position in range(len(task.documents))}
    free = free_shares(pipeline, task, settings, sids) if "generative" in scorings else {}
    rows: list[Row] = []
    with progress_bar("walks", len(scorings) * len(settings.beams) * len(task.ids)) as advance:
        for scoring in scorings:
            pipeline.search(task.texts[:1], SearchOptions(scoring=scoring))  # compile kernels before any clock runs
            for beam in settings.beams:
                walk = walk_once(pipeline, queries, scoring, beam, advance)
                observe(walk)
                shares = known_share(walk, bundle, sids), free.get(beam) if scoring == "generative" else None
                rows += _rankings(walk, task, settings, bundle.manifest.model.fusion_weight, shares)
    order = {ranking: number for number, ranking in enumerate(settings.rankings)}
    return sorted(rows, key=lambda row: (scorings.index(row.scoring), order[row.ranking]))


def _word_rows(pipeline: Pipeline, task: Task, queries: EncodedQueries, settings: Settings) -> Iterator[Row]:
    """The modes that look for words: alone, and joined with the walk by every scoring, with a beam a result."""
    offered = pipeline.bundle.manifest.model.scorings
    joined = (settings.scorings or offered) if "hybrid" in served(pipeline.has) else ()  # not where words count nothing
    asked = [("lexical", offered[0]), *(("hybrid", scoring) for scoring in joined)]
    with progress_bar("words", len(asked) * len(task.ids)) as advance:
        for mode, scoring in asked:
            options = SearchOptions(top_k=DEPTH, mode=mode, scoring=scoring)  # type: ignore[arg-type]  # of a literal
            pipeline.search(task.texts[:1], options)  # compile kernels before the clock runs
            results: list[Result] = []
            seconds = 0.0
            for answers, batch_seconds in _answered(pipeline, queries, options):
                results += [[(hit.id, hit.score) for hit in answer.hits] for answer in answers]
                seconds += batch_seconds
                advance(len(answers))
            walked = (scoring, options.beams(scoring)) if mode == "hybrid" else ("", None)
            milliseconds = 1000 * seconds / len(task.ids)
            row = Row(mode, _measured(task, results), walked[0], "words", walked[1], milliseconds)
            _write(row, task, results, settings)
            yield row


def _answered(
    pipeline: Pipeline, queries: EncodedQueries, options: SearchOptions
) -> Iterator[tuple[list[Answer], float]]:
    """Answer all queries, batch by batch, with the seconds that a batch took, fetching documents left out."""
    for encoded, encoding_seconds in queries:
        answers = pipeline.answer(encoded, options)
        searched = sum(time for stage, time in answers[0].timings_seconds.items() if stage != "documents")
        yield answers, encoding_seconds + searched


@dataclass(frozen=True, eq=False)
class Walk:
    """All candidates of every query for one scoring and beam.

    Attributes:
        seconds: for all queries, fetching documents left out.
        steps: of the decoder, for all queries.
    """

    scoring: str
    beam: int
    hits: list[list[Hit]]
    seconds: float
    steps: int


def walk_once(
    pipeline: Pipeline, queries: EncodedQueries, scoring: str, beam: int, advance: Callable[[int], None]
) -> Walk:
    """Search all queries with one scoring and beam."""
    options = SearchOptions(top_k=CANDIDATES, beam_width=beam, scoring=scoring)
    hits: list[list[Hit]] = []
    seconds, steps = 0.0, 0
    for answers, batch_seconds in _answered(pipeline, queries, options):
        hits += [answer.hits for answer in answers]
        seconds += batch_seconds
        steps += sum(answer.decoder_steps for answer in answers)
        advance(len(answers))
    return Walk(scoring, beam, hits, seconds, steps)


def known_share(walk: Walk, bundle: Bundle, sids: set[tuple[int, ...]]) -> float | None:
    """Give the share of returned semantic IDs that some document of the index has; None without any."""
    offsets = bundle.manifest.model.level_offsets
    known = [
        tuple(code + first for code, first in zip(hit.sid, offsets, strict=False) if code >= 0) in sids
        for row in walk.hits
        for hit in row
    ]
    return sum(known) / len(known) if known else None


def _rankings(
    walk: Walk, task: Task, settings: Settings, fusion_weight: float, valid: tuple[float | None, float | None]
) -> Iterator[Row]:
    milliseconds, steps = 1000 * walk.seconds / len(task.ids), walk.steps / len(task.ids)
    for number, ranking in enumerate(settings.rankings):
        results = [reorder(row, ranking, fusion_weight)[:DEPTH] for row in walk.hits]
        shown = (None,) * 4 if number else (milliseconds, *valid, steps)
        row = Row("walk", _measured(task, results), walk.scoring, ranking, walk.beam, *shown)
        _write(row, task, results, settings)
        yield row


def reorder(hits: Sequence[Hit], ranking: str, fusion_weight: float) -> Result:
    """Rank a walk's candidates: ids with the score of the ranking, best first, ties as in the pipeline.

    The service enumerates a leaf by cosine; `sampled` is what HHQ does instead: always the same order of the same hits.
    """
    if ranking == "lexicographic":
        scored = [((hit.beam_score, hit.cosine), hit.beam_score, hit) for hit in hits]
    elif ranking == SAMPLED:
        draws = np.random.default_rng([hit.position for hit in hits]).random(len(hits)).tolist()
        scored = [((hit.beam_score, draw), hit.beam_score, hit) for hit, draw in zip(hits, draws, strict=True)]
    elif ranking == "cosine":
        scored = [((hit.cosine, 0.0), hit.cosine, hit) for hit in hits]
    else:
        fused = [hit.beam_score + fusion_weight * hit.cosine for hit in hits]
        scored = [((score, 0.0), score, hit) for score, hit in zip(fused, hits, strict=True)]
    scored.sort(key=lambda entry: (-entry[0][0], -entry[0][1], entry[2].position))
    return [(hit.id, float(score)) for _, score, hit in scored]


def free_shares(pipeline: Pipeline, task: Task, settings: Settings, sids: set[tuple[int, ...]]) -> dict[int, float]:
    """Decode without the trie: for each beam width the share of valid IDs among the first so many beams."""
    decoder, tables = pipeline.decoder, pipeline.tables
    if decoder is None or not settings.free_queries:
        return {}
    texts, histories = task.texts[: settings.free_queries], task.histories[: settings.free_queries]
    beams = []
    with progress_bar("no trie", len(texts)) as advance:
        for start in range(0, len(texts), FREE_BATCH):
            rows = slice(start, start + FREE_BATCH)
            encoded = pipeline.encoder.encode_queries(texts[rows], histories[rows])
            step, width = decoder.start(encoded), max(settings.beams)
            found = decode_freely(
                step, len(texts[rows]), tables.tokens_TE, tables.token_scale_T, width, tables.spans, sids
            )
            beams.append(found.tokens)
            advance(len(texts[rows]))
    return valid_share(np.concatenate(beams), sids, settings.beams)


def _measured(task: Task, results: Sequence[Result]) -> dict[str, float]:
    run = {query: [document for document, _ in result] for query, result in zip(task.ids, results, strict=True)}
    return measure(run, task.qrels)


def _write(row: Row, task: Task, results: Sequence[Result], settings: Settings) -> None:
    if settings.runs is not None:
        settings.runs.mkdir(parents=True, exist_ok=True)
        write_run(settings.runs / f"{row.name}.trec", dict(zip(task.ids, results, strict=True)), row.name)
