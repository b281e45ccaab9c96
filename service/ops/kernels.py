"""A private folder for numba's compiled kernels.

A cache index is unpickled by numba, so whoever can write the folder can run code as us: it must belong to us alone
(mode 0700). A read-only root has no writable ``__pycache__``, where ``cache=True`` would fail at import: then a
temporary folder serves. Must run before numba is imported: numba reads ``NUMBA_CACHE_DIR`` once.

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

    A ``NUMBA_CACHE_DIR`` that is already set is kept. Where the folder cannot be made, or is not ours alone, a fresh
    temporary folder is used: kernels compile anew, nothing is trusted.
    """
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given)
    if "numba" in sys.modules:
        warnings.warn("numba was imported before its cache folder was set: kernels go to __pycache__", stacklevel=2)
    folder = cache_folder / "kernels" / _version_key(package)
    if not _make_private(folder):
        folder = Path(tempfile.mkdtemp(prefix="rhumb-kernels-"))
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


def _make_private(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
            return False
        if stat.S_IMODE(status.st_mode) & 0o077:
            return False  # others may have put something there
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False
