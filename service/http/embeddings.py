"""Embeddings in OpenAI's shape, so that its clients work: as floats, as their base64, or as packed binary codes.

Legend: Q inputs, D vector dimensions, W words.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Body
from numpy.typing import NDArray
from starlette.responses import Response

from service.http.embeddings_schemas import EXAMPLES, Embedding, EmbeddingAnswer, EmbeddingRequest, Space, Usage
from service.http.engine import Engine, Timings
from service.http.problems import invalid
from service.http.shared import (
    BODY_PROBLEMS,
    FromApp,
    check_count,
    check_dims,
    check_level,
    check_texts,
    needed_codes,
    off_loop,
    timing_headers,
)
from service.model.text import TextKind, TextSettings

embeddings_router = APIRouter(prefix="/v1", tags=["embeddings"])


class Part(NamedTuple):
    """Some inputs' embeddings as JSON, separated by commas, and the tokens that were read for them."""

    json: str
    tokens: int


@embeddings_router.post(
    "/embeddings", summary="Embeddings of texts, in OpenAI's shape", response_model=EmbeddingAnswer,
    responses=BODY_PROBLEMS,
)  # fmt: skip
async def embeddings(body: Annotated[EmbeddingRequest, Body(openapi_examples=EXAMPLES)], shared: FromApp) -> Response:
    """Encode texts as unit vectors.

    Without `dimensions` these are the encoder's vectors, as the bundle stores them; a smaller prefix comes from the
    model's adapter, and so do codes: `space` says which. Compare only what was asked for in the same way.
    """
    engine, limits = shared.engine, shared.limits
    manifest = engine.pipeline.bundle.manifest.model
    kind, texts = _kind(body, manifest.text), body.input
    check_count("#/input", len(texts), limits.max_embedding_inputs, "inputs")
    if kind == "query":  # documents may be long: tokens limit them
        check_texts("#/input", texts, limits.max_query_characters)
    order = Order(body, engine, kind, _space(body, engine))
    rows = [slice(first, first + limits.max_queries) for first in range(0, len(texts), limits.max_queries)]
    parts: list[Part] = []
    timings = await engine.compute_each([partial(order.part, each) for each in rows], parts.append)
    tokens = sum(part.tokens for part in parts)
    usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
    answer = EmbeddingAnswer(data=[], model=manifest.provenance.recipe, space=order.space, usage=usage)
    return await off_loop(len(texts), _response, answer, [part.json for part in parts], timing_headers(timings))


def _kind(body: EmbeddingRequest, text: TextSettings) -> TextKind:
    """Return what the inputs are read as: documents, which may be longer, where that is all the difference."""
    if body.input_type is not None:
        return body.input_type
    return "document" if text.query_prefix == text.document_prefix else "query"


def _space(body: EmbeddingRequest, engine: Engine) -> Space:
    """Return whose vectors are wanted; raises a 422 for a space, dimensions or a level that are not offered."""
    width = engine.pipeline.bundle.manifest.model.dimensions
    is_code, is_cut = body.encoding_format == "ubinary", body.dimensions not in (None, width)
    space: Space = body.space or ("adapter" if is_code or is_cut else "encoder")
    if space == "encoder":
        if is_code or is_cut:
            detail = f"gives all {width} dimensions, as floats: leave dimensions, or ubinary, out, or ask for `adapter`"
            raise invalid("#/space", detail)
        return space
    pointer = "#/space" if body.space else "#/encoding_format" if is_code else "#/dimensions"
    codes = needed_codes(engine, pointer)
    if is_code:
        check_level(codes, body.level or "1")
    check_dims("#/dimensions", body.dimensions, codes)
    return space


@dataclass(frozen=True)
class Order:
    """A checked request; threads compute it part by part.

    Attributes:
        body: the request.
        engine: what computes.
        kind: what its texts are read as.
        space: whose vectors are wanted.
    """

    body: EmbeddingRequest
    engine: Engine
    kind: TextKind
    space: Space

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens that are read of each input; raises a 422 for an input that has more and is not to be cut."""
        tokenizer = self.engine.pipeline.encoder.tokenizer
        lengths, most = tokenizer.lengths(self.body.input, self.kind), tokenizer.settings.max_tokens(self.kind)
        longer = [row for row, length in enumerate(lengths) if length > most]
        if longer and not self.body.truncate:
            detail = (
                f"has {lengths[longer[0]]} tokens, more than the {most} of a {self.kind}: shorten it, "
                "choose another input_type, or set truncate"
            )
            raise invalid(f"#/input/{longer[0]}", detail)
        return [min(length, most) for length in lengths]

    def part(self, rows: slice) -> tuple[Part, Timings]:
        """Compute the embeddings of some inputs; the first part to come holds all inputs to their limit."""
        begin = time.perf_counter()
        tokens = sum(self.tokens[rows])
        vectors_QD = self._encode(self.body.input[rows])
        encoded = time.perf_counter()
        made = [
            Embedding.model_construct(index=index, embedding=value)  # ours: nothing to validate
            for index, value in enumerate(self._values(vectors_QD), rows.start)
        ]
        json = ",".join(each.model_dump_json() for each in made)
        return Part(json, tokens), {"encode": encoded - begin, "render": time.perf_counter() - encoded}

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors (Q, D) float32 of the encoder."""
        encoder = self.engine.pipeline.encoder
        if self.kind == "query":
            return encoder.encode_queries(texts, memory=False).vectors_QD
        return encoder.encode_documents([("", text) for text in texts], advance=lambda _: None)

    def _values(self, vectors_QD: NDArray[np.float32]) -> list[Any]:
        """Return each embedding in the form asked for."""
        if self.body.encoding_format == "ubinary":
            return self._codes(vectors_QD)
        if self.space == "adapter":
            vectors_QD = needed_codes(self.engine, "#/space").binarizer.embed(vectors_QD, self.body.dimensions)
        if self.body.encoding_format == "base64":
            return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors_QD]
        return list(vectors_QD.tolist())

    def _codes(self, vectors_QD: NDArray[np.float32]) -> list[list[int]]:
        """Return the bytes of each packed code."""
        codes, level = needed_codes(self.engine, "#/encoding_format"), self.body.level or "1"
        codes_QW = codes.binarizer.codes(vectors_QD, level, self.body.dimensions)
        return [np.frombuffer(row.astype("<u8").tobytes(), np.uint8).tolist() for row in codes_QW]


def _response(answer: EmbeddingAnswer, data: Sequence[str], headers: dict[str, str]) -> Response:
    """Return an answer without its embeddings, and those, as JSON.

    They are JSON already: one call that writes millions of numbers keeps the interpreter, and so the event loop.
    """
    before, after = answer.model_dump_json().split("[]", 1)  # of the empty `data`
    return Response(f"{before}[{','.join(data)}]{after}", headers=headers, media_type="application/json")
