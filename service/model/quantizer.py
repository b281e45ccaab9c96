"""From vectors to semantic IDs and back: the quantizers' frozen halves in numpy, without torch.

Letters: N documents, D dimensions, L levels, K codes of a level, T tokens (sum of all K).

| kind | a level chooses | and goes on with |
|---|---|---|
| `householder` | first the greatest cosine, then the reflection that ends nearest (HHQ eq. 2-5) | the reflected point |
| `residual` | the nearest codeword (RQ-KMeans, RQ-VAE) | what the codeword leaves over |
| `residual_cosine` | the codeword of greatest cosine (DGI eq. 6, 13) | what the codeword leaves over |

All kinds read the tensor `codebooks` (T, D'). The tensors `projection.weight_i` (out, in) and `projection.bias_i`,
where given, are layers of an MLP with ReLU between them that is applied to the vectors first (RQ-VAE's encoder,
D → D'). The tensors `length_rule.*`, where given, say which of the chosen codes a document keeps: see
`service.model.lengths`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.model import lengths
from service.model.lengths import Codes, LengthRule
from service.model.lengths import QuantizerError as QuantizerError

Matrix = NDArray[np.float32]
Chooser = Callable[[Matrix, list[Matrix]], Codes]

NEGLIGIBLE = 1e-5  # length of a residual of unit vectors in float32 that is rounding
BLOCK_FLOATS = 1 << 24  # of the largest table of a block: 64 MiB


def assign_sids(
    vectors_ND: NDArray[Any],
    kind: str,
    tensors: Mapping[str, NDArray[Any]],
    level_sizes: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> Codes:
    """Return the semantic ID of every vector.

    Args:
        vectors_ND: (N, D) unit vectors, float32 or castable, memory map or array; read in blocks.
        kind: `householder`, `residual` or `residual_cosine`.
        tensors: the quantizer's tensors, see above.
        level_sizes: K of each level.
        advance: called with the number of vectors done, for a progress bar.

    Returns:
        Tokens (N, L) int32: level offset + code, packed to the left; shorter SIDs are padded with -1.

    Raises:
        QuantizerError: unknown kind or tensor, or sizes that do not fit together.
    """
    choose = _chooser(kind)
    codebooks, layers, rule = _checked(kind, tensors, level_sizes)
    _check_vectors(vectors_ND, layers[0][0].shape[1] if layers else codebooks[0].shape[1])
    chosen_first = [codebooks[level] for level in rule.order]
    tokens_NL = np.empty((len(vectors_ND), len(level_sizes)), np.int32)
    widest = max(*level_sizes, *(len(bias) for _, bias in layers), codebooks[0].shape[1])
    rows = max(1, BLOCK_FLOATS // widest)
    for start in range(0, len(vectors_ND), rows):
        block = _project(np.asarray(vectors_ND[start : start + rows], np.float32), layers)
        codes = rule.arrange(choose(block, chosen_first))
        tokens_NL[start : start + len(block)] = lengths.pack(codes, level_sizes)
        if advance is not None:
            advance(len(block))
    return tokens_NL


def reconstruct(
    tokens_NL: NDArray[np.integer[Any]], kind: str, tensors: Mapping[str, NDArray[Any]], level_sizes: Sequence[int]
) -> Matrix:
    """Return the points (N, D') float32 that semantic IDs stand for; a level without a token changes nothing.

    For `householder` they are unit vectors; for the residual kinds sums of codewords (in the projected space where
    there is a projection).

    Raises:
        QuantizerError: as `assign_sids`, a token that no level has, or two tokens of one level in a row.
    """
    _chooser(kind)
    codebooks, _, rule = _checked(kind, tensors, level_sizes)
    codes_NL = lengths.unpack(tokens_NL, level_sizes)
    points_ND = np.zeros((len(tokens_NL), codebooks[0].shape[1]), np.float32)
    for step, level in enumerate(rule.order):
        used_N = codes_NL[:, level] >= 0
        chosen = codebooks[level][codes_NL[used_N, level]]
        reflects = kind == "householder" and step > 0
        points_ND[used_N] = _reflect(points_ND[used_N], chosen) if reflects else points_ND[used_N] + chosen
    return points_ND


def _choose_householder(vectors_ND: Matrix, codebooks: list[Matrix]) -> Codes:
    """Greatest cosine first (eq. 2), then argmax of ⟨H(x̂; v), x⟩ = ⟨x̂, x⟩ − 2 ⟨x̂, v⟩⟨x, v⟩ (eq. 3-5)."""
    codes_NL = np.empty((len(vectors_ND), len(codebooks)), np.int32)
    codes_NL[:, 0] = (vectors_ND @ codebooks[0].T).argmax(axis=1)
    point_ND = codebooks[0][codes_NL[:, 0]]
    for level, codebook_KD in enumerate(codebooks[1:], start=1):
        gains_NK = point_ND @ codebook_KD.T
        gains_NK *= vectors_ND @ codebook_KD.T
        codes_NL[:, level] = gains_NK.argmin(axis=1)  # the factor -2 turns the greatest into the least
        point_ND = _reflect(point_ND, codebook_KD[codes_NL[:, level]])
    return codes_NL


def _choose_residual(vectors_ND: Matrix, codebooks: list[Matrix]) -> Codes:
    """Nearest codeword of what is left: argmin |r − c|² = argmax r·c − |c|²/2."""
    residual_ND = vectors_ND.copy()
    codes_NL = np.empty((len(vectors_ND), len(codebooks)), np.int32)
    for level, codebook_KD in enumerate(codebooks):
        scores_NK = residual_ND @ codebook_KD.T
        scores_NK -= np.einsum("kd,kd->k", codebook_KD, codebook_KD) / 2
        codes_NL[:, level] = scores_NK.argmax(axis=1)
        residual_ND -= codebook_KD[codes_NL[:, level]]
    return codes_NL


def _choose_residual_cosine(vectors_ND: Matrix, codebooks: list[Matrix]) -> Codes:
    """Codeword of greatest cosine to what is left (the residual's own length does not change the order).

    Where nothing is left but rounding, which has a direction too, it is the first.
    """
    residual_ND = vectors_ND.copy()
    codes_NL = np.empty((len(vectors_ND), len(codebooks)), np.int32)
    for level, codebook_KD in enumerate(codebooks):
        norms_K1 = np.linalg.norm(codebook_KD, axis=1, keepdims=True)
        directions_KD = codebook_KD / np.maximum(norms_K1, np.finfo(np.float32).tiny)
        residual_ND[np.linalg.norm(residual_ND, axis=1) < NEGLIGIBLE] = 0
        codes_NL[:, level] = (residual_ND @ directions_KD.T).argmax(axis=1)
        residual_ND -= codebook_KD[codes_NL[:, level]]
    return codes_NL


KINDS: dict[str, Chooser] = {
    "householder": _choose_householder,
    "residual": _choose_residual,
    "residual_cosine": _choose_residual_cosine,
}


def _reflect(point_ND: Matrix, direction_ND: Matrix) -> Matrix:
    """Householder reflection z − 2⟨z, v⟩v of rows (HHQ eq. 3)."""
    along_N1 = np.einsum("nd,nd->n", point_ND, direction_ND)[:, None]
    reflected: Matrix = point_ND - 2 * along_N1 * direction_ND
    return reflected


def _project(block_ND: Matrix, layers: list[tuple[Matrix, Matrix]]) -> Matrix:
    for number, (weight, bias) in enumerate(layers):
        block_ND = block_ND @ weight.T + bias
        if number < len(layers) - 1:
            np.maximum(block_ND, 0, out=block_ND)
    return block_ND


def _chooser(kind: str) -> Chooser:
    if kind not in KINDS:
        raise QuantizerError(f"quantizer kind {kind!r} is unknown, expected one of {sorted(KINDS)}: upgrade rhumbline")
    return KINDS[kind]


def _checked(
    kind: str, tensors: Mapping[str, NDArray[Any]], level_sizes: Sequence[int]
) -> tuple[list[Matrix], list[tuple[Matrix, Matrix]], LengthRule]:
    """Return the codebooks of all levels, the layers of the projection and the length rule."""
    if "codebooks" not in tensors:
        raise QuantizerError(f"a {kind} quantizer needs the tensor 'codebooks', got {sorted(tensors)}: export it again")
    table = np.asarray(tensors["codebooks"], np.float32)
    if table.ndim != 2 or len(table) != sum(level_sizes) or not np.isfinite(table).all():
        raise QuantizerError(
            f"codebooks of shape {table.shape} do not hold finite rows for levels of {list(level_sizes)} codes "
            f"(sum {sum(level_sizes)}): export the model again"
        )
    layers = _layers(tensors)
    if unknown := sorted(tensors.keys() - {"codebooks"} - lengths.NAMES - _layer_names(len(layers))):
        raise QuantizerError(f"quantizer tensors {unknown} are unknown to a {kind} quantizer: upgrade rhumbline")
    _check_chain(layers, table.shape[1])
    return np.split(table, np.cumsum(level_sizes)[:-1]), layers, lengths.read_rule(tensors, level_sizes)


def _layers(tensors: Mapping[str, NDArray[Any]]) -> list[tuple[Matrix, Matrix]]:
    count = 0
    while f"projection.weight_{count}" in tensors and f"projection.bias_{count}" in tensors:
        count += 1
    names = [(f"projection.weight_{layer}", f"projection.bias_{layer}") for layer in range(count)]
    return [(np.asarray(tensors[w], np.float32), np.asarray(tensors[b], np.float32)) for w, b in names]


def _layer_names(count: int) -> set[str]:
    return {f"projection.{part}_{layer}" for layer in range(count) for part in ("weight", "bias")}


def _check_chain(layers: list[tuple[Matrix, Matrix]], width: int) -> None:
    if any(weight.ndim != 2 or bias.ndim != 1 for weight, bias in layers):
        raise QuantizerError("projection weights are matrices and their biases rows: export the model again")
    outputs = [len(weight) for weight, _ in layers]
    inputs = [*(weight.shape[1] for weight, _ in layers[1:]), width]
    biases = [len(bias) for _, bias in layers]
    if layers and (outputs != inputs or biases != outputs):
        raise QuantizerError(
            f"projection layers give {outputs} values with biases of {biases}, the next ones take {inputs}: "
            "export the model again"
        )


def _check_vectors(vectors_ND: NDArray[Any], dimensions: int) -> None:
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != dimensions:
        raise QuantizerError(
            f"vectors of shape {vectors_ND.shape}, the quantizer takes {dimensions} dimensions: "
            "encode them with this model's encoder"
        )
