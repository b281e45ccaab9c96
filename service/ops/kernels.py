"""A private folder for numba's compiled kernels.

A cache index is unpickled by numba, so whoever can write the folder, or one above it, can run code as us: from the
cache folder down all must be ours, and nobody else may write there. A read-only root has no writable ``__pycache__``,
where ``cache=True`` would fail at import: then a temporary folder serves. Must run before numba is imported, which
reads ``NUMBA_CACHE_DIR`` once.

Numba compiles a kernel anew when its own file changes, not when a kernel in another file does that it calls. So the
folder is named after all sources that hold kernels: another state of them has another folder.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.ops.sources import SERVICE, sources_digest

ROOMS_WITH_KERNELS = ("index", "search")


def prepare_kernel_cache(cache_folder: Path, package: Path = SERVICE) -> Path:
    """Point numba at a private folder under ``cache_folder`` and return it.

    A ``NUMBA_CACHE_DIR`` that is already set is kept. Where the folder cannot be made, or others can write it, a fresh
    temporary folder is used, with a warning: kernels compile anew, nothing is trusted.
    """
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given)
    if "numba" in sys.modules:
        warnings.warn("numba was imported before its cache folder was set: kernels go to __pycache__", stacklevel=2)
    top = cache_folder.resolve()  # a link is followed now, not again when it may lead elsewhere
    folder = top / "kernels" / _version_key(package)
    try:
        top.parent.mkdir(parents=True, exist_ok=True)
        for each in (top, folder.parent, folder):
            _make_private(each)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="rhumb-kernels-"))
        warnings.warn(f"kernels are compiled anew, into a temporary folder: {error}", stacklevel=2)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return folder


def _version_key(package: Path) -> str:
    """Kernels of another numba, Python, machine type or state of the sources never meet."""
    digest = sources_digest(*ROOMS_WITH_KERNELS, package=package)
    return "-".join([f"numba{_version('numba')}", sys.implementation.cache_tag or "py", platform.machine(), digest])


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "0"


def _make_private(folder: Path) -> None:
    """Make a folder that is ours and that nobody else can write; raises OSError where that cannot be."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"'{folder}' is not a folder of this user: remove it, or set RHUMB_CACHE_DIR")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise PermissionError(f"others can write '{folder}': chmod go-w, or set RHUMB_CACHE_DIR")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"'{folder}' cannot be written: set RHUMB_CACHE_DIR")
