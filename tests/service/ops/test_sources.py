from __future__ import annotations

from pathlib import Path

from service.ops.sources import sources_digest


def test_every_change_of_a_source_file_is_another_digest(tmp_path: Path) -> None:
    for room in ("a", "b"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "one.py").write_text("1")
    digests = [sources_digest("a", package=tmp_path)]
    (tmp_path / "b" / "one.py").write_text("2")
    assert sources_digest("a", package=tmp_path) == digests[0], "another room"
    (tmp_path / "a" / "one.py").write_text("2")
    digests.append(sources_digest("a", package=tmp_path))
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "two.py")
    digests.append(sources_digest("a", package=tmp_path))
    (tmp_path / "a" / "three.py").write_text("")
    digests.append(sources_digest("a", package=tmp_path))
    digests.append(sources_digest("a", "b", package=tmp_path))
    assert len(set(digests)) == 5
    assert sources_digest("index", "search") != sources_digest("index")
