"""QAMA's binarizer without torch: unit vectors → adapter → thresholds → packed codes.

Shapes: N vectors, D dimensions, P = D/2 pairs, R hidden units of the pair FFN, U quantised values, W words.
`adapter.py` gives the tensors' names and shapes.

ẑ = z / ‖z‖ is normalised once, over all D dimensions, and every prefix thresholds the same ẑ: that is what makes a
prefix of a code the code of the prefix, and why no prefix has thresholds of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.model.adapter import FFN, REDUCE, AdapterError, AdapterInfo, FloatArray, check_adapter, load_adapter
from service.model.layout import BITS_PER_VALUE, CodeError, CodeLayout, Level, Run, code_layout
from service.model.packing import CodeArray, LevelArray, pack_values

HIDDEN_VALUES = 1 << 21  # of one chunk: 8 MB of hidden units, so that the passes of GELU stay in the cache
_TINY = np.float32(1e-30)


def gelu(x: FloatArray) -> FloatArray:
    """GELU by the error function, x Φ(x), to 1e-6.

    numpy has no erf: Abramowitz and Stegun 7.1.26, whose error of 1.5e-7 is that of float32.
    """
    scaled = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * scaled)
    series = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    tail = series * t * np.exp(-scaled * scaled)  # 1 - erf(|x| / sqrt 2)
    half: FloatArray = np.float32(0.5) * x * tail
    return np.where(x < 0, half, x - half)


class Binarizer:
    """Unit vectors to packed codes by an adapter.

    Args:
        tensors: as `load_adapter` gives them.
        info: its metadata.

    Raises:
        AdapterError: the tensors are not those of the format.
    """

    def __init__(self, tensors: Mapping[str, FloatArray], info: AdapterInfo) -> None:
        check_adapter(tensors, info)
        self._tensors = tensors
        self.prefixes = info.prefixes
        self.dims = info.prefixes[-1]
        self.layouts: dict[Level, CodeLayout] = self._offered()

    @classmethod
    def open(cls, path: Path, encoder: str | None = None) -> Binarizer:
        """Load an adapter file and hold it to the encoder that it will be used with.

        Args:
            path: `adapter.safetensors`.
            encoder: hex SHA-256 of the encoder.onnx beside it; None where vectors come from elsewhere.

        Raises:
            AdapterError: a bad file, or an adapter of another encoder.
        """
        tensors, info = load_adapter(path)
        if encoder is not None and info.encoder != encoder:
            raise AdapterError(
                f"{path} belongs to the encoder {info.encoder[:12] or '(none)'}, this model's is {encoder[:12]}: "
                "train the adapter on this model's vectors"
            )
        return cls(tensors, info)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that the adapter offers."""
        return tuple(self.layouts)

    def layout(self, level: str) -> CodeLayout:
        """Layout of one level's codes.

        Raises:
            CodeError: the adapter does not offer it.
        """
        for name, layout in self.layouts.items():
            if name == level:
                return layout
        raise CodeError(f"level {level!r} is not offered: choose one of {list(self.levels)}")

    def adapt(self, vectors_ND: FloatArray) -> FloatArray:
        """Give ẑ, the adapted unit vectors that are quantised (section 3.2), (N, D) float32.

        Raises:
            ValueError: another width, or a vector that is zero, NaN or infinite.
        """
        _check_vectors(vectors_ND, self.dims)
        out = np.empty(vectors_ND.shape, np.float32)
        hidden = len(self._tensors[FFN[0]]) if FFN[0] in self._tensors else 1
        rows = max(1, HIDDEN_VALUES // hidden)
        for first in range(0, len(vectors_ND), rows):
            chunk = vectors_ND[first : first + rows].astype(np.float32, copy=False)
            out[first : first + rows] = _normalise(self._transform(_normalise(chunk)))
        return out

    def embed(self, vectors_ND: FloatArray, dims: int | None = None) -> FloatArray:
        """Give the adapted vectors cut to a prefix and normalised again: Matryoshka embeddings in float32 (eq. 7).

        Raises:
            ValueError: as `adapt`, or `dims` is no prefix.
        """
        width = self.dims if dims is None else dims
        if width not in self.prefixes:
            raise CodeError(f"{width} dimensions are no prefix of this adapter: choose one of {list(self.prefixes)}")
        return _normalise(self.adapt(vectors_ND)[:, :width])

    def codes(self, vectors_ND: FloatArray, level: str, dims: int | None = None) -> CodeArray:
        """Quantise and pack vectors.

        Args:
            vectors_ND: float; rows need not be of unit length.
            level: one of `levels`.
            dims: one of `prefixes`; None for the full width.

        Returns:
            codes_NW: uint64, W = `layout(level).words_of(dims)`.

        Raises:
            ValueError: as `adapt`; unknown level or prefix.
        """
        layout = self.layout(level)
        words = layout.words_of(dims)
        return np.ascontiguousarray(pack_values(self.quantise(self.adapt(vectors_ND), layout), layout)[:, :words])

    def quantise(self, adapted_ND: FloatArray, layout: CodeLayout) -> LevelArray:
        """Count the thresholds below each value (eq. 3), values_NU in the layout's order."""
        runs = [run for block in layout.blocks() for run in block]
        return np.concatenate([self._quantise_run(adapted_ND, run) for run in runs], axis=1)

    def similarity(self, distances: npt.NDArray[np.integer[Any]], level: str, dims: int | None = None) -> FloatArray:
        """Hamming similarity 1 − distance / bits (eq. 24) of codes of one level and prefix."""
        bits = self.layout(level).bits_of(dims)
        return (1 - distances / bits).astype(np.float32)

    def _offered(self) -> dict[Level, CodeLayout]:
        plain: list[Level] = [level for level in BITS_PER_VALUE if f"thresholds.{level}" in self._tensors]
        if len(plain) == len(BITS_PER_VALUE) and self.dims % 8 == 0:
            plain.append("hybrid")
        return {level: code_layout(level, self.prefixes) for level in plain}

    def _transform(self, unit_ND: FloatArray) -> FloatArray:
        """The adapter's FFN with its residual; the identity where the adapter has thresholds only."""
        if FFN[0] not in self._tensors:
            return unit_ND
        weight_1, bias_1, weight_2, bias_2, residual = (self._tensors[name] for name in FFN)
        return residual * unit_ND + gelu(unit_ND @ weight_1.T + bias_1) @ weight_2.T + bias_2

    def _quantise_run(self, adapted_ND: FloatArray, run: Run) -> LevelArray:
        values = adapted_ND[:, run.first : run.last]
        first, last = run.first, run.last
        if run.level == "0.5":
            first, last = first // 2, last // 2
            values = self._reduce(values, first, last)
        thresholds = self._tensors[f"thresholds.{run.level}"][:, first:last]
        counts: LevelArray = (values[:, None, :] > thresholds).sum(axis=1, dtype=np.uint8)
        return counts

    def _reduce(self, values: FloatArray, first: int, last: int) -> FloatArray:
        """Join pairs [first, last) into one value each (eq. 20)."""
        own = slice(first, last) if len(self._tensors[REDUCE[0]]) > 1 else slice(0, 1)
        weight_1, bias_1, weight_2, bias_2 = (self._tensors[name][own] for name in REDUCE)
        pairs_NP2 = values.reshape(len(values), -1, 2)
        hidden_NPR = gelu((pairs_NP2[:, :, None, :] * weight_1).sum(axis=-1) + bias_1)
        reduced: FloatArray = (hidden_NPR * weight_2).sum(axis=-1) + bias_2
        return reduced


def _check_vectors(vectors_ND: npt.NDArray[Any], dims: int) -> None:
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != dims or vectors_ND.dtype.kind != "f":
        raise CodeError(f"vectors must be floats of shape (N, {dims}), got {vectors_ND.shape} {vectors_ND.dtype}")
    norms = np.linalg.norm(vectors_ND.astype(np.float32, copy=False), axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise CodeError(f"{len(bad)} vectors are zero, NaN or infinite, the first is row {bad[0]}")


def _normalise(x: FloatArray) -> FloatArray:
    """Unit rows; a row that the adapter maps to zero stays zero instead of turning into NaN."""
    unit: FloatArray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _TINY)
    return unit
