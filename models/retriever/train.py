"""Training of a retriever by a recipe: data → stages → model. Resumable at every epoch.

A run folder holds `checkpoint.safetensors`, `log.jsonl` and, at the end, `model/` (float32) and `model-int8/`.
The encoder may move in a stage; SIDs are always made from the vectors of the encoder as it stands when a decode stage
begins, so the last stage of a recipe leaves the encoder frozen and the model consistent.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from models.data import Dataset, load_dataset
from models.quantizers.base import Quantizer, codes_to_tokens, make_quantizer, progress_bar
from models.quantizers.gumbel import Gumbel
from models.quantizers.lengths import RuledQuantizer
from models.retriever.batches import StateCache, embed
from models.retriever.checkpoint import Place, load_checkpoint, save_checkpoint
from models.retriever.joint import GradientLog, Joint, joint_epoch, tie_codebooks, untie_codebooks
from models.retriever.material import Material, gather
from models.retriever.network import Decoder, DecoderShape, Encoder, Retriever, load_backbone
from models.retriever.publish import publish_model
from models.retriever.recipe import Recipe, RecipeError, Stage
from models.retriever.stages import Work, contrast_epoch, decode_epoch
from models.retriever.tree import CodeTree, build_tree
from models.retriever.validate import exact_ranks, mean_reciprocal_rank, walked_ranks
from service.search.tables import Scoring

console = Console(stderr=True)


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
    vectors_ND: Tensor | None = None
    fitted: bool = False
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return self.recipe.bf16

    def fingerprint(self) -> str:
        """What a checkpoint must agree with: the recipe and the token ids of the data."""
        material = self.material
        body = json.dumps([self.recipe.model_dump(mode="json"), material.documents.ids, material.queries.ids])
        return hashlib.sha256(body.encode()).hexdigest()

    def log(self, **row: object) -> None:
        """Append a line to log.jsonl and show it."""
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        console.print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def start_run(recipe: Recipe, datasets: Sequence[Dataset], out: Path, device: str) -> Run:
    """Load the encoder, tokenize the data, make an untrained decoder."""
    if not recipe.encoder.name:
        raise RecipeError("encoder.name is empty: name a Hugging Face encoder or a local folder (or --encoder)")
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.encoder.name)
    material = gather(datasets, recipe, tokenizer)
    backbone = load_backbone(recipe.encoder.name, recipe.encoder.dropout)
    freeze(backbone, recipe)
    quantizer = make_quantizer({"seed": recipe.seed} | recipe.quantizer)
    if recipe.objective.constraint == "none" and isinstance(quantizer, RuledQuantizer):
        raise RecipeError(
            "objective.constraint = 'none' normalises over the level of each position, and "
            f"{quantizer.system!r} makes SIDs that skip levels: use 'trie' or 'predecessor'"
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
    return Run(recipe, material, retriever.to(device), tokenizer, out, device, quantizer)


def load_tokenizer(name: str) -> Tokenizer:
    """The fast tokenizer of a local folder or a hub name."""
    path = Path(name) / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)


def freeze(backbone: torch.nn.Module, recipe: Recipe) -> None:
    """Switch off gradients of the embedding tables and of the first layers, as the recipe says."""
    table = recipe.encoder
    parts = [module for name, module in backbone.named_modules() if name.endswith("embeddings")]
    layers = next((m for n, m in backbone.named_modules() if isinstance(m, torch.nn.ModuleList) and n), None)
    chosen = (parts if table.freeze_embeddings else []) + list(layers[: table.freeze_layers] if layers else [])
    for module in chosen:
        module.requires_grad_(False)


def train(recipe: Recipe, datasets: Sequence[Dataset], out: Path, device: str = "cpu", resume: bool = True) -> Path:
    """Run a recipe to its end and publish the models; a run that was cut off goes on after its last epoch.

    Returns:
        The folder of the float32 model, `out/model`; the int8 one stands beside it.
    """
    run = start_run(recipe, datasets, out, device)
    checkpoint_path, fingerprint = out / "checkpoint.safetensors", run.fingerprint()
    checkpoint = load_checkpoint(checkpoint_path, fingerprint) if resume else None
    place = checkpoint.place if checkpoint else Place()
    if checkpoint:
        restore(run, checkpoint.model, checkpoint.extra)
        console.print(f"resuming at stage {place.stage + 1}, epoch {place.epoch + 1}")
    for number, stage in enumerate(recipe.stage):
        if number < place.stage:
            continue
        first = place.epoch if number == place.stage else 0
        if first == 0:
            prepare(run, stage)
        work, optimizer, schedule = set_up(run, stage)
        if first and checkpoint:
            checkpoint.restore_optimizer(optimizer)
            schedule.taken = place.steps
        run_epochs(run, work, optimizer, schedule, number, first, checkpoint_path, fingerprint)
    return publish_run(run)


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
    run.best_score = float(extra["best_score"]) if "best_score" in extra else -1.0


def extras(run: Run) -> dict[str, Tensor]:
    """What a checkpoint keeps beside the network."""
    kept = {f"quantizer.{name}": tensor for name, tensor in run.quantizer.learnt().items()}
    kept |= {f"best.{name}": tensor for name, tensor in run.best.items()} | {"best_score": torch.tensor(run.best_score)}
    return kept | ({"vectors": run.vectors_ND} if run.vectors_ND is not None else {})


def prepare(run: Run, stage: Stage) -> None:
    """Before a stage: encode the documents as the encoder stands; before codes are first needed, fit the codebooks."""
    run.best, run.best_score = {}, -1.0
    vectors_ND = encode_documents(run) if run.vectors_ND is None else run.vectors_ND
    if stage.objective != "contrast" and not run.fitted:
        if hasattr(run.quantizer, "interactions_N"):  # head and tail by how often train queries ask for a document
            asked = [document for _, document in run.material.real]
            run.quantizer.interactions_N = np.bincount(asked, minlength=len(run.material.documents))
        run.quantizer.fit(vectors_ND.cpu().numpy(), run.device)
        run.fitted = True
        if run.quantizer.in_vector_space:
            with torch.no_grad():
                run.retriever.tokens.copy_(torch.cat(run.quantizer.codebooks))


def encode_documents(run: Run) -> Tensor:
    """Encode all documents with the encoder as it stands."""
    run.vectors_ND = embed(run.retriever.encoder, run.material.documents, run.device, run.bf16, "documents")
    return run.vectors_ND


def make_tree(run: Run) -> CodeTree:
    """The tree of the documents' SIDs."""
    if run.vectors_ND is None:
        raise ValueError("documents are not encoded yet")
    vectors = run.vectors_ND.cpu().numpy()
    sids = codes_to_tokens(run.quantizer.encode(vectors), run.quantizer.level_sizes).astype(np.int64)
    console.print(f"p_unique {len(np.unique(sids, axis=0)) / len(sids):.4f} over {len(sids):,} documents")
    return build_tree(sids, vectors, sum(run.quantizer.level_sizes), run.device)


