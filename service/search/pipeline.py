"""A query's way: encode; walk, scan, look for words; rank, fetch. `Pipeline.search` reads from top to bottom.

Legend: Q queries, B beams, K results, E token dimensions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from service.index.bundle import Bundle
from service.index.manifest import Scoring
from service.model.decoder import Decoder
from service.model.encoder import Encoded, Encoder
from service.model.session import Device
from service.search.codes import CodeSearch, HammingOptions, open_code_search
from service.search.hybrid import OVERSAMPLING, Positions, Words, join
from service.search.lexical import LexicalSearch, Tokens, open_lexical_search
from service.search.modes import NO_CODES, NO_WORDS, Has, ways_of, weight_of_words
from service.search.options import Answer, Beam, Hit, SearchOptions
from service.search.ranking import Ranked, rank
from service.search.rescoring import Neighbours
from service.search.tables import WalkTables
from service.search.walk import Beams, Step, walk

__all__ = ["Answer", "Beam", "Hit", "Pipeline", "SearchOptions"]


class Pipeline:
    """Searches one bundle; threads may share it.

    Args:
        bundle: an open bundle; the pipeline closes it.
        threads: threads of each onnxruntime session and of each scan; None for every CPU that this process may use.
        device: where the graphs run.

    Attributes:
        codes: Hamming search over the bundle's packed codes; None where it has none.
        words: lexical search over the bundle's inverted index; None where it has none.

    Raises:
        ArtefactError: the bundle's adapter belongs to another encoder, or its postings to another tokenizer.
        ModelError: a graph or the tokenizer cannot be used, or this onnxruntime does not offer the device.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, device: Device = "cpu") -> None:
        self.bundle, model = bundle, bundle.model
        manifest = model.manifest
        self.encoder = Encoder(
            model.encoder_file,
            model.tokenizer_file,
            manifest.text,
            threads,
            device=device,
            dimensions=manifest.dimensions,
        )
        self.decoder = Decoder(model.decoder_file, threads, device=device) if model.decoder_file else None
        self.tables = tables_of(bundle)
        self.codes = open_code_search(bundle, threads)
        self.words = open_lexical_search(bundle)

    def search(
        self,
        queries: Sequence[str],
        options: SearchOptions | None = None,
        histories: Sequence[Sequence[str]] | None = None,
    ) -> list[Answer]:
        """Answer a batch of queries, in order.

        Args:
            queries: Q texts.
            options: how to search.
            histories: titles of each query's last items, oldest first; models without history ignore them.

        Returns:
            An answer per query; none for no queries.

        Raises:
            ValueError: the bundle does not offer the scoring or the mode, or has no packed codes of that level (the
                message says what it has), or a text cannot be encoded.
        """
        if not queries:
            return []
        options = options or SearchOptions()
        ways = ways_of(options, self.has)
        decodes = self.check_scoring(options.scoring) != "geometric" and ways.walk
        clock = StageClock()
        encoded = self.encoder.encode_queries(queries, histories, memory=decodes)
        clock.lap("encode")
        return self.answer(encoded, options, clock)

    def answer(self, encoded: Encoded, options: SearchOptions, clock: StageClock | None = None) -> list[Answer]:
        """Answer a batch of queries that are encoded already: what `search` does after encoding them.

        Raises:
            ValueError: as `search`.
        """
        scoring, ways = self.check_scoring(options.scoring), ways_of(options, self.has)
        clock = clock or StageClock()
        found: list[list[Positions]] = []  # of each way but the walk, the candidates of each query

        beams: Beams | None = None
        if ways.walk:
            beams = self._walk(encoded, scoring, options, clock)
            clock.lap("walk")

        if ways.scan:
            found.append([near.positions_K for near in self._scan(encoded.vectors_QD, options)])
            clock.lap("hamming")

        tokens_Q: list[Tokens] | None = None
        if ways.words:
            words = self.check_words()
            tokens_Q = words.tokens(encoded.texts)
            matches = words.search(tokens_Q, options.top_k * OVERSAMPLING, options.eligible)
            found.append([matched.positions_K for matched in matches])
            clock.lap("lexical")

        said_QB = said_by_decoder(beams, options) if beams is not None and scoring == "guided" else None
        walked = self._rank(beams, encoded.vectors_QD, options, said_QB is None) if beams is not None else None
        if walked is not None and options.mode == "generative":
            ranked = walked
        else:
            ranked = self._join(walked, said_QB, found, tokens_Q, encoded.vectors_QD, options)
        clock.lap("rank")

        hits = self._fetch(beams, ranked, options.whole)
        clock.lap("documents")

        return [
            Answer(
                hits=hits[query],
                timings_seconds=clock.seconds,
                beams=self._explain(beams, query) if beams else None,
                decoder_steps=int(beams.steps_Q[query]) if beams and beams.steps else 0,
            )
            for query in range(len(encoded))
        ]

    def check_scoring(self, scoring: str | None) -> Scoring:
        """Return the scoring to use, the bundle's default for None; raises ValueError for what it does not offer."""
        manifest = self.bundle.model.manifest
        chosen = manifest.default_scoring if scoring is None else scoring
        if chosen not in manifest.scorings:
            raise ValueError(f"this bundle does not offer scoring {chosen!r}: it offers {', '.join(manifest.scorings)}")
        return chosen

    @property
    def has(self) -> Has:
        """What the bundle has to search in beside its trie."""
        weight = self.bundle.model.manifest.lexical_weight
        return Has(self.codes is not None, self.words is not None, weight)

    def check_words(self) -> LexicalSearch:
        """Return the search over words; raises ValueError for a bundle without an inverted index."""
        if self.words is None:
            raise ValueError(f"this bundle has {NO_WORDS}")
        return self.words

    def check_codes(self) -> CodeSearch:
        """Return the search over packed codes; raises ValueError for a bundle without any."""
        if self.codes is None:
            raise ValueError(f"this bundle has {NO_CODES}")
        return self.codes

    def close(self) -> None:
        """Stop the scan's threads and close the bundle; no search may be running."""
        if self.codes is not None:
            self.codes.close()
        self.bundle.close()

    def _walk(self, encoded: Encoded, scoring: Scoring, options: SearchOptions, clock: StageClock) -> Beams:
        step: Step | None = None
        if scoring != "geometric" and self.decoder is not None:
            step = clock.timed(self.decoder.start(encoded))
        return walk(
            self.tables,
            scoring,
            self.bundle.model.manifest.normalisation,
            options.beams(scoring),
            encoded.vectors_QD,
            step,
            options.eligible,
            options.explain,
        )

    def _scan(self, vectors_QD: NDArray[np.float32], options: SearchOptions) -> list[Neighbours]:
        """Find more candidates by their codes than are wanted: they are ranked by cosine."""
        codes = self.check_codes()
        wanted = HammingOptions(options.top_k * OVERSAMPLING, options.level, eligible=options.eligible)
        return codes.nearest(codes.pack(vectors_QD, options.level), wanted)

    def _rank(self, beams: Beams, vectors_QD: NDArray[np.float32], options: SearchOptions, by_cosine: bool) -> Ranked:
        """Order what the walk found; for `hybrid` more of it than is wanted, by what that will rank by."""
        joins = options.mode == "hybrid"
        return rank(
            beams,
            "cosine" if joins and by_cosine else options.ranking,
            options.top_k * OVERSAMPLING if joins else options.top_k,
            vectors_QD,
            self.bundle.vectors,
            self.bundle.model.manifest.fusion_weight,
            options.eligible,
        )

    def _join(
        self,
        walked: Ranked | None,
        said_QB: NDArray[np.float64] | None,
        found: Sequence[Sequence[Positions]],
        tokens_Q: Sequence[Tokens] | None,
        vectors_QD: NDArray[np.float32],
        options: SearchOptions,
    ) -> Ranked:
        """Order what all ways found: by cosine, decoder and words; in the mode `lexical` by words alone."""
        words: Words | None = None
        if tokens_Q is not None:
            cosine, share = (0.0, 1.0) if options.mode == "lexical" else (1.0, weight_of_words(options, self.has))
            words = Words(self.check_words(), tokens_Q, cosine, share)
        candidates = [np.concatenate(positions) for positions in zip(*found, strict=True)]
        return join(walked, candidates, vectors_QD, self.bundle.vectors, options.top_k, said_QB, words)

    def _fetch(self, beams: Beams | None, ranked: Ranked, whole: bool) -> list[list[Hit]]:
        """Turn the ranked positions of all queries into hits, with one look at the documents."""
        rows = [(query, place) for query, size in enumerate(ranked.size_Q) for place in range(size)]
        documents = self.bundle.documents.many([int(ranked.position_QK[row]) for row in rows], whole)
        hits: list[list[Hit]] = [[] for _ in ranked.size_Q]
        for row, document in zip(rows, documents, strict=True):
            query, position, beam = row[0], int(ranked.position_QK[row]), int(ranked.beam_QK[row])
            hits[query].append(
                Hit(
                    position=position,
                    document=document,
                    score=float(ranked.score_QK[row]),
                    cosine=float(ranked.cosine_QK[row]),
                    beam_score=_beam_score(beams, query, beam, float(ranked.cosine_QK[row])),
                    sid=self._codes(position),
                    lexical=math.nan if ranked.lexical_QK is None else float(ranked.lexical_QK[row]),
                )
            )
        return hits

    def _explain(self, beams: Beams, query: int) -> list[Beam] | None:
        """Return a query's beams with what each level added; None where the walk kept no levels."""
        if beams.levels_QBL is None:
            return None
        explained = []
        for beam in range(int(beams.size_Q[query])):
            lo, hi = int(beams.lo_QB[query, beam]), int(beams.hi_QB[query, beam])
            levels = beams.levels_QBL[query, beam]
            walked = [float(value) for value in levels[~np.isnan(levels)]]
            explained.append(Beam(self._codes(lo), float(beams.score_QB[query, beam]), walked, hi - lo))
        return explained

    def _codes(self, position: int) -> tuple[int, ...]:
        """Return a document's semantic ID as codes per level."""
        return codes_by_level(self.bundle.trie.sid(position), self.tables.level_offsets)


