"""The endpoint of Hamming search: from a text, a vector or a packed code to the nearest documents.

Legend: Q queries, D vector dimensions, W words.
"""

from __future__ import annotations

import base64
import binascii
import math
import time
from functools import partial
from itertools import chain, pairwise
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body
from numpy.typing import NDArray
from starlette.responses import Response

from service.http.engine import Engine, Timings, document_filter
from service.http.hamming_schemas import (
    HAMMING_EXAMPLES,
    HammingAnswer,
    HammingBatchAnswer,
    HammingRequest,
    HammingResult,
    HammingResults,
)
from service.http.problems import invalid
from service.http.shared import (
    BODY_PROBLEMS,
    FromApp,
    RequestLimits,
    check_count,
    check_dims,
    check_level,
    check_texts,
    json_response,
    needed_codes,
    off_loop,
    timing_headers,
)
from service.index.documents import Document
from service.model.packing import are_packed
from service.search.codes import Cascade, CodeSearch, HammingOptions, unit_vectors
from service.search.rescoring import Neighbours

MAX_RESULTS = 64_000  # of one request
MAX_CANDIDATES = 400_000  # rescored for one request: half a second of reading vectors
MAX_SHORTLISTED = 4_000_000  # by a cascade for one request: about two seconds of one core

hamming_router = APIRouter(prefix="/v1", tags=["search"])


@hamming_router.post(
    "/hamming/search",
    summary="Find the nearest documents by packed binary codes",
    response_model=HammingAnswer | HammingBatchAnswer,
    responses=BODY_PROBLEMS,
)
async def hamming_search(
    body: Annotated[HammingRequest, Body(openapi_examples=HAMMING_EXAMPLES)], shared: FromApp
) -> Response:
    """Scan all packed codes of a level; the answer is exact unless a `cascade` is asked for. Answers are not cached.

    A single query gives `results`; a batch gives `answers`, one for each query in its order.
    """
    begin = time.perf_counter()
    engine = shared.engine
    codes = needed_codes(engine, "#")
    _check_limits(body, shared.limits)
    _check_shape(body, codes)
    documents = engine.pipeline.bundle.manifest.documents
    _check_top_k(body, documents)
    _check_cascade(body, documents)
    answers, timings = await engine.compute(partial(_answer, body, engine, codes))
    engine.metrics.count_queries(len(answers))
    timings |= {"total": time.perf_counter() - begin}
    how: dict[str, Any] = {
        "level": body.level or codes.default_level,
        "dims": body.dims or codes.prefixes[-1],
        "timings": timings,
    }
    answer = (
        HammingBatchAnswer(answers=answers, **how)
        if body.is_batch
        else HammingAnswer(results=answers[0].results, **how)
    )
    return await off_loop(sum(len(found.results) for found in answers), json_response, answer, timing_headers(timings))


def _check_limits(body: HammingRequest, limits: RequestLimits) -> None:
    """Raise a 422 for what is more than the operator, or the memory of one answer, allows."""
    queries = len(body.given())
    if body.top_k > limits.max_hamming_top_k:
        raise invalid("#/top_k", f"is more than {limits.max_hamming_top_k}: ask for fewer results")
    check_count(f"#/{body.form}", queries, limits.max_queries)
    if body.form in ("query", "queries"):
        check_texts(f"#/{body.form}", body.given(), limits.max_query_characters)
    results = queries * body.top_k
    if results > MAX_RESULTS:
        raise invalid("#/top_k", f"gives {results} results, more than {MAX_RESULTS}: send smaller batches")
    candidates = results * (body.rescore or 1)
    if candidates > MAX_CANDIDATES:
        raise invalid("#/rescore", f"ranks {candidates} candidates, more than {MAX_CANDIDATES}: send smaller batches")


def _check_shape(body: HammingRequest, codes: CodeSearch) -> None:
    """Raise a 422 for a level, dimensions or widths that these codes do not have."""
    layout = check_level(codes, body.level)
    check_dims("#/dims", body.dims, codes)
    if body.cascade is not None:
        check_dims("#/cascade/dims", body.cascade.dims, codes)
        if layout.words_of(body.cascade.dims) == layout.words:
            detail = f"takes all {layout.words} words of a code: choose fewer dimensions, or leave the cascade out"
            raise invalid("#/cascade/dims", detail)
    if body.form in ("vector", "vectors"):
        for row, vector in enumerate(body.given()):
            if len(vector) != layout.dims:
                detail = f"has {len(vector)} numbers, this model's vectors have {layout.dims}: send as many"
                raise invalid(body.pointer(row), detail)


