"""Two of the three kinds of training stage, one epoch each: `contrast_epoch` and `decode_epoch` (the third is `joint`).

Legend: B queries of a batch, G documents of a batch, N documents, L levels, D dimensions, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from models.retriever.batches import StateCache, Texts, shuffled_batches
from models.retriever.network import Retriever
from models.retriever.objectives import Scales, contrast, guided_loss, masked_loss, unmasked_loss
from models.retriever.recipe import ObjectiveTable, Stage
from models.retriever.tree import CodeTree, measure

Pair = tuple[int, int]  # row in the query texts, document position
QUERIES_PER_DOCUMENT = 4  # most queries of one document in a contrast batch, half of them real where there are
CLUMP = 16  # neighbours that go into a contrast batch together


@dataclass
class Work:
    """What the epochs of a stage share."""

    retriever: Retriever
    queries: Texts
    documents: Texts
    pairs: list[Pair]
    real: frozenset[int]  # rows of real queries
    vectors_ND: Tensor  # every document's vector
    stage: Stage
    objective: ObjectiveTable
    device: str
    bf16: bool
    step: Callable[[Tensor, bool], None]  # takes a loss; whether the optimizer steps now
    bar: Progress
    task: TaskID
    tree: CodeTree | None = None
    cache: StateCache | None = None
    distillation: float = 0.0  # of the objective, as far as the teacher is trusted
    relevant: Mapping[int, frozenset[int]] = field(default_factory=dict)  # see `asked_for_several`

    def encode(self, texts: Texts, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, token states and mask, with gradients where the encoder learns."""
        ids, mask = texts.batch(rows, self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            vectors, states = self.retriever.encoder(ids, mask)
        return vectors.float(), states, mask


def contrast_epoch(work: Work, seed: str) -> dict[str, float]:
    """InfoNCE between queries and a batch's documents (DGI eq. 19); batches are made of clumps of neighbours.

    Every negative is encoded by the encoder as it is now: with remembered vectors as negatives the network learns to
    tell fresh from stale instead of right from wrong. A document is encoded once for all its queries; rows of
    `work.vectors_ND` are replaced as documents are encoded, so that the next epoch's clumps follow the encoder.
    """
    rng = random.Random(seed)  # noqa: S311  (sampling, not secrets)
    of_document: dict[int, list[int]] = {}
    for query, document in work.pairs:
        of_document.setdefault(document, []).append(query)
    total, seen = 0.0, 0
    work.retriever.train()
    batches = clumped_batches(sorted(of_document), work.vectors_ND, work.stage.batch, rng)
    for count, rows_G in enumerate(batches, 1):
        pairs_B = [(q, place) for place, d in enumerate(rows_G) for q in _some(of_document[d], work.real, rng)]
        shown_G = Texts([work.documents.ids[row] for row in rows_G], work.documents.pad)
        if work.stage.leave_out:
            shown_G = leave_out(shown_G, work.queries, pairs_B, work.stage.leave_out, rng)
        fresh_GD = encode_in_blocks(work, shown_G, list(range(len(rows_G))))
        vector_BD = encode_in_blocks(work, work.queries, [query for query, _ in pairs_B])
        label_B = torch.tensor([place for _, place in pairs_B], device=work.device)
        known_BG = known_relevant(work, [query for query, _ in pairs_B], rows_G, label_B)
        loss = contrast(vector_BD, fresh_GD, label_B, work.objective.temperature, known_BG)
        work.step(loss, ends_step(count, len(batches), work.stage.accumulate))
        work.vectors_ND[torch.tensor(rows_G, device=work.device)] = fresh_GD.detach()
        total, seen = total + float(loss.detach()) * len(pairs_B), seen + len(pairs_B)
        work.bar.update(work.task, advance=1, loss=f"{total / seen:.3f}")
    return {"contrast": total / seen}


def asked_for_several(queries: Texts, pairs: Sequence[Pair]) -> dict[int, frozenset[int]]:
    """Give the rows of queries whose text asks for several documents, with all of these."""
    documents: dict[tuple[int, ...], set[int]] = {}
    for query, document in pairs:
        documents.setdefault(tuple(queries.ids[query]), set()).add(document)
    found = {query: documents[tuple(queries.ids[query])] for query, _ in pairs}
    return {query: frozenset(wanted) for query, wanted in found.items() if len(wanted) > 1}


def known_relevant(work: Work, queries_B: list[int], documents_K: Sequence[int], label_B: Tensor) -> Tensor | None:
    """Mark (B, K) the documents that a query asks for beside its own: no negatives. None where there are none."""
    several = [(row, query) for row, query in enumerate(queries_B) if query in work.relevant]
    if not several:
        return None
    columns = {document: column for column, document in enumerate(documents_K)}
    known_BK = torch.zeros(len(queries_B), len(documents_K), dtype=torch.bool)
    for row, query in several:
        known_BK[row, [columns[document] for document in work.relevant[query] if document in columns]] = True
    known_BK[torch.arange(len(queries_B)), label_B.cpu()] = False
    return known_BK.to(label_B.device)


def ends_step(count: int, batches: int, accumulate: int) -> bool:
    """Say whether the optimizer moves after the batch `count` of an epoch: no gradient waits for the next epoch."""
    return count % accumulate == 0 or count == batches


def leave_out(documents_G: Texts, queries: Texts, pairs_B: list[Pair], probability: float, rng: random.Random) -> Texts:
    """Cut queries that are copied from their document out of it, each with a probability (inverse cloze task).

    A query that stands in its document word for word teaches the encoder to look for words (Lee, Chang and Toutanova
    2019, section 4, take 0.9). A document that would be empty stays whole.

    Args:
        documents_G: the batch's documents.
        queries: all queries; special tokens at both ends.
        pairs_B: row of the query, place of its document in the batch.
        probability: of each cut.
        rng: source of the draws.
    """
    shown = list(documents_G.ids)
    for query, place in pairs_B:
        if rng.random() < probability:
            words, ids = queries.ids[query][1:-1], shown[place]
            size = len(words)
            at = next((i for i in range(1, len(ids) - size) if ids[i : i + size] == words), 0)
            if size and at and len(ids) > size + 2:
                shown[place] = ids[:at] + ids[at + size :]
    return Texts(shown, documents_G.pad)


def clumped_batches(documents: list[int], vectors_ND: Tensor, size: int, rng: random.Random) -> list[list[int]]:
    """Split documents into batches of clumps: a random document with its nearest ones that are still free.

    Neighbours in one batch are each other's hard negatives. Costs one product of a vector with all vectors a clump.
    """
    vectors_GD = vectors_ND[torch.tensor(documents, device=vectors_ND.device)]
    free = torch.ones(len(documents), dtype=torch.bool, device=vectors_ND.device)
    clumps = []
    for seed in rng.sample(range(len(documents)), len(documents)):
        if not free[seed]:
            continue
        near = (vectors_GD @ vectors_GD[seed]).masked_fill(~free, -2.0)
        near[seed] = 2.0
        chosen = near.topk(min(CLUMP, int(free.sum()))).indices
        free[chosen] = False
        clumps.append([documents[place] for place in chosen.tolist()])
    rng.shuffle(clumps)
    order = [document for clump in clumps for document in clump]
    return [sorted(order[start : start + size]) for start in range(0, len(order), size)]


def encode_in_blocks(work: Work, texts: Texts, rows_B: list[int], block: int = 32) -> Tensor:
    """Vectors (B, D) of texts, encoded in blocks of similar length so that short ones are not padded to the longest."""
    order = sorted(range(len(rows_B)), key=lambda place: len(texts.ids[rows_B[place]]))
    blocks = [order[start : start + block] for start in range(0, len(order), block)]
    vectors_BD = torch.cat([work.encode(texts, [rows_B[place] for place in block])[0] for block in blocks])
    return vectors_BD[torch.tensor(order, device=work.device).argsort()]


def _some(queries: list[int], real: frozenset[int], rng: random.Random) -> list[int]:
    """Choose queries of a document: half of them real, as far as there are, and whatever is left."""
    shuffled = rng.sample(queries, len(queries))
    asked = [query for query in shuffled if query in real]
    made = [query for query in shuffled if query not in real]
    half = QUERIES_PER_DOCUMENT // 2
    chosen = asked[: max(half, QUERIES_PER_DOCUMENT - len(made))]
    return chosen + made[: QUERIES_PER_DOCUMENT - len(chosen)]


def decode_epoch(work: Work, seed: str) -> dict[str, float]:
    """Train paths by cSFT and guided cSFT; with `encoder_lr` also InfoNCE against all documents, and the anchor."""
    lengths = [len(work.queries.ids[query]) for query, _ in work.pairs]
    moving = work.stage.encoder_lr > 0
    totals, seen = {"generative": 0.0, "guided": 0.0, "contrast": 0.0, "anchor": 0.0}, 0
    work.retriever.train()
    work.retriever.encoder.train(moving)
    batches = shuffled_batches(lengths, work.stage.batch, seed)
    for count, batch in enumerate(batches, 1):
        queries = [work.pairs[place][0] for place in batch]
        documents_B = torch.tensor([work.pairs[place][1] for place in batch], device=work.device)
        vector_BD, states, mask = work.cache.batch(queries) if work.cache else work.encode(work.queries, queries)
        losses = path_losses(work, vector_BD, states, mask, documents_B)
        if moving:
            known_BN = known_relevant(work, queries, range(len(work.vectors_ND)), documents_B)
            losses["contrast"] = contrast(vector_BD, work.vectors_ND, documents_B, work.objective.temperature, known_BN)
            losses["anchor"] = anchor_loss(work, f"{seed}/{count}")
        work.step(weighted(losses, work), ends_step(count, len(batches), work.stage.accumulate))
        seen += len(batch)
        for name, loss in losses.items():
            totals[name] += float(loss.detach()) * len(batch)
        work.bar.update(work.task, advance=1, loss=" ".join(f"{name} {totals[name] / seen:.3f}" for name in losses))
    return {name: total / seen for name, total in totals.items() if total}


def path_losses(work: Work, vector_BD: Tensor, states: Tensor, mask: Tensor, documents_B: Tensor) -> dict[str, Tensor]:
    """Mean generative and guided losses of a batch, summed over levels."""
    tree, retriever = work.tree, work.retriever
    if tree is None:
        raise ValueError("a decode stage needs the code tree")
    states = states.to(torch.bfloat16 if work.bf16 else torch.float32)
    with torch.autocast(work.device, torch.bfloat16, enabled=work.bf16):
        hidden_BLE = retriever.hidden(states, mask, tree.sids[documents_B], vector_BD)
    tokens_TE, scales = retriever.unit_tokens(), Scales.of(retriever)
    near = measure(tree, vector_BD, work.objective.temperature)
    generative = guided = vector_BD.new_zeros(())
    for level in range(hidden_BLE.shape[1]):
        cosine_BT = hidden_BLE[:, level].float() @ tokens_TE.T
        step = (tree, level, documents_B, cosine_BT, near, scales)
        if work.objective.constraint == "trie":
            generative = generative + masked_loss(*step, work.distillation)
        else:
            predecessor = work.objective.constraint == "predecessor"
            generative = generative + unmasked_loss(*step, work.distillation, predecessor)
        if work.objective.guided:
            guided = guided + guided_loss(*step)
    return {"generative": generative / len(documents_B), "guided": guided / len(documents_B)}


def anchor_loss(work: Work, seed: str, count: int = 16) -> Tensor:
    """Mean 1 - cosine between re-encoded documents and the vectors their SIDs were made from."""
    if not work.stage.anchor:
        return work.vectors_ND.new_zeros(())
    rows = random.Random(seed).sample(range(len(work.documents)), min(count, len(work.documents)))  # noqa: S311  (sampling)
    vectors, _, _ = work.encode(work.documents, rows)
    return (1 - (vectors * work.vectors_ND[torch.tensor(rows, device=work.device)]).sum(1)).mean()


def weighted(losses: dict[str, Tensor], work: Work) -> Tensor:
    """The sum that is minimised."""
    weights = {
        "generative": work.objective.generative,
        "guided": work.objective.guided,
        "contrast": work.objective.contrast,
        "anchor": work.stage.anchor,
    }
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
