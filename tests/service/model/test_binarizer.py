"""The numpy binarizer against the paper's equations restated value by value, and against torch's GELU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from service.model.adapter import AdapterError, AdapterInfo, load_adapter, save_adapter
from service.model.binarizer import Binarizer, gelu
from service.model.layout import LEVELS, CodeError
from service.model.packing import unpack_values

Floats = npt.NDArray[np.float32]
PREFIXES = (8, 16, 32)
DIMS = 32


def make_tensors(rng: np.random.Generator, pairs: int = DIMS // 2) -> dict[str, Floats]:
    def normal(*shape: int) -> Floats:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    return {
        "ffn.weight_1": normal(48, DIMS),
        "ffn.bias_1": normal(48),
        "ffn.weight_2": normal(DIMS, 48),
        "ffn.bias_2": normal(DIMS),
        "ffn.residual": np.array(0.7, np.float32),
        "thresholds.0.5": normal(1, DIMS // 2),
        "thresholds.1": normal(1, DIMS),
        "thresholds.1.5": np.sort(normal(2, DIMS), axis=0),
        "thresholds.2": np.sort(normal(3, DIMS), axis=0),
        "reduce.weight_1": normal(pairs, 5, 2),
        "reduce.bias_1": normal(pairs, 5),
        "reduce.weight_2": normal(pairs, 5),
        "reduce.bias_2": normal(pairs),
    }


def exact_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def restated(tensors: dict[str, Floats], vector: Floats) -> npt.NDArray[np.float64]:
    """ẑ of one vector in double precision."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))
    hidden = np.array([exact_gelu(v) for v in t["ffn.weight_1"] @ x + t["ffn.bias_1"]])
    z = t["ffn.residual"] * x + t["ffn.weight_2"] @ hidden + t["ffn.bias_2"]
    unit: npt.NDArray[np.float64] = z / np.linalg.norm(z)
    return unit


def value_of(tensors: dict[str, Floats], adapted: npt.NDArray[np.float64], level: str, column: int) -> int:
    """Quantised value of one dimension (or pair), by eq. 3 and 20."""
    value = adapted[column]
    if level == "0.5":
        own = column if len(tensors["reduce.weight_1"]) > 1 else 0
        pair = adapted[2 * column : 2 * column + 2]
        hidden = [
            exact_gelu(float(w @ pair + b))
            for w, b in zip(tensors["reduce.weight_1"][own], tensors["reduce.bias_1"][own], strict=True)
        ]
        value = tensors["reduce.weight_2"][own] @ hidden + tensors["reduce.bias_2"][own]
    return sum(int(value > threshold) for threshold in tensors[f"thresholds.{level}"][:, column])


