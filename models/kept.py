"""What a study keeps: folders that bear a fingerprint of what their content rests on, and files that are never half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def keep_if_same(folder: Path, print_: str) -> bool:
    """Make a folder bear a fingerprint; one with another, or with none, is emptied. Says whether it was kept."""
    mark = folder / "fingerprint"
    if mark.is_file() and mark.read_text() == print_:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(print_)
    return False


def save_json(path: Path, values: Any) -> None:
    """Write plain values as one line of JSON; a crash leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
    partial.replace(path)
