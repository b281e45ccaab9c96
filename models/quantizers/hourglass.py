"""Hourglass: a crowded level is removed, thinned out, or exchanged (Breaking the Hourglass Phenomenon, 3.3, 4.1, 4.2).

Shapes: N documents, L levels, M or K codes of a level.

In residual quantization the second level crowds most documents onto few codes. What the paper does about it:

- **remove** (4.1): quantise to L levels, then drop the second code of every document. Not the same as L − 1 levels: the
  third codebook still describes what the second left over.
- **variable** (4.2): drop the second code only where it is among the top K, the K codes that hold most documents of the
  corpus. The paper adds "with p as a threshold" and does not use p again; here K alone decides.
- **exchange** (3.3): the tokens of levels 1 and 2 change places, so that the crowded level is predicted first.

The dropped tokens are stored, not the counts: documents that come later are shortened by the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.quantizers.base import CodeArray, QuantizerError, register
from models.quantizers.lengths import LengthSettings, Rule, Shortened
from service.model.lengths import DROPPED, ORDER, level_offsets

MODES = ("remove", "variable", "exchange")


@dataclass(frozen=True)
class HourglassSettings(LengthSettings):
    """Settings of Hourglass.

    Attributes:
        mode: "remove", "variable" or "exchange", see above.
        top: K of "variable", 1 to the codes of the level (the paper's best: 400 of 4,096); 0 in the other modes.
        level: the crowded level, counted from 1 as in the paper; 2 to L (exchanged with level 1).
    """

    mode: str = "remove"
    top: int = 0
    level: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise QuantizerError(f"hourglass.mode is {self.mode!r}, must be one of {', '.join(MODES)}")
        if not 2 <= self.level <= len(self.level_sizes):
            raise QuantizerError(
                f"hourglass.level is {self.level}, must be 2 to the {len(self.level_sizes)} levels of level_sizes"
            )
        codes = self.level_sizes[self.level - 1]
        if self.mode == "variable" and not 1 <= self.top <= codes:
            raise QuantizerError(
                f"hourglass.top is {self.top}, level {self.level} has {codes} codes: give 1 to {codes} "
                "(all of them: mode = 'remove')"
            )
        if self.mode != "variable" and self.top:
            raise QuantizerError(
                f"hourglass.top is {self.top}, and mode {self.mode!r} takes none: set mode = 'variable'"
            )


@register
class Hourglass(Shortened):
    """A base whose crowded level is removed, thinned out or exchanged; its kind is the base's."""

    system = "hourglass"
    settings_class = HourglassSettings

    def __init__(self, settings: HourglassSettings | None = None) -> None:
        self.settings = settings or HourglassSettings()
        super().__init__(self.settings)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """K of each level in the order of the SID: exchanged with the tokens."""
        sizes = self.settings.level_sizes
        return tuple(sizes[choice] for choice in self._choices())

    def _choices(self) -> list[int]:
        """Give the place in the order of choice of every level of the SID."""
        choices = list(range(len(self.settings.level_sizes)))
        if self.settings.mode == "exchange":
            other = self.settings.level - 1
            choices[0], choices[other] = other, 0
        return choices

    def _read(self, codes_NL: CodeArray) -> Rule:
        settings = self.settings
        if settings.mode == "exchange":
            return {ORDER: np.argsort(self._choices()).astype(np.int32)}
        level = settings.level - 1
        codes = settings.level_sizes[level]
        top = codes if settings.mode == "remove" else settings.top
        first = int(level_offsets(settings.level_sizes)[level])
        return {DROPPED: (np.sort(top_codes(codes_NL[:, level], codes, top)) + first).astype(np.int32)}


def top_codes(codes_N: NDArray[np.integer[Any]], size: int, top: int) -> NDArray[np.int64]:
    """Give the `top` codes that most documents have, most used first; ties go to the smaller code.

    Raises:
        QuantizerError: `top` outside 1 to `size`.
    """
    if not 1 <= top <= size:
        raise QuantizerError(f"the top {top} of {size} codes: give 1 to {size}")
    counts_K = np.bincount(codes_N[codes_N >= 0], minlength=size)
    order: NDArray[np.int64] = np.argsort(-counts_K, kind="stable")[:top]
    return order
