"""ACRQ and SA2CRQ: the loss against its words, frozen anchors, and what the service makes of the state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import models.quantizers.acrq as acrq
from models.quantizers.acrq import ACRQ, SA2CRQ, head_order, path_loss
from models.quantizers.base import QuantizerError, VectorError, codes_to_tokens, make_quantizer
from models.quantizers.residual import residual_codes
from models.quantizers.sarq import path_rule
from service.model.lengths import CONTINUED, read_rule
from service.model.quantizer import assign_sids

SIZES = (8, 12, 16)
BOTH = [ACRQ, SA2CRQ]


def make(system: type[ACRQ], **changes: Any) -> ACRQ:
    table = {"level_sizes": list(SIZES), "epochs": 2, "head_share": 0.4, "kmeans_iterations": 5}
    if system is SA2CRQ:
        table["threshold"] = 0.02
    made = make_quantizer({"system": system.system} | table | changes)
    assert type(made) is system
    return made


def interactions() -> NDArray[np.int64]:
    return np.random.default_rng(8).permutation(600) // 3


def test_the_loss_is_summed_to_each_items_own_depth() -> None:
    """Item by item and level by level, in plain numbers."""
    rng = np.random.default_rng(0)
    x, words, depths = rng.normal(size=(5, 6)), rng.normal(size=(5, 3, 6)), [1, 2, 3, 3, 1]
    total = 0.0
    for row, depth in enumerate(depths):
        residual, loss = x[row], 0.0
        for word in words[row, :depth]:
            loss += ((residual - word) ** 2).sum()
            residual = residual - word
        total += loss + (residual**2).sum()
    found = path_loss(torch.from_numpy(x), torch.from_numpy(words), torch.tensor(depths))
    assert float(found) == pytest.approx(total / 5)


def test_levels_behind_the_depth_have_no_gradient_and_residuals_pass_none_on() -> None:
    """With the reconstruction term taken away, the gradient of level l is that of its own distance alone."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(2, 4)))
    words = torch.from_numpy(rng.normal(size=(2, 3, 4))).requires_grad_()
    depths = torch.tensor([1, 2])
    path_loss(x, words, depths).backward()
    assert words.grad is not None
    assert (words.grad[0, 1:] == 0).all()
    assert (words.grad[1, 2:] == 0).all()
    fixed = words.detach()
    own = -2 * (x[1] - fixed[1, 0] - fixed[1, 1])  # second level's distance to what the first left over
    rebuilt = -2 * (x[1] - fixed[1, :2].sum(0))
    torch.testing.assert_close(words.grad[1, 1], (own + rebuilt) / 2)
    torch.testing.assert_close(words.grad[1, 0], (-2 * (x[1] - fixed[1, 0]) + rebuilt) / 2)


@pytest.mark.parametrize("system", BOTH)
def test_the_tail_does_not_move_the_anchors(
    vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, system: type[ACRQ]
) -> None:
    """Bit for bit what the head left; every extension row has other values than it started with, or was not chosen."""
    before: list[list[torch.Tensor]] = []
    whole = acrq._extend

    def spy(*arguments: Any) -> Any:
        before.append([codebook.clone() for codebook in arguments[2]])
        made = whole(*arguments)
        before.append([codebook.clone() for codebook in made[0]])
        return made

    monkeypatch.setattr(acrq, "_extend", spy)
    made = make(system)
    made.interactions_N = interactions()
    made.fit(vectors, progress=False)
    anchors, extended = before
    assert [len(codebook) for codebook in anchors] == [6, 9, 12]
    for level, codebook in enumerate(made.codebooks):
        count = len(anchors[level])
        assert len(codebook) == SIZES[level]
        assert torch.equal(codebook[:count], anchors[level])
        assert not torch.equal(codebook[count:], extended[level][count:])


def test_only_head_items_shape_the_anchors(vectors: NDArray[np.float32]) -> None:
    """Other tail vectors, the same anchors; other head vectors, other anchors."""
    counts = interactions()
    order = np.argsort(-counts, kind="stable")
    rng = np.random.default_rng(5)
    anchors = {}
    for name, rows in (("plain", []), ("tail", order[-120:]), ("head", order[:120])):
        changed = vectors.copy()
        changed[rows] = rng.normal(size=(len(rows), vectors.shape[1]))
        made = make(ACRQ, head_share=0.2)
        made.interactions_N = counts * 1000 + np.arange(600)[::-1]  # no ties: density does not matter
        made.fit(changed, progress=False)
        anchors[name] = torch.cat([book[:size] for book, size in zip(made.codebooks, (6, 9, 12), strict=True)])
    assert torch.equal(anchors["plain"], anchors["tail"])
    assert not torch.allclose(anchors["plain"], anchors["head"])


def test_training_raises_the_cosine_above_the_start(vectors: NDArray[np.float32]) -> None:
    cosine = {}
    for epochs in (0, 12):
        made = make(ACRQ, epochs=epochs, learning_rate=0.01)
        cosine[epochs] = made.fit(vectors, progress=False).objective[-1]
    assert cosine[12] > cosine[0] + 0.002


def test_in_either_stage_the_learning_rate_falls_to_zero_on_a_half_cosine(
    vectors: NDArray[np.float32], learning_rates: list[float]
) -> None:
    """240 head documents and 360 of the tail are two steps an epoch each."""
    make(ACRQ, epochs=10, batch_size=200, learning_rate=0.01).fit(vectors, progress=False)
    stage = np.repeat([0.01 * np.cos(np.pi / 2 * epoch / 10) ** 2 for epoch in range(10)], 2)
    assert learning_rates == pytest.approx([*stage, *stage])


