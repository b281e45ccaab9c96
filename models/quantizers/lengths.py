"""What systems of variable length share: a base quantizer that chooses the codes, and a rule that is read off them.

Shapes: N documents, D dimensions, L levels, K codes of a level.

A system with a length rule fits its base, looks at the codes of the corpus, and keeps a rule. The rule is three small
integer tensors of the state; `service.model.lengths` applies it, here and in the service, so both give the same SIDs.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from models.quantizers.base import (
    CodeArray,
    FitReport,
    Quantizer,
    QuantizerError,
    QuantizerSettings,
    QuantizerState,
    make_quantizer,
    mean_cosine,
)
from models.quantizers.points import Points
from service.model.lengths import NAMES, LengthRule, read_rule

Rule = dict[str, NDArray[np.int32]]


SAID_BY_ITSELF = {"system": "base", "level_sizes": "level_sizes", "seed": "seed"}


@dataclasses.dataclass(frozen=True)
class LengthSettings(QuantizerSettings):
    """Settings of systems that shorten the SIDs of a base.

    Attributes:
        base: the system that chooses the codes, e.g. "rq_kmeans" or "hhq".
        base_settings: its settings, without level_sizes and seed; in a recipe the table `[quantizer.base_settings]`.
    """

    base: str = "rq_kmeans"
    base_settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class RuledQuantizer(Quantizer):
    """A quantizer whose SIDs follow a length rule; a fitted one has both, codebooks and rule."""

    def __init__(self, settings: QuantizerSettings | None = None) -> None:
        super().__init__(settings)
        self._rule: Rule | None = None

    def rule(self) -> LengthRule:
        """Give the rule, ready for use.

        Raises:
            QuantizerError: there is none: codebooks alone say nothing of lengths.
        """
        if self._rule is None:
            raise QuantizerError(
                f"{type(self).__name__} has codebooks but no length rule: fit it again, or restore it whole"
            )
        return read_rule(self._rule, self.level_sizes)

    def _arrange(self, chosen_NL: Tensor) -> Tensor:
        """Give the codes (N, L) that documents keep, of those that were chosen."""
        arranged = self.rule().arrange(chosen_NL.cpu().numpy())
        return torch.from_numpy(arranged).to(chosen_NL.device, torch.int64)

    def _extra_tensors(self) -> dict[str, NDArray[Any]]:
        self.rule()
        return dict(self._rule or {})

    def _take_extra_tensors(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._rule = {name: np.asarray(tensors[name], np.int32) for name in sorted(NAMES & tensors.keys())}


class Shortened(RuledQuantizer):
    """A base quantizer by name, and a rule that is read off its codes; `_read` says how."""

    settings_class: ClassVar[type[LengthSettings]] = LengthSettings

    def __init__(self, settings: LengthSettings | None = None) -> None:
        settings = settings or self.settings_class()
        super().__init__(settings)
        table = {"system": settings.base, "seed": settings.seed} | settings.base_settings
        for key, remedy in SAID_BY_ITSELF.items():
            if key in settings.base_settings:
                raise QuantizerError(f"base_settings.{key} is set: {remedy} of the quantizer itself says it")
        self._base = make_quantizer(table | {"level_sizes": list(settings.level_sizes)})
        if isinstance(self._base, RuledQuantizer):
            raise QuantizerError(f"base {settings.base!r} has a length rule of its own: choose a base of fixed length")
        if hasattr(self._base, "interactions_N"):
            raise QuantizerError(f"base {settings.base!r} tells head from tail itself: use it alone, or sa2crq")
        if not self._base.in_vector_space:
            raise QuantizerError(
                f"base {settings.base!r} has codes in a space of its own: choose one beside the vectors"
            )
        self.kind = self._base.kind  # type: ignore[misc]  # here it is the base's, so of the object

    def state(self) -> QuantizerState:
        """Give what a model stores; its kind is what the base's settings make it."""
        return super().state()._replace(kind=self._chooser().state().kind)

    @property
    def least_documents(self) -> int:
        """The base's."""
        return self._base.least_documents

    def _fit(self, points: Points, bar: Progress) -> FitReport:
        found = self._base._fit(points, bar)
        codes_NL = torch.cat([self._base._encode(block).cpu() for _, block in points.blocks()])
        self._rule = self._read(codes_NL.numpy().astype(np.int32))
        self.codebooks = [self._base.codebooks[choice] for choice in np.argsort(self.rule().order)]
        return FitReport((*found.objective, mean_cosine(self, points)), found.revived)

    @abstractmethod
    def _read(self, codes_NL: CodeArray) -> Rule:
        """Give the tensors of the rule for the base's codes of the corpus."""

    def _encode(self, block_ND: Tensor) -> Tensor:
        return self._arrange(self._chooser()._encode(block_ND))

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        return self._chooser()._reconstruct(codes_NL[:, list(self.rule().order)])

    def _extra_tensors(self) -> dict[str, NDArray[Any]]:
        return {**self._base._extra_tensors(), **super()._extra_tensors()}

    def _chooser(self) -> Quantizer:
        """Give the base with its codebooks in the order of choice; a training run may have replaced them."""
        self._base.codebooks = [self.codebooks[level] for level in self.rule().order]
        return self._base
