"""Tokens that are added one by one, against a twin that attends by the oracles to all tokens, every time again."""

import pytest
import torch
from decoding_models import LENGTH, ROUNDING, draw, make
from parity import relative_error
from torch import Tensor

from reformer import Reformer
from reformer.decoding import Decoder
from reformer.decoding_caches import MOST_LATE, LSHCache
from reformer.generation import continue_tokens
from reformer.local import local_attention_reference
from reformer.lsh.hashing import bucket_factors, draw_rotations, hash_by_directions, hash_to_buckets
from reformer.lsh.reference import lsh_attention_reference


class Slow:
    """A cache that keeps what comes in, and attends by the oracle of its kind."""

    def __init__(self, attention: torch.nn.Module) -> None:
        self.config, self.layer, self.parts = attention.config, attention.layer, []
        self.is_local = "key" in attention.projections
        self.factors = bucket_factors(self.config.n_buckets, self.config.max_seq_len, self.config.lsh_chunk_len)

    def extend(self, projected: list[Tensor]) -> Tensor:
        self.parts.append(projected)
        tensors = [torch.cat(each, dim=2) for each in zip(*self.parts, strict=True)]
        return self.attend(*tensors)[:, :, -projected[0].shape[2] :]

    def attend(self, *tensors: Tensor) -> Tensor:
        config = self.config
        if self.is_local:
            return local_attention_reference(*tensors, chunk_len=config.local_chunk_len)
        shape = (config.n_heads, config.d_head, config.n_hashes, self.factors)
        rotations = draw_rotations(*shape, config.seed, 0, self.layer)
        return lsh_attention_reference(
            *tensors,
            hash_to_buckets(tensors[0], rotations, self.factors),
            chunk_len=config.lsh_chunk_len,
            attend_across_buckets=config.attend_across_buckets,
            duplicate_correction=config.duplicate_correction,
        )


def slow_decoder(model: Reformer) -> Decoder:
    decoder = Decoder(model)
    decoder.caches = [Slow(block.attention) for block in model.blocks]
    return decoder


