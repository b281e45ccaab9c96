"""A tiny complete model for everybody's tests: random weights, a real tokenizer, real ONNX graphs, made in a moment.

The graphs are written node by node after the tensor contract of docs/architecture.md, so they are an independent second
implementation of it beside `models/export.py`.

    from tests.tiny import make_bundle, make_documents, make_model
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from service.index.artefact import new_artefact, publish
from service.index.build import build_bundle
from service.index.documents import Document
from service.index.manifest import AdapterSettings, DecoderShape, ModelManifest, Provenance, QuantizerSettings
from service.model.adapter import AdapterInfo, save_adapter
from service.model.text import TextSettings

VOCABULARY = (
    "north south east west star compass chart sail mast keel rudder anchor harbour port tide current wind storm calm "
    "captain sailor crew cargo island reef shore beacon lantern signal flag rope knot plank deck cabin galley bell "
    "log course bearing degree knotted line rhumb sphere pole meridian equator latitude longitude voyage passage"
)
WORDS = VOCABULARY.split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Tiny:
    """What the tiny model looks like; every field can be changed by keyword in `make_model`."""

    dimensions: int = 16
    level_sizes: tuple[int, ...] = (8, 8, 8)
    decoder: bool = True
    layers: int = 2
    heads: int = 2
    head_dimensions: int = 4
    embedding_dimensions: int = 12
    kind: str = "householder"
    history_count: int = 0
    max_query_tokens: int = 24
    max_document_tokens: int = 48
    query_prefix: str = ""
    document_prefix: str = ""
    normalisation: str = "constrained"
    lexical_weight: float = 0.3
    fusion_weight: float = 3.0
    code_levels: tuple[str, ...] = ()  # of the QAMA adapter; none: the model has no adapter
    code_prefixes: tuple[int, ...] = (8, 16)
    seed: int = 0


def make_model(folder: Path, **changes: Any) -> Path:
    """Publish a tiny model at `folder` and return the folder."""
    tiny = Tiny(**changes)
    with new_artefact(folder) as staging:
        write_tokenizer(staging / "tokenizer.json")
        write_encoder(staging / "encoder.onnx", tiny)
        save_file({"codebooks": unit_rows(sum(tiny.level_sizes), tiny.dimensions, tiny.seed + 1)}, staging / QUANTIZER)
        if tiny.decoder:
            write_decoder(staging / "decoder.onnx", tiny)
            np.save(
                staging / "tokens.npy", unit_rows(sum(tiny.level_sizes) + 1, tiny.embedding_dimensions, tiny.seed + 2)
            )
        adapter = write_adapter(staging, tiny) if tiny.code_levels else None
        publish(staging, tiny_manifest(tiny).model_copy(update={"adapter": adapter}))
    return folder


QUANTIZER = "quantizer.safetensors"


def make_bundle(folder: Path, documents: Sequence[Document] | None = None, **changes: Any) -> Path:
    """Publish a tiny bundle at `folder` (its model beside it, `<name>.model`) and return the folder."""
    model = make_model(folder.with_name(folder.name + ".model"), **changes)
    build_bundle(model, make_documents() if documents is None else documents, folder, threads=1, progress=False)
    return folder


def make_documents(count: int = 60, seed: int = 0) -> list[Document]:
    """Return documents with distinct texts over the tokenizer's words."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        words = rng.choice(WORDS, size=int(rng.integers(3, 20)))
        documents.append(Document(f"d{number}", f"{words[0]} {words[1]}", " ".join(words), {"number": number}))
    return documents


def tiny_manifest(tiny: Tiny) -> ModelManifest:
    """Return the manifest of a tiny model."""
    levels = len(tiny.level_sizes)
    shape = DecoderShape(
        layers=tiny.layers,
        heads=tiny.heads,
        head_dimensions=tiny.head_dimensions,
        embedding_dimensions=tiny.embedding_dimensions,
    )
    return ModelManifest(
        dimensions=tiny.dimensions,
        level_sizes=tiny.level_sizes,
        quantizer=QuantizerSettings(kind=tiny.kind),
        decoder=shape if tiny.decoder else None,
        normalisation=tiny.normalisation,  # type: ignore[arg-type]
        # every level another, so that a level that is served with another's scale shows
        token_scale=tuple(10.0 - 2 * level for level in range(levels)) if tiny.decoder else (),
        guided_scale=tuple(0.5 + 0.1 * level for level in range(levels)) if tiny.decoder else (),
        guided_weight=40.0 if tiny.decoder else 0.0,
        scorings=("generative", "geometric", "guided") if tiny.decoder else ("geometric",),
        default_scoring="guided" if tiny.decoder else "geometric",
        lexical_weight=tiny.lexical_weight,
        fusion_weight=tiny.fusion_weight,
        text=TextSettings(
            max_query_tokens=tiny.max_query_tokens,
            max_document_tokens=tiny.max_document_tokens,
            query_prefix=tiny.query_prefix,
            document_prefix=tiny.document_prefix,
            history_count=tiny.history_count,
        ),
        provenance=Provenance(recipe="tiny", data=("random numbers",), licences=("none needed",), seed=tiny.seed),
    )


