"""Export of a trained retriever to the two ONNX graphs of the model contract (docs/architecture.md).

Tests hold them against torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.int8 import quantize
from models.retriever.network import Decoder, Encoder
from service.model.decoder import cache_names

OPSET = 18


class EncoderGraph(nn.Module):
    """`input_ids, attention_mask → vector, memory_key_i, memory_value_i`."""

    def __init__(self, encoder: Encoder, decoder: Decoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.training = encoder.training  # what is restored after the export

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Flatten the memories of all layers behind the vector."""
        vector, states = self.encoder(input_ids, attention_mask)
        memories = self.decoder.memories(states) if self.decoder is not None else []
        return (vector, *(tensor for pair in memories for tensor in pair))


class DecoderGraph(nn.Module):
    """One step: `embedding, step, attention_mask, memories…, pasts… → hidden, presents…`.

    A decoder with a bearing also reads `vector, past_point` (last) and gives `present_point` (last).
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.training = decoder.training  # what is restored after the export

    def forward(self, embedding: Tensor, step: Tensor, attention_mask: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Pair the flat list of caches up again, and flatten the result."""
        layers = self.decoder.shape.layers
        pairs = list(zip(caches[0 : 4 * layers : 2], caches[1 : 4 * layers : 2], strict=True))
        bearing = caches[4 * layers :]
        hidden, present, point = self.decoder.step(
            embedding, step, attention_mask, pairs[:layers], pairs[layers:], *bearing
        )
        reached = () if point is None else (point,)
        return (hidden, *(tensor for pair in present for tensor in pair), *reached)


def export_encoder(encoder: Encoder, decoder: Decoder | None, path: Path, int8: bool = False) -> None:
    """Write `encoder.onnx`: axes Q and S are free."""
    layers = decoder.shape.layers if decoder is not None else 0
    memory = cache_names("memory", layers)
    axes = {"input_ids": {0: "Q", 1: "S"}, "attention_mask": {0: "Q", 1: "S"}, "vector": {0: "Q"}}
    axes |= {name: {0: "Q", 2: "S"} for name in memory}
    ids = torch.ones(2, 7, dtype=torch.int64)
    example = (ids, torch.ones_like(ids))
    _export(
        EncoderGraph(encoder, decoder), example, path, ["input_ids", "attention_mask"], ["vector", *memory], axes, int8
    )


def export_decoder(decoder: Decoder, path: Path, int8: bool = False) -> None:
    """Write `decoder.onnx`: axes Q, B, S and the cached length t are free."""
    shape = decoder.shape
    head = shape.width // shape.heads
    memory, past, present = (cache_names(kind, shape.layers) for kind in ("memory", "past", "present"))
    axes: dict[str, dict[int, str]] = {"embedding": {0: "Q", 1: "B"}, "attention_mask": {0: "Q", 1: "S"}}
    axes |= {"hidden": {0: "Q", 1: "B"}} | {name: {0: "Q", 2: "S"} for name in memory}
    axes |= {name: {0: "Q", 1: "B", 3: "t"} for name in past} | {name: {0: "Q", 1: "B", 3: "t1"} for name in present}
    q, b, s, t = 2, 3, 5, 2
    example: tuple[Tensor, ...] = (
        torch.randn(q, b, shape.embedding),
        torch.tensor([t]),
        torch.ones(q, s, dtype=torch.int64),
        *(torch.randn(q, shape.heads, s, head) for _ in memory),
        *(torch.randn(q, b, shape.heads, t, head) for _ in past),
    )
    if shape.bearing:
        past, present = (*past, "vector", "past_point"), (*present, "present_point")
        axes |= {"vector": {0: "Q"}, "past_point": {0: "Q", 1: "B"}, "present_point": {0: "Q", 1: "B"}}
        example = (*example, torch.randn(q, shape.embedding), torch.randn(q, b, shape.embedding))
    inputs = ["embedding", "step", "attention_mask", *memory, *past]
    _export(DecoderGraph(decoder), example, path, inputs, ["hidden", *present], axes, int8)


def _export(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
    int8: bool,
) -> None:
    import warnings

    whole = path.with_suffix(".float32.onnx") if int8 else path
    with _evaluating(graph), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the TorchScript exporter warns of itself and of constant-folded shapes
        torch.onnx.export(
            graph.cpu().float(),
            example,
            str(whole),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    if int8:
        quantize(whole, path)
        whole.unlink()


@contextmanager
def _evaluating(graph: nn.Module) -> Iterator[None]:
    was_training = graph.training
    graph.eval()
    try:
        yield
    finally:
        graph.train(was_training)
