"""Nothing is computed whole that can be computed by parts, and no size of the parts changes the result.

In float64 the loss and all gradients stay within 1e-12: what differs is the order of sums. Compared is a model with
itself, with chunks and tiles as long as all there is; that this is right, test_reversible.py shows by plain autograd.
"""

from functools import partial

import pytest
import torch
from parity import assert_parity, gradients
from small_models import small_model
from torch import Tensor

from reformer import Reformer, ReformerConfig
from reformer.chunks import ff_chunk_tokens, loss_chunk_tokens, map_chunks, token_slices
from reformer.loss import IGNORED_LABEL
from reformer.lsh.rounds import Layout, Tile

BATCH, TOKENS, VOCAB = 3, 101, 20
WHOLE = {"ff_chunk_tokens": TOKENS, "loss_chunk_tokens": BATCH * TOKENS}
make_model = partial(
    small_model, vocab_size=VOCAB, attn_pattern=["local", "lsh", "dense"], dropout=0.1, attn_dropout=0.1, **WHOLE
)
CHUNKS = [
    {"ff_chunk_tokens": 1},
    {"ff_chunk_tokens": 30},
    {"ff_chunk_tokens": TOKENS - 1},
    {"loss_chunk_tokens": 1},
    {"loss_chunk_tokens": 29},
    {"loss_chunk_tokens": BATCH * TOKENS - 1},
    {"ff_chunk_tokens": 17, "loss_chunk_tokens": 13},
]


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels of which many are ignored, 70 in a row among them, and documents."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, TOKENS), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED_LABEL
    labels[1, 10:80] = IGNORED_LABEL
    return tokens, labels, torch.randint(1, 4, (BATCH, TOKENS), generator=generator).sort().values


def loss_and_gradients(model: Reformer) -> dict[str, Tensor]:
    tokens, labels, segments = make_batch()
    loss = model(tokens, labels, segment_ids=segments, step=2)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks_of_tokens_do_not_change_the_result(chunks: dict[str, int], options: dict[str, bool]) -> None:
    whole = loss_and_gradients(make_model(**options))
    assert_parity(loss_and_gradients(make_model(**options, **chunks)), whole, 1e-12)


@pytest.mark.parametrize("size", [1, 13, 29])
def test_some_chunk_of_those_has_no_label_at_all(size: int) -> None:
    ignored = make_batch()[1].flatten() == IGNORED_LABEL
    chunks = [ignored[tokens] for tokens in token_slices(len(ignored), size)]
    assert any(chunk.all() for chunk in chunks) and not all(chunk.all() for chunk in chunks)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunks_per_tile", [1, 3, 12])
