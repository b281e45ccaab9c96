"""Settings of a quantizer: frozen dataclasses, filled from a recipe's table and checked key by key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from service.model.lengths import QuantizerError


@dataclasses.dataclass(frozen=True)
class QuantizerSettings:
    """Settings that every system has.

    Attributes:
        level_sizes: K of each level, e.g. (128, 128, 128, 128).
        seed: of every random choice.
    """

    level_sizes: tuple[int, ...] = (128, 128, 128, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.level_sizes or any(not _is_int(size) or size < 2 for size in self.level_sizes):
            raise QuantizerError(f"level_sizes must be whole numbers of at least 2, got {list(self.level_sizes)}")
        if not 0 <= self.seed < 1 << 63:
            raise QuantizerError(f"seed is {self.seed}, must be at least 0 and below 2^63")


def check_settings(system: str, settings_class: type[QuantizerSettings], given: Mapping[str, Any]) -> None:
    """Refuse unknown keys and values of the wrong type with QuantizerError, naming what is allowed."""
    defaults = {field.name: getattr(settings_class(), field.name) for field in dataclasses.fields(settings_class)}
    for key, value in given.items():
        if key not in defaults:
            raise QuantizerError(f"{system} knows no setting {key!r}; allowed: {', '.join(defaults)}")
        expected = type(defaults[key])
        fits = _is_number(value) if expected is float else isinstance(value, expected)
        if not fits or (expected is int and not _is_int(value)):
            raise QuantizerError(f"{system}.{key} must be {expected.__name__} like {defaults[key]!r}, got {value!r}")


def check_least(system: str, settings: QuantizerSettings, **least: float) -> None:
    """Refuse with QuantizerError settings below the least that they may be, and NaN and infinity."""
    for key, bound in least.items():
        if not bound <= getattr(settings, key) < math.inf:
            raise QuantizerError(f"{system}.{key} is {getattr(settings, key)}, must be at least {bound}")


def check_positive(system: str, settings: QuantizerSettings, *keys: str) -> None:
    """Refuse with QuantizerError settings that are not above zero, and NaN and infinity."""
    for key in keys:
        if not 0 < getattr(settings, key) < math.inf:
            raise QuantizerError(f"{system}.{key} is {getattr(settings, key)}, must be above 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
