"""Objectives against plain restatements that walk a dictionary trie."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from models.retriever.network import Encoder, Retriever
from models.retriever.objectives import Scales, contrast, guided_loss, masked_loss, unmasked_loss
from models.retriever.tree import CodeTree, build_tree, measure, reaches
from service.index.regions import HANDFUL, OPTIMISM
from service.search.scores import node_reach

SIZES = (4, 3, 3)
OFFSETS = (0, 4, 7, 10)
TOKENS = 10


def some_sids(seed: int, documents: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([o + rng.integers(0, k, documents) for o, k in zip(OFFSETS, SIZES, strict=False)], 1)


def some_tree(seed: int) -> tuple[CodeTree, np.ndarray, np.ndarray]:
    return tree_of(some_sids(seed), seed)


def tree_of(sids: np.ndarray, seed: int) -> tuple[CodeTree, np.ndarray, np.ndarray]:
    vectors = np.random.default_rng(seed + 1).normal(size=(len(sids), 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return build_tree(sids, vectors, OFFSETS, "cpu"), sids, vectors


def under(sids: np.ndarray, prefix: tuple[int, ...]) -> list[int]:
    return [row for row, sid in enumerate(sids) if tuple(sid[: len(prefix)]) == prefix]


def plain_loss(sids: np.ndarray, document: int, level: int, logit: dict[int, float]) -> float:
    """HHQ eq. 10 by a dictionary: minus the log of the target's share among the tokens that follow the prefix."""
    followers = {int(sid[level]) for sid in sids[under(sids, tuple(sids[document, :level]))]}
    total = sum(math.exp(logit[token]) for token in followers)
    return -math.log(math.exp(logit[int(sids[document, level])]) / total)


def plain_reach(vectors: np.ndarray, query: np.ndarray, leaf: bool) -> float:
    """Mean cosine and scaled deviation of more than a handful of documents; of a handful or a leaf the best cosine."""
    n, cosines = len(vectors), vectors.astype(np.float64) @ query
    if n <= HANDFUL or leaf:
        return float(cosines.max())
    _, lengths, directions = np.linalg.svd(vectors.astype(np.float64) - vectors.mean(0), full_matrices=False)
    axes = n // HANDFUL
    variances = lengths**2 / n
    variance = variances[:axes] @ (directions[:axes] @ query) ** 2 + variances[axes:].sum() / (6 - axes)
    return float(cosines.mean() + OPTIMISM * math.sqrt(2 * math.log(n) * variance))


def test_every_token_has_the_scales_of_its_level() -> None:
    """Set to other values than each other, level by level, so that none can stand in for another."""
    retriever = Retriever(Encoder(torch.nn.Identity()), None, (2, 3), (1.0, 1.0, 1.0))
    with torch.no_grad():
        retriever.log_alone.copy_(torch.tensor([2.0, 3.0]).log())
        retriever.log_beside.copy_(torch.tensor([5.0, 7.0]).log())
        retriever.log_weight.copy_(torch.tensor(11.0).log())
    scales = Scales.of(retriever)
    assert scales.alone.tolist() == pytest.approx([2, 2, 3, 3, 3])
    assert scales.beside.tolist() == pytest.approx([5, 5, 7, 7, 7])
    assert scales.weight.tolist() == pytest.approx(11)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), level=st.integers(0, 2))
def test_csft_is_the_share_among_valid_children(seed: int, level: int) -> None:
    """Generative and guided losses are those of a dictionary trie with reaches restated."""
    tree, sids, vectors = some_tree(seed)
    rng = np.random.default_rng(seed)
    documents = rng.integers(0, len(sids), 5)
    cosine = rng.uniform(-1, 1, (5, TOKENS))
    query = rng.normal(size=(5, 6))
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    scales = Scales(*(torch.tensor(rng.uniform(1, 5, size)) for size in (TOKENS, TOKENS, ())))
    near = measure(tree, torch.tensor(query).float())
    step = (tree, level, torch.tensor(documents), torch.tensor(cosine), near, scales)
    got = masked_loss(*step, distillation=0.0), guided_loss(*step)
    wanted = [0.0, 0.0]
    for row, document in enumerate(documents):
        alone, both = {}, {}
        for token in range(TOKENS):
            members = under(sids, (*sids[document, :level].tolist(), token))
            leaf = len({tuple(sids[member]) for member in members}) == 1
            reach = plain_reach(vectors[members], query[row], leaf) if members else 0.0
            alone[token] = float(scales.alone[token]) * cosine[row, token]
            both[token] = float(scales.beside[token]) * cosine[row, token] + float(scales.weight) * reach
        wanted[0] += plain_loss(sids, document, level, alone)
        wanted[1] += plain_loss(sids, document, level, both)
    assert [float(x) for x in got] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("level", [0, 1])
