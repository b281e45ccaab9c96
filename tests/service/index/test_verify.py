"""Reading artefacts: whatever is damaged is refused by its name, before anything is opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.artefact import ArtefactError
from service.index.bundle import open_bundle, open_model
from service.index.manifest import manifest_digest, render_manifest
from service.index.verify import read_manifest, verify_files


def check(folder: Path) -> None:
    verify_files(folder, read_manifest(folder))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def scratch(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that examples damage and mend again."""
    folder = tmp_path_factory.mktemp("scratch") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    for path in files(folder):
        path.chmod(0o644)
    return folder


def test_an_untouched_artefact_passes(tiny_bundle: Path, tiny_model: Path) -> None:
    check(tiny_bundle)
    check(tiny_model)


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_refused_by_name(scratch: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files(scratch)))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
    try:
        with pytest.raises(ArtefactError) as refusal:
            check(scratch)
        assert str(path) in str(refusal.value)
    finally:
        path.write_bytes(content)


@settings(max_examples=60)
@given(data=st.data())
def test_any_truncated_file_is_refused_by_name(scratch: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files(scratch)))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(ArtefactError) as refusal:
            check(scratch)
        assert str(path) in str(refusal.value)
    finally:
        path.write_bytes(content)


@settings(max_examples=40)
@given(data=st.data())
def test_any_two_swapped_files_are_refused_by_name(scratch: Path, data: st.DataObject) -> None:
    one, two = data.draw(st.lists(st.sampled_from(files(scratch)), min_size=2, max_size=2, unique=True))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    try:
        with pytest.raises(ArtefactError) as refusal:
            check(scratch)
        assert str(one) in str(refusal.value) or str(two) in str(refusal.value)
    finally:
        one.write_bytes(contents[0])
        two.write_bytes(contents[1])


def test_a_truncated_file_is_reported_with_both_sizes(model_copy: Path) -> None:
    path = model_copy / "encoder.onnx"
    size = path.stat().st_size
    os.truncate(path, size - 7)
    with pytest.raises(ArtefactError, match=rf"encoder\.onnx' has {size - 7} bytes, the manifest says {size}: copy"):
        open_model(model_copy)


def test_a_missing_file_is_refused_by_name(model_copy: Path) -> None:
    (model_copy / "decoder.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"decoder\.onnx' is missing"):
        open_model(model_copy)


def test_an_extra_file_is_refused_by_name(model_copy: Path) -> None:
    (model_copy / "weights.bin").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"weights\.bin' is not in the manifest"):
        open_model(model_copy)


def test_a_symbolic_link_is_refused_even_to_the_same_content(model_copy: Path, tmp_path: Path) -> None:
    shutil.copy(model_copy / "tokenizer.json", tmp_path / "outside.json")
    (model_copy / "tokenizer.json").unlink()
    (model_copy / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ArtefactError, match=r"tokenizer\.json' is a symbolic link"):
        open_model(model_copy)


def test_a_linked_folder_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "model").rename(tmp_path / "outside")
    (bundle_copy / "model").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtefactError, match="model' is a symbolic link"):
        open_bundle(bundle_copy)


def test_a_hard_link_is_refused_even_to_the_same_content(model_copy: Path, tmp_path: Path) -> None:
    os.link(model_copy / "encoder.onnx", tmp_path / "second-name")
    with pytest.raises(ArtefactError, match=r"encoder\.onnx' has 2 hard links"):
        open_model(model_copy)


def test_a_pipe_is_refused_and_not_waited_for(model_copy: Path) -> None:
    (model_copy / "tokenizer.json").unlink()
    os.mkfifo(model_copy / "tokenizer.json")
    with pytest.raises(ArtefactError, match="not a regular file"):
        open_model(model_copy)


def rewrite(folder: Path, **changes: Any) -> None:
    """Write a manifest with other fields and a digest that fits them."""
    fields = json.loads((folder / "manifest.json").read_bytes()) | changes
    fields["digest"] = manifest_digest(fields)
    (folder / "manifest.json").write_bytes(render_manifest(fields))


@pytest.mark.parametrize("version", [0, 3, "1", None, True, 1.5])
def test_another_schema_version_is_refused_with_both_numbers(model_copy: Path, version: Any) -> None:
    rewrite(model_copy, schema_version=version)
    with pytest.raises(ArtefactError, match=rf"schema version {version!r}, this program reads 2"):
        open_model(model_copy)


def test_an_unknown_kind_is_refused(model_copy: Path) -> None:
    rewrite(model_copy, kind="adapter")
    with pytest.raises(ArtefactError, match=r"kind 'adapter', not one of \['bundle', 'model'\]"):
        open_model(model_copy)


def test_a_bundle_is_no_model_and_a_model_no_bundle(tiny_bundle: Path, tiny_model: Path) -> None:
    with pytest.raises(ArtefactError, match="is a bundle, and a model is needed here"):
        open_model(tiny_bundle)
    with pytest.raises(ArtefactError, match="is a model, and a bundle is needed here"):
        open_bundle(tiny_model)


@pytest.mark.parametrize(
    ("field", "value"), [("dimensions", 0), ("level_sizes", []), ("surprise", 1), ("default_scoring", "magic")]
)
def test_an_invalid_field_is_named(model_copy: Path, field: str, value: Any) -> None:
    rewrite(model_copy, **{field: value})
    with pytest.raises(ArtefactError, match=rf"not a valid model manifest: .*{field}"):
        open_model(model_copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "holds a JSON list"),
        (b'{"kind": NaN}', "values that no manifest has"),
        (b'{"kind": "\\ud800"}', "schema|edited|values"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a": 1, "a": 1}', "it was edited"),
    ],
)
def test_a_manifest_that_is_no_json_object_is_refused(model_copy: Path, content: bytes, words: str) -> None:
    (model_copy / "manifest.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=words):
        open_model(model_copy)


def test_a_manifest_edited_by_hand_is_refused_even_where_json_does_not_care(model_copy: Path) -> None:
    path = model_copy / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"fusion_weight": 3.0', '"fusion_weight": 2.0'))
    with pytest.raises(ArtefactError, match="was changed: its digest is"):
        open_model(model_copy)
    path.write_text(text.replace('"fusion_weight": 3.0', '"fusion_weight":  3.0'))
    with pytest.raises(ArtefactError, match="it was edited"):
        open_model(model_copy)


def test_what_is_no_artefact_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is not a folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"has no manifest\.json"):
        open_model(tmp_path)


def test_a_huge_manifest_is_not_read(model_copy: Path) -> None:
    os.truncate(model_copy / "manifest.json", 17_000_000)
    with pytest.raises(ArtefactError, match="17000000 bytes, more than the 16000000"):
        open_model(model_copy)
