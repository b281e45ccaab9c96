"""Int8 for CPUs: weights of matrix products per output channel, what they multiply per row.

ONNX Runtime's own dynamic quantization takes one scale for a whole tensor, so a text's vector depends on the texts that
share its batch: one outlier among them coarsens all. With a scale for every row (a token of a query, a beam) a result
is the same in any company, and finer: decision 17.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

PEAK = 127  # a row's or a channel's largest magnitude, as an int8
MIDDLE = 128  # zero of a row as uint8: the kernels multiply uint8 rows by int8 weights
LEAST = 1e-30  # rows and channels of zeros have a scale too


def quantize(source: Path, target: Path) -> None:
    """Write the int8 graph of a float32 one; embedding tables have one scale each."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(target), ["Gather"], weight_type=QuantType.QInt8)
    prepared.unlink()
    model = onnx.load(target)
    quantize_products(model)
    onnx.save(model, target)


def quantize_products(model: onnx.ModelProto) -> None:
    """Make every product x · W with constant weights W (K, N) one of integers, in place.

    x[..., K] is divided by its rows' scales max |row| / 127, W by its channels'; the result is multiplied by both.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    floats = {"one": np.float32(1), "peak": np.float32(1 / PEAK), "least": np.float32(LEAST)}
    constants = floats | {"middle": np.uint8(MIDDLE), "nothing": np.int8(0), "last": np.array([-1])}
    made = [numpy_helper.from_array(np.asarray(value), f"int8_{name}") for name, value in constants.items()]
    nodes: list[onnx.NodeProto] = []
    divided: set[str] = set()
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            nodes.append(node)
            continue
        x, weights = node.input
        if x not in divided:
            divided.add(x)
            nodes += _divide_rows(x)
        channels, scale_N = quantize_channels(numpy_helper.to_array(arrays.pop(weights)))
        made += [numpy_helper.from_array(channels, weights), numpy_helper.from_array(scale_N, f"{weights}_scale")]
        given = [f"{x}_int8", weights, "int8_one", f"{weights}_scale", "int8_middle", "int8_nothing"]
        product = f"{node.output[0]}_of_units"
        nodes += [
            helper.make_node("MatMulIntegerToFloat", given, [product], domain="com.microsoft"),
            helper.make_node("Mul", [product, f"{x}_row"], [node.output[0]]),
        ]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*arrays.values(), *made])


def quantize_channels(weights_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give weights (K, N) as int8, and the float32 scale of every column (N,)."""
    scale_N = np.maximum(np.abs(weights_KN).max(axis=0), LEAST).astype(np.float32) / np.float32(PEAK)
    return np.rint(weights_KN / scale_N).astype(np.int8), scale_N


def _divide_rows(x: str) -> list[onnx.NodeProto]:
    """`x → x_int8, x_row`: the rows as uint8 around 128, and their scales (..., 1)."""
    from onnx import helper

    return [
        helper.make_node("Abs", [x], [f"{x}_magnitude"]),
        helper.make_node("ReduceMax", [f"{x}_magnitude", "int8_last"], [f"{x}_largest"], keepdims=1),
        helper.make_node("Mul", [f"{x}_largest", "int8_peak"], [f"{x}_scale"]),
        helper.make_node("Add", [f"{x}_scale", "int8_least"], [f"{x}_row"]),
        helper.make_node("Div", [x, f"{x}_row"], [f"{x}_unit"]),
        helper.make_node("QuantizeLinear", [f"{x}_unit", "int8_one", "int8_middle"], [f"{x}_int8"]),
    ]
