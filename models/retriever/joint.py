"""The joint stage: retriever and identifiers learn in one loop (Differentiable Geometric Indexing, section 4).

Legend: B pairs of a batch, G documents of a batch, L levels, T tokens, D vector dimensions (and token dimensions).

Documents are encoded with gradients, quantized softly, and their soft codewords are what the decoder reads in place of
codes (soft teacher forcing, section 4.1.1), so the retrieval loss reaches encoder and codebooks. What it predicts are
the codes that serving would assign at this moment. With `share` the retriever's token embeddings are the codebooks
(eq. 9); without, the decoder reads the same mixture of its own token embeddings.

The decoder reads unit vectors here as in service, where tokens are unit rows: soft vectors are normalised before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from models.quantizers.gumbel import Gumbel, SoftPath, annealed, hard_codes, soft_path, straight_through_path
from models.retriever.batches import shuffled_batches
from models.retriever.joint_losses import diversity_loss, global_loss, local_loss, next_token_loss
from models.retriever.network import Retriever
from models.retriever.objectives import contrast
from models.retriever.recipe import JointTable
from models.retriever.stages import Pair, Work, encode_in_blocks, ends_step, known_relevant


@dataclass
class Joint:
    """What a joint stage needs beside the work of every stage.

    Attributes:
        work: see `Work`.
        quantizer: its codebooks are the ones that learn (`tie_codebooks`).
        table: the recipe's `[joint]`.
        progress: the share of the stage's steps that is done; the temperature follows it.
    """

    work: Work
    quantizer: Gumbel
    table: JointTable
    progress: Callable[[], float]

    @property
    def heads(self) -> Sequence[Tensor]:
        """Token embeddings level by level, (K, D) each, with gradients."""
        return torch.split(self.work.retriever.tokens, list(self.quantizer.level_sizes))

    @property
    def codebooks(self) -> Sequence[Tensor]:
        """Codebooks level by level, with gradients: the heads themselves where they are shared (eq. 9)."""
        return self.heads if self.table.share else self.quantizer.codebooks


def tie_codebooks(retriever: Retriever, quantizer: Gumbel, share: bool) -> list[Tensor]:
    """Give the parameters that the codebooks learn through; `quantizer.codebooks` follow them from here on.

    Shared, they are the retriever's tokens, and the quantizer sees the same memory; otherwise copies of their own.
    """
    start = [codebook.detach().to(retriever.tokens.device) for codebook in quantizer.codebooks]
    if not share:
        quantizer.codebooks = [codebook.clone().requires_grad_() for codebook in start]
        return quantizer.codebooks
    with torch.no_grad():
        retriever.tokens.copy_(torch.cat(start))
    quantizer.codebooks = list(torch.split(retriever.tokens.detach(), list(quantizer.level_sizes)))
    return [retriever.tokens]


def untie_codebooks(quantizer: Gumbel) -> None:
    """Freeze the codebooks as they stand: later stages may move the tokens, and the index must not follow."""
    quantizer.codebooks = [codebook.detach().clone() for codebook in quantizer.codebooks]


def joint_epoch(joint: Joint, seed: str) -> dict[str, float]:
    """Train encoder, decoder and codebooks by the weighted sum of eq. 16-20; gives each loss's mean over pairs."""
    work = joint.work
    weights = loss_weights(joint)
    totals, seen = dict.fromkeys(weights, 0.0), 0
    work.retriever.train()
    work.retriever.encoder.train(work.stage.encoder_lr > 0)
    lengths = [len(work.queries.ids[query]) for query, _ in work.pairs]
    batches = shuffled_batches(lengths, work.stage.batch, seed)
    for count, batch in enumerate(batches, 1):
        losses = joint_losses(joint, [work.pairs[place] for place in batch])
        work.step(
            torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(),
            ends_step(count, len(batches), work.stage.accumulate),
        )
        seen += len(batch)
        for name, loss in losses.items():
            totals[name] += float(loss.detach()) * len(batch)
        work.bar.update(work.task, advance=1, loss=" ".join(f"{name} {totals[name] / seen:.3f}" for name in losses))
    return {name: total / seen for name, total in totals.items()}


def loss_weights(joint: Joint) -> dict[str, float]:
    """The weight of every loss in the sum; the paper's are all one."""
    objective, table = joint.work.objective, joint.table
    return {
        "generative": objective.generative,
        "reconstruction": table.reconstruction,
        "local": table.local,
        "contrast": objective.contrast,
        "diversity": table.diversity,
    }


