"""One interface for every identifier system: fit, encode, reconstruct, state.

Shapes: N documents, D dimensions, L levels, K codes of a level, T tokens (sum of all K).

Codes are (N, L), column l for level l, -1 where a document has none there; tokens are what the service reads, see
`service.model.lengths`.

A system is a file in this package and a recipe: a subclass of `Quantizer` with a frozen dataclass of settings,
decorated with `@register`. The recipe's table `[quantizer]` names it (`system = "hhq"`) and gives the settings.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.quantizers.points import HELD_BYTES, Points, VectorArray, VectorError, check_enough, unit_points
from models.quantizers.settings import QuantizerSettings, check_settings
from service.model.lengths import Codes as CodeArray
from service.model.lengths import QuantizerError
from service.model.lengths import pack as codes_to_tokens
from service.model.lengths import unpack as tokens_to_codes

FloatArray = NDArray[np.float32]


class QuantizerState(NamedTuple):
    """What a model stores of its quantizer, in the format of `service.model.quantizer`.

    Attributes:
        kind: how the service turns a vector into codes ("householder", "residual", …).
        tensors: float32 arrays; `codebooks` (T, D) is always there.
        level_sizes: K of each level; they sum to T.
    """

    kind: str
    tensors: dict[str, NDArray[Any]]
    level_sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FitReport:
    """What a fit did: the objective after every epoch or iteration (mean cosine), and how many codes were revived."""

    objective: tuple[float, ...]
    revived: int = 0


class Quantizer(ABC):
    """Turns unit vectors into codes and back.

    Attributes:
        system: the name in recipes.
        kind: how the service assigns codes (see `QuantizerState`).
        settings_class: the frozen dataclass that a recipe's table fills.
        in_vector_space: whether codewords live beside the vectors, so that a retriever can read and predict them.
        codebooks: one (K, D) float32 tensor a level, once fitted.
    """

    system: ClassVar[str]
    kind: ClassVar[str]
    settings_class: ClassVar[type[QuantizerSettings]]
    in_vector_space: ClassVar[bool] = True

    def __init__(self, settings: QuantizerSettings | None = None) -> None:
        self._settings = self.settings_class() if settings is None else settings
        self.codebooks: list[torch.Tensor] = []
        self.held_bytes = HELD_BYTES

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """K of each level."""
        return self._settings.level_sizes

    @property
    def least_documents(self) -> int:
        """The smallest corpus that codebooks can be learnt from: a document for every code of the widest level."""
        return max(self.level_sizes)

    def fit(self, vectors: VectorArray, device: torch.device | str = "cpu", progress: bool = True) -> FitReport:
        """Learn the codebooks.

        Args:
            vectors: (N, D) floats, array, memory map (read in blocks) or tensor; normalised here.
            device: "cpu", "cuda", …
            progress: a bar on stderr.

        Raises:
            VectorError: NaN, infinity, zero vectors, wrong shape, or fewer distinct vectors than codes of a level.
        """
        points = unit_points(vectors, device, self.held_bytes)
        check_enough(vectors, max(self.level_sizes))
        with progress_bar(progress) as bar, torch.no_grad():
            return self._fit(points, bar)

    def encode(self, vectors: VectorArray) -> CodeArray:
        """Give codes (N, L) int32 of vectors (N, D), on the device of the codebooks, in blocks.

        Raises:
            QuantizerError: not fitted, or another number of dimensions.
            VectorError: NaN, infinity, zero vectors, wrong shape.
        """
        device = self._fitted().device
        points = unit_points(vectors, device, held_bytes=0)
        self._check_dim(points.dim)
        with torch.no_grad():
            blocks = [self._encode(block).to(torch.int32).cpu().numpy() for _, block in points.blocks()]
        return np.concatenate(blocks)

    def reconstruct(self, codes: NDArray[np.integer[Any]]) -> FloatArray:
        """Give the vectors (N, D) float32 that codes (N, L) stand for; a code of -1 leaves its level out.

        Raises:
            QuantizerError: not fitted, wrong number of levels, or a code outside its level.
        """
        device = self._fitted().device
        self._check_codes(codes)
        with torch.no_grad():
            rebuilt = self._reconstruct(torch.from_numpy(np.asarray(codes, dtype=np.int64)).to(device))
        array: FloatArray = rebuilt.cpu().numpy()
        return array

    def state(self) -> QuantizerState:
        """Give what a model stores."""
        self._fitted()
        codebooks = torch.cat(self.codebooks).cpu().numpy()
        return QuantizerState(self.kind, {"codebooks": codebooks, **self._extra_tensors()}, self.level_sizes)

    def learnt(self) -> dict[str, torch.Tensor]:
        """Give everything that was learnt, by name, for the checkpoint of a training run; nothing before `fit`."""
        if not self.codebooks:
            return {}
        extra = {name: torch.from_numpy(array) for name, array in self._extra_tensors().items()}
        return {f"codebook.{level}": book.detach() for level, book in enumerate(self.codebooks)} | extra

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `learnt` gave."""
        self.codebooks = [tensors[f"codebook.{level}"] for level in range(len(self.level_sizes))]
        self._take_extra_tensors({n: t.numpy() for n, t in tensors.items() if not n.startswith("codebook.")})

    @abstractmethod
    def _fit(self, points: Points, bar: Progress) -> FitReport:
        """Learn `self.codebooks` from checked unit points; gradients are off, switch them on where needed."""

    @abstractmethod
    def _encode(self, block_ND: torch.Tensor) -> torch.Tensor:
        """Give (N, L) codes of unit rows."""

    @abstractmethod
    def _reconstruct(self, codes_NL: torch.Tensor) -> torch.Tensor:
        """Give (N, D) vectors of checked codes."""

    def _extra_tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def _take_extra_tensors(self, tensors: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027  # most have none
        """Restore what `_extra_tensors` gave."""

    def _fitted(self) -> torch.Tensor:
        if not self.codebooks:
            raise QuantizerError(f"{type(self).__name__} has no codebooks yet: fit it first, or restore it")
        return self.codebooks[0]

    def _check_dim(self, dim: int) -> None:
        expected = self._fitted().shape[1]
        if dim != expected:
            raise QuantizerError(f"vectors have {dim} dimensions, the codebooks {expected}: use the same encoder")

    def _check_codes(self, codes: NDArray[np.integer[Any]]) -> None:
        levels = len(self.level_sizes)
        if codes.ndim != 2 or codes.shape[1] != levels or not np.issubdtype(codes.dtype, np.integer):
            raise QuantizerError(f"codes must be whole numbers (N, {levels}), got {codes.dtype} {codes.shape}")
        outside = (codes < -1) | (codes >= np.asarray(self.level_sizes))
        if outside.any():
            row, level = (int(i) for i in np.argwhere(outside)[0])
            raise QuantizerError(
                f"code {int(codes[row, level])} in row {row} is outside level {level} of {self.level_sizes[level]}"
            )


def mean_cosine(quantizer: Quantizer, points: Points) -> float:
    """Give the mean cosine between unit points and what their codes stand for."""
    total = 0.0
    for _, block in points.blocks():
        rebuilt = quantizer._reconstruct(quantizer._encode(block))
        total += float(torch.nn.functional.cosine_similarity(rebuilt, block).double().sum())
    return total / points.rows


QuantizerT = TypeVar("QuantizerT", bound=type[Quantizer])
_SYSTEMS: dict[str, type[Quantizer]] = {}


def register(quantizer: QuantizerT) -> QuantizerT:
    """Class decorator: make a system known to recipes under its `system` name."""
    _SYSTEMS[quantizer.system] = quantizer
    return quantizer


def systems() -> dict[str, type[Quantizer]]:
    """Give every system of this package by name."""
    package = importlib.import_module("models.quantizers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"models.quantizers.{module.name}")
    return dict(sorted(_SYSTEMS.items()))


def make_quantizer(table: Mapping[str, Any]) -> Quantizer:
    """Make the quantizer of a recipe's `[quantizer]` table: `system` and its settings.

    Raises:
        QuantizerError: no or unknown system, unknown setting (with the allowed ones), or a value of the wrong type.
    """
    known = systems()
    system = table.get("system")
    if not isinstance(system, str) or system not in known:
        raise QuantizerError(f"quantizer.system is {system!r}, must be one of {', '.join(known)}")
    chosen = known[system]
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "system"
    }
    check_settings(system, chosen.settings_class, given)
    return chosen(chosen.settings_class(**given))


def progress_bar(shown: bool) -> Progress:
    """Make a progress bar on stderr (stdout is for results)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)


__all__ = [
    "CodeArray",
    "FitReport",
    "Quantizer",
    "QuantizerError",
    "QuantizerSettings",
    "QuantizerState",
    "VectorError",
    "codes_to_tokens",
    "make_quantizer",
    "mean_cosine",
    "register",
    "systems",
    "tokens_to_codes",
]