def columns_of(level: str) -> list[tuple[str, int]]:
    if level == "hybrid":
        quarter = DIMS // 4
        names = ["2"] * quarter + ["1.5"] * quarter + ["1"] * quarter
        pairs = [("0.5", p) for p in range(3 * quarter // 2, DIMS // 2)]
        return [(name, d) for d, name in enumerate(names)] + pairs
    return [(level, c) for c in range(DIMS // 2 if level == "0.5" else DIMS)]


@pytest.fixture
def tensors() -> dict[str, Floats]:
    return make_tensors(np.random.default_rng(0))


@pytest.fixture
def vectors() -> Floats:
    return np.random.default_rng(1).standard_normal((20, DIMS)).astype(np.float32)


@pytest.mark.parametrize("pairs", [1, DIMS // 2])
@pytest.mark.parametrize("level", LEVELS)
def test_codes_are_the_equations_values(level: str, pairs: int, vectors: Floats) -> None:
    tensors = make_tensors(np.random.default_rng(pairs), pairs)
    binarizer = Binarizer(tensors, AdapterInfo(PREFIXES, ""))
    values = unpack_values(binarizer.codes(vectors, level), binarizer.layout(level))
    for row, vector in enumerate(vectors):
        adapted = restated(tensors, vector)
        assert values[row].tolist() == [value_of(tensors, adapted, name, c) for name, c in columns_of(level)]


def test_adapted_vectors_follow_the_equations_in_chunks_of_any_size(
    tensors: dict[str, Floats], vectors: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.model.binarizer.HIDDEN_VALUES", 48 * 3)  # chunks of three rows
    adapted = Binarizer(tensors, AdapterInfo(PREFIXES, "")).adapt(vectors)
    np.testing.assert_allclose(adapted, [restated(tensors, v) for v in vectors], atol=2e-6)


def test_gelu_is_the_error_functions() -> None:
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), [exact_gelu(float(v)) for v in x], atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dims", PREFIXES)
def test_a_prefix_of_a_code_is_the_code_of_the_prefix(
    level: str, dims: int, tensors: dict[str, Floats], vectors: Floats
) -> None:
    binarizer = Binarizer(tensors, AdapterInfo(PREFIXES, ""))
    words = binarizer.layout(level).words_of(dims)
    cut = binarizer.codes(vectors, level, dims)
    assert cut.shape == (20, words)
    np.testing.assert_array_equal(cut, binarizer.codes(vectors, level)[:, :words])


def test_thresholds_alone_make_a_binarizer_of_unit_vectors(vectors: Floats) -> None:
    binarizer = Binarizer({"thresholds.1": np.zeros((1, DIMS), np.float32)}, AdapterInfo(PREFIXES, ""))
    assert binarizer.levels == ("1",)
    bits = unpack_values(binarizer.codes(vectors, "1"), binarizer.layout("1"))
    np.testing.assert_array_equal(bits, vectors > 0)
    np.testing.assert_array_equal(binarizer.codes(vectors * 9, "1"), binarizer.codes(vectors, "1"))


def test_embeddings_of_a_prefix_are_cut_and_unit_length(tensors: dict[str, Floats], vectors: Floats) -> None:
    binarizer = Binarizer(tensors, AdapterInfo(PREFIXES, ""))
    cut = binarizer.adapt(vectors)[:, :16]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose(binarizer.embed(vectors, 16), expected, rtol=1e-6)
    with pytest.raises(CodeError, match="8, 16, 32"):
        binarizer.embed(vectors, 12)


def test_similarity_counts_information_bits_only(tensors: dict[str, Floats]) -> None:
    """Eq. 24 at 8 dimensions of 1.5 bit: 16 bits in a word of 64."""
    binarizer = Binarizer(tensors, AdapterInfo(PREFIXES, ""))
    np.testing.assert_allclose(binarizer.similarity(np.array([0, 4, 16]), "1.5", 8), [1.0, 0.75, 0.0])


def test_an_adapter_survives_its_file(tmp_path: Path, tensors: dict[str, Floats], vectors: Floats) -> None:
    info = AdapterInfo(PREFIXES, "ab" * 32)
    save_adapter(tmp_path / "adapter.safetensors", tensors, info)
    loaded, found = load_adapter(tmp_path / "adapter.safetensors")
    assert found == info
    assert loaded.keys() == tensors.keys()
    opened = Binarizer.open(tmp_path / "adapter.safetensors", "ab" * 32)
    for level in LEVELS:
        np.testing.assert_array_equal(opened.codes(vectors, level), Binarizer(tensors, info).codes(vectors, level))


def test_an_adapter_of_another_encoder_is_refused(tmp_path: Path, tensors: dict[str, Floats]) -> None:
    save_adapter(tmp_path / "a.safetensors", tensors, AdapterInfo(PREFIXES, "ab" * 32))
    with pytest.raises(AdapterError, match="belongs to the encoder abababababab, this model's is cdcdcdcdcdcd"):
        Binarizer.open(tmp_path / "a.safetensors", "cd" * 32)
    save_adapter(tmp_path / "b.safetensors", tensors, AdapterInfo(PREFIXES, ""))
    with pytest.raises(AdapterError, match=r"\(none\)"):
        Binarizer.open(tmp_path / "b.safetensors", "cd" * 32)


def test_equal_adapters_are_equal_files(tmp_path: Path, tensors: dict[str, Floats]) -> None:
    for name in ("a", "b", "c", "d"):
        save_adapter(tmp_path / name, tensors, AdapterInfo(PREFIXES, "ab" * 32))
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c", "d")}) == 1


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "noise").write_bytes(b"\x00" * 64)
    save_file({"thresholds.1": np.zeros((1, 8), np.float32)}, tmp_path / "plain")
    for name, about in {"bad": {"format": "rhumbline-adapter-1"}, "old": {"format": "rhumbline-adapter-0"}}.items():
        save_file({"thresholds.1": np.zeros((1, 8), np.float32)}, tmp_path / name, {"rhumbline": json.dumps(about)})
    with pytest.raises(AdapterError, match="no adapter"):
        load_adapter(tmp_path / "noise")
    with pytest.raises(AdapterError, match="no adapter: 'rhumbline'"):
        load_adapter(tmp_path / "plain")
    with pytest.raises(AdapterError, match="format 'rhumbline-adapter-0'"):
        load_adapter(tmp_path / "old")
    with pytest.raises(AdapterError, match="prefixes"):
        load_adapter(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn.bias_2": None}, r"ffn.bias_2 must have shape \(32,\), found None"),
        ({"ffn.weight_2": np.zeros((48, DIMS), np.float32)}, "ffn.weight_2 must have shape"),
        ({"thresholds.2": np.zeros((2, DIMS), np.float32)}, r"\(3, 32\)"),
        ({"thresholds.2": -np.sort(np.random.default_rng(0).random((3, DIMS), np.float32), axis=0)}, "ascend"),
        ({"thresholds.1": np.full((1, DIMS), np.nan, np.float32)}, "finite"),
        ({"thresholds.1": np.zeros((1, DIMS))}, "float64"),
        ({"reduce.weight_1": None}, "reduce.weight_1"),
        ({"thresholds.3": np.zeros((7, DIMS), np.float32)}, r"unknown tensors \['thresholds.3'\]"),
    ],
)
def test_tensors_that_are_not_the_formats_are_named(
    change: dict[str, Floats | None], message: str, tensors: dict[str, Floats]
) -> None:
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(AdapterError, match=message):
        Binarizer(changed, AdapterInfo(PREFIXES, ""))


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_vectors_that_have_no_direction_are_refused(fill: float, tensors: dict[str, Floats], vectors: Floats) -> None:
    vectors[3] = fill
    with pytest.raises(CodeError, match="the first is row 3"):
        Binarizer(tensors, AdapterInfo(PREFIXES, "")).codes(vectors, "1")


def test_other_widths_and_levels_are_refused(tensors: dict[str, Floats], vectors: Floats) -> None:
    binarizer = Binarizer(tensors, AdapterInfo(PREFIXES, ""))
    with pytest.raises(CodeError, match=r"\(N, 32\)"):
        binarizer.codes(vectors[:, :31], "1")
    with pytest.raises(CodeError, match="choose one of"):
        binarizer.codes(vectors, "4")
    with pytest.raises(AdapterError, match="thresholds of one level"):
        Binarizer({}, AdapterInfo(PREFIXES, ""))
