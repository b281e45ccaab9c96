"""A training run: what a recipe, its data and its folder become, what a checkpoint keeps, and how it is published."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.data import Dataset, vectors_file
from models.quantizers.base import Quantizer, codes_to_tokens, make_quantizer
from models.quantizers.gumbel import Gumbel
from models.retriever.batches import Texts, embed
from models.retriever.material import Material, gather
from models.retriever.network import Decoder, DecoderShape, Encoder, Retriever, load_backbone
from models.retriever.publish import publish_model, save_tokenizer
from models.retriever.recipe import Recipe, RecipeError
from models.retriever.shelf import Shelf
from models.retriever.tree import CodeTree, build_tree
from models.retriever.words import choose_lexical_weight
from models.tensors import write_errors
from service.index.arrays import write_array
from service.index.manifest import DEFAULT_LEXICAL_WEIGHT
from service.model.tokens import WordTokenizer

TRAIN_QUERIES = "add qrels/train.tsv, or choose a recipe that needs no train queries, such as hhq_frozen"

console = Console(stderr=True)


class StartError(ValueError):
    """A training that cannot start on this machine: the message names the option and the remedy."""


@dataclass
class Run:
    """A training run: its recipe, material, network and the state that stages change."""

    recipe: Recipe
    material: Material
    retriever: Retriever
    tokenizer: Tokenizer
    out: Path
    device: str
    quantizer: Quantizer
    shelf: Shelf
    vectors_ND: Tensor | None = None
    fitted: bool = False
    # of the stage that runs: its best epoch, how many passed since, and how far its teacher is trusted
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    without_gain: int = 0
    distillation: float | None = None

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return self.recipe.bf16

    def fingerprint(self) -> str:
        """What a checkpoint must agree with: the recipe, the token ids of the data, and which belong together."""
        material = self.material
        texts, pairs = [material.documents.ids, material.queries.ids], [material.real, material.pseudo]
        body = json.dumps([self.recipe.model_dump(mode="json"), *texts, *pairs, material.held_out])
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def log_file(self) -> Path:
        """Where `log` writes."""
        return self.out / "log.jsonl"

    def log(self, **row: object) -> None:
        """Append a line to log.jsonl and show it."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        console.print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def check_lengths(recipe: Recipe, backbone: nn.Module) -> None:
    """Refuse texts that are longer than the encoder's learnt positions, if it has such."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            most = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            for key in ("max_query_tokens", "max_document_tokens"):
                if (asked := getattr(recipe.text, key)) > most:
                    raise RecipeError(
                        f"text.{key} is {asked}, and {recipe.encoder.name} reads {most} tokens: give fewer"
                    )


def start_run(recipe: Recipe, datasets: Sequence[Dataset], out: Path, device: str, shelf: Shelf) -> Run:
    """Load the encoder, tokenize the data, make an untrained decoder."""
    if not recipe.encoder.name:
        raise RecipeError("encoder.name is empty: name a Hugging Face encoder or a local folder (or --encoder)")
    check_device(device)
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.encoder.name)
    material = gather(datasets, recipe, tokenizer)
    check_queries(recipe, material)
    backbone = load_backbone(recipe.encoder.name, recipe.encoder.dropout)
    check_lengths(recipe, backbone)
    freeze(backbone, recipe)
    quantizer = make_quantizer(quantizer_table(recipe))
    if (least := quantizer.least_documents) > (documents := len(material.documents)):
        raise RecipeError(
            f"quantizer.level_sizes has a level of {max(quantizer.level_sizes):,} codes for {documents:,} documents, "
            f"and {quantizer.system} learns so many from {least:,} at least: use fewer codes, or more documents"
        )
    if (
        not quantizer.in_vector_space
        and not recipe.decoder.train_tokens
        and "train_tokens" in recipe.decoder.model_fields_set
    ):
        raise RecipeError(f"codes of {quantizer.system} are no vectors to read: decoder.train_tokens must be true")
    dimensions = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]  # transformers is untyped here
    table, objective = recipe.decoder, recipe.objective
    shape = DecoderShape(
        layers=table.layers,
        heads=table.heads,
        width=table.width,
        embedding=dimensions,
        memory=dimensions,
        max_steps=len(quantizer.level_sizes) + 1,
        dropout=table.dropout,
        bearing=table.bearing and quantizer.system == "hhq" and not table.train_tokens,
    )
    retriever = Retriever(
        Encoder(backbone, recipe.encoder.pooling),
        Decoder(shape) if table.layers else None,
        quantizer.level_sizes,
        (objective.scale, objective.guided_scale, objective.guided_weight),
    )
    retriever.unit_heads = not isinstance(quantizer, Gumbel) or quantizer.settings.scaled_cosine
    out.mkdir(parents=True, exist_ok=True)
    return Run(recipe, material, retriever.to(device), tokenizer, out, device, quantizer, shelf)


def check_queries(recipe: Recipe, material: Material) -> None:
    """Refuse a recipe whose stages, the last one too, ask for queries that the data do not give.

    Raises:
        RecipeError: the first such stage, with the remedy.
    """
    for stage in recipe.stage:
        if not material.pairs(stage.queries):
            remedy = TRAIN_QUERIES if stage.queries == "real" else "give documents with words, or pseudo-queries"
            raise RecipeError(
                f"stage {stage.name!r} asks for {stage.queries} queries, and the data have none: {remedy}"
            )


def load_tokenizer(name: str) -> Tokenizer:
    """The fast tokenizer of a local folder or a hub name.

    Raises:
        StartError: there is none.
    """
    path = Path(name) / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    if path.parent.is_dir():
        raise StartError(f"encoder {name!r}: no tokenizer.json in this folder: give one of a Hugging Face encoder")
    try:
        return Tokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise StartError(f"encoder {name!r} is no folder here, and the hub did not give it: {error}") from None


def check_device(device: str) -> None:
    """Refuse a device that this machine or this torch lacks.

    Raises:
        StartError: with torch's own reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StartError(f"--device {device} cannot be used here ({reason}): give cpu, cuda or cuda:N") from None


