"""Recipes: what a training run does, as a small TOML file that is checked before anything runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.quantizers.base import make_quantizer
from service.index.manifest import MAX_LEXICAL_WEIGHT, Normalisation, Scoring
from service.model.text import TextSettings

RECIPES = Path(__file__).parents[1] / "recipes"


Model = TypeVar("Model", bound=BaseModel)


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names the key, what it holds and what is allowed."""


class Table(BaseModel):
    """A frozen table of a recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderTable(Table):
    """`[encoder]`: a Hugging Face name or a local folder, and how it is used."""

    name: str = ""
    pooling: Literal["mean", "cls"] = "mean"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    freeze_embeddings: bool = True
    freeze_layers: int = Field(default=0, ge=0)


class DecoderTable(Table):
    """`[decoder]`: 0 layers means a model without a decoder, which serves `geometric` only.

    `bearing` lets the decoder know the direction from the point reached to the query; it needs codes that reflect (HHQ)
    and token embeddings that stay the codebooks, and is left out otherwise.
    """

    layers: int = Field(default=2, ge=0, le=24)
    heads: int = Field(default=6, ge=1)
    width: int = Field(default=384, ge=8)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    bearing: bool = True
    train_tokens: bool = False

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> DecoderTable:
        if self.layers and self.width % self.heads:
            fitting = self.width + -self.width % self.heads
            raise ValueError(f"width is {self.width}, no multiple of heads, {self.heads}: give e.g. width {fitting}")
        return self


class PseudoTable(Table):
    """`[pseudo_queries]`: a file, a local sequence-to-sequence model, or the extractive sampler."""

    source: Literal["extractive", "file", "model"] = "extractive"
    path: str = ""
    per_document: int = Field(default=4, ge=1, le=100)

    @model_validator(mode="after")
    def _path_where_needed(self) -> PseudoTable:
        if (self.source != "extractive") == (not self.path):
            raise ValueError(f"source {self.source!r} {'needs' if not self.path else 'takes no'} path")
        return self


class ObjectiveTable(Table):
    """`[objective]`: weights of the losses and their settings.

    `constraint` says among which tokens the generative loss chooses; the guided loss chooses among children always.
    `distillation` is the share of the generative target that the dense retriever gives. `trust = "as_right"` listens to
    it as far as it is right on held-out queries: that share is multiplied by its MRR@10 there, and `guided_weight` is
    not learnt on the queries that it was tuned on, but what makes the held-out ones likeliest.
    """

    constraint: Literal["trie", "predecessor", "none"] = "trie"
    generative: float = Field(default=1.0, ge=0)
    guided: float = Field(default=1.0, ge=0)
    contrast: float = Field(default=1.0, ge=0)
    distillation: float = Field(default=0.5, ge=0, le=1)
    trust: Literal["full", "as_right"] = "full"
    temperature: float = Field(default=0.05, gt=0)
    scale: float = Field(default=20.0, gt=0)
    guided_scale: float = Field(default=3.0, gt=0)
    guided_weight: float = Field(default=40.0, gt=0)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> ObjectiveTable:
        read_by = {"generative": ("distillation",), "guided": ("guided_scale", "guided_weight")}
        for scoring, keys in read_by.items():
            unread = [key for key in keys if key in self.model_fields_set and getattr(self, key)]
            if unread and not getattr(self, scoring):
                raise ValueError(
                    f"{unread[0]} is {getattr(self, unread[0])} and {scoring} 0: that scoring is not trained, remove "
                    f"{unread[0]} or set {scoring} above 0"
                )
        if self.trust == "as_right" and not self.distillation and not self.guided:
            raise ValueError(
                "trust is 'as_right', distillation 0 and guided 0: nothing listens to the dense retriever, remove "
                "trust, or set one of them above 0"
            )
        return self

    @property
    def normalisation(self) -> Normalisation:
        """Among which tokens the service normalises generative scores: those that the loss chose among.

        Of `predecessor` it sees fewer, the children of the whole prefix: every SID that it writes exists.
        """
        return "full" if self.constraint == "none" else "constrained"


class JointTable(Table):
    """`[joint]`: DGI's joint training; the weights of next-token and InfoNCE losses stand in `[objective]`.

    reconstruction, local, diversity: weights of eq. 17, 18 and 20 (the paper: 1 each). beta: of eq. 18 (not given).
    temperature_start, temperature_end: of Gumbel-softmax, annealed exponentially over the stage.
    straight_through: hard codes with copied gradients instead of soft codes, so without the temperatures. share: heads
        are the codebooks.
    gradient_log_steps: optimizer steps between two lines of gradient norms in log.jsonl.
    """

    reconstruction: float = Field(default=1.0, ge=0)
    local: float = Field(default=1.0, ge=0)
    diversity: float = Field(default=1.0, ge=0)
    beta: float = Field(default=0.25, ge=0)
    temperature_start: float = Field(default=1.0, gt=0)
    temperature_end: float = Field(default=0.1, gt=0)
    straight_through: bool = False
    share: bool = True
    gradient_log_steps: int = Field(default=50, ge=1)

    @model_validator(mode="after")
    def _cools(self) -> JointTable:
        if self.temperature_end > self.temperature_start:
            raise ValueError(f"temperature rises from {self.temperature_start} to {self.temperature_end}: it must fall")
        return self


class Stage(Table):
    """`[[stage]]`: `contrast` tunes the encoder, `decode` trains the decoder on paths, `joint` also the codebooks.

    `batch` counts documents in `contrast` (all their queries come along) and queries in `decode`. A `decode` stage with
    `encoder_lr > 0` moves the encoder too, held near its document vectors by `anchor`. `leave_out` is the probability
    with which a contrast stage cuts a query that is copied from its document out of it. Held-out queries are walked
    after every `validate_every`-th epoch and after the last.
    """

    name: str
    objective: Literal["contrast", "decode", "joint"]
    queries: Literal["pseudo", "real", "both"] = "both"
    epochs: int = Field(ge=1, le=1000)
    batch: int = Field(default=256, ge=2)
    accumulate: int = Field(default=1, ge=1)
    encoder_lr: float = Field(default=0.0, ge=0)
    decoder_lr: float = Field(default=5e-4, ge=0)
    quantizer_lr: float = Field(default=5e-4, ge=0)
    anchor: float = Field(default=0.0, ge=0)
    leave_out: float = Field(default=0.0, ge=0, le=1)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    patience: int = Field(default=0, ge=0)
    validate_every: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _something_learns(self) -> Stage:
        if self.objective == "contrast" and not self.encoder_lr:
            raise ValueError(f"stage {self.name!r}: a contrast stage trains the encoder, encoder_lr must be above 0")
        if self.objective == "joint" and (self.patience or self.anchor):
            raise ValueError(f"stage {self.name!r}: patience and anchor have no meaning while codes move: remove them")
        if self.patience and self.validate_every > 1:
            raise ValueError(f"stage {self.name!r}: patience counts epochs, so validate_every must be 1")
        if self.leave_out and self.objective != "contrast":
            raise ValueError(f"stage {self.name!r}: leave_out belongs to contrast stages, this one is {self.objective}")
        if self.objective != "joint" and "quantizer_lr" in self.model_fields_set:
            raise ValueError(f"stage {self.name!r}: quantizer_lr belongs to joint stages, this one is {self.objective}")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Stage:
        named = {key: key in self.model_fields_set for key in ("decoder_lr", "validate_every")}
        set_ = named | {"patience": self.patience, "anchor": self.anchor}
        if self.objective == "contrast" and any(set_.values()):
            raise ValueError(
                f"stage {self.name!r}: a contrast stage trains the encoder alone, remove "
                f"{' and '.join(key for key, value in set_.items() if value)}"
            )
        if self.anchor and not self.encoder_lr:
            raise ValueError(
                f"stage {self.name!r}: anchor is {self.anchor} and encoder_lr 0: nothing moves that it could hold, "
                "remove it or set encoder_lr above 0"
            )
        return self


class Recipe(Table):
    """A whole recipe."""

    name: str
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    text: TextSettings = TextSettings(max_query_tokens=48, max_document_tokens=128)
    encoder: EncoderTable = EncoderTable()
    quantizer: dict[str, Any] = Field(default_factory=lambda: {"system": "hhq"})
    decoder: DecoderTable = DecoderTable()
    pseudo_queries: PseudoTable = PseudoTable()
    objective: ObjectiveTable = ObjectiveTable()
    joint: JointTable = JointTable()
    stage: tuple[Stage, ...] = Field(min_length=1)
    dev_share: float = Field(default=0.05, ge=0, lt=0.5)
    bf16: bool = True
    notes: str = ""
    licences: tuple[str, ...] = ()
    fusion_weight: float = Field(default=20.0, ge=0)
    lexical_weight: float | None = Field(default=None, ge=0, le=MAX_LEXICAL_WEIGHT)  # None: held-out queries choose
    default_scoring: Scoring = "guided"

    @field_validator("quantizer")
    @classmethod
    def _quantizer_can_be_made(cls, table: dict[str, Any]) -> dict[str, Any]:
        make_quantizer(table)  # its errors name the setting
        return table

    @model_validator(mode="after")
    def _joint_stages_fit(self) -> Recipe:
        joint = [stage.objective == "joint" for stage in self.stage]
        if not any(joint):
            if "joint" in self.model_fields_set:
                raise ValueError("[joint] is given, but no stage has objective = 'joint'")
            return self
        if (system := self.quantizer.get("system")) != "dgi":
            raise ValueError(f"a joint stage needs quantizer.system = 'dgi', not {system!r}")
        if self.stage[-1].objective != "joint":
            return self
        if self.objective.constraint != "none":
            raise ValueError(
                "a joint stage predicts codes among all of a level: set objective.constraint = 'none' and guided = 0, "
                f"or end with a decode stage that trains with constraint = {self.objective.constraint!r}"
            )
        if self.objective.guided or not self.objective.generative:
            raise ValueError(
                f"objective.generative is {self.objective.generative} and objective.guided {self.objective.guided}: "
                "a joint stage trains generative scoring alone, set guided = 0 and generative above 0, or end with a "
                "decode stage"
            )
        unread = self.objective.model_fields_set & {"distillation", "trust"}
        if unread and all(stage.objective != "decode" for stage in self.stage):
            raise ValueError(
                f"objective.{min(unread)} is of decode stages, and there is none: leave it out, or add one"
            )
        return self

    @model_validator(mode="after")
    def _scale_is_read(self) -> Recipe:
        given, read = "scale" in self.objective.model_fields_set, any(s.objective == "joint" for s in self.stage)
        if given and not self.objective.generative and not read:
            raise ValueError(
                f"objective.scale is {self.objective.scale} and objective.generative 0: nothing reads it, remove scale "
                "or set generative above 0"
            )
        return self

    @model_validator(mode="after")
    def _decoder_learns(self) -> Recipe:
        kinds = [stage.objective for stage in self.stage]
        uses_codes = [kind != "contrast" for kind in kinds]
        if any(uses_codes) and not self.decoder.layers:
            raise ValueError(f"a {kinds[uses_codes.index(True)]} stage needs a decoder: decoder.layers is 0")
        if not any(uses_codes):
            if self.decoder.layers:
                raise ValueError("no stage trains the decoder: add a decode stage, or set decoder.layers = 0")
            return self
        if not all(uses_codes[uses_codes.index(True) :]):
            raise ValueError("a contrast stage follows one that uses codes, and would move the vectors away: reorder")
        if "decode" in kinds and not self.objective.generative and not self.objective.guided:
            raise ValueError("objective.generative and objective.guided are 0: a decode stage would learn nothing")
        return self

    @model_validator(mode="after")
    def _the_index_holds_what_was_trained(self) -> Recipe:
        last = self.stage[-1]
        if last.objective == "decode" and last.encoder_lr:
            raise ValueError(
                f"stage {last.name!r} comes last and moves the encoder (encoder_lr {last.encoder_lr}): documents would "
                "get other codes than it was taught; add a decode stage with encoder_lr = 0"
            )
        return self

    @model_validator(mode="after")
    def _copied_queries_can_be_found(self) -> Recipe:
        if self.text.query_prefix and any(stage.leave_out for stage in self.stage):
            raise ValueError(
                f"leave_out looks for a query's words in its document, and text.query_prefix is "
                f"{self.text.query_prefix!r}: use one of them"
            )
        return self

    @model_validator(mode="after")
    def _default_scoring_is_trained(self) -> Recipe:
        name = self.default_scoring
        if "default_scoring" not in self.model_fields_set or name == "geometric":
            return self
        if not self.decoder.layers:
            raise ValueError(f"default_scoring is {name!r}, and decoder.layers is 0: set 'geometric'")
        if not getattr(self.objective, name):
            raise ValueError(
                f"default_scoring is {name!r}, and objective.{name} is 0: raise it, or choose a scoring that is trained"
            )
        return self

    @model_validator(mode="after")
    def _held_out_queries_can_choose(self) -> Recipe:
        if self.quantizer.get("held_out") and "threshold" in self.quantizer:
            raise ValueError(
                f"quantizer.threshold is {self.quantizer['threshold']}, and with held_out the held-out queries choose "
                "it: use one of them"
            )
        if self.quantizer.get("held_out") and not self.decoder.layers:
            raise ValueError(
                "quantizer.held_out lets held-out queries choose the lengths by the decoder's walk: decoder.layers "
                "must be above 0"
            )
        return self


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name, or any TOML file.

    Raises:
        RecipeError: no such recipe, not TOML, unknown or contradictory keys (named, with the allowed ones).
    """
    path, table = read_table(name_or_path)
    try:
        return parse_recipe(table)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def read_table(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    """Read the TOML of a shipped recipe by name, or of any file, unchecked.

    Raises:
        RecipeError: no such recipe, or not TOML.
    """
    path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {name_or_path!r}: give a TOML file, or one of: {shipped}")
    return path, read_toml("recipe", path)


def read_toml(what: str, path: Path) -> dict[str, Any]:
    """Read a TOML file, unchecked; RecipeError calls it `what`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} {path} is not TOML: {error}") from None


def parse_recipe(table: dict[str, Any]) -> Recipe:
    """Check a recipe given as a dictionary; see `load_recipe`."""
    return check_table(Recipe, table)


def check_table(model: type[Model], table: dict[str, Any]) -> Model:
    """Check a dictionary; raises RecipeError that names every wrong key, an unknown one with the allowed ones."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(model, item) for item in error.errors())) from None


def _explain(model: Any, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg'].removeprefix('Value error, ')}"
    for part in item["loc"][:-1]:
        if isinstance(part, str):  # a number is a place in a list of tables
            annotation = model.model_fields[part].annotation
            model = next(iter(get_args(annotation)), annotation)
    return f"{where}: unknown key; allowed here: {', '.join(sorted(model.model_fields))}"