def test_tiles_of_attention_do_not_change_the_result(
    chunks_per_tile: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """101 tokens are 13 chunks of a round; the last tile is smaller, unless it is one chunk too."""
    model = make_model(causal=causal)
    whole = loss_and_gradients(model)
    tiles, counts = Layout.tiles, []

    def counted(layout: Layout, n_chunks: int) -> list[Tile]:
        found = tiles(layout, n_chunks)
        counts.append([tile.count for tile in found])
        return found

    scores_of_chunk = 8 * 8 * (2 if causal else 3)
    monkeypatch.setattr("reformer.lsh.rounds.TILE_SCORES_PER_THREAD", chunks_per_tile * scores_of_chunk)
    monkeypatch.setattr("reformer.lsh.rounds.RUN_PLACES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(Layout, "tiles", counted)
    parts = loss_and_gradients(model)
    expected = {1: [1] * 13, 3: [3, 3, 3, 3, 1], 12: [12, 1]}[chunks_per_tile]
    assert len(counts) >= 4 and all(count == expected for count in counts)  # two layers, forward and backward
    assert_parity(parts, whole, 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        {"reformer.attention.GROUP_NUMBERS": 1},
        {"reformer.lsh.chunked.FINISH_TOKENS": 7},
        {"reformer.lsh.hashing.HASH_TOKENS": 10},
        {"reformer.dense.MIN_BLOCK": 9, "reformer.dense.BLOCK_SCORES": {"cpu": 1, "cuda": 1}},
    ],
    ids=str,
)
def test_other_parts_do_not_change_the_result(
    parts: dict[str, object], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads, tokens whose gradients are put together, tokens that are hashed, queries of dense attention."""
    model = make_model(causal=causal)
    whole = loss_and_gradients(model)
    for name, value in parts.items():
        monkeypatch.setattr(name, value)
    assert_parity(loss_and_gradients(model), whole, 1e-12)


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 64, 101])
def test_everything_in_parts_at_once_at_any_length(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for is_in_parts in (False, True):
        if is_in_parts:
            monkeypatch.setattr("reformer.lsh.rounds.TILE_SCORES_PER_THREAD", 1)
            monkeypatch.setattr("reformer.attention.GROUP_NUMBERS", 1)
            monkeypatch.setattr("reformer.lsh.chunked.FINISH_TOKENS", 5)
            monkeypatch.setattr("reformer.lsh.hashing.HASH_TOKENS", 4)
            monkeypatch.setattr("reformer.dense.MIN_BLOCK", 3)
            monkeypatch.setattr("reformer.dense.BLOCK_SCORES", {"cpu": 1, "cuda": 1})
        model = make_model(**({"ff_chunk_tokens": 6, "loss_chunk_tokens": 11} if is_in_parts else {}))
        tokens, labels, segments = (x[:, :n_tokens] for x in make_batch())
        labels[0, 0] = 3  # whatever the length, one label is not ignored
        loss = model(tokens, labels, segment_ids=segments, step=0)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert_parity(*results[::-1], 1e-12)


def test_logits_and_the_loss_without_gradients_are_the_same_in_chunks() -> None:
    tokens, labels, segments = make_batch()
    results = []
    for chunks in (WHOLE, {"ff_chunk_tokens": 30, "loss_chunk_tokens": 29}):
        model = make_model(**chunks).eval()
        with torch.no_grad():
            logits, loss = (model(tokens, given, segment_ids=segments) for given in (None, labels))
        results.append({"logits": logits, "loss": loss})
    assert_parity(*results, 1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 10])
def test_results_of_chunks_are_put_together_with_gradients_and_without(chunk_tokens: int) -> None:
    """One by tokens, one by heads; of the latter a head's tokens stand side by side."""
    x_BTM = torch.randn(2, 7, 6, dtype=torch.float64)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, (x + 1).unflatten(-1, (3, 2))

    with torch.no_grad():
        by_token, by_head = map_chunks(both, x_BTM, chunk_tokens)
    assert by_token.is_contiguous() and by_head.transpose(1, 2).is_contiguous()
    assert torch.equal(by_token, x_BTM * 2) and torch.equal(by_head, (x_BTM + 1).view(2, 7, 3, 2))
    for one, other in zip(map_chunks(both, x_BTM, chunk_tokens), (by_token, by_head), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_chunk_that_is_all_tokens_is_the_result_without_a_copy() -> None:
    x_BTM = torch.randn(2, 7, 6)
    doubled = x_BTM * 2
    for chunk_tokens in (7, 8):
        (result,) = map_chunks(lambda x: (doubled,), x_BTM, chunk_tokens)
        assert result.data_ptr() == doubled.data_ptr()


@pytest.mark.parametrize(
    ("vocab_size", "on_cpu", "on_gpu"),
    [
        (2, 2048, 131_072),  # features, not logits, are the most numbers
        (8192, 2048, 8192),
        (8193, 2047, 8191),
        (131_072, 128, 512),
        (2**24, 1, 4),
        (2**30, 1, 1),
    ],
)
def test_a_large_vocabulary_makes_the_chunks_of_the_loss_short(vocab_size: int, on_cpu: int, on_gpu: int) -> None:
    for device, expected in (("cpu", on_cpu), ("meta", on_gpu)):
        assert loss_chunk_tokens(ReformerConfig(vocab_size=vocab_size), torch.device(device)) == expected
        given = ReformerConfig(vocab_size=vocab_size, loss_chunk_tokens=77)
        assert loss_chunk_tokens(given, torch.device(device)) == 77


def test_chunks_of_layers_are_larger_on_a_gpu() -> None:
    """ "meta" stands for whatever is no CPU."""
    for config, batch, on_cpu, on_gpu in (
        (ReformerConfig(vocab_size=9), 1, 4096, 131_072),
        (ReformerConfig(vocab_size=9, d_model=1024), 1, 4096, 32_768),
        (ReformerConfig(vocab_size=9, d_model=1024), 4, 4096, 8192),
        (ReformerConfig(vocab_size=9, d_ff=8), 2, 4096, 262_144),
        (ReformerConfig(vocab_size=9, d_ff=2**28), 1, 4096, 1),
        (ReformerConfig(vocab_size=9, ff_chunk_tokens=5), 3, 5, 5),
    ):
        for device, expected in (("cpu", on_cpu), ("meta", on_gpu)):
            assert ff_chunk_tokens(config, torch.empty(batch, 7, config.d_model, device=device)) == expected
