"""From a trained retriever to a model artefact: the two graphs, tokens, quantizer, tokenizer, manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from models.export import export_decoder, export_encoder
from models.quantizers.base import QuantizerState
from models.retriever.network import Retriever
from models.retriever.recipe import Recipe
from models.tensors import write_errors
from service.index.arrays import write_array
from service.index.artefact import new_artefact, publish
from service.index.manifest import DEFAULT_LEXICAL_WEIGHT, DecoderShape, ModelManifest, Provenance, QuantizerSettings

Precision = Literal["float32", "int8"]


def publish_model(
    retriever: Retriever,
    quantizer: QuantizerState,
    tokenizer: Tokenizer,
    recipe: Recipe,
    data: tuple[str, ...],
    target: Path,
    precision: Precision,
    lexical_weight: float = DEFAULT_LEXICAL_WEIGHT,
    replace: bool = True,
) -> ModelManifest:
    """Write one model artefact of a precision; the target appears whole or not at all."""
    with new_artefact(target, replace, "model") as staging:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        save_tokenizer(tokenizer, staging)
        export_encoder(retriever.encoder, retriever.decoder, staging / "encoder.onnx", precision == "int8")
        tensors, path = {n: np.ascontiguousarray(t) for n, t in quantizer.tensors.items()}, "quantizer.safetensors"
        with write_errors(target / path):
            save_file(tensors, staging / path)
        if retriever.decoder is not None:
            export_decoder(retriever.decoder, staging / "decoder.onnx", precision == "int8")
            write_array(staging / "tokens.npy", token_table(retriever))
        manifest = describe(retriever, quantizer, recipe, data, precision)
        return publish(staging, manifest.model_copy(update={"lexical_weight": lexical_weight}))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`; a full disk is an OSError, where the library's own `save` raises a bare Exception."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def token_table(retriever: Retriever) -> np.ndarray:
    """Unit token embeddings (T, E) float32 (see `Retriever.unit_tokens`) with the start vector as row T."""
    rows = [retriever.unit_tokens().detach().cpu().numpy(), retriever.start.detach().cpu().numpy()[None]]
    return np.concatenate(rows).astype(np.float32)


def describe(
    retriever: Retriever, quantizer: QuantizerState, recipe: Recipe, data: tuple[str, ...], precision: Precision
) -> ModelManifest:
    """Fill in the manifest; a retriever without a decoder offers `geometric` only."""
    decoder = retriever.decoder
    objective = recipe.objective
    offered = ["geometric"]
    if decoder is not None:
        offered += ["generative"] * (objective.generative > 0) + ["guided"] * (objective.guided > 0)
    scales = {
        "token_scale": retriever.log_alone,
        "guided_scale": retriever.log_beside,
    }
    shape = decoder and DecoderShape(
        layers=decoder.shape.layers,
        heads=decoder.shape.heads,
        head_dimensions=decoder.shape.width // decoder.shape.heads,
        embedding_dimensions=decoder.shape.embedding,
    )
    fields = {name: tuple(log.exp().tolist()) if decoder is not None else () for name, log in scales.items()}
    default = recipe.default_scoring if recipe.default_scoring in offered else offered[-1]
    return ModelManifest.model_validate(
        fields
        | {
            "guided_weight": float(retriever.log_weight.detach().exp()) if decoder is not None else 0.0,
            "dimensions": int(quantizer.tensors.get("projection.weight_0", quantizer.tensors["codebooks"]).shape[1]),
            "level_sizes": quantizer.level_sizes,
            "quantizer": QuantizerSettings(kind=quantizer.kind),
            "decoder": shape,
            "normalisation": objective.normalisation,
            "scorings": offered,
            "default_scoring": default,
            "fusion_weight": recipe.fusion_weight,
            "text": recipe.text,
            "precision": precision,
            "provenance": Provenance(
                recipe=recipe.name,
                data=data,
                licences=recipe.licences,
                base_model=Path(recipe.encoder.name).name or recipe.encoder.name,
                seed=recipe.seed,
                notes=recipe.notes,
            ),
        }
    )