def joint_losses(joint: Joint, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The five losses of a batch; a document of several pairs is encoded and quantized once."""
    work, retriever, table = joint.work, joint.work.retriever, joint.table
    queries = [query for query, _ in pairs]
    rows_G = sorted({document for _, document in pairs})
    place = {document: row for row, document in enumerate(rows_G)}
    label_B = torch.tensor([place[document] for _, document in pairs], device=work.device)
    vector_BD, states, mask = work.cache.batch(queries) if work.cache else work.encode(work.queries, queries)
    x_GD = document_vectors(work, rows_G)
    path = quantize_softly(joint, x_GD)
    with torch.no_grad():  # what serving would assign now: supervision, not a path of gradients
        codes_GL = hard_codes(joint.codebooks, x_GD, joint.quantizer.settings.scaled_cosine)
    hidden_BLD = soft_hidden(work, states, mask, decoder_reads(joint, path)[label_B])
    scale_L = retriever.log_alone.exp()
    known_BG = known_relevant(work, queries, rows_G, label_B)
    return {
        "generative": next_token_loss(hidden_BLD, joint.heads, scale_L, codes_GL[label_B], retriever.unit_heads),
        "reconstruction": global_loss(x_GD, path.vectors_GLD),
        "local": local_loss(path.residuals_GLD, joint.codebooks, path.codes_GL, table.beta),
        "contrast": contrast(vector_BD, x_GD, label_B, work.objective.temperature, known_BG),
        "diversity": diversity_loss(path.weights),
    }


def document_vectors(work: Work, rows_G: list[int]) -> Tensor:
    """Unit vectors of documents, through the encoder where it learns."""
    if work.stage.encoder_lr:
        return encode_in_blocks(work, work.documents, rows_G)
    return work.vectors_ND[torch.tensor(rows_G, device=work.device)]


def quantize_softly(joint: Joint, x_GD: Tensor) -> SoftPath:
    """The soft path at the temperature of the moment, or the straight-through one (ablation)."""
    scale_L, scaled_cosine = joint.work.retriever.log_alone.exp(), joint.quantizer.settings.scaled_cosine
    if joint.table.straight_through:
        return straight_through_path(joint.codebooks, x_GD, scale_L, scaled_cosine)
    temperature = annealed(joint.table.temperature_start, joint.table.temperature_end, joint.progress())
    return soft_path(joint.codebooks, x_GD, scale_L, temperature, scaled_cosine)


def decoder_reads(joint: Joint, path: SoftPath) -> Tensor:
    """What the decoder reads (G, L, D): soft codewords, or the same mixture of the retriever's own tokens."""
    read_GLD = path.vectors_GLD
    if not joint.table.share and joint.table.straight_through:
        own = [head[codes] for head, codes in zip(joint.heads, path.codes_GL.T, strict=True)]
        read_GLD = torch.stack(own, 1) + path.residuals_GLD - path.residuals_GLD.detach()
    elif not joint.table.share:
        read_GLD = torch.stack([weight @ head for weight, head in zip(path.weights, joint.heads, strict=True)], 1)
    return F.normalize(read_GLD, dim=-1) if joint.work.retriever.unit_heads else read_GLD


def soft_hidden(work: Work, states: Tensor, mask: Tensor, read_BLD: Tensor) -> Tensor:
    """Unit hidden states (B, L, D) before each code, the decoder fed with `read_BLD` up to there."""
    retriever = work.retriever
    if retriever.decoder is None:
        raise ValueError("a joint stage needs a decoder")
    start = retriever.start.expand(len(read_BLD), 1, -1)
    states = states.to(torch.bfloat16 if work.bf16 else torch.float32)
    with torch.autocast(work.device, torch.bfloat16, enabled=work.bf16):
        path = torch.cat([start, read_BLD[:, :-1]], 1)
        hidden: Tensor = retriever.decoder(path, retriever.decoder.memories(states), mask)
    return hidden.float()


@dataclass
class GradientLog:
    """Gradient norms of every parameter group (figure 3), before clipping: mean and greatest of `every` steps."""

    optimizer: torch.optim.Optimizer
    log: Callable[..., None]
    every: int
    norms: dict[str, list[float]] = field(default_factory=dict)

    def record(self, step: int) -> None:
        """Note the norms of this step; write a line at every so many."""
        for group in self.optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
            self.norms.setdefault(group["name"], []).append(float(norm))
        if step % self.every == 0:
            means = {f"gradient_{name}": sum(kept) / len(kept) for name, kept in self.norms.items()}
            self.log(step=step, **means, **{f"gradient_{n}_max": max(kept) for n, kept in self.norms.items()})
            self.norms.clear()
