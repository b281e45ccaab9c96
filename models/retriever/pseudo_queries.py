"""Pseudo-queries: what a document might be asked for (HHQ section 4.3).

Three sources: a file of queries, a local sequence-to-sequence model, and an extractive sampler that needs nothing but
the documents: their titles, sentences and spans.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from models.lines import json_lines, refuse_unknown, string_field
from models.quantizers.base import progress_bar
from service.index.documents import Document

SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
SHORTEST, LONGEST = 4, 16  # words of a span


def sample_extractive(document: Document, count: int, seed: str) -> list[str]:
    """Draw `count` distinct queries from a document: its title, whole sentences, spans of 4 to 16 words.

    The draw depends on `seed` and the document's id only, so it does not change with the corpus around it.
    """
    rng = random.Random(f"{seed}/{document.id}")  # noqa: S311  (sampling, not secrets)
    sentences = [part.strip() for part in SENTENCE_END.split(document.text) if len(part.split()) >= SHORTEST]
    drawn = [document.title.strip()] if document.title.strip() else []
    for _ in range(4 * count):
        if len(drawn) >= count:
            break
        query = _draw(document, sentences, rng)
        if query and query not in drawn:
            drawn.append(query)
    return drawn[:count]


def _draw(document: Document, sentences: Sequence[str], rng: random.Random) -> str:
    if sentences and rng.random() < 0.5:
        words = rng.choice(sentences).split()
    else:
        words = document.text.split() or document.title.split()
    if len(words) <= LONGEST:
        return " ".join(words)
    length = rng.randint(SHORTEST, LONGEST)
    start = rng.randrange(len(words) - length + 1)
    span = " ".join(words[start : start + length])
    return f"{document.title}: {span}" if document.title and rng.random() < 0.25 else span


def read_pseudo_queries(path: Path, positions: dict[str, int]) -> list[tuple[str, int]]:
    """Read JSON lines `{"_id": document id, "text": query}` as pairs (query, document position).

    Raises:
        DataError: no such file, a line that is not such an object, or ids that are no document's.
    """
    rows = []
    for number, record in json_lines(path):
        where = f"{path}:{number}"
        rows.append((string_field(record, "text", where), string_field(record, "_id", where)))
    refuse_unknown(path, "_id", (id_ for _, id_ in rows), positions)
    return [(text, positions[id_]) for text, id_ in rows]


def generate_pseudo_queries(
    folder: str, documents: Sequence[Document], count: int, seed: int, batch: int = 16
) -> list[tuple[str, int]]:
    """Sample `count` queries a document from a local sequence-to-sequence model (docT5query and its kin), top-k 10."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    pairs: list[tuple[str, int]] = []
    with progress_bar(True) as bar, torch.no_grad():
        task = bar.add_task("pseudo-queries", total=len(documents))
        for start in range(0, len(documents), batch):
            block = documents[start : start + batch]
            texts = [f"{document.title} {document.text}".strip() for document in block]
            inputs = tokenizer(texts, truncation=True, max_length=384, padding=True, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=True, top_k=10, max_new_tokens=40, num_return_sequences=count)
            queries = tokenizer.batch_decode(ids, skip_special_tokens=True)
            pairs += [(query, start + row // count) for row, query in enumerate(queries) if query.strip()]
            bar.advance(task, len(block))
    return pairs