def test_the_guided_loss_has_slopes_through_the_decoder_and_through_the_geometry(level: int) -> None:
    """Into the cosines, the query's vector and the weight, each what the loss rises by over a small step."""
    tree, _, _ = some_tree(5)
    generator = torch.Generator().manual_seed(2)
    documents = torch.tensor([3, 8, 17, 21])
    inputs = {
        "cosine": torch.rand(4, TOKENS, generator=generator) * 2 - 1,
        "query": normalize(torch.randn(4, 6, generator=generator), dim=1),
        "weight": torch.tensor(4.0),
    }

    def loss(cosine: torch.Tensor, query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scales = Scales(torch.full((TOKENS,), 2.0), torch.full((TOKENS,), 2.0), weight)
        return guided_loss(tree, level, documents, cosine, measure(tree, query), scales)

    for name, value in inputs.items():
        moved = value.clone().requires_grad_()
        loss(**(inputs | {name: moved})).backward()
        assert moved.grad is not None
        direction = moved.grad / moved.grad.norm()
        rise = [float(loss(**(inputs | {name: value + step * direction}))) for step in (-0.005, 0.005)]
        assert float(moved.grad.norm()) > 0.05
        assert (rise[1] - rise[0]) / 0.01 == pytest.approx(float(moved.grad.norm()), rel=0.02)


def test_paths_lead_through_the_children_of_every_prefix_that_several_sids_share() -> None:
    tree, sids, _ = some_tree(3)
    children, holders = defaultdict(set), defaultdict(set)
    for sid in sids:
        for length in range(4):
            holders[tuple(sid[:length])].add(tuple(sid))
            children[tuple(sid[:length])] |= {int(sid[length])} if length < 3 else set()
    for document, sid in enumerate(sids):
        for level in range(3):
            node, alone = int(tree.path[document, level]), len(holders[tuple(sid[:level])]) == 1
            assert (int(tree.path[document, level + 1]) == -1) == alone, "what is certain is no step"
            if alone:
                break
            block = tree.token[int(tree.child_start[node]) : int(tree.child_start[node + 1])]
            assert set(block.tolist()) == children[tuple(sid[:level])]


def test_reaches_are_those_of_the_service() -> None:
    tree, _, vectors = some_tree(11)
    query = vectors[:3] + 0.1
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    nodes = torch.arange(1, tree.trie.nodes).expand(3, -1)
    got = reaches(tree, nodes, measure(tree, torch.tensor(query)))
    regions = tree.regions
    for row, vector in enumerate(query):
        for place, node in enumerate(range(1, tree.trie.nodes)):
            wanted = node_reach(
                node, int(tree.lo[node]), int(tree.end[node]), regions.region_M, regions.start_C, regions.rest_C,
                regions.rows_RD, tree.vectors.numpy(), vector,
            )  # fmt: skip
            assert float(got[row, place]) == pytest.approx(wanted, abs=1e-5)


def test_variable_lengths_end_early() -> None:
    """A document whose SID has ended costs nothing at deeper levels."""
    sids = np.array([[0, 4, 7], [0, 5, -1], [1, 4, 8], [0, 4, 9]])
    vectors = np.eye(4, dtype=np.float32)
    tree = build_tree(sids, vectors, OFFSETS, "cpu")
    assert tree.path[1].tolist()[-1] == -1
    scales = Scales(torch.ones(TOKENS), torch.ones(TOKENS), torch.ones(()))
    near = measure(tree, torch.rand(1, 4))
    zero, some = (
        (masked_loss(*step, 0.0), guided_loss(*step))
        for step in ((tree, 2, torch.tensor([row]), torch.rand(1, TOKENS), near, scales) for row in (1, 0))
    )
    assert [float(x) for x in zero] == [0.0, 0.0]
    assert min(float(x) for x in some) > 0.1


def test_a_tree_may_be_shallower_than_its_levels() -> None:
    sids = np.array([[0, -1, -1], [1, -1, -1]])
    tree = build_tree(sids, np.eye(2, dtype=np.float32), OFFSETS, "cpu")
    assert tree.path.tolist() == [[0, 1, -1, -1], [0, 2, -1, -1]]


@pytest.mark.parametrize("level", [0, 1])
def test_distillation_teaches_what_the_dense_retriever_believes(level: int) -> None:
    """0.4 of the hard loss and 0.6 spread over the children by the chances of their documents, exp(cosine / 0.1)."""
    tree, sids, vectors = some_tree(8)
    rng = np.random.default_rng(3)
    query = rng.normal(size=6)
    query /= np.linalg.norm(query)
    cosine = torch.tensor(rng.uniform(-1, 1, (1, TOKENS)))
    scales = Scales(torch.full((TOKENS,), 2.0), torch.full((TOKENS,), 2.0), torch.tensor(2.0))
    near = measure(tree, torch.tensor(query[None]).float(), temperature=0.1)
    got = masked_loss(tree, level, torch.tensor([4]), cosine, near, scales, 0.6)
    prefix = tuple(sids[4, :level].tolist())
    tokens = sorted({int(sid[level]) for sid in sids[under(sids, prefix)]})
    chance = {t: sum(math.exp(vectors[m] @ query / 0.1) for m in under(sids, (*prefix, t))) for t in tokens}
    total = sum(math.exp(2 * float(cosine[0, token])) for token in tokens)
    log_p = {token: 2 * float(cosine[0, token]) - math.log(total) for token in tokens}
    spread = sum(chance[token] / sum(chance.values()) * log_p[token] for token in tokens)
    assert len(tokens) > 1
    assert float(got) == pytest.approx(-0.4 * log_p[int(sids[4, level])] - 0.6 * spread, rel=1e-4)


@pytest.mark.parametrize("distillation", [0.0, 0.6])
@pytest.mark.parametrize("predecessor", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("skips", [True, False])
def test_looser_masks(skips: bool, level: int, predecessor: bool, distillation: float) -> None:
    """The shares are among tokens seen after the predecessor, or all of the level; the teacher's among the children.

    No SID begins with token 3; those of documents 9 and 2 have ended before level 2, that of 5 even before level 1.
    Where some leave out level 1, as document 0, what stands at that depth is of two levels.
    """
    sids = some_sids(21)
    sids[:, 0] %= 3
    sids[[9, 2], 2] = -1
    sids[5, 1:] = -1
    if skips:
        sids[[0, 3, 8], 1] = sids[[0, 3, 8], 2]
        sids[[0, 3, 8], 2] = -1
    tree, _, vectors = tree_of(sids, 21)
    generator = torch.Generator().manual_seed(1)
    cosine = torch.rand(5, TOKENS, generator=generator)
    query = normalize(torch.randn(5, 6, generator=generator), dim=1)
    scales = Scales(torch.full((TOKENS,), 3.0), torch.full((TOKENS,), 3.0), torch.tensor(3.0))
    documents = [0, 5, 9, 2, 1]
    near = measure(tree, query, temperature=0.1)
    got = unmasked_loss(tree, level, torch.tensor(documents), cosine, near, scales, distillation, predecessor)
    wanted = 0.0
    for row, document in enumerate(documents):
        target, prefix = int(sids[document, level]), tuple(sids[document, :level].tolist())
        if target < 0:
            continue  # it costs nothing that there is no further token
        children = {int(sids[other, level]) for other in under(sids, prefix)} - {-1}
        seen = {int(sid[level]) for sid in sids if level == 0 or sid[level - 1] == prefix[-1]} - {-1}
        standing = range(OFFSETS[level], OFFSETS[3 if skips and level == 1 else level + 1])
        allowed = seen if predecessor else set(standing)
        total = sum(math.exp(3 * float(cosine[row, token])) for token in allowed)
        log_p = {token: 3 * float(cosine[row, token]) - math.log(total) for token in allowed}
        chance = {
            token: sum(math.exp(vectors[m] @ query[row].numpy() / 0.1) for m in under(sids, (*prefix, token)))
            for token in children
        }
        taught = sum(chance[token] / sum(chance.values()) * log_p[token] for token in children)
        wanted -= (1 - distillation) * log_p[target] + distillation * taught
    assert wanted > 0
    assert float(got) == pytest.approx(wanted, rel=1e-4)


def test_contrast_is_the_log_share_of_the_own_document() -> None:
    """DGI eq. 19 by a loop, with a known second relevant document left out of the sum."""
    generator = torch.Generator().manual_seed(4)
    queries, keys = (normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (3, 7))
    label = torch.tensor([0, 6, 2])
    known = torch.zeros(3, 7, dtype=torch.bool)
    known[1, 3] = True
    wanted = 0.0
    for row in range(3):
        terms = [math.exp(float(queries[row] @ keys[j]) / 0.1) for j in range(7) if not known[row, j]]
        wanted -= math.log(math.exp(float(queries[row] @ keys[label[row]]) / 0.1) / sum(terms)) / 3
    assert float(contrast(queries, keys, label, 0.1, known)) == pytest.approx(wanted, rel=1e-5)
