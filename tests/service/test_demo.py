from __future__ import annotations

import json
import os
import pydoc
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import demo, stdlib_corpus
from service.demo import DemoError, collected_corpus, curl_command, demo_key, open_demo_bundle, shipped_model
from service.index.artefact import ArtefactError
from service.index.corpus import read_corpus
from service.index.documents import Document
from tests.service.test_cli import serving
from tests.tiny import make_model


@pytest.fixture(scope="module")
def corpus() -> dict[str, Document]:
    with collected_corpus() as file:
        return {document.id: document for document in read_corpus(file)}


# ---------------------------------------------------------------- the corpus


def test_corpus_is_several_thousand_documents_of_all_kinds(corpus: dict[str, Document]) -> None:
    assert len(corpus) > 3000
    kinds = [document.metadata["kind"] for document in corpus.values()]
    assert all(kinds.count(kind) > 200 for kind in ("module", "class", "function", "method"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("collections.Counter", "counting hashable items"),
        ("len", "number of items"),
        ("str.split", "separator"),
        ("os.path.join", "pathname"),
        ("json.dumps", "JSON"),
        ("concurrent.futures.ThreadPoolExecutor", "ThreadPoolExecutor"),
        ("asyncio.Queue", "queue"),
        ("datetime.timedelta.total_seconds", "seconds"),
        ("random.shuffle", "in place"),
        ("int", "Convert a number or string to an integer"),
        ("xml.etree.ElementTree", "XML"),
    ],
)
def test_what_people_look_for_is_there_under_its_name(corpus: dict[str, Document], name: str, words: str) -> None:
    assert words.lower() in corpus[name].text.lower()
    assert name in corpus[name].title


def test_a_class_tells_what_its_methods_do(corpus: dict[str, Document]) -> None:
    """Its title begins with its own name, its text with its own words; methods follow, a sentence each."""
    counter = corpus["collections.Counter"]
    assert counter.title == "Counter (collections.Counter)"
    assert counter.text.startswith("Dict subclass for counting hashable items.")
    assert "most_common: List the n most common elements" in counter.text


def test_names_lead_to_the_documented_objects(corpus: dict[str, Document]) -> None:
    """pydoc, the library's own help, finds every twentieth of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for name in list(corpus)[::20] if not name.startswith(("multiprocessing", "distutils"))]
        lost = [name for name in names if pydoc.locate(name) is None]
    assert len(lost) <= len(names) // 50, lost


def test_nothing_is_said_twice_by_inheritance(corpus: dict[str, Document]) -> None:
    """A method that a class only inherits, or documents word for word as its base does, is the base's document."""
    assert {"dict.setdefault", "collections.OrderedDict.move_to_end"} <= set(corpus)
    assert "collections.OrderedDict.setdefault" not in corpus
    assert "bool.bit_length" not in corpus
    assert not any(name.rsplit(".", 1)[-1].startswith("_") for name in corpus)
    assert not any(document.text.startswith("Initialize self") for document in corpus.values())


def test_texts_are_short_paragraphs(corpus: dict[str, Document]) -> None:
    for document in corpus.values():
        assert stdlib_corpus.MIN_DOC_CHARACTERS <= len(document.text) <= stdlib_corpus.MAX_TEXT_CHARACTERS
        assert "\n" not in document.text
        assert not document.text.startswith(">>>")


def test_side_effects_stay_out_of_this_process() -> None:
    """The collector imports hundreds of modules; here none of them appears."""
    before = set(sys.modules)
    with collected_corpus() as file:
        assert file.stat().st_size > 100_000
        folder = file.parent
    assert not folder.exists()
    assert not {name for name in set(sys.modules) - before if name in ("turtle", "antigravity", "lib2to3", "curses")}


def test_what_modules_print_does_not_land_in_the_corpus(tmp_path: Path) -> None:
    script = Path(stdlib_corpus.__file__)
    code = f"print('noise'); import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line != "noise"]) > 3000
    assert all(isinstance(json.loads(line), dict) for line in lines if line != "noise")


