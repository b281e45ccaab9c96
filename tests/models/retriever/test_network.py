"""The decoder's two ways of running, and the exported graphs, give one answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import normalize

from models.export import export_decoder, export_encoder
from models.quantizers.hhq import HHQ, HHQSettings
from models.retriever.network import (
    Decoder,
    DecoderShape,
    Dropout,
    Encoder,
    Retriever,
    attend,
    attention_bias,
    load_backbone,
    path_points,
)
from service.model.decoder import cache_names

SHAPE = DecoderShape(layers=2, heads=2, width=16, embedding=12, memory=24, max_steps=5, dropout=0.3)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    torch.manual_seed(1)
    return Encoder(load_backbone(str(tiny_encoder))).eval()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(2)
    return Decoder(SHAPE).eval()


def some_queries() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def test_steps_with_caches_equal_teacher_forcing(encoder: Encoder, decoder: Decoder) -> None:
    """Hidden states of a path are the same whether its positions are run at once or one by one."""
    ids, mask = some_queries()
    with torch.no_grad():
        memories = decoder.memories(encoder(ids, mask)[1])
        path = normalize(torch.randn(3, 4, 12), dim=-1)
        whole = decoder(path, memories, mask)
        past = [(torch.zeros(3, 1, 2, 0, 8),) * 2] * 2
        for step in range(4):
            hidden, past, _ = decoder.step(path[:, step : step + 1], torch.tensor([step]), mask, memories, past)
            torch.testing.assert_close(hidden[:, 0], whole[:, step], atol=1e-5, rtol=1e-4)


def test_a_bearing_points_from_the_reconstruction_to_the_query(tmp_path: Path) -> None:
    """Points are what HHQ reconstructs from the codes so far; steps, teacher forcing and the graph agree on them."""
    shape = DecoderShape(layers=1, heads=2, width=16, embedding=12, memory=24, max_steps=5, bearing=True)
    decoder = Decoder(shape).eval()
    torch.nn.init.normal_(decoder.write.weight)
    quantizer = HHQ(HHQSettings(level_sizes=(4, 4, 4)))
    quantizer.codebooks = [normalize(torch.randn(4, 12), dim=-1) for _ in range(3)]
    codes = np.array([[0, 1, 2], [3, 3, 0]])
    rows = [torch.stack([quantizer.codebooks[level][code] for level, code in enumerate(row)]) for row in codes]
    path = torch.cat([torch.randn(2, 1, 12), torch.stack(rows)], 1)
    points = path_points(path)
    for length in (1, 2, 3):
        kept = np.where(np.arange(3) < length, codes, -1)
        np.testing.assert_allclose(points[:, length].numpy(), quantizer.reconstruct(kept), atol=1e-5)
    vector, states, mask = normalize(torch.randn(2, 12), dim=-1), torch.randn(2, 5, 24), torch.ones(2, 5).long()
    export_decoder(decoder, tmp_path / "decoder.onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    with torch.no_grad():
        memories = decoder.memories(states)
        whole = decoder(path, memories, mask, vector)
    feed = {"attention_mask": mask.numpy(), "vector": vector.numpy()}
    feed |= {f"memory_{half}_0": tensor.numpy() for half, tensor in zip(("key", "value"), memories[0], strict=True)}
    past = [np.zeros((2, 1, 2, 0, 8), np.float32)] * 2 + [np.zeros((2, 1, 12), np.float32)]
    for step in range(4):
        names = ("past_key_0", "past_value_0", "past_point")
        inputs = {"embedding": path[:, step : step + 1].numpy(), "step": np.array([step])}
        hidden, *past = graph.run(None, feed | inputs | dict(zip(names, past, strict=True)))
        np.testing.assert_allclose(hidden[:, 0], whole[:, step].numpy(), atol=1e-5)
        np.testing.assert_allclose(past[-1][:, 0], points[:, step].numpy(), atol=1e-5)


def test_an_untrained_bearing_goes_where_geometry_points() -> None:
    decoder = Decoder(DecoderShape(layers=1, heads=2, width=16, embedding=12, memory=24, bearing=True)).eval()
    vector, states, mask = normalize(torch.randn(2, 12), dim=-1), torch.randn(2, 5, 24), torch.ones(2, 5).long()
    with torch.no_grad():
        hidden = decoder(torch.randn(2, 1, 12), decoder.memories(states), mask, vector)
    torch.testing.assert_close(hidden[:, 0], vector)


def test_later_codes_do_not_change_earlier_states(encoder: Encoder, decoder: Decoder) -> None:
    ids, mask = some_queries()
    with torch.no_grad():
        memories = decoder.memories(encoder(ids, mask)[1])
        path = normalize(torch.randn(3, 4, 12), dim=-1)
        changed = path.clone()
        changed[:, 3] = -changed[:, 3]
        before, after = decoder(path, memories, mask), decoder(changed, memories, mask)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3], atol=1e-3)


def test_padding_tokens_change_nothing(encoder: Encoder, decoder: Decoder) -> None:
    ids, mask = some_queries()
    garbage = torch.where(mask == 1, ids, 7)
    with torch.no_grad():
        (vector, states), (other_vector, other_states) = encoder(ids, mask), encoder(garbage, mask)
        path = normalize(torch.randn(3, 2, 12), dim=-1)
        hidden = decoder(path, decoder.memories(states), mask)
        other = decoder(path, decoder.memories(other_states), mask)
    torch.testing.assert_close(vector, other_vector)
    torch.testing.assert_close(hidden, other, atol=1e-5, rtol=1e-4)


def test_onnx_graphs_equal_torch(encoder: Encoder, decoder: Decoder, tmp_path: Path) -> None:
    """Float32 graphs agree with torch to 1e-4 for other shapes than they were traced with."""
    export_encoder(encoder, decoder, tmp_path / "encoder.onnx")
    export_decoder(decoder, tmp_path / "decoder.onnx")
    ids, mask = some_queries()
    encode = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    vector, *memory = encode.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected, states = encoder(ids, mask)
        memories = decoder.memories(states)
    np.testing.assert_allclose(vector, expected.numpy(), atol=1e-4)
    decode = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    embeddings = normalize(torch.randn(3, 6, 12), dim=-1)
    past = [torch.randn(3, 6, 2, 2, 8) for _ in range(4)]
    feed = {"embedding": embeddings.numpy(), "step": np.array([2]), "attention_mask": mask.numpy()}
    feed |= dict(zip(cache_names("memory", 2), memory, strict=True))
    feed |= {name: tensor.numpy() for name, tensor in zip(cache_names("past", 2), past, strict=True)}
    hidden, *present = decode.run(None, feed)
    with torch.no_grad():
        pairs = [(past[0], past[1]), (past[2], past[3])]
        wanted, wanted_present, _ = decoder.step(embeddings, torch.tensor([2]), mask, memories, pairs)
    np.testing.assert_allclose(hidden, wanted.numpy(), atol=1e-4)
    np.testing.assert_allclose(present[2], wanted_present[1][0].numpy(), atol=1e-4)


def test_int8_stays_near_float32(encoder: Encoder, decoder: Decoder, tmp_path: Path) -> None:
    for int8 in (False, True):
        export_encoder(encoder, decoder, tmp_path / f"{int8}.onnx", int8)
    ids, mask = some_queries()
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    exact, rough = (
        onnxruntime.InferenceSession(tmp_path / f"{i}.onnx").run(["vector"], feed)[0] for i in (False, True)
    )
    assert not np.array_equal(exact, rough)
    assert (exact * rough).sum(1).min() > 0.999


def test_int8_vectors_do_not_depend_on_their_company(encoder: Encoder, decoder: Decoder, tmp_path: Path) -> None:
    """A text beside others is what it is alone, and so is a beam: scales are of rows, not of batches."""
    export_encoder(encoder, decoder, tmp_path / "encoder.onnx", int8=True)
    export_decoder(decoder, tmp_path / "decoder.onnx", int8=True)
    ids, mask = some_queries()
    encode = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    together = encode.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    alone = [
        encode.run(None, {"input_ids": ids[row : row + 1].numpy(), "attention_mask": mask[row : row + 1].numpy()})
        for row in range(len(ids))
    ]
    for number, whole in enumerate(together):
        np.testing.assert_allclose(whole, np.concatenate([results[number] for results in alone]), atol=1e-6)
    decode = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    feed = {"embedding": normalize(torch.randn(3, 6, 12), dim=-1).numpy(), "attention_mask": mask.numpy()}
    feed["embedding"][2] *= 50  # an outlier
    feed |= dict(zip(cache_names("memory", 2), together[1:], strict=True))
    feed |= {name: torch.randn(3, 6, 2, 2, 8).numpy() for name in cache_names("past", 2)}
    hidden = decode.run(["hidden"], feed | {"step": np.array([2])})[0]
    first = {name: array[:1] for name, array in feed.items()}
    np.testing.assert_allclose(decode.run(["hidden"], first | {"step": np.array([2])})[0], hidden[:1], atol=1e-6)


def test_export_leaves_training_mode_as_it_was(encoder: Encoder, decoder: Decoder, tmp_path: Path) -> None:
    encoder.train()
    export_encoder(encoder, decoder, tmp_path / "encoder.onnx")
    assert encoder.training
    encoder.eval()
    decoder.eval()
    export_encoder(encoder, decoder, tmp_path / "encoder.onnx")
    assert not encoder.training
    assert not decoder.training


@pytest.mark.parametrize("causal", [False, True])
def test_attention_that_learns_is_attention_that_serves(causal: bool) -> None:
    """The plain products and torch's fused kernel give the same values and gradients, padding and future left out."""
    given = [torch.randn(3, 2, 5, 8, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    bias = None if causal else attention_bias(mask, torch.float32)
    learnt = attend(*given, bias)
    with torch.no_grad():
        torch.testing.assert_close(attend(*given, bias), learnt, atol=1e-6, rtol=1e-5)
    fused = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=bias, is_causal=causal)
    weight = torch.randn_like(fused)
    for mine, theirs in zip(
        torch.autograd.grad((learnt * weight).sum(), given), torch.autograd.grad((fused * weight).sum(), given),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_an_encoder_that_learns_says_what_it_says_when_it_serves(tiny_encoder: Path) -> None:
    """Plain attention while it learns, fused while it does not, one result."""
    encoder = Encoder(load_backbone(str(tiny_encoder)))
    ids, mask = some_queries()
    implementations, vectors = [], []
    for mode in (True, False):
        encoder.train(mode)
        implementations.append(encoder.backbone.config._attn_implementation)  # type: ignore[union-attr]
        vectors.append(encoder(ids, mask)[0].detach())
    assert implementations == ["eager", "sdpa"]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    given = torch.ones(41, 1003, dtype=dtype)  # not a whole number of draws
    dropout = Dropout(0.25)
    torch.manual_seed(7)
    left = dropout(given)
    assert left.dtype == dtype
    assert float((left == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert set(left.float().unique().tolist()) == {0.0, float(torch.tensor(4 / 3, dtype=dtype))}
    assert not torch.equal(left, dropout(given)), "other draws"
    torch.manual_seed(7)
    assert torch.equal(left, dropout(given)), "the same draws by the same seed"
    columns = (left == 0).float().mean(0)
    assert float(columns.max()) < 0.6, "no place is dropped always"
    assert torch.equal(dropout.eval()(given), given)
    assert torch.equal(Dropout(0.0)(given), given)


def test_gradients_pass_where_nothing_was_dropped() -> None:
    given = torch.ones(50, 20, requires_grad=True)
    left = Dropout(0.5)(given)
    left.sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, left.detach())


def test_dropout_of_a_loaded_encoder_is_what_was_asked_for(tiny_encoder: Path) -> None:
    rates = {m.p for m in load_backbone(str(tiny_encoder), 0.25).modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"):
        DecoderShape(width=10, heads=4)


def test_levels_of_tokens(encoder: Encoder, decoder: Decoder) -> None:
    retriever = Retriever(encoder, decoder, (3, 2), (20.0, 3.0, 40.0))
    assert retriever.level_of_token.tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(retriever.log_weight.exp(), torch.tensor(40.0))
