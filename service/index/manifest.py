"""The manifests of both artefacts: what a model or a bundle is, in one frozen, checked object.

Letters: D vector dimensions, E token embedding dimensions, L levels, N documents, M trie nodes, C regions.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.model.text import TextSettings

SCHEMA_VERSION: Final = 2
MANIFEST_NAME = "manifest.json"
DEFAULT_LEXICAL_WEIGHT: Final = 0.3  # where no held-out queries choose it
MAX_LEXICAL_WEIGHT: Final = 100.0

Scoring = Literal["generative", "geometric", "guided"]
Normalisation = Literal["constrained", "full"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Frozen):
    """One file of an artefact: its content hash and its size in bytes."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class DecoderShape(Frozen):
    """Sizes of the decoder: layers, attention heads, Dh dimensions of a head, E dimensions of a token."""

    layers: int = Field(ge=1, le=64)
    heads: int = Field(ge=1, le=256)
    head_dimensions: int = Field(ge=1, le=4096)
    embedding_dimensions: int = Field(ge=1, le=65536)


class QuantizerSettings(Frozen):
    """How SIDs are made from vectors: the kind that `service.model.quantizer` knows; no kind has options."""

    kind: str = Field(min_length=1)
    options: dict[str, str] = Field(default_factory=dict, max_length=0)  # every manifest of this version has it


class AdapterSettings(Frozen):
    """The QAMA adapter: Matryoshka prefixes in dimensions, level names, and the encoder it was trained on."""

    prefixes: tuple[int, ...] = Field(min_length=1)
    levels: tuple[str, ...] = Field(min_length=1)
    encoder_sha256: Sha256


class LexicalSettings(Frozen):
    """Sizes of the inverted index: V tokens of the tokenizer, P postings."""

    vocabulary: int = Field(ge=1)
    postings: int = Field(ge=0)


class Provenance(Frozen):
    """Where a model comes from; `inspect` prints it."""

    recipe: str
    data: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    base_model: str = ""
    seed: int | None = None
    notes: str = ""


class Manifest(Frozen):
    """What both kinds share: schema version, the file table, and the digest over everything but itself."""

    schema_version: Literal[2] = SCHEMA_VERSION
    kind: str
    files: dict[str, FileEntry] = Field(default_factory=dict)
    digest: str = ""

    @abstractmethod
    def expected_files(self) -> frozenset[str]:
        """Return the names of the files that an artefact with this manifest has, relative to its folder."""


class ModelManifest(Manifest):
    """Manifest of a model (it knows no documents).

    The logit of token t of level l is `token_scale[l] · hidden·tokens[t]` (`generative`) or
    `guided_scale[l] · hidden·tokens[t] + guided_weight · reach` (`guided`; reach: `service.index.regions`).
    The `fused` score is log P + `fusion_weight` · cosine; that of `hybrid` is cosine + `lexical_weight` · the share of
    the query's words that a document holds (`service.search.lexical`).
    """

    kind: Literal["model"] = "model"
    dimensions: int = Field(ge=1, le=65536)
    level_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=64)
    quantizer: QuantizerSettings
    decoder: DecoderShape | None = None
    normalisation: Normalisation = "constrained"
    token_scale: tuple[Finite, ...] = ()
    guided_scale: tuple[Finite, ...] = ()
    guided_weight: Finite = Field(default=0.0, ge=0)
    scorings: tuple[Scoring, ...] = ("geometric",)
    default_scoring: Scoring = "geometric"
    fusion_weight: Finite = 1.0
    lexical_weight: Finite = Field(default=DEFAULT_LEXICAL_WEIGHT, ge=0, le=MAX_LEXICAL_WEIGHT)
    text: TextSettings
    precision: Literal["float32", "int8"] = "float32"
    adapter: AdapterSettings | None = None
    provenance: Provenance

    @property
    def levels(self) -> int:
        """L: codes of a full semantic ID."""
        return len(self.level_sizes)

    @property
    def tokens(self) -> int:
        """T: tokens of all levels together."""
        return sum(self.level_sizes)

    @property
    def level_offsets(self) -> tuple[int, ...]:
        """First token of each level, and T at the end: (L+1,)."""
        return tuple(sum(self.level_sizes[:level]) for level in range(self.levels + 1))

    @model_validator(mode="after")
    def _scorings_are_possible(self) -> Self:
        if self.default_scoring not in self.scorings:
            raise ValueError(f"default_scoring {self.default_scoring!r} is not among scorings {self.scorings}")
        if len(set(self.scorings)) != len(self.scorings):
            raise ValueError(f"scorings {self.scorings} repeat themselves")
        wants_decoder = {"generative", "guided"} & set(self.scorings)
        if wants_decoder and self.decoder is None:
            raise ValueError(f"scorings {sorted(wants_decoder)} need a decoder, and this model has none")
        return self

    @model_validator(mode="after")
    def _scales_have_one_value_per_level(self) -> Self:
        needed = {
            "token_scale": "generative" in self.scorings,
            "guided_scale": "guided" in self.scorings,
        }
        for name, is_needed in needed.items():
            values = getattr(self, name)
            if len(values) not in ((self.levels,) if is_needed else (0, self.levels)):
                raise ValueError(f"{name} has {len(values)} values for {self.levels} levels")
        return self

    def expected_files(self) -> frozenset[str]:
        """Return the names of the files that a model with this manifest has."""
        names = {"tokenizer.json", "encoder.onnx", "quantizer.safetensors"}
        if self.decoder is not None:
            names |= {"decoder.onnx", "tokens.npy"}
        if self.adapter is not None:
            names |= {"adapter.safetensors"}
        return frozenset(names)


class BundleManifest(Manifest):
    """Manifest of a bundle: the model's manifest and the sizes of the index made with it."""

    kind: Literal["bundle"] = "bundle"
    model: ModelManifest
    documents: int = Field(ge=1)
    distinct_sids: int = Field(ge=1)
    nodes: int = Field(ge=1)
    regions: int = Field(ge=0)
    region_rows: int = Field(ge=0)
    code_levels: tuple[str, ...] = ()
    lexical: LexicalSettings | None = None
    corpus: str = ""

    def expected_files(self) -> frozenset[str]:
        """Return the names of the files that a bundle with this manifest has, relative to its folder."""
        index = {
            "trie_token.npy",
            "trie_lo.npy",
            "trie_child.npy",
            "sids.npy",
            "vectors.npy",
            "regions.npy",
            "region_start.npy",
            "region_rest.npy",
            "trie_region.npy",
            "documents.sqlite",
        }
        codes = {f"codes_{level}.npy" for level in self.code_levels}
        words = {f"postings_{part}.npy" for part in ("start", "document", "worth")} if self.lexical else set()
        return frozenset(index | codes | words | {f"model/{name}" for name in self.model.expected_files()})


def manifest_digest(fields: dict[str, Any]) -> str:
    """Return the sha256 (hex) over the canonical JSON of a manifest's fields without `digest` itself.

    It covers the file table (so every byte of every file) and every setting, so two artefacts with one digest
    answer alike.
    """
    body = {key: value for key, value in fields.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def render_manifest(fields: dict[str, Any]) -> bytes:
    """Return the bytes of `manifest.json`; reading compares with them, so that no byte of it goes unchecked."""
    return (json.dumps(fields, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def human_bytes(count: int) -> str:
    """Return a byte count as people read it: `1.5 MB` (powers of 1,000)."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log(count, 1000)), 4)
    return f"{count / 1000**power:.1f} {' KMGT'[power]}B"
