"""How many CPUs this process may really use: affinity and cgroup quota, not the machine's count."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "<quota|max> <period>", microseconds


def available_cpus(quota_file: Path = CPU_QUOTA_FILE) -> int:
    """Return the number of CPUs this process can keep busy, at least 1.

    The smaller of the scheduling affinity and the cgroup's quota (rounded up): thread pools that are sized by the
    machine's core count stall inside containers (onnxruntime#29510).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _quota_cpus(quota_file)))


def _quota_cpus(quota_file: Path) -> int:
    no_quota = 1 << 20
    try:
        quota, period = quota_file.read_text("ascii").split()
        return no_quota if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return no_quota