@dataclass
class Schedule:
    """Linear warm-up, then linear decay to 5 % of the peak."""

    optimizer: torch.optim.Optimizer
    total: int
    warmup: float
    taken: int = 0

    def advance(self) -> None:
        """Set the learning rates for the next optimizer step."""
        share = self.taken / max(1, self.total)
        factor = min(share / self.warmup, 1.0) if self.warmup and share < self.warmup else 1 - 0.95 * share
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * max(factor, 1e-3)
        self.taken += 1


def parameter_groups(run: Run, stage: Stage) -> list[dict[str, Any]]:
    """What a stage trains: encoder, decoder with scales and tokens, codebooks; each with its learning rate."""
    retriever, joint = run.retriever, stage.objective == "joint"
    free = run.recipe.decoder.train_tokens or not run.quantizer.in_vector_space
    retriever.tokens.requires_grad_(joint or free)
    books: list[Tensor] = []
    if joint and isinstance(run.quantizer, Gumbel):
        books = tie_codebooks(retriever, run.quantizer, run.recipe.joint.share)
    encoder = [p for p in retriever.encoder.parameters() if p.requires_grad]
    heads = [p for name, p in retriever.named_parameters() if not name.startswith("encoder.") and p.requires_grad]
    heads = [p for p in heads if all(p is not book for book in books)]
    rates = {"encoder": stage.encoder_lr, "decoder": stage.decoder_lr, "quantizer": stage.quantizer_lr}
    trained = {
        "encoder": encoder if stage.encoder_lr else [],
        "decoder": heads if stage.objective != "contrast" else [],
        "quantizer": books,
    }
    return [{"params": p, "lr": rates[name], "peak": rates[name], "name": name} for name, p in trained.items() if p]