def test_extensions_start_where_the_anchors_serve_worst() -> None:
    """The head and half of the tail lie around one direction, the other half of the tail around another."""
    rng = np.random.default_rng(2)
    directions = np.eye(8)[np.repeat([0, 1], [70, 30])]
    vectors = (directions + 0.05 * rng.normal(size=(100, 8))).astype(np.float32)
    made = make(ACRQ, level_sizes=[4, 4], epochs=0)
    made.interactions_N = np.repeat([9, 0], [40, 60])
    made.fit(vectors, progress=False)
    anchors, extension = made.codebooks[0][:3].numpy(), made.codebooks[0][3].numpy()
    np.testing.assert_allclose(anchors, np.eye(8)[[0, 0, 0]], atol=0.2)
    np.testing.assert_allclose(extension, np.eye(8)[1], atol=0.05)


def test_depths_follow_how_many_documents_share_a_path(vectors: NDArray[np.float32]) -> None:
    """The rule is the path table of all documents: a path through an extension row goes on where it is crowded."""
    made = make(SA2CRQ)
    made.interactions_N = interactions()
    made.fit(vectors, progress=False)
    full = residual_codes(made.codebooks, torch.from_numpy(vectors)).numpy()
    expected = path_rule(full.astype(np.int32), SIZES, 0.02)[CONTINUED]
    np.testing.assert_array_equal(made.state().tensors[CONTINUED], expected)
    found = made.encode(vectors)
    np.testing.assert_array_equal(found, read_rule({CONTINUED: expected}, SIZES).arrange(full))
    paths = full[:, 0] * 100 + full[:, 1]
    np.testing.assert_array_equal(found[:, 2] >= 0, np.bincount(paths)[paths] > 0.02 * len(vectors))
    assert set((found >= 0).sum(1).tolist()) == {2, 3}
    assert ((full[:, 0] >= 6) & (found[:, 2] >= 0)).any()


def test_the_heads_tables_have_the_same_budget(vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    """In stage 1 the head's paths end at so many documents, not at a share of the head."""
    budgets, counted = [], set()

    def spy(codes: Any, sizes: Any, share: float) -> Any:
        budgets.append(share * len(codes))
        counted.add(len(codes))
        return path_rule(codes, sizes, share)

    monkeypatch.setattr(acrq, "path_rule", spy)
    make(SA2CRQ).fit(vectors, progress=False)
    assert counted == {240, 600}, "the head, then all"
    assert budgets == pytest.approx([0.02 * len(vectors)] * len(budgets))


@pytest.mark.parametrize("system", BOTH)
def test_the_service_assigns_the_same_sids(vectors: NDArray[np.float32], system: type[ACRQ]) -> None:
    made = make(system)
    made.fit(vectors[:400], progress=False)
    kind, tensors, sizes = made.state()
    np.testing.assert_array_equal(
        assign_sids(vectors, kind, tensors, sizes), codes_to_tokens(made.encode(vectors), sizes)
    )
    again = system(made.settings)
    again.restore(made.learnt())
    np.testing.assert_array_equal(again.encode(vectors), made.encode(vectors))
    np.testing.assert_allclose(again.reconstruct(again.encode(vectors)), made.reconstruct(made.encode(vectors)))


def test_equal_seeds_give_equal_states(vectors: NDArray[np.float32]) -> None:
    states = []
    for _ in range(2):
        made = make(SA2CRQ)
        made.fit(vectors, progress=False)
        states.append(made.state().tensors)
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_head_is_by_interactions_then_density_then_place() -> None:
    density = np.array([5, 9, 5, 9, 1])
    assert head_order(None, density).tolist() == [1, 3, 0, 2, 4]
    assert head_order(np.array([0, 0, 7, 0, 8]), density).tolist() == [4, 2, 1, 3, 0]


def test_interactions_are_a_count_of_every_document() -> None:
    with pytest.raises(QuantizerError, match=r"int64 of shape \(2,\), need 3 counts"):
        head_order(np.array([1, 2]), np.ones(3, np.int64))
    with pytest.raises(QuantizerError, match="need 3 counts of at least 0"):
        head_order(np.array([1, 2, -1]), np.ones(3, np.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level_sizes": [16, 8]}, r"level_sizes is \[16, 8\]: levels must not get smaller, e.g. \[8, 16\]"),
        ({"extension": 0.0}, "extension is 0.0, must be a share above 0 and below 1"),
        ({"head_share": 1.0}, "head_share is 1.0, must be a share"),
        ({"threshold": 2.0}, "threshold is 2.0, must be a share"),
        ({"epochs": -1}, r"acrq.epochs is -1, must be at least 0"),
    ],
)
def test_contradictory_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        make(SA2CRQ, **changes)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.01, r"6 of 600 documents are head \(head_share 0.01\), its largest level has 12 codes"),
        (0.999, r"0 of 600 documents are tail \(head_share 0.999\), its largest level has 4 codes"),
    ],
)
def test_groups_too_small_for_their_codes_are_refused(vectors: NDArray[np.float32], share: float, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        make(ACRQ, head_share=share).fit(vectors, progress=False)


@pytest.mark.parametrize("share", [1e-6, 0.001, 0.2, 1 / 3, 0.4, 0.97])
@pytest.mark.parametrize("sizes", [(2, 2), (8, 12, 16), (16, 16, 300)])
def test_the_least_corpus_is_the_first_that_gives_every_code_a_document(share: float, sizes: tuple[int, ...]) -> None:
    """Also where it is a million documents, without counting to it."""
    made = make(ACRQ, level_sizes=list(sizes), head_share=share)
    settings, least = made.settings, made.least_documents

    def fits(n: int) -> bool:
        head = settings.head(n)
        return n >= max(sizes) and head >= max(settings.anchors) and n - head >= max(settings.extensions)

    assert fits(least)
    assert not any(fits(n) for n in range(max(0, least - 1000), least))