def said_by_decoder(beams: Beams, options: SearchOptions) -> NDArray[np.float64] | None:
    """What the decoder changed of each beam of a guided walk (Q, B), as a cosine; None where it does not count."""
    if options.mode != "hybrid" or options.ranking == "cosine" or not beams.weight:
        return None
    said_QB: NDArray[np.float64] = (beams.score_QB - beams.geometry_QB) / beams.weight
    return said_QB


def _beam_score(beams: Beams | None, query: int, beam: int, cosine: float) -> float:
    """Return the score of the beam that led to a document, with its cosine in the place of the node's reach."""
    if beams is None or beam < 0:
        return math.nan
    return float(beams.score_QB[query, beam] - beams.geometry_QB[query, beam] + beams.weight * cosine)


class StageClock:
    """Seconds per stage; the decoder's are taken out of the stage that they are part of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"encode": 0.0, "decode": 0.0}
        self._last = perf_counter()
        self._decode_before = 0.0

    def lap(self, stage: str) -> None:
        """Book the time since the last lap, less what the decoder took."""
        now, decode = perf_counter(), self.seconds["decode"]
        self.seconds[stage] = now - self._last - (decode - self._decode_before)
        self._last, self._decode_before = now, decode

    def timed(self, step: Step) -> Step:
        """Return a step whose time is booked as `decode`."""

        def run(
            embeddings_QBE: NDArray[np.float32], depth: int, parents_QB: NDArray[np.int64] | None, /
        ) -> NDArray[np.float32]:
            started = perf_counter()
            hidden_QBE = step(embeddings_QBE, depth, parents_QB)
            self.seconds["decode"] += perf_counter() - started
            return hidden_QBE

        return run


def codes_by_level(tokens: Sequence[int], level_offsets: Sequence[int]) -> tuple[int, ...]:
    """Return a SID's codes down to its last level; -1 for a level that it leaves out. A token says its own level."""
    codes: list[int] = []
    for token in tokens:
        level = bisect_right(level_offsets, token) - 1
        codes += [-1] * (level - len(codes)) + [token - level_offsets[level]]
    return tuple(codes)


def tables_of(bundle: Bundle) -> WalkTables:
    """Return what the walk reads of a bundle, with the manifest's scales spread over the tokens of their levels."""
    manifest = bundle.model.manifest

    def spread(values: Sequence[float]) -> NDArray[np.float32]:
        return np.repeat(np.asarray(values, np.float32), manifest.level_sizes if values else 1)

    return WalkTables(
        trie=bundle.trie,
        vectors=bundle.vectors,
        regions=bundle.regions,
        level_offsets=manifest.level_offsets,
        tokens_TE=bundle.model.tokens_TE,
        token_scale_T=spread(manifest.token_scale),
        guided_scale_T=spread(manifest.guided_scale),
        guided_weight=manifest.guided_weight,
    )