@pytest.mark.parametrize("n_first", [1, 17])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"n_hashes": 1},
        {"n_hashes": 4, "lsh_chunk_len": 3},
        {"n_buckets": (4, 2)},
        {"n_buckets": 2},
        {"lsh_chunk_len": 64, "n_hashes": 1},
        {"lsh_chunk_len": 64},
        {"lsh_chunk_len": 1},
        {"duplicate_correction": True, "n_hashes": 4},
        {"attend_across_buckets": False},
        {"attend_across_buckets": False, "n_hashes": 1, "n_buckets": 2},
        {"attend_across_buckets": False, "duplicate_correction": True, "n_hashes": 4, "n_buckets": 4},
        {"tie_embeddings": True, "activation": "gelu", "d_head": 5},
    ],
    ids=str,
)
def test_every_token_is_attended_to_as_by_the_oracle(
    mode: dict[str, object], n_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two sequences, whose tokens are sorted again after each five."""
    monkeypatch.setattr("reformer.decoding_caches.MOST_LATE", 5)
    model, tokens = make(attn_pattern=["lsh", "local"], **mode), draw(n_rows=2)
    fast, slow = Decoder(model), slow_decoder(model)
    worst = max(relative_error(fast(tokens[:, :t]), slow(tokens[:, :t])) for t in range(n_first, LENGTH + 1))
    print(f"largest relative error of the logits {worst:.1e}")
    assert worst < ROUNDING


@pytest.mark.parametrize("n_first", [1, 5, 6, 23])
@pytest.mark.parametrize("pattern", [["local"], ["dense"], ["local", "dense"]], ids=str)
def test_without_lsh_layers_it_is_a_pass_over_all_tokens(pattern: list[str], n_first: int) -> None:
    model, tokens = make(attn_pattern=pattern), draw()
    decoder = Decoder(model)
    with torch.no_grad():
        for t in range(n_first, LENGTH + 1):
            assert relative_error(decoder(tokens[:, :t]), model(tokens[:, :t])[:, -1:]) < ROUNDING


def test_the_first_call_is_a_pass_and_chunks_that_hold_all_make_all_of_them_one() -> None:
    tokens = draw()
    for mode in ({}, {"attend_across_buckets": False}, {"duplicate_correction": True, "n_hashes": 4}):
        model = make(max_seq_len=LENGTH, **mode)
        with torch.no_grad():
            expected = model(tokens)
        assert relative_error(Decoder(model)(tokens), expected[:, -1:]) < ROUNDING
    # Every round sees everything, equally often.
    model = make(lsh_chunk_len=64)
    decoder = Decoder(model)
    with torch.no_grad():
        for t in (1, 2, 30, 31, 32):
            assert relative_error(decoder(tokens[:, :t]), model(tokens[:, :t])[:, -1:]) < ROUNDING


def test_buckets_of_a_prompt_are_those_of_a_pass_if_their_number_is_given() -> None:
    tokens = draw()
    with torch.no_grad():
        for n_buckets, is_same in ((4, True), (None, False)):
            model = make(n_buckets=n_buckets)
            error = relative_error(Decoder(model)(tokens), model(tokens)[:, -1:])
            assert error < ROUNDING if is_same else error > 0.01


def test_a_few_tokens_later_are_the_same_as_one_by_one() -> None:
    model, tokens = make(max_seq_len=192), draw(187)
    one_by_one, at_once = Decoder(model), Decoder(model)
    for t in (185, 186, 187):
        expected = one_by_one(tokens[:, :t])
    at_once(tokens[:, :185])
    assert torch.equal(at_once(tokens.to(torch.uint16)), expected)
    assert not torch.equal(Decoder(model)(tokens), expected)


@pytest.mark.parametrize("pattern", [["local", "lsh"], ["dense", "lsh"]])
def test_a_copy_goes_its_own_way(pattern: list[str]) -> None:
    """Neither of them sees what the other takes in: both are as if there were no other."""
    model, tokens = make(attn_pattern=pattern), draw()
    ways = [tokens.clone(), tokens.clone()]
    ways[1][:, 21:] = (tokens[:, 21:] + 1) % 13
    first = Decoder(model)
    first(tokens[:, :20])
    first(tokens[:, :21])
    decoders, alone = [first, first.select([0])], [Decoder(model), Decoder(model)]
    for t in range(20, LENGTH + 1):
        for decoder, by_itself, way in zip(decoders, alone, ways, strict=True):
            expected = by_itself(way[:, :t])
            if t > 21:
                assert torch.equal(decoder(way[:, :t]), expected)


def test_sequences_that_are_selected_are_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reformer.decoding_caches.MOST_LATE", 4)
    model, tokens = make(attn_pattern=["local", "lsh", "dense"], n_layers=3), draw(n_rows=3)
    decoder = Decoder(model)
    for t in range(10, 20):
        decoder(tokens[:, :t])
    rows = [2, 0, 0]
    ways = tokens[rows]
    ways[2, 19:] = (ways[2, 19:] + 1) % 13
    decoder, alone = decoder.select(rows), [Decoder(model) for _ in rows]
    for t in range(10, LENGTH + 1):
        expected = torch.cat([by_itself(way[None, :t]) for by_itself, way in zip(alone, ways, strict=True)])
        if t >= 20:
            assert relative_error(decoder(ways[:, :t]), expected) < ROUNDING


def test_what_a_token_costs_does_not_grow_with_the_sequence() -> None:
    """Of those sorted before, none is moved: only the newest are."""
    decoder, tokens = Decoder(make(max_seq_len=512)), draw(420)
    decoder(tokens[:, :150])
    orders = [cache.order for cache in decoder.caches if isinstance(cache, LSHCache)]
    assert orders
    before = [order.token_BHRT for order in orders]
    for t in range(151, 421):
        decoder(tokens[:, :t])
        if t == 150 + MOST_LATE:
            assert all(order.token_BHRT is same for order, same in zip(orders, before, strict=True))
    assert [order.n_sorted for order in orders] == [150 + 2 * MOST_LATE] * len(orders)


@pytest.mark.parametrize("n_first", [1, 3, 188])
def test_many_tokens_later_are_those_of_a_new_decoder(n_first: int) -> None:
    """Then a pass over all is less work."""
    model, tokens = make(max_seq_len=192), draw(192)
    new, decoder = Decoder(model), Decoder(model)
    decoder(tokens[:, :n_first])
    for t in (191, 192):
        assert torch.equal(decoder(tokens[:, :t]), new(tokens[:, :t]))


def test_two_tokens_of_a_short_sequence_are_those_of_a_new_decoder() -> None:
    model, tokens = make(), draw(23)
    decoder, one_by_one = Decoder(model), Decoder(model)
    for t in (21, 22):
        one_by_one(tokens[:, :t])
    decoder(tokens[:, :21])
    found = decoder(tokens)
    assert torch.equal(found, Decoder(model)(tokens)) and not torch.equal(found, one_by_one(tokens))


def test_it_continues_a_text() -> None:
    model, prompt = make(), draw(20)[0]
    state = torch.get_rng_state()
    options = {"temperature": 2.0, "top_p": 0.9, "seed": 7}
    found = continue_tokens(Decoder(model), model.config, prompt, 24, **options)
    assert torch.equal(found, continue_tokens(slow_decoder(model), model.config, prompt, 24, **options))
    assert len(found.unique()) > 3
    assert torch.equal(torch.get_rng_state(), state)
    assert not Decoder(model)(prompt[None]).requires_grad


def test_in_half_precision_streams_and_keys_are_fp32_as_in_a_pass() -> None:
    model, tokens = make(torch.bfloat16, attn_pattern=["local", "dense"], n_layers=6), draw()
    decoder = Decoder(model)
    with torch.no_grad():
        for t in range(1, LENGTH + 1):
            assert relative_error(decoder(tokens[:, :t]), model(tokens[:, :t])[:, -1:]) < 0.01, t


def test_tokens_that_the_caller_changes_afterwards() -> None:
    model, tokens = make(), draw()
    decoder, memory = Decoder(model), tokens.clone()
    decoder(memory[:, :9])
    memory[:, :9] = 0
    with pytest.raises(ValueError, match="do not begin with those"):
        decoder(memory[:, :10])
    assert torch.isfinite(decoder(tokens[:, :10])).all()


def test_tied_embeddings_that_are_two_parameters_are_refused() -> None:
    model = make(tie_embeddings=True)
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="the embedding and the head have a matrix each"):
        Decoder(model)(draw())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_fewer_bits(dtype: torch.dtype) -> None:
    """Against the twin in the same precision: the weights, and so the buckets, are the same."""
    model, tokens = make(dtype, attn_pattern=["lsh", "local", "dense"], n_layers=1), draw()
    fast, slow = Decoder(model), slow_decoder(model)
    for t in range(10, LENGTH + 1):
        error = relative_error(fast(tokens[:, :t]), slow(tokens[:, :t]))
        assert error < 10 * torch.finfo(dtype).eps, (t, error)


def test_a_query_of_zeros_and_tokens_of_all_kinds_of_numbers() -> None:
    model, tokens = make(duplicate_correction=True), draw()
    with torch.no_grad():
        for block in model.blocks:
            if "qk" in block.attention.projections:
                block.attention.qk_weight[:8] = 0
    fast, slow = Decoder(model), slow_decoder(model)
    for t in range(1, LENGTH + 1):
        assert relative_error(fast(tokens[:, :t]), slow(tokens[:, :t])) < ROUNDING


def test_under_autocast_buckets_are_those_of_the_projections() -> None:
    """Only what is projected is rounded, as in training."""
    model, tokens = make(torch.float32, attn_pattern=["lsh"], n_layers=1, n_hashes=16), draw()
    decoder, slow = Decoder(model), slow_decoder(model)
    with torch.autocast("cpu", torch.bfloat16):
        for t in range(1, LENGTH + 1):
            decoder(tokens[:, :t])
            slow(tokens[:, :t])
    (fast,), (slow_cache,) = decoder.caches, slow.caches
    assert isinstance(fast, LSHCache) and isinstance(slow_cache, Slow)
    qk = torch.cat([part[0] for part in slow_cache.parts], dim=2)
    assert qk.dtype == torch.bfloat16
    assert torch.equal(fast.order.buckets.tensor, hash_by_directions(qk, fast.directions_HND, fast.factors))


def test_an_interrupted_call_is_not_taken_for_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokens = Decoder(make()), draw()
    decoder(tokens[:, :5])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder.caches[1], "extend", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        decoder(tokens[:, :6])
    with pytest.raises(RuntimeError, match="this decoder was interrupted while it took tokens in: make another one"):
        decoder(tokens[:, :6])