def freeze(backbone: torch.nn.Module, recipe: Recipe) -> None:
    """Switch off gradients of the embedding tables and of the first layers, as the recipe says."""
    table = recipe.encoder
    parts = [module for name, module in backbone.named_modules() if name.endswith("embeddings")]
    layers = next((m for n, m in backbone.named_modules() if isinstance(m, torch.nn.ModuleList) and n), None)
    if table.freeze_layers > len(layers or []):
        raise RecipeError(f"encoder.freeze_layers is {table.freeze_layers}, the encoder has {len(layers or [])} layers")
    chosen = (parts if table.freeze_embeddings else []) + list(layers[: table.freeze_layers] if layers else [])
    for module in chosen:
        module.requires_grad_(False)


def restore(run: Run, model: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
    """Put a checkpoint's tensors back."""
    run.retriever.load_state_dict(model)
    if "vectors" in extra:
        run.vectors_ND = extra["vectors"].to(run.device)
    learnt = {name.removeprefix("quantizer."): t for name, t in extra.items() if name.startswith("quantizer.")}
    run.fitted = bool(learnt)
    if learnt:
        run.quantizer.restore(learnt)
    run.best = {name.removeprefix("best."): t for name, t in extra.items() if name.startswith("best.")}
    run.best_score, run.without_gain = float(extra["best_score"]), int(extra["without_gain"])
    run.distillation = float(extra["distillation"]) if "distillation" in extra else None


def extras(run: Run) -> dict[str, Tensor]:
    """What a checkpoint keeps beside the network."""
    kept = {f"quantizer.{name}": tensor for name, tensor in run.quantizer.learnt().items()}
    kept |= {f"best.{name}": tensor for name, tensor in run.best.items()}
    kept |= {"best_score": torch.tensor(run.best_score, dtype=torch.float64)}
    kept |= {"without_gain": torch.tensor(run.without_gain)}
    if run.distillation is not None:
        kept |= {"distillation": torch.tensor(run.distillation, dtype=torch.float64)}
    return kept | ({"vectors": run.vectors_ND} if run.vectors_ND is not None else {})


def encode_documents(run: Run) -> Tensor:
    """Encode all documents with the encoder as it stands, in float32 as indexing does.

    Under bf16 autocast vectors keep a cosine of .99998, and an RQ-VAE still gave a third of the documents other codes:
    its decoder would learn SIDs that the index does not have.
    """
    run.vectors_ND = run.shelf.vectors(run.retriever.encoder, run.material.documents, run.device, bf16=False)
    return run.vectors_ND


def quantizer_table(recipe: Recipe) -> dict[str, Any]:
    """A recipe's quantizer with the recipe's seed, unless it has one of its own."""
    return {"seed": recipe.seed} | recipe.quantizer


def fit_quantizer(run: Run, vectors_ND: Tensor) -> None:
    """Learn the codebooks; head and tail are told apart by how often train queries ask for a document."""
    if hasattr(run.quantizer, "interactions_N"):
        asked = [document for _, document in run.material.real]
        run.quantizer.interactions_N = np.bincount(asked, minlength=len(run.material.documents))
    run.shelf.fit(run.quantizer, quantizer_table(run.recipe), vectors_ND.cpu().numpy(), run.device)
    run.fitted = True


def make_tree(run: Run) -> CodeTree:
    """The tree of the documents' SIDs."""
    if run.vectors_ND is None:
        raise ValueError("documents are not encoded yet")
    vectors = run.vectors_ND.cpu().numpy()
    sids = codes_to_tokens(run.quantizer.encode(vectors), run.quantizer.level_sizes).astype(np.int64)
    console.print(f"p_unique {len(np.unique(sids, axis=0)) / len(sids):.4f} over {len(sids):,} documents")
    return build_tree(sids, vectors, list(accumulate(run.quantizer.level_sizes, initial=0)), run.device)


def weigh_words(run: Run) -> float:
    """The weight of words in `hybrid`: the recipe's, or what held-out queries choose; without any, the usual one."""
    if run.recipe.lexical_weight is not None:
        return run.recipe.lexical_weight
    material = run.material
    if not material.held_out:
        return DEFAULT_LEXICAL_WEIGHT
    asked = Texts([material.queries.ids[query] for query, _ in material.held_out], material.queries.pad)
    vectors_QD = embed(run.retriever.encoder, asked, run.device, run.bf16, "held-out queries").cpu().numpy()
    vectors_ND = (encode_documents(run) if run.vectors_ND is None else run.vectors_ND).cpu().numpy()
    wanted_Q = [document for _, document in material.held_out]
    weight, gained, before = choose_lexical_weight(
        WordTokenizer(Tokenizer.from_str(run.tokenizer.to_str())),
        material.document_words,
        material.held_out_words,
        wanted_Q,
        vectors_QD,
        vectors_ND,
    )
    run.log(lexical_weight=weight, hybrid_mrr=gained, exact_mrr=before)
    return weight


def publish_run(run: Run) -> Path:
    """Export both precisions, the documents' vectors, and the encoder if it was tuned."""
    if not run.fitted:
        fit_quantizer(run, run.vectors_ND if run.vectors_ND is not None else encode_documents(run))
    weight = weigh_words(run)
    write_vectors(run)
    run.retriever.to("cpu").eval()
    state = run.quantizer.state()
    names = tuple(folder.name for folder in run.material.sizes)
    for precision, name in (("float32", "model"), ("int8", "model-int8")):
        target = run.out / name
        publish_model(run.retriever, state, run.tokenizer, run.recipe, names, target, precision, weight)  # type: ignore[arg-type]
        console.print(f"model written: {target}")
    if any(stage.encoder_lr for stage in run.recipe.stage):
        save_encoder(run)
    return run.out / "model"


def write_vectors(run: Run) -> None:
    """Write the vectors that the SIDs were made from, a file for each data set, in the order of its corpus.

    An index that is given them has the SIDs that were trained, whatever the precision of its encoder (decision 15).
    """
    vectors_ND = encode_documents(run) if run.vectors_ND is None else run.vectors_ND
    first = 0
    for folder, count in run.material.sizes.items():
        file = vectors_file(run.out, folder)
        with write_errors(file):
            file.parent.mkdir(exist_ok=True)
            write_array(file, vectors_ND[first : first + count].cpu().numpy())
        first += count


def save_encoder(run: Run) -> None:
    """Write the tuned encoder as a Hugging Face folder, `out/encoder`, for other recipes to start from.

    It appears whole or not at all: what is there counts as tuned.
    """
    folder, partial = run.out / "encoder", run.out / "encoder.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with write_errors(folder):
        run.retriever.encoder.backbone.save_pretrained(partial)  # type: ignore[operator]  # transformers is untyped here
        save_tokenizer(run.tokenizer, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
