"""Token sequences and the batches made of them: padded to their longest, bucketed by length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.quantizers.base import progress_bar
from service.model.tokens import padding_id

BUCKET = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Texts:
    """Token ids of many texts."""

    ids: list[list[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
        """Ids and mask (Q, S) int64 of some texts, padded to the longest of them."""
        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            length = len(self.ids[row])
            ids[place, :length] = torch.tensor(self.ids[row])
            mask[place, :length] = 1
        return ids.to(device), mask.to(device)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], limit: int, cut: Literal["left", "right"] = "right") -> Texts:
    """Tokenize with special tokens, truncated to `limit` tokens on one side, as `service.model.tokens` does."""
    tokenizer.enable_truncation(limit, direction=cut)
    tokenizer.no_padding()
    return Texts([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], padding_id(tokenizer))


def shuffled_batches(lengths: Sequence[int], size: int, seed: str) -> list[list[int]]:
    """Random batches of rows whose lengths are close: shuffle, sort within buckets of 16 batches, shuffle batches."""
    rng = random.Random(seed)  # noqa: S311  (sampling, not secrets)
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    batches = []
    for start in range(0, len(rows), BUCKET * size):
        bucket = sorted(rows[start : start + BUCKET * size], key=lengths.__getitem__)
        batches += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    rng.shuffle(batches)
    return batches


def by_length(texts: Texts, size: int) -> Iterator[list[int]]:
    """Rows in batches of similar length, longest first (so that memory is seen at once)."""
    order = sorted(range(len(texts)), key=lambda row: -len(texts.ids[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def embed(encoder: nn.Module, texts: Texts, device: str, bf16: bool, what: str, size: int = 128) -> Tensor:
    """Unit vectors (N, D) float32 of texts, without gradients."""
    was_training = encoder.training
    encoder.eval()
    vectors: Tensor | None = None
    with torch.no_grad(), progress_bar(True) as bar:
        task = bar.add_task(f"encode {what}", total=len(texts))
        for rows in by_length(texts, size):
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                block = encoder(*texts.batch(rows, device))[0].float()
            if vectors is None:
                vectors = torch.empty(len(texts), block.shape[1], device=device)
            vectors[torch.tensor(rows, device=device)] = block
            bar.advance(task, len(rows))
    encoder.train(was_training)
    if vectors is None:
        raise ValueError("no texts to encode")
    return vectors


class StateCache:
    """Token states of texts under a frozen encoder, computed once (bfloat16; Q·S·D·2 bytes)."""

    def __init__(self, encoder: nn.Module, texts: Texts, device: str, bf16: bool) -> None:
        self.vectors: Tensor | None = None
        self.states: list[Tensor] = [torch.empty(0)] * len(texts)
        encoder.eval()
        with torch.no_grad(), progress_bar(True) as bar:
            task = bar.add_task("cache token states", total=len(texts))
            for rows in by_length(texts, 256):
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    vectors, states = encoder(*texts.batch(rows, device))
                self._keep(rows, vectors, states, [len(texts.ids[row]) for row in rows], len(texts))
                bar.advance(task, len(rows))

    def _keep(self, rows: list[int], vectors: Tensor, states: Tensor, lengths: list[int], total: int) -> None:
        if self.vectors is None:
            self.vectors = torch.empty(total, vectors.shape[1], device=vectors.device)
        self.vectors[torch.tensor(rows, device=vectors.device)] = vectors.float()
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            self.states[row] = states[place, :length].to(torch.bfloat16).clone()

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (Q, D), states (Q, S, D) and mask (Q, S) of some texts."""
        states = torch.nn.utils.rnn.pad_sequence([self.states[row] for row in rows], batch_first=True)
        lengths = torch.tensor([len(self.states[row]) for row in rows], device=states.device)
        mask = (torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]).long()
        return self.of(rows), states, mask

    def of(self, rows: Sequence[int]) -> Tensor:
        """Vectors (Q, D) of some texts."""
        if self.vectors is None:
            raise ValueError("no texts were cached")
        return self.vectors[torch.tensor(rows, device=self.vectors.device)]
