from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.ops.cpus import available_cpus


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000", 8),
        ("150000 100000\n", 2),
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("nonsense", 8),
        ("1 0", 8),
    ],
)
def test_quota_and_affinity_both_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    quota.write_text(content, "ascii")
    assert available_cpus(quota) == expected


def test_without_a_quota_file_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert available_cpus(tmp_path / "absent") == 3
