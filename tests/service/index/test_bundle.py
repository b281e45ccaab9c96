"""Opening bundles: mapped, read-only, and only what belongs together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.index import bundle as bundle_module
from service.index.artefact import ArtefactError, new_artefact, publish
from service.index.build import build_bundle
from service.index.bundle import open_bundle, open_model
from service.index.documents import Document, write_documents
from service.index.manifest import AdapterSettings, BundleManifest, ModelManifest
from service.index.verify import read_manifest
from service.model.adapter import AdapterInfo, save_adapter
from tests.tiny import make_bundle, make_documents, make_model, unit_rows

Spoil = Callable[[Path], object]


def republish(source: Path, target: Path, spoil: Spoil, **changes: Any) -> Path:
    """Publish a spoilt copy: all hashes fit, so only the checks of what belongs together can refuse it."""
    manifest = read_manifest(source)
    with new_artefact(target) as staging:
        for name in manifest.files:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, staging / name)
        spoil(staging)
        publish(staging, manifest.model_copy(update=changes))
    return target


def array(name: str, change: Callable[[Any], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)), allow_pickle=True)

    return spoil


def test_arrays_are_mapped_read_only_and_agree_with_the_manifest(tiny_bundle: Path) -> None:
    with closing(open_bundle(tiny_bundle)) as bundle:
        mapped = [bundle.vectors, bundle.regions.rows_RD, bundle.regions.region_M, bundle.trie.sids_NL]
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in mapped)
        assert bundle.vectors.shape == (60, 16)
        assert len(bundle.documents) == bundle.trie.documents == bundle.manifest.documents == 60
        assert bundle.model.tokens_TE.shape == (25, 12)
        assert bundle.digest == bundle.manifest.digest
        assert bundle.touch() >= sum(array.nbytes for array in mapped)


def test_a_model_inside_a_bundle_is_the_model_it_was_made_with(tiny_bundle: Path, tiny_model: Path) -> None:
    with closing(open_bundle(tiny_bundle)) as bundle:
        assert bundle.model.manifest == open_model(tiny_model).manifest
        for name in bundle.model.manifest.files:
            assert (bundle.model.path / name).read_bytes() == (tiny_model / name).read_bytes()


def test_a_model_without_a_decoder_opens(tmp_path: Path) -> None:
    model = open_model(make_model(tmp_path / "bare", decoder=False))
    assert model.decoder_file is None
    assert model.tokens_TE.shape == (0, 0)
    with closing(open_bundle(make_bundle(tmp_path / "bundle", decoder=False))) as bundle:
        assert bundle.manifest.model.scorings == ("geometric",)


BUNDLE_MISTAKES: dict[str, tuple[Spoil, str]] = {
    "dimensions": (array("vectors.npy", lambda v: v[:, :-2]), "vectors of 14 dimensions, its encoder gives 16: index"),
    "rows": (array("vectors.npy", lambda v: v[:-1]), r"vectors\.npy' holds float32 of shape \(59, 16\), .*\(60, 16\)"),
    "dtype": (array("vectors.npy", lambda v: v.astype(np.float16)), "holds float16"),
    "token": (array("sids.npy", lambda s: s + 20), "token"),
    "levels": (array("sids.npy", lambda s: s[:, :2]), "has 2 levels in sids.npy, the manifest says 3"),
    "nodes": (array("trie_lo.npy", lambda n: n[:-1]), "trie_token.npy is uint16 .56,., expected"),
    "order": (array("trie_child.npy", lambda c: c[::-1].copy()), "do not belong to one trie of 56 nodes"),
    "regions": (array("regions.npy", lambda r: r[:-1]), r"regions\.npy"),
    "region numbers": (array("trie_region.npy", lambda r: r + 9), r"trie_region\.npy' names regions 8 to \d+ of \d"),
    "one region more": (
        array("trie_region.npy", lambda r: np.where(r == r.max(), r.max() + 1, r)),
        r"trie_region\.npy' names regions -1 to (\d+) of \1:",
    ),
    "region without rows": (
        array("region_start.npy", lambda s: np.concatenate([s[:1], s[:1], s[2:]])),
        r"region_start\.npy' does not divide",
    ),
    "posting starts": (array("postings_start.npy", lambda s: s[::-1].copy()), r"postings_start\.npy' does not divide"),
    "documents of postings": (
        array("postings_document.npy", lambda d: d + 1),
        r"postings_document\.npy' names documents 1 to 60 of 60",
    ),
    "order of postings": (
        array("postings_document.npy", lambda d: np.concatenate([d[1::-1], d[2:]])),
        r"postings_document\.npy' has a token's documents out of order",
    ),
    "worth of nothing": (
        array("postings_worth.npy", lambda w: np.where(np.arange(len(w)) == 7, 0, w).astype(np.float32)),
        r"postings_worth\.npy' holds numbers that are not above 0",
    ),
    "worth of NaN": (
        array("postings_worth.npy", lambda w: np.where(np.arange(len(w)) == 7, np.nan, w).astype(np.float32)),
        r"postings_worth\.npy' holds numbers that are not above 0",
    ),
    "worths of postings": (
        array("postings_worth.npy", lambda w: w[1:]),
        r"postings_worth\.npy' holds float32 of shape",
    ),
    "region starts": (array("region_start.npy", lambda s: s[::-1].copy()), r"region_start\.npy' does not divide"),
    "region rests": (array("region_rest.npy", lambda r: r - 1), r"region_rest\.npy' holds numbers below 0"),
    "pickle": (
        array("regions.npy", lambda r: np.array([{}], object)),
        r"regions\.npy' cannot be opened .*Python objects",
    ),
    "no array": (lambda folder: (folder / "vectors.npy").write_bytes(b"x" * 99), r"vectors\.npy' cannot be opened"),
    "no database": (lambda folder: (folder / "documents.sqlite").write_bytes(b"x" * 99), "not a database"),
}


@pytest.mark.parametrize("mistake", BUNDLE_MISTAKES)
def test_files_that_do_not_belong_together_are_refused(tiny_bundle: Path, tmp_path: Path, mistake: str) -> None:
    spoil, words = BUNDLE_MISTAKES[mistake]
    with pytest.raises(ArtefactError, match=words):
        open_bundle(republish(tiny_bundle, tmp_path / "spoilt", spoil))


def test_a_document_too_few_is_refused_with_both_numbers(tiny_bundle: Path, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        (folder / "documents.sqlite").unlink()
        write_documents(folder / "documents.sqlite", [Document("only one", "", "text")])

    with pytest.raises(ArtefactError, match=r"1 documents in documents\.sqlite, the manifest says 60: index"):
        open_bundle(republish(tiny_bundle, tmp_path / "spoilt", spoil))


def test_the_encoder_of_another_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    spoilt = republish(
        tiny_bundle,
        tmp_path / "spoilt",
        lambda f: shutil.copyfile(other / "encoder.onnx", f / "model" / "encoder.onnx"),
    )
    with pytest.raises(ArtefactError, match=r"model/encoder\.onnx' is not the file the index was made with"):
        open_bundle(spoilt)


def test_the_manifest_of_another_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    other = open_model(make_model(tmp_path / "other", seed=5)).manifest
    spoilt = republish(tiny_bundle, tmp_path / "spoilt", lambda _: None, model=other)
    with pytest.raises(ArtefactError, match="is not the file the index was made with"):
        open_bundle(spoilt)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokens: tokens[:-1], r"\(24, 12\), the manifest asks for float32 of shape \(25, 12\)"),
        (lambda tokens: tokens[:, :-1], r"\(25, 11\)"),
        (lambda tokens: tokens.astype(np.float64), "holds float64"),
    ],
)
def test_a_token_table_of_another_size_is_refused(
    tiny_model: Path, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ArtefactError, match=words):
        open_model(republish(tiny_model, tmp_path / "spoilt", array("tokens.npy", change)))


def test_a_quantizer_that_is_no_safetensors_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    spoilt = republish(
        tiny_model, tmp_path / "spoilt", lambda f: (f / "quantizer.safetensors").write_bytes(b"\xff" * 64)
    )
    with pytest.raises(ArtefactError, match=r"quantizer\.safetensors' cannot be opened"):
        open_model(spoilt)


def with_adapter(source: Path, target: Path, encoder: str | None = None) -> Path:
    """Publish the tiny model with a 1-bit adapter, bound to its own encoder or to another."""
    manifest = read_manifest(source)
    own = manifest.files["encoder.onnx"].sha256
    settings = AdapterSettings(prefixes=(8, 16), levels=("1",), encoder_sha256=encoder or own)
    info = AdapterInfo((8, 16), encoder or own)
    return republish(
        source,
        target,
        lambda f: save_adapter(f / "adapter.safetensors", {"thresholds.1": np.zeros((1, 16), np.float32)}, info),
        adapter=settings,
    )


def test_an_adapter_of_another_encoder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="belongs to the encoder 000000000000, this model's is"):
        open_model(with_adapter(tiny_model, tmp_path / "other", "0" * 64))


def test_a_bundle_with_an_adapter_carries_its_codes(tiny_model: Path, tmp_path: Path) -> None:
    model = with_adapter(tiny_model, tmp_path / "model")
    build_bundle(model, make_documents(70), tmp_path / "bundle", threads=1, progress=False)
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        stored = bundle.codes["1"]
        assert (stored.shape, stored.dtype) == ((3, 2, 32), np.uint64)  # each prefix of 8 dimensions has its word
        words = np.ascontiguousarray(stored.transpose(0, 2, 1).reshape(-1, 2)[:70])
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(70, 2, 64)[:, :, :8]
        # at thresholds of zero a 1-bit code is the sign, dimension by dimension
        np.testing.assert_array_equal(bits.reshape(70, 16), bundle.vectors > 0)
        assert bundle.manifest.code_levels == ("1",)
    wrong = republish(
        tmp_path / "bundle", tmp_path / "wrong", lambda f: np.save(f / "codes_1.npy", np.zeros((2, 2, 32), np.uint64))
    )
    with pytest.raises(ArtefactError, match=r"codes_1\.npy' holds uint64 of shape \(2, 2, 32\), 70 documents need"):
        open_bundle(wrong)


def test_manifests_of_both_kinds_come_back_as_their_own_class(tiny_bundle: Path, tiny_model: Path) -> None:
    assert isinstance(read_manifest(tiny_bundle), BundleManifest)
    assert isinstance(read_manifest(tiny_model), ModelManifest)


def test_a_quantizer_of_another_size_is_refused_when_indexing(tiny_model: Path, tmp_path: Path) -> None:
    small = republish(
        tiny_model,
        tmp_path / "small",
        lambda f: save_file({"codebooks": unit_rows(20, 16, 0)}, f / "quantizer.safetensors"),
    )
    with pytest.raises(ArtefactError, match=r"codebooks of shape \(20, 16\) .* levels of \[8, 8, 8\]"):
        build_bundle(small, make_documents(9), tmp_path / "bundle", threads=1, progress=False)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_that_is_replaced_while_it_is_opened_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    other = republish(tiny_bundle, tmp_path / "other", lambda _: None, corpus="another")

    def replace(_: object) -> None:
        folder.rename(tmp_path / "old")
        other.rename(folder)

    monkeypatch.setattr(bundle_module, "_check_references", replace)
    with pytest.raises(ArtefactError, match="was replaced while it was opened: open it again"):
        open_bundle(folder)