def _answer(body: HammingRequest, engine: Engine, codes: CodeSearch) -> tuple[list[HammingResults], Timings]:
    """Compute in a thread: encode, pack, scan, then the documents."""
    times = [time.perf_counter()]
    options = _options(body, engine)
    vectors_QD = _vectors(body, engine)
    times.append(time.perf_counter())
    codes_QW = _codes(body, codes) if vectors_QD is None else codes.pack(vectors_QD, body.level)
    times.append(time.perf_counter())
    found = codes.nearest(codes_QW, options, vectors_QD)
    times.append(time.perf_counter())
    results = _render(found, engine, "documents" in body.include)
    times.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in pairwise(times)]
    stages = dict(zip(("encode", "pack", "hamming", "render"), seconds, strict=True))
    return results, stages | {"pipeline": sum(seconds[:3])}


def _check_top_k(body: HammingRequest, documents: int) -> None:
    """Raise a 422 for more results than there are documents; who asks for no number gets them all."""
    if "top_k" in body.model_fields_set and body.top_k > documents:
        raise invalid("#/top_k", f"is more than the {documents} documents: ask for at most {documents}")


def _check_cascade(body: HammingRequest, documents: int) -> None:
    """Raise a 422 for shortlists that take longer than any exact scan would."""
    if body.cascade is None:
        return
    shortlisted = len(body.given()) * math.ceil(body.cascade.share * documents)
    if shortlisted > MAX_SHORTLISTED:
        detail = (
            f"shortlists {shortlisted} documents for all queries, more than {MAX_SHORTLISTED}: ask for a smaller part"
        )
        raise invalid("#/cascade/share", detail)


def _options(body: HammingRequest, engine: Engine) -> HammingOptions:
    cascade = Cascade(body.cascade.dims, body.cascade.share) if body.cascade else None
    return HammingOptions(
        top_k=body.top_k,
        level=body.level,
        dims=body.dims,
        eligible=document_filter(engine.pipeline, body.filter),
        oversampling=body.rescore,
        cascade=cascade,
    )


def _vectors(body: HammingRequest, engine: Engine) -> NDArray[np.float32] | None:
    """Return the queries' unit vectors (Q, D) float32, None for codes."""
    if body.form in ("query", "queries"):
        return engine.pipeline.encoder.encode_queries(body.given(), memory=False).vectors_QD
    if body.form in ("code", "codes"):
        return None
    try:
        return unit_vectors(body.given())
    except ValueError as error:
        raise invalid(f"#/{body.form}", str(error)) from None


def _codes(body: HammingRequest, codes: CodeSearch) -> NDArray[np.uint64]:
    """Return the given codes (Q, W) uint64, cut to the prefix that is compared."""
    layout = codes.layout(body.level)
    words = layout.words_of(body.dims)
    codes_QW = np.zeros((len(body.given()), layout.words), np.uint64)
    for row, text in enumerate(body.given()):
        code_W = decode_code(text, body.pointer(row), sorted({words, layout.words}))
        codes_QW[row, : len(code_W)] = code_W
    if len(bad := np.flatnonzero(~are_packed(codes_QW, layout))):
        detail = (
            f"is no code of level {layout.level}, which has {layout.bits} bits at {layout.dims} dimensions: pack bit i "
            "of word w least significant first, as `/v1/embeddings` with ubinary gives codes"
        )
        raise invalid(body.pointer(int(bad[0])), detail)
    return np.ascontiguousarray(codes_QW[:, :words])


def decode_code(text: str, pointer: str, widths: list[int]) -> NDArray[np.uint64]:
    """Return the words (W,) uint64 of a base64 code; raises a 422 for what is none, or of no such width in words."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(pointer, "is not base64 (RFC 4648, with padding): encode the code's bytes") from None
    allowed = [8 * width for width in widths]
    if len(content) not in allowed:
        sizes = " or ".join(map(str, allowed))
        raise invalid(pointer, f"has {len(content)} bytes, a code here has {sizes}: check level and dims")
    return np.frombuffer(content, "<u8").astype(np.uint64)


def _render(found: list[Neighbours], engine: Engine, is_whole: bool) -> list[HammingResults]:
    positions = list(chain.from_iterable(row.positions_K.tolist() for row in found))
    documents = iter(engine.pipeline.bundle.documents.many(positions, is_whole))
    return [
        HammingResults(results=[_result(row, rank, next(documents), is_whole) for rank in range(len(row[0]))])
        for row in found
    ]


def _result(row: Neighbours, rank: int, document: Document, is_whole: bool) -> HammingResult:
    return HammingResult(
        id=document.id,
        distance=int(row.distances_K[rank]),
        similarity=float(row.similarities_K[rank]),
        cosine=None if row.cosines_K is None else float(row.cosines_K[rank]),
        title=document.title or None,
        text=document.text if is_whole else None,
        metadata=document.metadata if is_whole else None,
    )
