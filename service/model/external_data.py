"""Finding external data in an ONNX file without the onnx package: a walk over the protobuf wire format.

An ONNX graph may say that a tensor's bytes lie in another file, which escapes the artefact's checksums (and, before
onnxruntime 1.24, its folder). Models here hold their own data, so any such tensor is refused before a session exists.
"""

from __future__ import annotations

from collections.abc import Iterator

# onnx.proto: message → {field number: message it holds}; everything else is skipped unread
NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a Tensor
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def has_external_data(model: bytes) -> bool:
    """Return whether any tensor of a serialised ONNX model keeps its data elsewhere.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    if b"location" not in model:  # external data names its file under this key
        return False
    pending = [("Model", memoryview(model))]
    while pending:
        message, data = pending.pop()
        for field, value in _fields(data):
            if message == "Tensor" and (field == EXTERNAL_DATA or (field == DATA_LOCATION and value != 0)):
                return True
            if field in NESTED[message] and isinstance(value, memoryview):
                pending.append((NESTED[message][field], value))
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, integer or bytes) of one message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key >> 32:  # protobuf itself would drop these bits and read another field
            raise ValueError(f"a field's number does not fit in 32 bits at byte {at}: this is not ONNX")
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == BYTES:
            size, at = _varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at} is not ONNX")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} passes the end at {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the integer that starts at `at`, and where the next field starts."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"an integer does not end at byte {at}")
