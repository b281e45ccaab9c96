"""Embeddings in OpenAI's shape, so that its clients work: as floats, as their base64, or as packed binary codes.

Legend: Q inputs, D vector dimensions, W words.
"""

from __future__ import annotations

import base64
import time
from functools import partial
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from fastapi import APIRouter, Body
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator
from starlette.responses import Response

from service.http.engine import Engine, Timings
from service.http.hamming_schemas import MAX_DIMENSIONS
from service.http.schemas import MAX_QUERIES, QueryText, Strict
from service.http.shared import (
    BODY_PROBLEMS,
    FromApp,
    check_count,
    check_dims,
    check_level,
    check_texts,
    json_response,
    needed_codes,
    timing_headers,
)
from service.model.layout import Level

EXAMPLES: Final[dict[str, Any]] = {
    "floats": {"summary": "One text", "value": {"input": "open a file", "model": "rhumbline"}},
    "documents": {
        "summary": "Documents, as the base64 of their floats",
        "value": {"input": ["one", "two"], "model": "any", "encoding_format": "base64", "input_type": "document"},
    },
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Inputs = Annotated[
    list[QueryText],
    Field(min_length=1, max_length=MAX_QUERIES),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class EmbeddingRequest(Strict):
    """Texts to embed, and in which form."""

    input: Inputs = Field(description="A text, or a list of texts.")
    model: Annotated[str, Field(max_length=256)] = Field(
        description="Any name: one model is served, its own is given back."
    )
    dimensions: int | None = Field(
        None, ge=1, le=MAX_DIMENSIONS, description="Matryoshka prefix, normalised again; `/info` lists them."
    )
    encoding_format: Literal["float", "base64", "ubinary"] = Field(
        "float",
        description="`base64` is of little-endian float32. `ubinary` lists the bytes of a packed code, whose base64 "
        "`/v1/hamming/search` takes.",
    )
    level: Level | None = Field(None, description="Level of `ubinary`; 1 bit if left out.")
    input_type: Literal["query", "document"] = Field(
        "query", description="Which of the model's prefixes and lengths apply."
    )
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="Ignored.")

    @model_validator(mode="after")
    def _level_belongs_to_codes(self) -> Self:
        if self.level is not None and self.encoding_format != "ubinary":
            raise ValueError("level belongs to encoding_format ubinary: leave it out, or ask for ubinary")
        return self


class Embedding(BaseModel):
    """The embedding of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[int] | list[float] | str


class Usage(BaseModel):
    """Tokens that were read, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """The embeddings of all inputs, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


embeddings_router = APIRouter(prefix="/v1", tags=["embeddings"])


@embeddings_router.post(
    "/embeddings", summary="Embeddings of texts, in OpenAI's shape", response_model=EmbeddingAnswer,
    responses=BODY_PROBLEMS,
)  # fmt: skip
async def embeddings(body: Annotated[EmbeddingRequest, Body(openapi_examples=EXAMPLES)], shared: FromApp) -> Response:
    """Encode texts as unit vectors.

    Without `dimensions` these are the encoder's vectors, as the bundle stores them; a smaller prefix comes from the
    model's adapter, and so do codes. Compare only what was asked for in the same way.
    """
    check_count("#/input", len(body.input), shared.limits)
    if body.input_type == "query":  # documents may be long: they are cut to the model's limit, as in the index
        check_texts("#/input", body.input, shared.limits.max_query_characters)
    _check_form(body, shared.engine)
    answer, timings = await shared.engine.compute(partial(_answer, body, shared.engine))
    return json_response(answer, timing_headers(timings))


def _check_form(body: EmbeddingRequest, engine: Engine) -> None:
    """Raise a 422 for dimensions or a level that this model does not give."""
    if body.encoding_format == "ubinary":
        check_level(needed_codes(engine, "#/encoding_format"), body.level or "1")
    if body.dimensions not in (None, engine.pipeline.bundle.manifest.model.dimensions):
        check_dims("#/dimensions", body.dimensions, needed_codes(engine, "#/dimensions"))


def _answer(body: EmbeddingRequest, engine: Engine) -> tuple[EmbeddingAnswer, Timings]:
    begin = time.perf_counter()
    vectors_QD, tokens = _encode(body, engine)
    encoded = time.perf_counter()
    data = [Embedding(index=index, embedding=value) for index, value in enumerate(_values(body, engine, vectors_QD))]
    name = engine.pipeline.bundle.manifest.model.provenance.recipe
    answer = EmbeddingAnswer(data=data, model=name, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))
    return answer, {"encode": encoded - begin, "render": time.perf_counter() - encoded}


def _encode(body: EmbeddingRequest, engine: Engine) -> tuple[NDArray[np.float32], int]:
    """Return unit vectors (Q, D) float32 and the number of tokens read."""
    encoder = engine.pipeline.encoder
    if body.input_type == "query":
        found = encoder.encode_queries(body.input, memory=False)
        return found.vectors_QD, int(found.attention_mask_QS.sum())
    documents = [("", text) for text in body.input]
    tokens = sum(map(len, encoder.tokenizer.documents(documents)))
    return encoder.encode_documents(documents, advance=lambda _: None), tokens


def _values(body: EmbeddingRequest, engine: Engine, vectors_QD: NDArray[np.float32]) -> list[Any]:
    """Return each embedding in the form asked for."""
    codes = engine.pipeline.codes
    if body.encoding_format == "ubinary" and codes is not None:
        words = codes.layout(body.level or "1").words_of(body.dimensions)
        codes_QW = codes.pack(vectors_QD, body.level or "1")[:, :words]
        return [np.frombuffer(row.astype("<u8").tobytes(), np.uint8).tolist() for row in codes_QW]
    if codes is not None and body.dimensions not in (None, vectors_QD.shape[1]):
        vectors_QD = codes.binarizer.embed(vectors_QD, body.dimensions)
    if body.encoding_format == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors_QD]
    return list(vectors_QD.tolist())
