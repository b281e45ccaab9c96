"""Manifests: what they refuse, and that the digest covers all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from service.index.manifest import BundleManifest, ModelManifest, human_bytes, manifest_digest, render_manifest
from tests.tiny import Tiny, tiny_manifest

WHOLE = tiny_manifest(Tiny(level_sizes=(8, 4, 16)))
BARE = tiny_manifest(Tiny(decoder=False))


def changed(manifest: ModelManifest, **changes: Any) -> ModelManifest:
    return ModelManifest.model_validate(manifest.model_dump(mode="json") | changes)


def test_levels_tokens_and_offsets_follow_from_the_level_sizes() -> None:
    assert (WHOLE.levels, WHOLE.tokens, WHOLE.level_offsets) == (3, 28, (0, 8, 12, 28))


def test_a_manifest_survives_json() -> None:
    assert ModelManifest.model_validate(json.loads(render_manifest(WHOLE.model_dump(mode="json")))) == WHOLE


def test_a_manifest_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        WHOLE.dimensions = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("manifest", "changes", "words"),
    [
        (WHOLE, {"colour": "red"}, "colour"),
        (WHOLE, {"default_scoring": "guided", "scorings": ["geometric"]}, "default_scoring 'guided' is not among"),
        (WHOLE, {"scorings": ["geometric", "geometric"], "default_scoring": "geometric"}, "repeat"),
        (BARE, {"scorings": ["geometric", "guided"]}, "need a decoder, and this model has none"),
        (WHOLE, {"token_scale": [1.0, 2.0]}, "token_scale has 2 values for 3 levels"),
        (WHOLE, {"guided_scale": []}, "guided_scale has 0 values for 3 levels"),
        (WHOLE, {"guided_weight": -1.0}, "greater than or equal to 0"),
        (WHOLE, {"guided_scale": [1.0, 2.0, float("nan")]}, "finite number"),
        (WHOLE, {"level_sizes": [8, 0, 8]}, "level_sizes"),
        (WHOLE, {"precision": "float16"}, "precision"),
        (WHOLE, {"quantizer": {"kind": "residual", "options": {"depth": "2"}}}, "options"),
        (WHOLE, {"text": {"max_query_tokens": 2, "max_document_tokens": 48}}, "max_query_tokens"),
        (WHOLE, {"files": {"a": {"sha256": "xyz", "bytes": 1}}}, "sha256"),
    ],
)
def test_what_contradicts_itself_is_refused(manifest: ModelManifest, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        changed(manifest, **changes)


def test_a_model_without_a_decoder_has_neither_decoder_nor_tokens() -> None:
    assert BARE.expected_files() == {"tokenizer.json", "encoder.onnx", "quantizer.safetensors"}
    assert WHOLE.expected_files() - BARE.expected_files() == {"decoder.onnx", "tokens.npy"}


def test_a_bundle_expects_its_index_its_codes_and_its_models_files() -> None:
    bundle = BundleManifest(
        model=BARE, documents=1, distinct_sids=1, nodes=1, regions=0, region_rows=0, code_levels=("1.5", "hybrid")
    )
    names = bundle.expected_files()
    assert {f"model/{name}" for name in BARE.expected_files()} < names
    assert {"codes_1.5.npy", "codes_hybrid.npy", "documents.sqlite", "vectors.npy"} < names


def test_the_digest_changes_with_every_single_field() -> None:
    fields = WHOLE.model_dump(mode="json")
    digests = {manifest_digest(fields | {name: ["something else"]}) for name in fields if name != "digest"}
    assert len(digests) == len(fields) - 1
    assert manifest_digest(fields) not in digests
    assert manifest_digest(fields | {"digest": "itself aside"}) == manifest_digest(fields)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (31_900_000, "31.9 MB"), (10**16, "10000.0 TB")]
)
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text
