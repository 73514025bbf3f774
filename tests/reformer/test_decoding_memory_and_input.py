"""What a decoder keeps, and what it is called with: tokens, rows, models."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from decoding_models import draw, make
from torch import Tensor

from reformer.decoding import Decoder
from reformer.decoding_caches import Growing, LocalCache, Order, memory_per_token
from reformer.generation import continue_tokens


@pytest.mark.parametrize("pattern", [["lsh"], ["local", "dense", "lsh"]], ids=str)
def test_memory_per_token_is_the_most_that_is_kept(pattern: list[str]) -> None:
    model = make(torch.float32, max_seq_len=4096, n_layers=3, n_hashes=4, attn_pattern=pattern)
    decoder, tokens = Decoder(model), draw(2100, n_rows=3)
    most, local = memory_per_token(model.config), 3 * 3 * 2 * 16 * 10 * 4
    used = []
    for t in (2000, *range(2001, 2020), 2099):
        decoder(tokens[:, :t])
        used.append(sum(kept.nbytes() for cache in decoder.caches for kept in tensors(cache)) / (3 * t * most))
    assert max(used) < 1 + local / (3 * 2000 * most) and max(used) > 0.9, used


def tensors(kept: object) -> Iterator[torch.UntypedStorage]:
    for value in vars(kept).values():
        if isinstance(value, Tensor) and len(value) == 3:
            yield value.untyped_storage()
        elif isinstance(value, Order | Growing):
            yield from tensors(value)


def test_local_layers_keep_two_chunks() -> None:
    decoder = Decoder(make(attn_pattern=["local"]))
    for t in (28, 29, 35):
        decoder(draw()[:, :t])
        for cache in decoder.caches:
            assert isinstance(cache, LocalCache)
            for kept in (cache.k, cache.v):
                assert kept.shape[2] <= 10 and kept.untyped_storage().nbytes() == kept.numel() * 8


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            draw(6),
            r"tokens are \[1, 6\], expected \[1, T\] with T from 7, as this decoder has seen 7, to max_seq_len=64",
        ),
        (draw(65), r"tokens are \[1, 65\], expected \[1, T\] with T from 7, as this"),
        (draw(8)[0], r"tokens are \[8\], expected \[1, T\]"),
        (draw(8).expand(2, -1), r"tokens are \[2, 8\], expected \[1, T\]"),
        (draw(8)[:0], r"tokens are \[0, 8\], expected \[1, T\]"),
        ((draw(8) + 1) % 13, "the tokens do not begin with those that this decoder has seen: make another one"),
        (torch.cat([draw(7), torch.tensor([[13]])], dim=1), "expected ids from 0 to 12"),
    ],
)
def test_what_is_no_continuation_is_refused(tokens: Tensor, message: str) -> None:
    decoder = Decoder(make())
    decoder(draw(7))
    with pytest.raises(ValueError, match=message):
        decoder(tokens)
    assert torch.isfinite(decoder(draw(8))).all()
    for nothing in (draw(8)[:0], draw(8)[:, :0]):
        with pytest.raises(ValueError, match=r"expected \[B, T\] with T from 1, as this decoder has seen 0, to max"):
            Decoder(make())(nothing)


@pytest.mark.parametrize("rows", [[], [0, 2], [-1]])
def test_sequences_that_a_decoder_has_not_seen_are_none_to_select(rows: list[int]) -> None:
    decoder = Decoder(make())
    with pytest.raises(ValueError, match=r"rows=\[0\]: this decoder has seen 0 sequences"):
        decoder.select([0])
    decoder(draw(8, n_rows=2))
    with pytest.raises(ValueError, match=r"rows=\[.*\]: this decoder has seen 2 sequences, counted from 0"):
        decoder.select(rows)


def test_rows_of_any_kind_of_integers() -> None:
    decoder, tokens = Decoder(make()), draw(9, n_rows=2)
    decoder(tokens[:, :8])
    expected = decoder.select([1, 0])(tokens[[1, 0]])
    for rows in (np.array([1, 0]), torch.tensor([1, 0]), (1, 0)):
        assert torch.equal(decoder.select(rows)(tokens[[1, 0]]), expected)
    assert decoder.select(np.array([0]))(tokens[:1]).shape == (1, 1, 13)
    with pytest.raises(TypeError):
        decoder.select([0.0])  # type: ignore[list-item]
    decoder.keep([1, 0])
    assert torch.equal(decoder(tokens[[1, 0]]), expected)


def test_the_same_tokens_again_give_the_same_logits() -> None:
    model, tokens = make(), draw(n_rows=2)
    decoder = Decoder(model)
    found = decoder(tokens[:, :9])
    expected = found.clone()
    for logits in (found, decoder(tokens[:, :9])):
        logits.zero_()
    assert torch.equal(decoder(tokens[:, :9]), expected)
    assert torch.equal(decoder.select([1])(tokens[1:, :9]), expected[1:])
    with pytest.raises(ValueError, match="do not begin with those"):
        decoder((tokens[:, :9] + 1) % 13)


def test_lists_are_no_tokens() -> None:
    tokens, said = draw().tolist(), "tokens must be a torch tensor of integers, got list: use torch.as_tensor"
    model = make()
    for use in (model, Decoder(model), lambda tokens: continue_tokens(Decoder(model), model.config, tokens[0], 2)):
        with pytest.raises(ValueError, match=said):
            use(tokens)


def test_what_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(ValueError, match="causal=False computes every token again when one is added: call the model"):
        Decoder(make(causal=False, attn_pattern=["lsh"]))
