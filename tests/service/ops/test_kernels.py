from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from service.ops.kernels import prepare_kernel_cache


@pytest.fixture(autouse=True)
def _as_if_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delitem(sys.modules, "numba", raising=False)


def test_folder_is_private_and_versioned(tmp_path: Path) -> None:
    folder = prepare_kernel_cache(tmp_path)
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    assert folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "numba" in folder.name


def test_users_own_choice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/somewhere")
    assert prepare_kernel_cache(tmp_path) == Path("/somewhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("levels_up", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_open_to_others_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels_up: int, mode: int
) -> None:
    """Who can write a folder can put another in the place of one below it."""
    folder = prepare_kernel_cache(tmp_path / "cache")
    opened = [folder, *folder.parents][levels_up]
    opened.chmod(mode)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    with pytest.warns(UserWarning, match=f"others can write '{opened}': chmod go-w"):
        other = prepare_kernel_cache(tmp_path / "cache")
    assert not other.is_relative_to(tmp_path)
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    other.rmdir()


def test_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_kernel_cache(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    with pytest.warns(UserWarning, match="is not a folder of this user: remove it"):
        other = prepare_kernel_cache(tmp_path)
    assert other.parent != folder.parent
    other.rmdir()


def test_folders_are_ours_alone_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o000)
    try:
        folder = prepare_kernel_cache(tmp_path / "deep" / "cache")
    finally:
        os.umask(before)
    assert folder.is_relative_to(tmp_path / "deep" / "cache")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    assert prepare_kernel_cache(tmp_path / "deep" / "cache") == folder


def test_cache_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "there")
    assert prepare_kernel_cache(tmp_path / "cache").is_relative_to(tmp_path / "there")


def test_unwritable_place_falls_back_to_a_temporary_folder(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.warns(UserWarning, match="into a temporary folder: .*file"):
        folder = prepare_kernel_cache(blocker)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()


def test_kernels_that_call_a_changed_kernel_are_compiled_anew(tmp_path: Path) -> None:
    """Numba looks at the file of a kernel only, not at those of the kernels that it calls."""
    room = tmp_path / "rooms" / "search"
    room.mkdir(parents=True)
    inner = "from numba import njit\n@njit(cache=True)\ndef inner(x):\n    return x + {}\n"
    outer = "from numba import njit\nfrom inner import inner\n@njit(cache=True)\ndef outer(x):\n    return inner(x)\n"
    (room / "outer.py").write_text(outer)
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from service.ops.kernels import prepare_kernel_cache\n"
        "prepare_kernel_cache(Path(sys.argv[1]), Path(sys.argv[2]).parent)\n"
        "import outer; print(outer.outer(1))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), str(room)]
    answers = []
    for number in (10, 20):
        (room / "inner.py").write_text(inner.format(number))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        answers.append(done.stdout.strip())
    assert answers == ["11", "21"]


def test_numba_that_came_first_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", object())
    with pytest.warns(UserWarning, match="before its cache folder"):
        prepare_kernel_cache(tmp_path)


def test_numba_compiles_into_the_folder(tmp_path: Path) -> None:
    """The point of it all: a compiled kernel lands in the folder and nowhere else."""
    kernel = tmp_path / "kernel.py"
    kernel.write_text("from numba import njit\n@njit(cache=True)\ndef f(x):\n    return x + 1\n")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from service.ops.kernels import prepare_kernel_cache\n"
        "folder = prepare_kernel_cache(Path(sys.argv[1]) / 'cache')\n"
        "import kernel; assert kernel.f(1) == 2\n"
        "print(len(list(folder.rglob('*.nbi'))))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "1"
    assert list((tmp_path / "__pycache__").glob("*.nbi")) == []