def set_up(run: Run, stage: Stage) -> tuple[Work, torch.optim.Optimizer, Schedule]:
    """Make what the epochs of a stage share."""
    retriever = run.retriever
    optimizer = torch.optim.AdamW(parameter_groups(run, stage), weight_decay=0.01, fused=True)
    pairs = run.material.pairs(stage.queries)
    if not pairs:
        raise RecipeError(f"stage {stage.name!r} asks for {stage.queries} queries, and the data have none")
    units = len({document for _, document in pairs}) if stage.objective == "contrast" else len(pairs)
    batches = math.ceil(units / stage.batch)
    schedule = Schedule(optimizer, max(1, stage.epochs * batches // stage.accumulate), stage.warmup)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = GradientLog(optimizer, partial(run.log, stage=stage.name), run.recipe.joint.gradient_log_steps)

    def step(loss: Tensor, now: bool) -> None:
        torch.autograd.backward(loss / stage.accumulate)
        if now:
            if stage.objective == "joint":
                gradients.record(schedule.taken + 1)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            schedule.advance()
            optimizer.step()
            optimizer.zero_grad()

    if run.vectors_ND is None:
        raise ValueError("documents are not encoded yet")
    bar = progress_bar(True)
    work = Work(
        retriever=retriever,
        queries=run.material.queries,
        documents=run.material.documents,
        pairs=pairs,
        vectors_ND=run.vectors_ND,
        stage=stage,
        objective=run.recipe.objective,
        device=run.device,
        bf16=run.bf16,
        step=step,
        bar=bar,
        task=bar.add_task(stage.name, total=batches * stage.epochs, loss=""),
    )
    if stage.objective == "decode":
        work.tree = make_tree(run)
    if stage.objective != "contrast" and not stage.encoder_lr:
        work.cache = StateCache(retriever.encoder, run.material.queries, run.device, run.bf16)
    return work, optimizer, schedule


def run_epochs(
    run: Run,
    work: Work,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    number: int,
    first: int,
    checkpoint_path: Path,
    fingerprint: str,
) -> None:
    """The epochs of one stage, each seeded by its own number, checkpointed, and validated on held-out train queries."""
    stage = work.stage
    without_gain = 0
    with work.bar:
        work.bar.update(work.task, completed=first * (work.bar.tasks[0].total or 0) / stage.epochs)
        for epoch in range(first, stage.epochs):
            seed = f"{run.recipe.seed}/{number}/{epoch}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]))
            began = time.monotonic()
            losses = run_epoch(run, work, schedule, seed)
            scores = validate(run, work)
            named = {f"{name}_loss": loss for name, loss in losses.items()} | {f"{k}_mrr": v for k, v in scores.items()}
            run.log(stage=stage.name, epoch=epoch + 1, **named, seconds=time.monotonic() - began)
            without_gain = keep_best(run, stage, scores, without_gain)
            place = Place(number, epoch + 1, schedule.taken)
            save_checkpoint(checkpoint_path, place, fingerprint, run.retriever, optimizer, extras(run))
            if stage.patience and without_gain >= stage.patience:
                break
    if run.best:
        run.retriever.load_state_dict(run.best)
    if stage.encoder_lr:
        work.vectors_ND = encode_documents(run)
        if run.material.held_out:
            run.log(stage=stage.name, exact_mrr=mean_reciprocal_rank(exact_ranks(work, run.material.held_out)))
    if stage.objective == "joint" and isinstance(
        run.quantizer, Gumbel
    ):  # codes are made anew, hard, and hold from here
        untie_codebooks(run.quantizer)
        work.tree = make_tree(run)
        run.log(stage=stage.name, **{f"{name}_mrr": score for name, score in validate(run, work).items()})
    save_checkpoint(checkpoint_path, Place(number + 1), fingerprint, run.retriever, None, extras(run))


def run_epoch(run: Run, work: Work, schedule: Schedule, seed: str) -> dict[str, float]:
    """One epoch of a stage by its objective; gives mean losses."""
    if work.stage.objective == "joint" and isinstance(run.quantizer, Gumbel):
        joint = Joint(work, run.quantizer, run.recipe.joint, lambda: schedule.taken / schedule.total)
        return joint_epoch(joint, seed)
    return contrast_epoch(work, seed) if work.stage.objective == "contrast" else decode_epoch(work, seed)


def validate(run: Run, work: Work) -> dict[str, float]:
    """MRR@10 on the held-out train queries: exact cosine, and for decode stages the walk at beam 10."""
    held_out = run.material.held_out
    if not held_out:
        return {}
    if work.tree is None:  # documents move: they are encoded again only when the stage is over
        return {}
    wanted: dict[Scoring, float] = {
        "generative": run.recipe.objective.generative,
        "guided": run.recipe.objective.guided,
    }
    return {name: mean_reciprocal_rank(walked_ranks(work, held_out, name)) for name, on in wanted.items() if on}


def keep_best(run: Run, stage: Stage, scores: dict[str, float], without_gain: int) -> int:
    """Remember the best decode epoch by the sum of its walks; returns how many epochs went by without a gain."""
    if stage.objective != "decode" or not stage.patience or not scores:
        return 0
    if sum(scores.values()) <= run.best_score:
        return without_gain + 1
    run.best_score = sum(scores.values())
    run.best = {name: tensor.detach().clone() for name, tensor in run.retriever.state_dict().items()}
    return 0


def publish_run(run: Run) -> Path:
    """Export both precisions."""
    if not run.fitted:
        vectors = run.vectors_ND if run.vectors_ND is not None else encode_documents(run)
        run.quantizer.fit(vectors.cpu().numpy(), run.device)
    run.retriever.to("cpu").eval()
    state = run.quantizer.state()
    for precision, name in (("float32", "model"), ("int8", "model-int8")):
        target = run.out / name
        publish_model(run.retriever, state, run.tokenizer, run.recipe, run.material.names, target, precision)  # type: ignore[arg-type]
        console.print(f"model written: {target}")
    return run.out / "model"


def run(
    recipe: Recipe, folders: Sequence[Path], out: Path, device: str = "cpu", resume: bool = True, history: int = 0
) -> Path:
    """Train on folders in the BEIR layout; the entry of `rhumb train`."""
    datasets = [load_dataset(folder, splits=train_splits(folder), history=history) for folder in folders]
    return train(recipe, datasets, out, device, resume)


def train_splits(folder: Path) -> list[str]:
    """Only the train split is ever read in training; a corpus without one trains on pseudo-queries."""
    return ["train"] if (folder / "qrels" / "train.tsv").is_file() else []
