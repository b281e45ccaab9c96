"""Building bundles: every document keeps its own vector, SID and text; nothing half-written; no torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service.index import build as building
from service.index import codes
from service.index.artefact import ArtefactError
from service.index.build import build_bundle
from service.index.bundle import open_bundle, open_model
from service.index.corpus import CorpusError, read_corpus
from service.index.documents import Document, DocumentStore
from service.model import tokens
from service.model.adapter import AdapterError
from service.model.encoder import Encoder
from service.model.quantizer import assign_sids
from tests.tiny import make_documents, make_model, unit_rows


def build(model: Path, target: Path, documents: list[Document], **options: object) -> None:
    build_bundle(model, documents, target, threads=1, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [4096, 7])
def test_every_document_keeps_its_vector_and_sid(
    tiny_model: Path, tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions are depth-first; by id everything is what encoder and quantizer say of each document alone."""
    monkeypatch.setattr(building, "WINDOW", window)
    documents = make_documents(300, seed=3)
    build(tiny_model, tmp_path / "bundle", documents)
    model = open_model(tiny_model)
    encoder = Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        for document in documents:
            position = bundle.documents.by_id(document.id)
            assert position is not None
            assert bundle.documents.get(position) == document
            vector = encoder.encode_documents([(document.title, document.text)])
            np.testing.assert_allclose(bundle.vectors[position], vector[0], atol=1e-6)
            sid = assign_sids(vector, "householder", model.quantizer_tensors, (8, 8, 8))
            assert bundle.trie.sid(position) == tuple(sid[0])


def test_documents_of_one_sid_keep_the_order_of_the_corpus(tiny_bundle: Path) -> None:
    with closing(open_bundle(tiny_bundle)) as bundle:
        numbers = defaultdict(list)
        for position in range(len(bundle.documents)):
            numbers[bundle.trie.sid(position)].append(bundle.documents.get(position).metadata["number"])
    assert all(group == sorted(group) for group in numbers.values())
    assert list(numbers) == sorted(numbers)


def test_the_same_input_gives_the_same_bytes(tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    build(tiny_model, tmp_path / "again", make_documents())
    with closing(open_bundle(tmp_path / "again")) as again, closing(open_bundle(tiny_bundle)) as first:
        assert again.digest == first.digest


def test_memory_is_bounded_by_characters_and_the_bundle_is_the_same(
    tiny_model: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[Document]] = []

    def many(store: DocumentStore, positions: Sequence[int]) -> list[Document]:
        read.append(plain(store, positions))
        return read[-1]

    plain = DocumentStore.many
    monkeypatch.setattr(DocumentStore, "many", many)
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 300)
    build(tiny_model, tmp_path / "again", make_documents())
    with closing(open_bundle(tmp_path / "again")) as again, closing(open_bundle(tiny_bundle)) as first:
        assert again.digest == first.digest
    sizes = [sum(len(each.title) + len(each.text) for each in documents) for documents in read]
    assert max(sizes) <= 300
    assert max(map(len, read)) > 1


