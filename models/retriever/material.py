"""What a training run reads: data sets as one corpus, tokenized, with train queries and pseudo-queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.data import Dataset
from models.retriever.batches import Texts, tokenize
from models.retriever.pseudo_queries import generate_pseudo_queries, read_pseudo_queries, sample_extractive
from models.retriever.recipe import Recipe
from models.retriever.stages import Pair
from service.model.text import document_text, query_text


@dataclass
class Material:
    """Everything a run reads: tokenized documents, train queries, pseudo-queries, and queries to validate on.

    Attributes:
        documents, queries: tokenized texts.
        real, pseudo: pairs to train on.
        held_out: pairs to validate on: the dev split where there is one, otherwise a part of train; of a user's
            queries the last at most, as when serving: nothing later is known.
        names: of the data sets.
    """

    documents: Texts
    queries: Texts
    real: list[Pair]
    pseudo: list[Pair]
    held_out: list[Pair]
    names: tuple[str, ...]

    def pairs(self, kind: str) -> list[Pair]:
        """The pairs of a stage: pseudo, real or both."""
        return (self.pseudo if kind != "real" else []) + (self.real if kind != "pseudo" else [])


def gather(datasets: Sequence[Dataset], recipe: Recipe, tokenizer: Tokenizer) -> Material:
    """Tokenize one or several data sets as one corpus; of their splits train and dev only."""
    settings = recipe.text
    documents: list[str] = []
    texts: list[str] = []
    real: list[Pair] = []
    pseudo: list[Pair] = []
    dev: list[Pair] = []
    followed: set[int] = set()
    for dataset in datasets:
        base = len(documents)
        documents += [document_text(d.title, d.text, settings) for d in dataset.documents]
        earlier = dataset.followed("train") if "train" in dataset.qrels else set()
        for split, pairs in (("train", real), ("dev", dev)):
            for query, document in dataset.pairs(split) if split in dataset.qrels else []:
                history = dataset.histories.get(query, ())
                if split == "train" and query in earlier:
                    followed.add(len(real))
                pairs.append((len(texts), base + document))
                texts.append(query_text(dataset.queries[query], history, settings))
        for text, document in make_pseudo_queries(dataset, recipe):
            pseudo.append((len(texts), base + document))
            texts.append(query_text(text, (), settings))
    order = np.random.default_rng(recipe.seed).permutation(len(real)).tolist()
    last = [row for row in order if row not in followed]
    held = set() if dev else set(last[: int(recipe.dev_share * len(real))])
    return Material(
        documents=tokenize(tokenizer, documents, settings.max_document_tokens),
        queries=tokenize(
            tokenizer, texts, settings.max_query_tokens, "left" if settings.history_count else "right"
        ),  # the query stands behind its history
        real=[pair for row, pair in enumerate(real) if row not in held],
        pseudo=pseudo,
        held_out=dev or [real[row] for row in sorted(held)],
        names=tuple(dataset.folder.name for dataset in datasets),
    )


def make_pseudo_queries(dataset: Dataset, recipe: Recipe) -> list[tuple[str, int]]:
    """Pseudo-queries (text, document position) from the recipe's source."""
    table = recipe.pseudo_queries
    if not any(stage.queries != "real" for stage in recipe.stage):
        return []
    if table.source == "file":
        return list(read_pseudo_queries(Path(table.path), dataset.position))
    if table.source == "model":
        return list(generate_pseudo_queries(table.path, dataset.documents, table.per_document, recipe.seed))
    return [
        (query, position)
        for position, document in enumerate(dataset.documents)
        for query in sample_extractive(document, table.per_document, str(recipe.seed))
    ]
