"""The retriever's network: any Hugging Face text encoder, and a small decoder whose vocabulary is geometry.

Legend: Q queries, S source tokens, B beams or target positions, L levels, H heads, Dh = width / H, D vector
dimensions, E token-embedding dimensions, T tokens of all levels together.

The decoder reads token embeddings from outside and gives unit hidden states; logits are made outside, from cosines with
the token embeddings (DGI eq. 10 and 13). Keys and values of the cross-attention are made once per query.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
BLOCKED = -1e4  # what is added to the scores of what must not be attended to


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder. `embedding` is E, `memory` the width of the encoder's token states.

    With `bearing` the decoder knows where the path has led: the point that the codes so far stand for (HHQ eq. 5), and
    the direction from there to the query's vector. It reads that bearing, and its hidden state starts from it.
    """

    layers: int = 2
    heads: int = 6
    width: int = 384
    embedding: int = 384
    memory: int = 384
    max_steps: int = 8
    dropout: float = 0.1
    bearing: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"decoder width {self.width} is not divisible by {self.heads} heads")


def split_heads(states_QSW: Tensor, heads: int) -> Tensor:
    """Reshape (Q, S, H·Dh) to (Q, H, S, Dh)."""
    q, s, w = states_QSW.shape
    return states_QSW.view(q, s, heads, w // heads).transpose(1, 2)


def merge_heads(states_QHSD: Tensor) -> Tensor:
    """Reshape (Q, H, S, Dh) to (Q, S, H·Dh)."""
    q, h, s, d = states_QHSD.shape
    return states_QHSD.transpose(1, 2).reshape(q, s, h * d)


class Dropout(nn.Dropout):
    """Dropout whose draws are bytes, eight from one random number: on a CPU torch's own takes a sixth of a training.

    The probability is rounded to a 256th; what is left is scaled by what that makes of it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements while learning."""
        dropped = round(256 * self.p)
        if not (self.training and dropped) or input.device.type != "cpu":
            return super().forward(input)
        draws = torch.empty(-(-input.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.uint8)[: input.numel()].view(input.shape) >= dropped
        return input * (kept.to(input.dtype) * (256 / (256 - dropped)))


def attend(query_QHPD: Tensor, key_QHSD: Tensor, value_QHSD: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of P positions to S tokens, (Q, H, P, Dh); `bias` is added to the scores, None is causal.

    While a CPU learns, by plain products: torch's fused kernel takes two to five times as long to go back in bfloat16.
    """
    if not (torch.is_grad_enabled() and query_QHPD.device.type == "cpu"):
        return F.scaled_dot_product_attention(query_QHPD, key_QHSD, value_QHSD, attn_mask=bias, is_causal=bias is None)
    scores = query_QHPD * query_QHPD.shape[-1] ** -0.5 @ key_QHSD.transpose(-1, -2)
    ahead = torch.full(scores.shape[-2:], BLOCKED, dtype=scores.dtype).triu(1) if bias is None else bias
    return torch.softmax(scores + ahead, dim=-1) @ value_QHSD


class DecoderLayer(nn.Module):
    """Pre-norm self-attention over the path, cross-attention to the query, feed-forward."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        w = shape.width
        self.heads = shape.heads
        self.self_norm, self.cross_norm, self.ffn_norm = nn.LayerNorm(w), nn.LayerNorm(w), nn.LayerNorm(w)
        self.self_qkv, self.self_out = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.cross_query, self.cross_out = nn.Linear(w, w), nn.Linear(w, w)
        self.memory_norm, self.memory_kv = nn.LayerNorm(shape.memory), nn.Linear(shape.memory, 2 * w)
        self.ffn = nn.Sequential(nn.Linear(w, 4 * w), nn.GELU(), Dropout(shape.dropout), nn.Linear(4 * w, w))
        self.dropout = Dropout(shape.dropout)

    def memory_key_value(self, states_QSM: Tensor) -> KeyValue:
        """Project the encoder's token states once per query: two of (Q, H, S, Dh)."""
        key, value = self.memory_kv(self.memory_norm(states_QSM)).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def cross(self, x_QBW: Tensor, memory: KeyValue, bias_Q11S: Tensor) -> Tensor:
        """Attend from all beams of a query to the query's tokens; beams stand where positions usually stand."""
        query = split_heads(self.cross_query(self.cross_norm(x_QBW)), self.heads)
        mixed = attend(query, *memory, bias_Q11S)
        crossed: Tensor = self.dropout(self.cross_out(merge_heads(mixed)))
        return crossed

    def forward(self, x_QLW: Tensor, memory: KeyValue, bias_Q11S: Tensor) -> Tensor:
        """Teacher forcing: all L positions of one path at once, causal."""
        query, key, value = (split_heads(y, self.heads) for y in self.self_qkv(self.self_norm(x_QLW)).chunk(3, -1))
        mixed = attend(query, key, value, None)
        x_QLW = x_QLW + self.dropout(self.self_out(merge_heads(mixed)))
        x_QLW = x_QLW + self.cross(x_QLW, memory, bias_Q11S)
        fed: Tensor = x_QLW + self.dropout(self.ffn(self.ffn_norm(x_QLW)))
        return fed

    def step(self, x_QBW: Tensor, memory: KeyValue, bias_Q11S: Tensor, past: KeyValue) -> tuple[Tensor, KeyValue]:
        """One position of B beams per query; `past` holds two of (Q, B, H, t, Dh), the result t + 1."""
        q, b, w = x_QBW.shape
        fresh = (y.view(q, b, self.heads, 1, -1) for y in self.self_qkv(self.self_norm(x_QBW)).chunk(3, -1))
        query, key, value = fresh
        key, value = torch.cat([past[0], key], dim=3), torch.cat([past[1], value], dim=3)
        weights = torch.softmax(query @ key.transpose(-1, -2) * (w // self.heads) ** -0.5, dim=-1)
        x_QBW = x_QBW + self.self_out((weights @ value).reshape(q, b, w))
        x_QBW = x_QBW + self.cross(x_QBW, memory, bias_Q11S)
        return x_QBW + self.ffn(self.ffn_norm(x_QBW)), (key, value)


class Decoder(nn.Module):
    """Token embeddings of a path in, unit hidden states out, one per position."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.read = nn.Linear(shape.embedding, shape.width)
        self.position = nn.Embedding(shape.max_steps, shape.width)
        self.layers: Iterable[DecoderLayer] = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))  # type: ignore[assignment]  # a ModuleList iterates as Module
        self.norm = nn.LayerNorm(shape.width)
        self.write = nn.Linear(shape.width, shape.embedding)
        self.dropout = Dropout(shape.dropout)
        nn.init.normal_(self.position.weight, std=0.02)
        if shape.bearing:
            self.read_bearing = nn.Linear(shape.embedding, shape.width, bias=False)
            self.follow = nn.Embedding(shape.max_steps, 1)
            nn.init.ones_(self.follow.weight)
            nn.init.zeros_(self.write.weight)  # the untrained decoder goes where the bearing points
            nn.init.zeros_(self.write.bias)

    def memories(self, states_QSM: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of every layer."""
        return [layer.memory_key_value(states_QSM) for layer in self.layers]

    def forward(
        self, embeddings_QLE: Tensor, memories: list[KeyValue], mask_QS: Tensor, vector_QE: Tensor | None = None
    ) -> Tensor:
        """Unit hidden states (Q, L, E) under teacher forcing; position l has read embeddings 0..l."""
        steps = torch.arange(embeddings_QLE.shape[1], device=embeddings_QLE.device)
        bearing_QLE = None if vector_QE is None else bearings(vector_QE, path_points(embeddings_QLE))
        x = self.dropout(self._enter(embeddings_QLE, steps, bearing_QLE))
        for layer, memory in zip(self.layers, memories, strict=True):
            x = layer(x, memory, attention_bias(mask_QS, x.dtype))
        return self._leave(x, steps, bearing_QLE)

    def step(
        self,
        embedding_QBE: Tensor,
        step_1: Tensor,
        mask_QS: Tensor,
        memories: list[KeyValue],
        past: list[KeyValue],
        vector_QE: Tensor | None = None,
        point_QBE: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue], Tensor | None]:
        """One step for B beams per query: unit hidden states (Q, B, E), the longer caches, the points reached."""
        bearing_QBE = None
        if vector_QE is not None and point_QBE is not None:
            point_QBE = next_point(point_QBE, embedding_QBE, step_1)
            bearing_QBE = bearings(vector_QE, point_QBE)
        x = self._enter(embedding_QBE, step_1, bearing_QBE)
        present = []
        for layer, memory, old in zip(self.layers, memories, past, strict=True):
            x, new = layer.step(x, memory, attention_bias(mask_QS, x.dtype), old)
            present.append(new)
        return self._leave(x, step_1, bearing_QBE), present, point_QBE

    def _enter(self, embeddings: Tensor, steps: Tensor, bearing: Tensor | None) -> Tensor:
        if self.shape.bearing != (bearing is not None):
            raise ValueError(f"this decoder {'needs' if self.shape.bearing else 'takes no'} vector and points")
        x: Tensor = self.read(embeddings) + self.position(steps)
        return x if bearing is None else x + self.read_bearing(bearing)

    def _leave(self, x: Tensor, steps: Tensor, bearing: Tensor | None) -> Tensor:
        written = self.write(self.norm(x))
        return F.normalize(written if bearing is None else written + self.follow(steps) * bearing, dim=-1)


def next_point(point_QBE: Tensor, embedding_QBE: Tensor, step_1: Tensor) -> Tensor:
    """The point after one more code: nothing at step 0, the first codeword at step 1, then reflections (HHQ eq. 5)."""
    reflected = point_QBE - 2 * (point_QBE * embedding_QBE).sum(-1, keepdim=True) * embedding_QBE
    first, begun = (step_1 == 1).to(point_QBE.dtype), (step_1 > 0).to(point_QBE.dtype)
    return begun * (reflected + first * embedding_QBE)


def path_points(embeddings_QLE: Tensor) -> Tensor:
    """The points (Q, L, E) before each position of a path; position 0 holds the start vector and stands nowhere."""
    point = torch.zeros_like(embeddings_QLE[:, 0])
    points = []
    for step in range(embeddings_QLE.shape[1]):
        point = next_point(point, embeddings_QLE[:, step], torch.tensor([step], device=point.device))
        points.append(point)
    return torch.stack(points, 1)


def bearings(vector_QE: Tensor, points_QBE: Tensor) -> Tensor:
    """Unit directions (Q, B, E) from points to the query's vector."""
    return F.normalize(vector_QE[:, None] - points_QBE, dim=-1)


def attention_bias(mask_QS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive cross-attention bias (Q, 1, 1, S): 0 for tokens, a large negative number for padding."""
    return ((1 - mask_QS[:, None, None, :].to(dtype)) * BLOCKED).to(dtype)


class Encoder(nn.Module):
    """A Hugging Face encoder with pooling: token states and the unit vector of a text."""

    def __init__(self, backbone: nn.Module, pooling: str = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling {pooling!r} is not one of: mean, cls")
        self.backbone = backbone
        self.pooling = pooling

    def train(self, mode: bool = True) -> Self:
        """Learn, or stop learning. On CPUs backbones learn with plain attention (see `attend`)."""
        if choose := getattr(self.backbone, "set_attn_implementation", None):
            choose("eager" if mode and next(self.backbone.parameters()).device.type == "cpu" else "sdpa")
        return super().train(mode)

    def forward(self, ids_QS: Tensor, mask_QS: Tensor) -> tuple[Tensor, Tensor]:
        """Give unit vectors (Q, D) and token states (Q, S, D)."""
        states = self.backbone(input_ids=ids_QS, attention_mask=mask_QS).last_hidden_state
        if self.pooling == "cls":
            return F.normalize(states[:, 0].float(), dim=-1), states
        weight = mask_QS[:, :, None].to(torch.float32)
        pooled = (states.float() * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
        return F.normalize(pooled, dim=-1), states


def load_backbone(name: str, dropout: float = 0.0) -> nn.Module:
    """Load a text encoder by hub name or local folder; of an encoder-decoder its encoder.

    `dropout` replaces all dropout probabilities: on CPUs dropout inside attention costs more than attention.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # a missing pooling head is expected: pooling is ours
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(name)
    for key, value in vars(config).items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, dropout)
    model = AutoModel.from_pretrained(name, config=config, attn_implementation="sdpa")
    encoder: nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder


class Retriever(nn.Module):
    """Encoder, decoder, tied token embeddings and the learnt scales of scoring, one per level.

    `tokens` (T, E) are the codebooks: input embeddings and output heads alike (DGI eq. 9); they move in
    joint stages, where codes are no vectors to read, and when `train_tokens` is set. `start` (E) is read before the
    first code.
    """

    level_of_token: Tensor

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        level_sizes: tuple[int, ...],
        scales: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.level_sizes = level_sizes
        self.unit_heads = True  # off: tokens keep their length in products (DGI without scaled cosine)
        width = decoder.shape.embedding if decoder is not None else 1
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.tokens = nn.Parameter(F.normalize(torch.randn(sum(level_sizes), width), dim=-1), requires_grad=False)
        alone, beside, weight = scales
        self.log_alone, self.log_beside = (
            nn.Parameter(torch.full((len(level_sizes),), scale).log()) for scale in (alone, beside)
        )
        self.log_weight = nn.Parameter(torch.tensor(weight).log())  # one for all levels: nodes of all depths compete
        levels = torch.arange(len(level_sizes)).repeat_interleave(torch.tensor(level_sizes))
        self.register_buffer("level_of_token", levels, persistent=False)

    def unit_tokens(self) -> Tensor:
        """Token embeddings (T, E) of unit length; as they are without `unit_heads`."""
        return F.normalize(self.tokens, dim=-1) if self.unit_heads else self.tokens

    def hidden(self, states_QSM: Tensor, mask_QS: Tensor, sids_QL: Tensor, vector_QD: Tensor) -> Tensor:
        """Unit hidden states (Q, L, E) before each code of the paths `sids_QL` (tokens, padded with -1)."""
        if self.decoder is None:
            raise ValueError("this retriever has no decoder")
        read_QLE = self.unit_tokens()[sids_QL[:, :-1].clamp_min(0)]
        start = self.start.expand(len(sids_QL), 1, -1)
        vector = vector_QD if self.decoder.shape.bearing else None
        path = torch.cat([start, read_QLE], 1)
        hidden: Tensor = self.decoder(path, self.decoder.memories(states_QSM), mask_QS, vector)
        return hidden.float()