@pytest.mark.parametrize("window", [4096, 7])
def test_given_vectors_are_used_instead_of_the_encoder(
    tiny_model: Path, tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "WINDOW", window)
    documents = make_documents(50)
    model = open_model(tiny_model)
    encoder = Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
    made = encoder.encode_documents([(document.title, document.text) for document in documents])
    vectors = 0.98 * made + 0.2 * unit_rows(50, 16, 9)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (vectors * made).sum(1).max() < 0.999
    build(tiny_model, tmp_path / "bundle", documents, vectors=vectors.astype(np.float16))
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        for row, document in enumerate(documents):
            position = bundle.documents.by_id(document.id)
            np.testing.assert_allclose(bundle.vectors[position], vectors[row], atol=1e-3)
            sid = assign_sids(bundle.vectors[position][None], "householder", model.quantizer_tensors, (8, 8, 8))
            assert bundle.trie.sid(position) == tuple(sid[0])
        np.testing.assert_allclose(np.linalg.norm(bundle.vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("wrong", [0, 49])
def test_given_vectors_are_held_against_the_encoder_from_the_first_to_the_last(
    tiny_model: Path, tmp_path: Path, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a corpus that has grown are right at its beginning."""
    monkeypatch.setattr(building, "WINDOW", 7)
    documents = make_documents(50)
    model = open_model(tiny_model)
    encoder = Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
    vectors = encoder.encode_documents([(document.title, document.text) for document in documents])
    vectors[wrong] *= -1
    with pytest.raises(ArtefactError, match=rf"given vector {wrong} has cosine -1\.00 to what .* makes of 'd{wrong}'"):
        build(tiny_model, tmp_path / "bundle", documents, vectors=vectors)


def with_row(row: int, value: float) -> np.ndarray:
    vectors = unit_rows(50, 16, 9)
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (unit_rows(49, 16, 0), r"shape \(49, 16\), 50 documents and a model of 16 dimensions need \(50, 16\)"),
        (unit_rows(50, 12, 0), r"shape \(50, 12\)"),
        (unit_rows(50, 16, 0)[0], r"shape \(16,\)"),
        (unit_rows(50, 16, 0) * 2, "given vector 0 has length (2|1.99).*, expected 1: normalise"),
        (with_row(7, np.nan), "given vector 7 has length nan"),
        (with_row(8, 0), "given vector 8 has length 0.0"),
        (unit_rows(50, 16, 0), r"given vector \d+ has cosine -?0.\d\d to what this model's encoder makes of 'd\d+'"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path, vectors: np.ndarray, words: str) -> None:
    with pytest.raises(ArtefactError, match=words):
        build(tiny_model, tmp_path / "bundle", make_documents(50), vectors=vectors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([], "no documents to index"),
        (
            [Document("x", "", "one"), Document("y", "", "two"), Document("x", "", "three")],
            "two documents have the id 'x'",
        ),
        ([Document("x", "", "half \ud800")], "document 'x' holds a lone surrogate"),
    ],
)
def test_documents_that_cannot_be_stored_are_refused(
    tiny_model: Path, tmp_path: Path, documents: list[Document], words: str
) -> None:
    with pytest.raises(ArtefactError, match=words):
        build(tiny_model, tmp_path / "bundle", documents)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_corpus_line_leaves_the_old_bundle(tiny_model: Path, tmp_path: Path) -> None:
    build(tiny_model, tmp_path / "bundle", make_documents(20))
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "north"}\n{"_id": "a", "text": "south"}\n')
    with pytest.raises(CorpusError, match=r"corpus\.jsonl:2"):
        build_bundle(
            tiny_model,
            read_corpus(tmp_path / "corpus.jsonl"),
            tmp_path / "bundle",
            replace=True,
            threads=1,
            progress=False,
        )
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        assert len(bundle.documents) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "corpus.jsonl"]


def test_one_document_is_a_corpus(tiny_model: Path, tmp_path: Path) -> None:
    build(tiny_model, tmp_path / "bundle", [Document("only", "", "north")])
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        assert bundle.documents.get(0).id == "only"
        assert (bundle.manifest.documents, bundle.manifest.regions) == (1, 0)


def test_equal_documents_share_a_sid(tiny_model: Path, tmp_path: Path) -> None:
    build(tiny_model, tmp_path / "bundle", [Document(str(i), "", "north star") for i in range(40)])
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        assert bundle.manifest.distinct_sids == 1
        assert [document.id for document in bundle.documents.many(range(40))] == [str(i) for i in range(40)]


def test_progress_is_shown_on_stderr_and_only_there(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_bundle(tiny_model, make_documents(20), tmp_path / "bundle", threads=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(stage in err for stage in ("reading", "encoding", "assigning", "writing"))


LIMITED = """
    import resource, signal, sys
    from pathlib import Path
    from service.index.artefact import ArtefactError
    from service.index.build import build_bundle
    from tests.tiny import make_documents
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    try:
        build_bundle(Path(sys.argv[1]), make_documents(3000), Path(sys.argv[2]), threads=1, progress=False)
    except ArtefactError as error:
        print(error)
"""


@pytest.mark.parametrize("room", [4_000, 20_000, 150_000])
def test_a_full_disk_is_a_clear_error_and_publishes_nothing(tiny_model: Path, tmp_path: Path, room: int) -> None:
    """Files may not grow past `room` bytes, which looks to the writer like a disk that fills up."""
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tiny_model), str(tmp_path / "bundle"), str(room)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert "was not written" in done.stdout
    assert "bytes free): free some space and run again; nothing was published" in done.stdout
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
    import sys
    for name in ("torch", "transformers", "models", "onnx"):
        sys.modules[name] = None
    from pathlib import Path
    from service.index.build import build_bundle
    from service.index.bundle import open_bundle
    from service.index.documents import Document
    from service.index.inspect import inspect_artefact
    from service.index.inspect_tables import render
    from service.model.decoder import Decoder
    from service.model.encoder import Encoder
    documents = [Document(str(i), "", f"north {i}") for i in range(30)]
    build_bundle(Path(sys.argv[1]), documents, Path(sys.argv[2]), threads=1, progress=False)
    bundle = open_bundle(Path(sys.argv[2]))
    model = bundle.model
    encoder = Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
    step = Decoder(model.decoder_file, 1).start(encoder.encode_queries(["north 7"]))
    assert step(model.tokens_TE[None, -1:], 0).shape == (1, 1, 12)
    render(inspect_artefact(Path(sys.argv[2])))
    print("answered")
"""


def test_indexing_and_decoding_need_neither_torch_nor_onnx(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH), str(tiny_model), str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("answered\n", 0), done.stderr


IMPORT_ALL = """
    import importlib, pkgutil, sys
    for name in ("torch", "transformers", "models", "loadtest", "onnx"):
        sys.modules[name] = None
    import service
    found = [module.name for module in pkgutil.walk_packages(service.__path__, "service.")]
    for name in found:
        importlib.import_module(name)
    print(len(found))
"""


def test_every_module_of_the_service_imports_without_torch() -> None:
    command = [sys.executable, "-c", textwrap.dedent(IMPORT_ALL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_metadata_survives(tiny_model: Path, tmp_path: Path) -> None:
    document = dataclasses.replace(make_documents(1)[0], metadata={"url": "u", "tags": ["a", {"b": None}], "n": 1.5})
    build(tiny_model, tmp_path / "bundle", [document])
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        assert bundle.documents.get(0) == document


def test_the_shipped_model_is_indexed_with_codes_of_every_level(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[3] / "models" / "pretrained" / "model"
    documents = [Document(f"d{n}", "title", f"the text of document {n}") for n in range(3)]
    built = build_bundle(shipped, documents, tmp_path / "bundle", threads=1, progress=False)
    assert set(built.code_levels) == {"0.5", "1", "1.5", "2", "hybrid"}
    assert built.documents == 3


def test_an_adapter_of_another_encoder_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest may be right where the adapter itself is another's."""
    model = make_model(tmp_path / "model", code_levels=("1",), code_prefixes=(8, 16))

    def refuse(*_: object, **__: object) -> None:
        raise AdapterError("it belongs to the encoder of somebody else")

    monkeypatch.setattr(codes.Binarizer, "open", refuse)
    monkeypatch.setattr(building, "_vector_blocks", lambda *_: pytest.fail("documents were encoded"))
    with pytest.raises(ArtefactError, match="cannot be used: it belongs to the encoder of somebody else"):
        build_bundle(model, make_documents(5), tmp_path / "bundle", progress=False)
