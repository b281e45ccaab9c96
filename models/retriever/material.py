"""What a training run reads: data sets as one corpus, tokenized, with train queries and pseudo-queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.data import Dataset, unlike
from models.retriever.batches import Texts, tokenize
from models.retriever.pseudo_queries import generate_pseudo_queries, read_pseudo_queries, sample_extractive
from models.retriever.recipe import Recipe, RecipeError
from models.retriever.stages import Pair
from service.index.postings import words_of
from service.model.text import document_text, query_text

SPLIT_SEED = 0  # not the recipe's: an encoder tuned by one run must not have seen what a later run holds out


@dataclass
class Material:
    """Everything a run reads: tokenized documents, train queries, pseudo-queries, and queries to validate on.

    Attributes:
        documents, queries: tokenized texts.
        real, pseudo: pairs to train on.
        held_out: pairs to validate on: the dev split where there is one, otherwise a part of train; of a user's
            queries the last at most, as when serving: nothing later is known.
        sizes: documents of each data set, by its folder.
        document_words: what of each document lexical search indexes.
        held_out_words: the text of each pair's query in `held_out`, without prefix and history.
    """

    documents: Texts
    queries: Texts
    real: list[Pair]
    pseudo: list[Pair]
    held_out: list[Pair]
    sizes: dict[Path, int]
    document_words: list[str] = field(default_factory=list)
    held_out_words: list[str] = field(default_factory=list)

    def pairs(self, kind: str) -> list[Pair]:
        """The pairs of a stage: pseudo, real or both."""
        return (self.pseudo if kind != "real" else []) + (self.real if kind != "pseudo" else [])


def gather(datasets: Sequence[Dataset], recipe: Recipe, tokenizer: Tokenizer) -> Material:
    """Tokenize one or several data sets as one corpus; of their splits train and dev only."""
    settings = recipe.text
    if len(datasets) > 1 and recipe.pseudo_queries.source == "file":
        raise RecipeError(
            "pseudo_queries.source = 'file' names documents of one data set: train on one, or sample them"
        )
    sizes = {dataset.folder.resolve(): len(dataset.documents) for dataset in datasets}
    if len({folder.name for folder in sizes}) < len(datasets):
        raise RecipeError(f"two of the {len(datasets)} data sets are in folders of one name: rename one")
    documents: list[str] = []
    texts: list[str] = []
    plain: dict[int, str] = {}  # of a real query's row, what was asked
    real: list[Pair] = []
    pseudo: list[Pair] = []
    dev: list[Pair] = []
    owners: list[tuple[int, str]] = []  # of each real pair: its data set and query
    followed: set[tuple[int, str]] = set()
    for number, dataset in enumerate(datasets):
        base = len(documents)
        documents += [document_text(d.title, d.text, settings) for d in dataset.documents]
        earlier = dataset.followed("train") if "train" in dataset.qrels else set()
        for split, pairs in (("train", real), ("dev", dev)):
            for query, document in dataset.pairs(split) if split in dataset.qrels else []:
                history = dataset.histories.get(query, ())
                if split == "train":
                    owners.append((number, query))
                    followed |= {owners[-1]} if query in earlier else set()
                pairs.append((len(texts), base + document))
                plain[len(texts)] = dataset.queries[query]
                texts.append(query_text(dataset.queries[query], history, settings))
        for text, document in make_pseudo_queries(dataset, recipe):
            pseudo.append((len(texts), base + document))
            texts.append(query_text(text, (), settings))
    asked = list(dict.fromkeys(owners))  # queries, not pairs: what is held out must not be trained on
    order = np.random.default_rng(SPLIT_SEED).permutation(len(asked)).tolist()
    last = [asked[place] for place in order if asked[place] not in followed]
    chosen = set() if dev else set(last[: int(recipe.dev_share * len(asked))])
    held = {row for row, owner in enumerate(owners) if owner in chosen}
    held_out = dev or [real[row] for row in sorted(held)]
    kept = [pair for row, pair in enumerate(real) if row not in held]  # some may ask the same by another id
    learnt = unlike([texts[query] for query, _ in kept], [texts[query] for query, _ in held_out])
    return Material(
        documents=tokenize(tokenizer, documents, settings.max_document_tokens),
        queries=tokenize(
            tokenizer, texts, settings.max_query_tokens, "left" if settings.history_count else "right"
        ),  # the query stands behind its history
        real=[kept[row] for row in learnt],
        pseudo=pseudo,
        held_out=held_out,
        sizes=sizes,
        document_words=[words_of(d.title, d.text) for dataset in datasets for d in dataset.documents],
        held_out_words=[plain[query] for query, _ in held_out],
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