def write_adapter(folder: Path, tiny: Tiny) -> AdapterSettings:
    """Write an adapter with random weights for the encoder in `folder`; returns its part of the manifest."""
    rng, width, hidden = np.random.default_rng(tiny.seed + 5), tiny.dimensions, 24

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    tensors = {
        "ffn.weight_1": normal(hidden, width),
        "ffn.bias_1": normal(hidden),
        "ffn.weight_2": normal(width, hidden),
        "ffn.bias_2": normal(width),
        "ffn.residual": np.array(1, np.float32),
        "thresholds.0.5": normal(1, width // 2),
        "thresholds.1": normal(1, width),
        "thresholds.1.5": np.sort(normal(2, width), axis=0),
        "thresholds.2": np.sort(normal(3, width), axis=0),
        "reduce.weight_1": normal(1, 4, 2),
        "reduce.bias_1": normal(1, 4),
        "reduce.weight_2": normal(1, 4),
        "reduce.bias_2": normal(1),
    }
    encoder = hashlib.sha256((folder / "encoder.onnx").read_bytes()).hexdigest()
    save_adapter(folder / "adapter.safetensors", tensors, AdapterInfo(tiny.code_prefixes, encoder))
    return AdapterSettings(prefixes=tiny.code_prefixes, levels=tiny.code_levels, encoder_sha256=encoder)


def unit_rows(rows: int, dimensions: int, seed: int) -> np.ndarray:
    """Return (rows, dimensions) float32 unit rows."""
    table = np.random.default_rng(seed).standard_normal((rows, dimensions))
    return (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)


def write_tokenizer(path: Path) -> None:
    """Write a WordPiece tokenizer over `WORDS` and single letters, with BERT's special tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*SPECIAL, *dict.fromkeys(WORDS), *letters, *(f"##{letter}" for letter in letters), ".", ",", ";", ":"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer.save(str(path))


def vocabulary_size() -> int:
    """Return the number of pieces that `write_tokenizer` makes."""
    return len(SPECIAL) + len(dict.fromkeys(WORDS)) + 2 * 36 + 4


class Graph:
    """Collects the nodes and weights of one ONNX graph."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._rng = np.random.default_rng(seed)

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        name = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """Add a constant and return its name."""
        name = f"const_{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def random(self, *shape: int) -> str:
        """Add a random float32 weight and return its name."""
        return self.const(self._rng.standard_normal(shape) / np.sqrt(shape[0]), np.float32)

    def unit(self, x: str, out: str) -> str:
        """Normalise the last axis."""
        return self.op("LpNormalization", x, out=out, axis=-1, p=2)

    def save(self, path: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Check and write the graph; shapes are given by name, integer inputs are those of `INTEGERS`."""

        def info(shapes: dict[str, Any]) -> list[onnx.ValueInfoProto]:
            kinds = {name: TensorProto.INT64 if name in INTEGERS else TensorProto.FLOAT for name in shapes}
            return [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]

        weights = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "tiny", info(inputs), info(outputs), weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())


INTEGERS = frozenset({"input_ids", "attention_mask", "step"})


def write_encoder(path: Path, tiny: Tiny) -> None:
    """Write an encoder: mean of token embeddings, a linear map, unit length; linear memories."""
    g, width = Graph(tiny.seed + 3), tiny.heads * tiny.head_dimensions
    states = g.op("Gather", g.random(vocabulary_size(), tiny.dimensions), "input_ids")
    mask = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=TensorProto.FLOAT), g.const([-1]))
    total = g.op("ReduceSum", g.op("Mul", states, mask), g.const([1]), keepdims=0)
    mean = g.op("Div", total, g.op("ReduceSum", mask, g.const([1]), keepdims=0))
    g.unit(g.op("MatMul", mean, g.random(tiny.dimensions, tiny.dimensions)), "vector")
    outputs: dict[str, Any] = {"vector": ["Q", tiny.dimensions]}
    for layer in range(tiny.layers if tiny.decoder else 0):
        for half in ("key", "value"):
            name = f"memory_{half}_{layer}"
            flat = g.op("MatMul", states, g.random(tiny.dimensions, width))
            heads = g.op("Reshape", flat, g.const([0, 0, tiny.heads, tiny.head_dimensions]))
            g.op("Transpose", heads, out=name, perm=[0, 2, 1, 3])
            outputs[name] = ["Q", tiny.heads, "S", tiny.head_dimensions]
    g.save(path, {"input_ids": ["Q", "S"], "attention_mask": ["Q", "S"]}, outputs)


def write_decoder(path: Path, tiny: Tiny) -> None:
    """Write a decoder step: per layer self-attention over the cache and cross-attention to the memory."""
    g, width, size = Graph(tiny.seed + 4), tiny.heads * tiny.head_dimensions, tiny.head_dimensions
    positions = g.op("Gather", g.random(len(tiny.level_sizes) + 1, width), "step")
    x = g.op("Add", g.op("MatMul", "embedding", g.random(tiny.embedding_dimensions, width)), positions)
    mask = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.const([1, 2])), to=TensorProto.FLOAT)
    bias = g.op("Mul", g.op("Sub", mask, g.const(1.0, np.float32)), g.const(1e4, np.float32))
    inputs: dict[str, Any] = {
        "embedding": ["Q", "B", tiny.embedding_dimensions],
        "step": [1],
        "attention_mask": ["Q", "S"],
    }
    outputs: dict[str, Any] = {"hidden": ["Q", "B", tiny.embedding_dimensions]}
    for layer in range(tiny.layers):
        for half in ("key", "value"):
            inputs[f"memory_{half}_{layer}"] = ["Q", tiny.heads, "S", size]
            inputs[f"past_{half}_{layer}"] = ["Q", "B", tiny.heads, "t", size]
            outputs[f"present_{half}_{layer}"] = ["Q", "B", tiny.heads, "t1", size]
        x = g.op("Add", x, _self_attention(g, x, layer, tiny))
        x = g.op("Add", x, _cross_attention(g, x, layer, bias, tiny))
    g.unit(g.op("MatMul", x, g.random(width, tiny.embedding_dimensions)), "hidden")
    g.save(path, inputs, outputs)


def _self_attention(g: Graph, x: str, layer: int, tiny: Tiny) -> str:
    width, size = tiny.heads * tiny.head_dimensions, tiny.head_dimensions
    split = g.const([0, 0, tiny.heads, 1, size])
    query, key, value = (g.op("Reshape", g.op("MatMul", x, g.random(width, width)), split) for _ in range(3))
    keys = g.op("Concat", f"past_key_{layer}", key, out=f"present_key_{layer}", axis=3)
    values = g.op("Concat", f"past_value_{layer}", value, out=f"present_value_{layer}", axis=3)
    scores = g.op("MatMul", query, g.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    mixed = g.op("MatMul", g.op("Softmax", _scaled(g, scores, size), axis=-1), values)
    return g.op("MatMul", g.op("Reshape", mixed, g.const([0, 0, width])), g.random(width, width))


def _cross_attention(g: Graph, x: str, layer: int, bias: str, tiny: Tiny) -> str:
    width, size = tiny.heads * tiny.head_dimensions, tiny.head_dimensions
    flat = g.op("Reshape", g.op("MatMul", x, g.random(width, width)), g.const([0, 0, tiny.heads, size]))
    query = g.op("Transpose", flat, perm=[0, 2, 1, 3])
    scores = g.op("MatMul", query, g.op("Transpose", f"memory_key_{layer}", perm=[0, 1, 3, 2]))
    weights = g.op("Softmax", g.op("Add", _scaled(g, scores, size), bias), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", weights, f"memory_value_{layer}"), perm=[0, 2, 1, 3])
    return g.op("MatMul", g.op("Reshape", mixed, g.const([0, 0, width])), g.random(width, width))


def _scaled(g: Graph, scores: str, size: int) -> str:
    return g.op("Mul", scores, g.const(size**-0.5, np.float32))
