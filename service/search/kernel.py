"""How the kernels of a search are compiled: without numba's reference counts.

Numba counts references to every array that a function is given, reads out of a named tuple or takes a row of, each time
with an atomic instruction: without them a walk's kernels take a third less time. With `_nrt=False` arrays are borrowed
from the caller, whose frame keeps them alive; a kernel that would allocate memory is then refused when it is compiled.
"""

from __future__ import annotations

from typing import Any, Final

KERNEL: Final[dict[str, Any]] = {"cache": True, "nogil": True, "_nrt": False}