def test_collection_is_deterministic(corpus: dict[str, Document]) -> None:
    with collected_corpus() as file:
        again = {document.id: document for document in read_corpus(file)}
    assert again == corpus


def test_collector_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no room left')")
    monkeypatch.setattr(stdlib_corpus, "__file__", str(broken))
    with pytest.raises(DemoError, match="no room left"), collected_corpus():
        pass
    broken.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(demo, "COLLECT_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(DemoError, match="within"), collected_corpus():
        pass


# ---------------------------------------------------------------- the bundle in the cache


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A collector that is quick."""
    script = tmp_path / "collector.py"
    lines = [json.dumps({"_id": f"m{n}", "title": "", "text": f"north star {n}"}) for n in range(30)]
    script.write_text(f"print({chr(10).join(lines)!r})")
    monkeypatch.setattr(stdlib_corpus, "__file__", str(script))
    return script


def test_second_start_opens_what_the_first_built(small_library: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    first = open_demo_bundle(model, tmp_path / "cache", threads=1)
    assert first.manifest.documents == 30
    built = first.path.stat().st_mtime_ns
    second = open_demo_bundle(model, tmp_path / "cache", threads=1)
    assert (second.path, second.path.stat().st_mtime_ns) == (first.path, built)
    rebuilt = open_demo_bundle(model, tmp_path / "cache", threads=1, rebuild=True)
    assert rebuilt.path.stat().st_mtime_ns != built
    for bundle in (first, second, rebuilt):
        bundle.close()


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "empty"])
def test_damaged_bundle_is_built_anew(small_library: Path, tmp_path: Path, damage: str) -> None:
    model = make_model(tmp_path / "model")
    first = open_demo_bundle(model, tmp_path / "cache", threads=1)
    first.close()
    vectors = first.path / "vectors.npy"
    if damage == "truncate":
        vectors.chmod(0o644)
        os.truncate(vectors, 100)
    elif damage == "delete":
        vectors.unlink()
    elif damage == "manifest":
        (first.path / "manifest.json").unlink()
    else:
        for file in first.path.glob("*.*"):
            file.unlink()
    again = open_demo_bundle(model, tmp_path / "cache", threads=1)
    assert again.manifest.documents == 30
    assert again.digest == first.digest
    again.close()


def test_key_binds_interpreter_model_collector_and_sources(
    small_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {demo_key("a"), demo_key("b")}
    small_library.write_text("print()")
    keys.add(demo_key("a"))
    monkeypatch.setattr(sys, "platform", "plan9")
    keys.add(demo_key("a"))
    monkeypatch.setattr(demo, "sources_digest", lambda *_: "others")
    keys.add(demo_key("a"))
    assert len(keys) == 5


def test_model_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nowhere"):
        open_demo_bundle(tmp_path / "nowhere", tmp_path, threads=1)


def test_shipped_model_is_found_beside_the_packages_or_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoError, match="--model"):
        shipped_model()


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("a.b", "a.b")]
)
def test_curl_goes_to_an_address_that_answers(host: str, address: str) -> None:
    assert f"http://{address}:80/" in curl_command(host, 80)


def test_demo_prints_a_curl_that_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The whole way with the tiny model: collect, index, serve, and ask by the printed command."""
    folder = tmp_path_factory.mktemp("demo")
    model = make_model(folder / "model")
    with serving("demo", "--model", str(model), cache=tmp_path_factory.getbasetemp() / "cache") as (url, _, lines):
        deadline = time.monotonic() + 20
        while not (printed := [line for line in lines if "curl" in line]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = run_curl(printed[0])
        assert len(answer["results"]) == 5
        name = answer["results"][0]["id"]
        assert httpx.get(f"{url}/v1/documents/{name}").json()["id"] == name


def run_curl(command: str) -> Any:
    """Run the printed line as a shell does; without curl, take it apart."""
    if shutil.which("curl"):
        return json.loads(subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=True).stdout)
    words = shlex.split(command)
    headers = dict([words[words.index("-H") + 1].split(": ")])
    return httpx.post(words[2], content=words[words.index("-d") + 1], headers=headers, timeout=60).json()
