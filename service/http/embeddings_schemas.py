"""What clients send to and get from `/v1/embeddings`: OpenAI's shape, with a few fields more."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from service.http.hamming_schemas import MAX_DIMENSIONS
from service.http.schemas import MAX_QUERIES, QueryText, Strict
from service.model.layout import Level
from service.model.text import TextKind

Space = Literal["encoder", "adapter"]

EXAMPLES: Final[dict[str, Any]] = {
    "floats": {"summary": "One text", "value": {"input": "open a file", "model": "rhumbline"}},
    "documents": {
        "summary": "Documents, as the base64 of their floats",
        "value": {"input": ["one", "two"], "model": "any", "encoding_format": "base64", "input_type": "document"},
    },
}


def _listed(value: Any) -> Any:
    if isinstance(value, list) and value and type(value[0]) in (int, list):
        raise ValueError("is an array of tokens, which are another model's: send texts")
    return [value] if isinstance(value, str) else value


Inputs = Annotated[
    list[QueryText],
    Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class EmbeddingRequest(Strict):
    """Texts to embed, and in which form."""

    input: Inputs = Field(description="A text, or a list of texts; no tokens.")
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
    space: Space | None = Field(
        None,
        description="`encoder`: the vectors that the bundle stores, all dimensions as floats. `adapter`: what the "
        "model's adapter makes of them, whose prefixes and codes mean something. If left out, `encoder` where it can "
        "be. Compare only vectors of one space.",
    )
    input_type: TextKind | None = Field(
        None,
        description="Which of the model's prefixes and lengths apply; if left out, `document` where both prefixes are "
        "the same, else `query`.",
    )
    truncate: bool = Field(False, description="Cut a text that has too many tokens; if false, it is refused.")
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
    space: Space = Field(description="Whose vectors these are, or are the codes of.")
    usage: Usage
