"""Something small to study, made on the spot: paragraphs of Python's language reference, and an untrained encoder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

DOCUMENTS = 400
QUERY_WORDS = 6
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_quick(out: Path) -> tuple[Path, str]:
    """Write data set and encoder under a folder, once; returns the folder of data sets and the encoder's name.

    What is there is kept: no two vocabularies are learnt alike, and a study that was cut off rests on the first.
    """
    made, partial = out / "quick", out / "quick.partial"
    if not made.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        texts = write_topics(partial / "data" / "topics")
        write_encoder(partial / "encoder", texts)
        partial.rename(made)
    return made / "data", str(made / "encoder")


def write_topics(folder: Path, seed: int = 0) -> list[str]:
    """Write a data set in the BEIR layout: paragraphs of `pydoc`'s topics, and words of them as queries.

    Returns:
        The paragraphs.
    """
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    rng = random.Random(seed)  # noqa: S311  (sampling, not secrets)
    chosen = rng.sample(sorted({part for part in paragraphs if 20 <= len(part.split()) <= 80}), DOCUMENTS)
    queries: list[dict[str, str]] = []
    qrels = {split: ["query-id\tcorpus-id\tscore"] for split in ("train", "test")}
    for number, paragraph in enumerate(chosen):
        for split in ("train", "train", "test"):
            words = paragraph.split()
            start = rng.randrange(len(words) - QUERY_WORDS)
            queries.append({"_id": f"q{len(queries)}", "text": " ".join(words[start : start + QUERY_WORDS])})
            qrels[split].append(f"{queries[-1]['_id']}\td{number}\t1")
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "corpus.jsonl", [json.dumps({"_id": f"d{i}", "text": t}) for i, t in enumerate(chosen)])
    _write_lines(folder / "queries.jsonl", [json.dumps(query) for query in queries])
    for split, rows in qrels.items():
        _write_lines(folder / "qrels" / f"{split}.tsv", rows)
    return chosen


def write_encoder(folder: Path, texts: list[str]) -> None:
    """Write a Hugging Face folder: a BERT of two narrow layers with random weights, and a tokenizer for the texts."""
    tokenizer = Tokenizer(WordPiece(unk_token=SPECIAL[1]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    tokenizer.train_from_iterator(texts, WordPieceTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_bert(folder, tokenizer.get_vocab_size(), width=32)


def write_bert(folder: Path, vocabulary: int, width: int) -> None:
    """Write a BERT of two layers with random weights, the same every time, as a Hugging Face folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
