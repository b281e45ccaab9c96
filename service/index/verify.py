"""Reading artefacts with distrust: manifest first, then every file against it, before anything is opened.

A bit-flipped .npy always loads and a bit-flipped ONNX graph often does, so nothing is opened that does not hash right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.index.artefact import ArtefactError, check_plain, file_names, hash_file
from service.index.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    BundleManifest,
    Manifest,
    ModelManifest,
    manifest_digest,
    render_manifest,
)
from service.ops.progress import progress_bar

MAX_MANIFEST_BYTES = 16_000_000
QUIET_BYTES = 500_000_000  # hashed in about a second; above it a progress bar is shown
KINDS: dict[str, type[ModelManifest | BundleManifest]] = {"model": ModelManifest, "bundle": BundleManifest}


def read_manifest(folder: Path) -> ModelManifest | BundleManifest:
    """Return the manifest of an artefact; it is checked byte by byte, its files are not.

    Raises:
        ArtefactError: no such folder, no manifest, or one that is damaged, of another version or of unknown kind.
    """
    path = folder / MANIFEST_NAME
    fields = _parse(path, _read(path))
    version = fields.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ArtefactError(
            f"'{path}' has schema version {version!r}, this program reads {SCHEMA_VERSION}: "
            "make the artefact again with this version of rhumbline, or install the version that made it"
        )
    recorded, found = fields.get("digest"), manifest_digest(fields)
    if recorded != found:
        raise ArtefactError(f"'{path}' was changed: its digest is {found}, it records {recorded!r}: {RESTORE}")
    kind = fields.get("kind")
    if kind not in KINDS:
        raise ArtefactError(f"'{path}' is of kind {kind!r}, not one of {sorted(KINDS)}")
    try:
        return KINDS[kind].model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ArtefactError(f"'{path}' is not a valid {kind} manifest: {problems}") from None


RESTORE = "copy the artefact again from where it was made, or make it again"


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Hold every file under `folder` against the manifest; reads every byte once.

    Raises:
        ArtefactError: names the first file that is missing, extra, linked, truncated or changed, with the numbers.
    """
    names = file_names(folder)
    if unlisted := sorted(names - manifest.files.keys()):
        raise ArtefactError(f"'{folder / unlisted[0]}' is not in the manifest ({len(unlisted)} such): remove it")
    for name in sorted(manifest.files.keys() - names):
        raise ArtefactError(f"'{folder / name}' is missing: the manifest lists {len(manifest.files)} files; {RESTORE}")
    if manifest.files.keys() != manifest.expected_files():
        odd = sorted(manifest.files.keys() ^ manifest.expected_files())
        raise ArtefactError(f"'{folder / MANIFEST_NAME}' lists files that a {manifest.kind} lacks: {odd}; {RESTORE}")
    _check_sizes(folder, manifest)
    total = sum(entry.bytes for entry in manifest.files.values())
    with progress_bar("verifying", total, quiet=total < QUIET_BYTES) as advance:
        for name, entry in sorted(manifest.files.items()):
            found = hash_file(folder / name).sha256
            if found != entry.sha256:
                raise ArtefactError(
                    f"'{folder / name}' was changed: its sha256 is {found}, the manifest says {entry.sha256}: {RESTORE}"
                )
            advance(entry.bytes)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in sorted(manifest.files.items()):
        found = (folder / name).stat().st_size
        if found != entry.bytes:
            raise ArtefactError(f"'{folder / name}' has {found} bytes, the manifest says {entry.bytes}: {RESTORE}")


def _read(path: Path) -> bytes:
    if not path.parent.is_dir():
        raise ArtefactError(f"'{path.parent}' is not a folder: give the folder of a model or bundle")
    if not path.exists() and not path.is_symlink():
        raise ArtefactError(f"'{path.parent}' has no {MANIFEST_NAME}: it is no artefact, or was never finished")
    check_plain(path)
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise ArtefactError(f"'{path}' has {size} bytes, more than the {MAX_MANIFEST_BYTES} of any manifest: {RESTORE}")
    return path.read_bytes()


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"'{path}' is not JSON ({error}): {RESTORE}") from None
    if not isinstance(fields, dict):
        raise ArtefactError(f"'{path}' holds a JSON {type(fields).__name__}, not an object: {RESTORE}")
    try:
        expected = render_manifest(fields)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"'{path}' holds values that no manifest has ({error}): {RESTORE}") from None
    if raw != expected:
        raise ArtefactError(f"'{path}' is not written as this program writes manifests: it was edited; {RESTORE}")
    return fields
