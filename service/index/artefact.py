"""Writing artefacts: a staging folder beside the target, everything on disk, then one rename.

A reader sees the old artefact, the new one or none, never a half: a crash leaves a hidden staging folder
(`.NAME.*.partial`), which the next writer of the same target clears away. A running writer holds a lock on its staging
folder, so it is never cleared away by another. Replacing renames the old folder aside (`.NAME.*.old`) first; a crash
between the two renames is undone by the next writer.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from service.index.manifest import MANIFEST_NAME, FileEntry, Manifest, manifest_digest, render_manifest

AnyManifest = TypeVar("AnyManifest", bound=Manifest)


class ArtefactError(Exception):
    """A model or bundle cannot be written or trusted; the message names the file, the numbers and the remedy."""


@contextmanager
def new_artefact(target: Path, replace: bool = False, kind: str | None = None) -> Iterator[Path]:
    """Give a staging folder that becomes `target` when the block ends after a call of `publish`.

    Whatever goes wrong in the block, the staging folder is removed and `target` stays as it was.

    Args:
        target: the folder to make. Its parent is made if missing.
        replace: whether an artefact that stands there is replaced.
        kind: of the new artefact, "model" or "bundle"; one of the other kind is never replaced.

    Yields:
        The staging folder; write the artefact's files into it, then call `publish(staging, manifest)`.

    Raises:
        ArtefactError: `target` exists and may not be replaced, nothing was published, or the disk is full.
    """
    target = target.absolute()
    _check_target(target, replace, kind)  # before anything is made
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent):
        _clear_leftovers(target)
        _check_target(target, replace, kind)  # a crashed writer may have put it aside
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        lock = _lock(staging)
    try:
        yield staging
        if not (staging / MANIFEST_NAME).exists():
            raise ArtefactError(f"'{target}' was not published: nothing called publish() on its staging folder")
        with _locked(target.parent):
            _check_target(target, replace, kind)
            _move_into_place(staging, target)
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, manifest: AnyManifest) -> AnyManifest:
    """Make the files durable and read-only, and write `manifest.json`, complete with file table and digest, last.

    Args:
        staging: the folder that `new_artefact` gave.
        manifest: everything but `files` and `digest`, which are computed here.

    Returns:
        The manifest as written.

    Raises:
        ArtefactError: the folder does not hold exactly the files of such an artefact, or holds links.
    """
    names = file_names(staging)
    expected = manifest.expected_files()
    if missing := sorted(expected - names):
        raise ArtefactError(f"'{staging}' lacks {missing}: a {manifest.kind} of this manifest needs {sorted(expected)}")
    if extra := sorted(names - expected):
        raise ArtefactError(f"'{staging}' holds {extra}, which a {manifest.kind} of this manifest does not have")
    table = {name: _seal(staging / name) for name in sorted(names)}
    fields = manifest.model_copy(update={"files": table, "digest": ""}).model_dump(mode="json")
    fields["digest"] = manifest_digest(fields)
    path = staging / MANIFEST_NAME
    path.write_bytes(render_manifest(fields))
    _seal(path)
    for folder in {staging, *((staging / name).parent for name in names)}:
        folder.chmod(0o755)
        _sync(folder)
    return type(manifest).model_validate(fields)


def file_names(folder: Path) -> set[str]:
    """Return the relative names of all files under a folder but the manifest at its top.

    Raises:
        ArtefactError: something there is neither a folder nor a plain file with a single name.
    """
    names = set()
    for entry in _entries(folder):
        name = Path(entry.path).relative_to(folder).as_posix()
        check_plain(Path(entry.path))
        if name != MANIFEST_NAME:
            names.add(name)
    return names


def check_plain(path: Path) -> None:
    """Raise ArtefactError unless `path` is a regular file with exactly one name (no symbolic, no hard link)."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ArtefactError(f"'{path}' is a symbolic link: artefacts hold plain files only; copy the file in its place")
    if not stat.S_ISREG(status.st_mode):
        raise ArtefactError(f"'{path}' is not a regular file: artefacts hold plain files only; remove it")
    if status.st_nlink > 1:
        raise ArtefactError(
            f"'{path}' has {status.st_nlink} hard links, so it can change from elsewhere: "
            "copy the folder (cp -r; uv: UV_LINK_MODE=copy)"
        )


def hash_file(path: Path) -> FileEntry:
    """Return the sha256 and the size of a file."""
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=file.tell())


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path))
            else:
                yield entry


def _seal(path: Path) -> FileEntry:
    """Flush a file to disk, make it read-only, and return its entry."""
    path.chmod(0o444)
    _sync(path)
    return hash_file(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_outside(folder: Path) -> None:
    """Raise ArtefactError for a folder of other files that is an artefact, or lies in one: it would be spoilt."""
    folder = folder.resolve()
    for outer in (folder, *folder.parents):
        if kind := _kind_of(outer):
            lies = "is" if outer == folder else f"lies in '{outer}', which is"
            raise ArtefactError(f"'{folder}' {lies} a {kind}, and holds its files only: choose another folder")


def _check_target(target: Path, replace: bool, kind: str | None) -> None:
    if not target.name:
        raise ArtefactError(f"'{target}' has no name to publish under: give a folder")
    if target.is_symlink():
        raise ArtefactError(f"'{target}' is a symbolic link: give the folder itself")
    if not target.exists():
        return
    if not replace:
        raise ArtefactError(f"'{target}' exists: choose another folder, or ask for it to be replaced (--replace)")
    if not (target / MANIFEST_NAME).is_file():
        raise ArtefactError(f"'{target}' exists and has no {MANIFEST_NAME}, so it is not replaced: move it away")
    if kind is not None and (found := _kind_of(target)) not in (kind, None):
        raise ArtefactError(f"'{target}' is a {found} and would be replaced by a {kind}: choose another folder")


def _kind_of(artefact: Path) -> str | None:
    """Return what an artefact's manifest says it is; None for one that cannot be read."""
    try:
        return str(json.loads((artefact / MANIFEST_NAME).read_bytes())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(folder: Path) -> int:
    """Open and lock a folder; closing the handle (or the process's end) frees it."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def _clear_leftovers(target: Path) -> None:
    """Undo what crashed writers of this target left; the parent is locked."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(old|partial)")  # mkdtemp's alphabet
    for path in sorted(target.parent.iterdir()):
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        if path.suffix == ".old":
            _restore_or_remove(path, target)
        else:
            _remove_unlocked(path)


def _restore_or_remove(aside: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)


def _remove_unlocked(staging: Path) -> None:
    handle = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(staging, ignore_errors=True)
    except BlockingIOError:
        pass  # its writer lives
    finally:
        os.close(handle)


def _move_into_place(staging: Path, target: Path) -> None:
    """Rename staging to target; an artefact that stands there goes aside first and is deleted last."""
    aside = staging.with_suffix(".old") if target.exists() else None
    if aside:
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside:
            aside.rename(target)
        raise
    _sync(target.parent)
    if aside:
        with suppress(OSError):
            shutil.rmtree(aside)


def _explained(error: OSError, target: Path) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    free: Any = "unknown"
    with suppress(OSError):
        free = shutil.disk_usage(target.parent).free
    return ArtefactError(
        f"'{target}' was not written: {os.strerror(error.errno)} ({free} bytes free): free some space and run again; "
        "nothing was published"
    )
