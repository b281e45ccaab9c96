"""Writing artefacts: all or nothing, read-only, never over something else."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from service.index import artefact
from service.index.artefact import ArtefactError, new_artefact, publish
from service.index.manifest import ModelManifest
from service.index.verify import read_manifest, verify_files
from tests.tiny import Tiny, tiny_manifest

MANIFEST = tiny_manifest(Tiny(decoder=False))
NAMES = ("encoder.onnx", "quantizer.safetensors", "tokenizer.json")


def fill(staging: Path, text: str = "content of ") -> None:
    for name in NAMES:
        (staging / name).write_text(text + name)


def make(
    target: Path, text: str = "content of ", replace: bool = False, spoil: Callable[[Path], object] | None = None
) -> ModelManifest:
    """Publish an artefact of `MANIFEST`; `spoil` does something to the staging folder before it is published."""
    with new_artefact(target, replace) as staging:
        fill(staging, text)
        if spoil is not None:
            spoil(staging)
        return publish(staging, MANIFEST)


def test_a_published_artefact_has_the_files_their_hashes_and_no_write_bit(tmp_path: Path) -> None:
    manifest = make(tmp_path / "deep" / "model")
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == sorted([*NAMES, "manifest.json"])
    for name, entry in manifest.files.items():
        content = (tmp_path / "deep" / "model" / name).read_bytes()
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    for path in (tmp_path / "deep" / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert stat.S_IMODE((tmp_path / "deep" / "model").stat().st_mode) == 0o755
    assert read_manifest(tmp_path / "deep" / "model") == manifest
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["model"]


def test_equal_content_gives_an_equal_digest_and_other_content_another(tmp_path: Path) -> None:
    one, two, three = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", "other ")
    assert one.digest == two.digest != three.digest


def test_an_existing_artefact_is_not_overwritten(tmp_path: Path) -> None:
    first = make(tmp_path / "model")
    with pytest.raises(ArtefactError, match="exists: choose another folder"):
        make(tmp_path / "model", "new ")
    assert read_manifest(tmp_path / "model") == first


def test_replacing_swaps_the_content_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    make(tmp_path / "model")
    second = make(tmp_path / "model", "new ", replace=True)
    verify_files(tmp_path / "model", second)
    assert (tmp_path / "model" / NAMES[0]).read_text() == "new " + NAMES[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_artefact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ArtefactError, match=r"has no manifest\.json, so it is not replaced"):
        make(tmp_path / "home", replace=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_a_link_is_never_replaced(tmp_path: Path) -> None:
    make(tmp_path / "model")
    (tmp_path / "current").symlink_to("model")
    with pytest.raises(ArtefactError, match="symbolic link"):
        make(tmp_path / "current", replace=True)


def test_an_error_while_writing_leaves_the_old_artefact_and_nothing_else(tmp_path: Path) -> None:
    def fail(staging: Path) -> None:
        raise RuntimeError("half way")

    first = make(tmp_path / "model")
    with pytest.raises(RuntimeError, match="half way"):
        make(tmp_path / "model", "new ", replace=True, spoil=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    verify_files(tmp_path / "model", first)


def test_a_block_without_publish_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="was not published"), new_artefact(tmp_path / "model") as staging:
        fill(staging)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_when_publishing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtefactError, match=rf"lacks \['{name}'\]"):
        make(tmp_path / "model", spoil=lambda staging: (staging / name).unlink())
    assert list(tmp_path.iterdir()) == []


def test_an_extra_file_is_named_when_publishing(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"weights\.bin"):
        make(tmp_path / "model", spoil=lambda staging: (staging / "weights.bin").write_text(""))


@pytest.mark.parametrize(("link", "words"), [(os.symlink, "symbolic link"), (os.link, "2 hard links")])
def test_links_are_refused_when_publishing(tmp_path: Path, link: Callable[[Path, Path], None], words: str) -> None:
    def spoil(staging: Path) -> None:
        (staging / NAMES[0]).unlink()
        link(tmp_path / "elsewhere", staging / NAMES[0])

    (tmp_path / "elsewhere").write_text("x")
    with pytest.raises(ArtefactError, match=words):
        make(tmp_path / "model", spoil=spoil)
    assert (tmp_path / "elsewhere").read_text() == "x"


def test_the_manifest_is_written_after_every_other_file_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    seal = artefact._seal
    monkeypatch.setattr(artefact, "_seal", lambda path: (synced.append(path.name), seal(path))[1])
    make(tmp_path / "model")
    assert synced == [*sorted(NAMES), "manifest.json"]


def test_a_failed_flush_means_no_manifest_and_no_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        assert not list(tmp_path.glob(".model.*/manifest.json"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artefact.os, "fsync", full)
    with pytest.raises(ArtefactError, match=r"No space left on device \(\d+ bytes free\): free some space"):
        make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_when_the_second_rename_fails_the_old_artefact_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, rename = make(tmp_path / "model"), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        make(tmp_path / "model", "new ", replace=True)
    verify_files(tmp_path / "model", first)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from service.index.artefact import new_artefact
    with new_artefact(Path(sys.argv[1])) as staging:
        (staging / "encoder.onnx").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_invisible_and_the_next_writer_clears_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "model")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".model.")
    make(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_living_writer_is_not_cleared_away(tmp_path: Path) -> None:
    def be_slow(staging: Path) -> None:
        make(tmp_path / "model", "the faster one ")
        assert sorted(path.name for path in staging.iterdir()) == sorted(NAMES)

    slow = make(tmp_path / "model", replace=True, spoil=be_slow)
    verify_files(tmp_path / "model", slow)
    assert (tmp_path / "model" / NAMES[0]).read_text() == "content of " + NAMES[0]


def test_the_slower_of_two_writers_is_refused(tmp_path: Path) -> None:
    made = []
    with pytest.raises(ArtefactError, match="exists"):
        make(tmp_path / "model", spoil=lambda _: made.append(make(tmp_path / "model", "the faster one ")))
    verify_files(tmp_path / "model", made[0])


def test_a_crash_between_the_two_renames_is_undone_by_the_next_writer(tmp_path: Path) -> None:
    first = make(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.abcd_123.old")
    with pytest.raises(ArtefactError, match="exists"):
        make(tmp_path / "model", "new ", spoil=lambda _: pytest.fail("refused before any work is done"))
    verify_files(tmp_path / "model", first)


def test_leftovers_of_an_artefact_with_a_longer_name_stay(tmp_path: Path) -> None:
    (tmp_path / ".model.v2.abcd_123.old").mkdir()
    (tmp_path / ".model.v2.abcd_123.partial").mkdir()
    make(tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_model_is_not_replaced_by_a_bundle(tmp_path: Path) -> None:
    manifest = make(tmp_path / "model")
    message = "is a model and would be replaced by a bundle: choose another folder"
    with pytest.raises(ArtefactError, match=message), new_artefact(tmp_path / "model", replace=True, kind="bundle"):
        pytest.fail("refused before any work is done")
    verify_files(tmp_path / "model", manifest)
