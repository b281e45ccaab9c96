"""Training of a retriever by a recipe: data → stages → model. Resumable at every epoch.

A run folder holds `checkpoint.safetensors`, `log.jsonl` and, at the end, `model/` (float32) and `model-int8/`.
The encoder may move in a stage; SIDs are always made from the vectors of the encoder as it stands when a decode stage
begins, so a decode stage that comes last leaves the encoder frozen, and the model is consistent. `vectors/` keeps the
documents' vectors, for an index of the same SIDs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.data import Dataset, load_dataset
from models.quantizers.base import progress_bar
from models.quantizers.gumbel import Gumbel
from models.retriever.checkpoint import Place, load_checkpoint, save_checkpoint
from models.retriever.joint import GradientLog, Joint, joint_epoch, tie_codebooks, untie_codebooks
from models.retriever.lengths import choose_lengths
from models.retriever.recipe import Recipe, Stage
from models.retriever.run import (
    Run,
    console,
    encode_documents,
    extras,
    fit_quantizer,
    make_tree,
    publish_run,
    restore,
    start_run,
)
from models.retriever.shelf import Shelf
from models.retriever.stages import Work, asked_for_several, contrast_epoch, decode_epoch
from models.retriever.validate import calibrate, exact_ranks, likeliest_weight, mean_reciprocal_rank, walked_scores


def train(
    recipe: Recipe,
    datasets: Sequence[Dataset],
    out: Path,
    device: str = "cpu",
    resume: bool = True,
    shelf: Shelf | None = None,
) -> Path:
    """Run a recipe to its end and publish the models; a run that was cut off goes on after its last epoch.

    Trainings that are given the same `shelf` share what a frozen encoder made of the same texts.

    Returns:
        The folder of the float32 model, `out/model`; the int8 one stands beside it.
    """
    run = start_run(recipe, datasets, out, device, shelf or Shelf())
    checkpoint_path, fingerprint = out / "checkpoint.safetensors", run.fingerprint()
    checkpoint = load_checkpoint(checkpoint_path, fingerprint) if resume else None
    place = checkpoint.place if checkpoint else Place()
    with run.log_file.open("ab") as log:
        log.truncate(min(place.logged, log.tell()))
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


def prepare(run: Run, stage: Stage) -> None:
    """Before a stage: encode the documents as the encoder stands; before codes are first needed, fit the codebooks."""
    run.best, run.best_score, run.without_gain, run.distillation = {}, -1.0, 0, None
    vectors_ND = encode_documents(run) if run.vectors_ND is None else run.vectors_ND
    if stage.objective != "contrast" and not run.fitted:
        fit_quantizer(run, vectors_ND)
        if run.quantizer.in_vector_space:
            with torch.no_grad():
                run.retriever.tokens.copy_(torch.cat(run.quantizer.codebooks))


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
    retriever.log_weight.requires_grad_(not held_to_be_right(run, stage))
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
    units = len({document for _, document in pairs}) if stage.objective == "contrast" else len(pairs)
    batches = math.ceil(units / stage.batch)
    schedule = Schedule(optimizer, stage.epochs * math.ceil(batches / stage.accumulate), stage.warmup)
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
        real=frozenset(query for query, _ in run.material.real),
        vectors_ND=run.vectors_ND,
        stage=stage,
        objective=run.recipe.objective,
        device=run.device,
        bf16=run.bf16,
        step=step,
        bar=bar,
        task=bar.add_task(stage.name, total=batches * stage.epochs, loss=""),
        relevant=asked_for_several(run.material.queries, pairs),
    )
    if stage.objective == "decode":
        work.tree = make_tree(run)
    if stage.objective != "contrast" and not stage.encoder_lr:
        work.cache = run.shelf.states(retriever.encoder, run.material.queries, run.device, run.bf16)
    if run.distillation is None:  # a run that goes on keeps what its stage began with
        run.distillation = trusted_distillation(run, work)
        trust_geometry(run, work)
    work.distillation = run.distillation
    return work, optimizer, schedule


def held_to_be_right(run: Run, stage: Stage) -> bool:
    """Whether the dense retriever counts in this stage as far as held-out queries find it right (`trust`).

    On the queries that it was tuned on, it is always right.
    """
    return stage.objective == "decode" and run.recipe.objective.trust == "as_right" and bool(run.material.held_out)


def trusted_distillation(run: Run, work: Work) -> float:
    """The teacher's share of what a stage teaches: the recipe's, or that times its MRR@10 on held-out queries."""
    share = run.recipe.objective.distillation
    if not held_to_be_right(run, work.stage):
        return share
    right = mean_reciprocal_rank(exact_ranks(work, run.material.held_out))
    run.log(stage=work.stage.name, teacher_mrr=right, distillation=share * right)
    return share * right


def trust_geometry(run: Run, work: Work) -> None:
    """Set the weight of geometry in guided scoring to what held-out queries make likeliest; the stage leaves it."""
    if held_to_be_right(run, work.stage) and run.recipe.objective.guided:
        weight = likeliest_weight(work, run.material.held_out)
        with torch.no_grad():
            run.retriever.log_weight.fill_(math.log(weight))
        run.log(stage=work.stage.name, guided_weight=weight)


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
    """The epochs of one stage, each seeded by its own number, checkpointed, and validated on held-out queries."""
    stage = work.stage
    with work.bar:
        work.bar.update(work.task, completed=first * (work.bar.tasks[0].total or 0) / stage.epochs)
        for epoch in range(first, stage.epochs):
            if stage.patience and run.without_gain >= stage.patience:
                break
            seed = f"{run.recipe.seed}/{number}/{epoch}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]))
            began = time.monotonic()
            losses = run_epoch(run, work, schedule, seed)
            walked = (epoch + 1) % stage.validate_every == 0 or epoch + 1 == stage.epochs
            scores = walked_scores(work, run.material.held_out) if walked else {}
            named = {f"{name}_loss": loss for name, loss in losses.items()} | scores
            run.log(stage=stage.name, epoch=epoch + 1, **named, seconds=time.monotonic() - began)
            keep_best(run, stage, scores)
            place = Place(number, epoch + 1, schedule.taken, run.log_file.stat().st_size)
            save_checkpoint(checkpoint_path, place, fingerprint, run.retriever, optimizer, extras(run))
    if run.best:
        run.retriever.load_state_dict(run.best)
    if number == len(run.recipe.stage) - 1:
        choose_lengths(run, work)
    if stage.objective == "decode" and run.recipe.objective.guided and run.material.held_out:
        share, gain = calibrate(work, run.material.held_out)
        run.log(stage=stage.name, decoder_share=share, guided_mrr=gain)
    if stage.encoder_lr:
        work.vectors_ND = encode_documents(run)
        if run.material.held_out:
            run.log(stage=stage.name, exact_mrr=mean_reciprocal_rank(exact_ranks(work, run.material.held_out)))
    if stage.objective == "joint" and isinstance(
        run.quantizer, Gumbel
    ):  # codes are made anew, hard, and hold from here
        untie_codebooks(run.quantizer)
        work.tree = make_tree(run)
        run.log(stage=stage.name, **walked_scores(work, run.material.held_out))
    place = Place(number + 1, logged=run.log_file.stat().st_size)
    save_checkpoint(checkpoint_path, place, fingerprint, run.retriever, None, extras(run))


def run_epoch(run: Run, work: Work, schedule: Schedule, seed: str) -> dict[str, float]:
    """One epoch of a stage by its objective; gives mean losses."""
    if work.stage.objective == "joint" and isinstance(run.quantizer, Gumbel):
        joint = Joint(work, run.quantizer, run.recipe.joint, lambda: schedule.taken / schedule.total)
        return joint_epoch(joint, seed)
    return contrast_epoch(work, seed) if work.stage.objective == "contrast" else decode_epoch(work, seed)


def keep_best(run: Run, stage: Stage, scores: dict[str, float]) -> None:
    """Remember the best decode epoch by the sum of its walks, and count the epochs since."""
    if stage.objective != "decode" or not stage.patience or not scores:
        return
    run.without_gain += 1
    if sum(scores.values()) > run.best_score:
        run.best_score, run.without_gain = sum(scores.values()), 0
        run.best = {name: tensor.detach().clone() for name, tensor in run.retriever.state_dict().items()}


def run(recipe: Recipe, folders: Sequence[Path], out: Path, device: str = "cpu", resume: bool = True) -> Path:
    """Train on folders in the BEIR layout; the entry of `rhumb train`."""
    history = recipe.text.history_count
    datasets = [load_dataset(folder, splits=train_splits(folder), history=history) for folder in folders]
    return train(recipe, datasets, out, device, resume)


def train_splits(folder: Path) -> list[str]:
    """What training may read: the train split, and to validate on the dev split; without any, pseudo-queries alone."""
    return [split for split in ("train", "dev") if (folder / "qrels" / f"{split}.tsv").is_file()]
