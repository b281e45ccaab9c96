"""The file `adapter.safetensors`: QAMA's adapter and thresholds, bound to the encoder they were trained for.

Shapes: D dimensions, H hidden units of the FFN, P = D/2 pairs, R hidden units of the pair FFN. All tensors float32;
all Matryoshka prefixes share them. The file keeps the FFN's two weight matrices, nearly all of its bytes, as float16.

`ffn.weight_1` (H, D), `ffn.bias_1` (H), `ffn.weight_2` (D, H), `ffn.bias_2` (D), `ffn.residual` ()
    The adapter z = residual · x + W2 GELU(W1 x + b1) + b2, GELU by erf; the paper (section 3.3.1) has residual 0.
    The five come together or not at all (thresholds only: z = x).
`thresholds.1` (1, D), `thresholds.1.5` (2, D), `thresholds.2` (3, D), `thresholds.0.5` (1, P)
    Ascending along the first axis (eq. 1-3), compared with ẑ = z / ‖z‖, at 0.5 bit with each pair's reduced value.
    A level is offered when its thresholds are there.
`reduce.weight_1` (P or 1, R, 2), `reduce.bias_1` (P or 1, R), `reduce.weight_2` (P or 1, R), `reduce.bias_2` (P or 1)
    The pair FFN (eq. 20), one for each pair or one for all: w2 · GELU(w1 [ẑ_2i, ẑ_2i+1] + b1) + b2, i counted from 0.
    Needed with `thresholds.0.5`.

Metadata: one key, `rhumbline`, of JSON (one, since safetensors does not fix the order of several, and equal adapters
should be equal files): `format` = `rhumbline-adapter-1`; `prefixes`, a list of the Matryoshka dimensions, ascending,
ending with D; `encoder`, hex SHA-256 of the encoder.onnx whose vectors it was trained on, empty while it has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from service.model.layout import BITS_PER_VALUE, PlainLevel, code_layout

FloatArray = npt.NDArray[np.float32]
FORMAT = "rhumbline-adapter-1"
HALVED = ("ffn.weight_1", "ffn.weight_2")
FFN = ("ffn.weight_1", "ffn.bias_1", "ffn.weight_2", "ffn.bias_2", "ffn.residual")
REDUCE = ("reduce.weight_1", "reduce.bias_1", "reduce.weight_2", "reduce.bias_2")


class AdapterError(ValueError):
    """An adapter file is damaged, incomplete, or belongs to another encoder."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's metadata says.

    Attributes:
        prefixes: Matryoshka dimensions, ascending; the last is D.
        encoder: hex SHA-256 of its encoder.onnx; empty while it is bound to none.
    """

    prefixes: tuple[int, ...]
    encoder: str


def save_adapter(path: Path, tensors: Mapping[str, FloatArray], info: AdapterInfo) -> None:
    """Check and write `adapter.safetensors`.

    Raises:
        AdapterError: a tensor is missing, unknown, of another shape than the format's, or too large for float16.
    """
    check_adapter(tensors, info)
    about = {"format": FORMAT, "prefixes": list(info.prefixes), "encoder": info.encoder}
    metadata = {"rhumbline": json.dumps(about, sort_keys=True)}
    stored = {name: tensor.astype(np.float16) if name in HALVED else tensor for name, tensor in tensors.items()}
    for name in HALVED:
        if name in stored and not np.isfinite(stored[name]).all():
            raise AdapterError(f"tensor {name} has values beyond {np.finfo(np.float16).max}, the largest of float16")
    save_file({name: np.asarray(tensor, order="C") for name, tensor in stored.items()}, path, metadata)


def load_adapter(path: Path) -> tuple[dict[str, FloatArray], AdapterInfo]:
    """Read and check `adapter.safetensors`.

    Raises:
        AdapterError: not an adapter of this format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["rhumbline"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        tensors |= {name: tensors[name].astype(np.float32) for name in HALVED if name in tensors}
        if about["format"] != FORMAT:
            raise AdapterError(
                f"{path} has format {about['format']!r}, this version reads {FORMAT!r}: train the adapter anew"
            )
        info = AdapterInfo(tuple(about["prefixes"]), about["encoder"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is no adapter: {error}") from error
    check_adapter(tensors, info)
    return tensors, info


def check_adapter(tensors: Mapping[str, FloatArray], info: AdapterInfo) -> None:
    """Hold tensors to the table in the module's docstring.

    Raises:
        AdapterError: naming the tensor, its shape, and the shape it needs.
    """
    if not info.prefixes or not all(isinstance(d, int) for d in info.prefixes):
        raise AdapterError(f"prefixes must be a list of integers, got {list(info.prefixes)}")
    code_layout("1", info.prefixes)
    levels: list[PlainLevel] = [level for level in BITS_PER_VALUE if f"thresholds.{level}" in tensors]
    if not levels:
        raise AdapterError("an adapter needs the thresholds of one level at least")
    expected = _expected_shapes(tensors, info.prefixes[-1], levels)
    if unknown := sorted(set(tensors) - set(expected)):
        raise AdapterError(f"unknown tensors {unknown}")
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else None
        if found != shape:
            raise AdapterError(f"tensor {name} must have shape {shape}, found {found}")
        if tensors[name].dtype != np.float32 or not np.isfinite(tensors[name]).all():
            raise AdapterError(f"tensor {name} must be finite float32, found {tensors[name].dtype}")
    for level in levels:
        if (np.diff(tensors[f"thresholds.{level}"], axis=0) < 0).any():
            raise AdapterError(f"thresholds.{level} must ascend along its first axis")


def _expected_shapes(
    tensors: Mapping[str, FloatArray], dims: int, levels: list[PlainLevel]
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the present ones imply; sizes H, R and P-or-1 are read from the first weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for level in levels:
        shapes[f"thresholds.{level}"] = (1, dims // 2) if level == "0.5" else (BITS_PER_VALUE[level], dims)
    if any(name in tensors for name in FFN):
        hidden = len(tensors[FFN[0]]) if FFN[0] in tensors else 0
        shapes |= dict(zip(FFN, ((hidden, dims), (hidden,), (dims, hidden), (dims,), ()), strict=True))
    if "0.5" in levels:
        first = tensors[REDUCE[0]].shape if REDUCE[0] in tensors else ()
        pairs = 1 if first[:1] == (1,) else dims // 2
        hidden = first[1] if len(first) == 3 else 0
        shapes |= dict(zip(REDUCE, ((pairs, hidden, 2), (pairs, hidden), (pairs, hidden), (pairs,)), strict=True))
    return shapes
