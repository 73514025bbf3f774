"""Diagnostics against dense float64 computations of the same numbers, at awkward sizes, and what must hold of them."""

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.attention import LSHSelfAttention
from reformer.call import Call
from reformer.diagnostics import (
    SAMPLED_QUERIES,
    ablated,
    bucket_occupancy,
    invert,
    observed,
    reached_keys,
    reconstruction_error,
    recovered_mass,
    sample_queries,
)
from reformer.lsh.hashing import sort_by_bucket
from reformer.lsh.reference import reach_counts
from reformer.reversible import Streams

LENGTHS = [1, 7, 8, 9, 16, 61]
CHUNK_LEN = 8
TINY = {
    "vocab_size": 20, "max_seq_len": 70, "d_model": 16, "n_layers": 3, "n_heads": 2, "lsh_chunk_len": 8,
    "local_chunk_len": 8, "n_hashes": 2,
}  # fmt: skip


def random_case(n_tokens: int, n_hashes: int) -> tuple[Tensor, Tensor, Tensor]:
    """qk [2, T, 4], buckets [2, R, T], and every query in a shuffled order [2, T]."""
    generator = torch.Generator().manual_seed(n_tokens + 100 * n_hashes)
    qk = 2 * torch.randn(2, n_tokens, 4, dtype=torch.float64, generator=generator)
    buckets = torch.randint(0, 6, (2, n_hashes, n_tokens), generator=generator)
    return qk, buckets, torch.stack([torch.randperm(n_tokens, generator=generator) for _ in range(2)])


def dense_mass(qk_TD: Tensor, reached_TT: Tensor, causal: bool, segment_ids_T: Tensor | None) -> Tensor:
    """The definition, one query and one key at a time."""
    n_tokens = len(qk_TD)
    masses = []
    for i in range(n_tokens):
        keys = [j for j in range(n_tokens) if (j < i or not causal) and j != i]
        keys = [j for j in keys if segment_ids_T is None or segment_ids_T[i] == segment_ids_T[j]] or [i]
        weights = torch.stack([(qk_TD[i] @ qk_TD[j] / qk_TD[j].norm()).exp() for j in keys])
        masses.append((weights * reached_TT[i, keys]).sum() / weights.sum())
    return torch.stack(masses)


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("n_hashes", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attend_across_buckets", [True, False])
def test_reached_keys_and_mass_equal_the_dense_definition(
    n_tokens: int, n_hashes: int, causal: bool, attend_across_buckets: bool
) -> None:
    qk, buckets, queries = random_case(n_tokens, n_hashes)
    segment_ids = torch.arange(n_tokens) // 23
    options = {"causal": causal, "attend_across_buckets": attend_across_buckets}
    for segments in (None, segment_ids):
        mass = recovered_mass(qk, buckets, queries, chunk_len=CHUNK_LEN, segment_ids_T=segments, **options)
        for head in range(2):
            labels = buckets[head] if segments is None else buckets[head] + 1_000 * segments
            reached = reach_counts(buckets[head], CHUNK_LEN, labels_RT=labels, **options).sum(dim=0) > 0
            order, inverse = sort_by_bucket(labels[None], CHUNK_LEN)
            own = None if attend_across_buckets else buckets[head]
            fast = reached_keys(order[0], inverse[0], queries[head], CHUNK_LEN, causal=causal, buckets_RT=own)
            assert torch.equal(fast, reached[queries[head]])
            expected = dense_mass(qk[head], reached, causal, segments)[queries[head]]
            assert (mass[head] - expected).abs().max() <= 1e-12


def test_blocks_of_queries_do_not_change_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, buckets, queries = random_case(61, 3)
    whole = recovered_mass(qk, buckets, queries, chunk_len=CHUNK_LEN)
    monkeypatch.setattr("reformer.diagnostics.BLOCK_SCORES", 61 * 7)
    assert torch.allclose(recovered_mass(qk, buckets, queries, chunk_len=CHUNK_LEN), whole, rtol=1e-13)


def test_one_bucket_and_one_chunk_recover_everything() -> None:
    qk, _, queries = random_case(61, 1)
    buckets = torch.zeros(2, 1, 61, dtype=torch.int64)
    for chunk_len, is_all in ((61, True), (64, True), (8, False)):
        mass = recovered_mass(qk, buckets, queries, chunk_len=chunk_len)
        assert torch.allclose(mass, torch.ones_like(mass), rtol=1e-12) == is_all


def test_more_rounds_recover_more() -> None:
    """Query by query for the own bucket alone; otherwise the circle of rounds moves one window in T."""
    qk, buckets, queries = random_case(200, 8)
    masses = [
        recovered_mass(qk, buckets[:, :n], queries, chunk_len=CHUNK_LEN, attend_across_buckets=False)
        for n in (1, 2, 4, 8)
    ]
    means = [mass.mean().item() for mass in masses]
    print("recovered by 1, 2, 4, 8 rounds:", [f"{mean:.3f}" for mean in means])
    for fewer, more in itertools.pairwise(masses):
        assert (more >= fewer - 1e-12).all()
    assert means[-1] > 1.5 * means[0]


def test_hashing_recovers_more_than_chance() -> None:
    """With queries this sharp the mass lies on near neighbours, which is what hashing finds."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    qk = 3 * centres[torch.arange(256) % 16] + 0.3 * torch.randn(256, 16, generator=generator, dtype=torch.float64)
    queries = torch.arange(256)[None]
    _, buckets = lsh_attention(qk[None, None], qk[None, None], n_hashes=2, chunk_len=CHUNK_LEN)
    random = buckets[..., torch.randperm(256, generator=generator)]
    by_hash, by_chance = (
        recovered_mass(qk[None], b[0], queries, chunk_len=CHUNK_LEN).mean() for b in (buckets, random)
    )
    print(f"recovered by hashing {by_hash:.3f}, by chance {by_chance:.3f}")
    assert by_hash > 2 * by_chance


def test_half_precision_queries_are_computed_in_fp32() -> None:
    qk, buckets, queries = random_case(61, 2)
    half = qk.bfloat16()
    mass = recovered_mass(half, buckets, queries, chunk_len=CHUNK_LEN)
    assert mass.dtype == torch.float32
    exact = recovered_mass(half.double(), buckets, queries, chunk_len=CHUNK_LEN)
    assert (mass - exact).abs().max() < 1e-5


def test_bucket_occupancy_by_hand() -> None:
    even = torch.arange(12).remainder(4)
    lopsided = torch.tensor([0] * 9 + [1] * 3)
    assert bucket_occupancy(even.expand(1, 1, 1, 12), 4) == (1.0, 0.0)
    assert bucket_occupancy(lopsided.expand(1, 1, 1, 12), 4) == (3.0, 0.5)
    assert bucket_occupancy(torch.stack([even, lopsided]).to(torch.int16).view(1, 2, 1, 12), 4) == (3.0, 0.25)
    assert bucket_occupancy(torch.zeros(1, 1, 1, 5, dtype=torch.int16), 8) == (8.0, 7 / 8)


def test_queries_are_a_function_of_their_arguments() -> None:
    state = torch.get_rng_state()
    first = sample_queries(3, 50, seed=1)
    assert torch.equal(first, sample_queries(3, 50, seed=1)) and not torch.equal(first, sample_queries(3, 50, seed=2))
    assert first.shape == (3, SAMPLED_QUERIES) and first.min() >= 0 and first.max() < 50
    assert len(first.unique()) > 40  # all of the range
    assert torch.equal(torch.get_rng_state(), state)


def make_model(**changes: object) -> Reformer:
    torch.manual_seed(0)
    return Reformer(ReformerConfig(**{**TINY, **changes})).double().eval()


@pytest.mark.parametrize("causal", [True, False])
def test_observed_reports_what_ran_and_changes_nothing(causal: bool) -> None:
    """Against a walk through the blocks by hand; a second pass does not count."""
    model = make_model(causal=causal, attn_pattern=["lsh", "local"], attend_across_buckets=False)
    tokens = torch.randint(0, 20, (2, 61))
    segments = (torch.arange(61) // 30).expand(2, 61)
    inner = [block.attention.inner for block in model.blocks]
    with torch.no_grad():
        plain = model(tokens, segment_ids=segments, step=3)
        with observed(model, n_tokens=50) as found:
            seen = model(tokens, segment_ids=segments, step=3)
            numbers = dict(found)
            model(tokens.flip(0), segment_ids=segments, step=4)
        model(tokens.flip(0), segment_ids=segments, step=4)
    assert torch.equal(seen, plain) and found == numbers
    assert [block.attention.inner for block in model.blocks] == inner

    expected = {}
    x1 = x2 = model.embedding(tokens)
    for layer, block in enumerate(model.blocks):
        y1, y2, buckets = block(x1, x2, Call(0, 3, (0, 1), 0.0, segments))
        if buckets is not None:
            qk = block.attention.project(x2)[0][0]
            queries = sample_queries(2, 50, seed=layer)
            mass = torch.stack(
                [
                    dense_mass(
                        qk[h],
                        reach_counts(
                            buckets[0, h],
                            8,
                            causal=causal,
                            attend_across_buckets=False,
                            labels_RT=buckets[0, h] + 1_000 * segments[0],
                        ).sum(dim=0)
                        > 0,
                        causal,
                        segments[0],
                    )[queries[h]]
                    for h in range(2)
                ]
            )
            sizes = torch.stack([bucket.long().bincount(minlength=16) for bucket in buckets[0, ..., :50].flatten(0, 1)])
            expected[f"lsh/layer{layer:02d}/largest_bucket_over_mean"] = sizes.max().item() / (50 / 16)
            expected[f"lsh/layer{layer:02d}/empty_buckets"] = (sizes == 0).double().mean().item()
            expected[f"lsh/layer{layer:02d}/recovered_mass"] = mass.mean().item()
        x1, x2 = y1, y2
    assert found == pytest.approx(expected, rel=1e-9)
    assert len(found) == 6 and 0.1 < found["lsh/layer00/recovered_mass"] < 0.99


@pytest.mark.parametrize("look", [observed, ablated])
def test_the_inner_attention_is_given_back_after_an_error(look: Callable[..., AbstractContextManager]) -> None:
    model = make_model()
    inner = [block.attention.inner for block in model.blocks]
    with pytest.raises(ValueError, match="position table"), look(model):
        model(torch.zeros(1, 71, dtype=torch.int64))
    assert [block.attention.inner for block in model.blocks] == inner


@pytest.mark.parametrize("causal", [True, False])
def test_ablated_is_the_model_without_what_lsh_layers_add(causal: bool) -> None:
    model = make_model(causal=causal, attn_pattern=["lsh", "local", "dense"])
    tokens = torch.randint(0, 20, (2, 61))
    inner, called = [block.attention.inner for block in model.blocks], []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda layer, *_: called.append(layer.layer))
    with torch.no_grad():
        whole = model(tokens)
        del called[:]
        with ablated(model):
            found = model(tokens)
        assert called == [0, 1, 2]  # each layer, as ZeRO-3 expects it
        assert torch.equal(model(tokens), whole)
        assert [block.attention.inner for block in model.blocks] == inner
        model.blocks[0].attention.out_weight.zero_()
        assert torch.equal(found, model(tokens))
    assert (found - whole).abs().max() > 1e-2


def test_inverse_equals_what_the_backward_reconstructs() -> None:
    model = make_model()
    call = Call(0, 0, (0, 1))
    x1, x2 = torch.randn(2, 2, 61, 16, dtype=torch.float64)
    for block in model.blocks:
        with torch.no_grad():
            y1, y2, buckets = block(x1, x2, call)
            inverse = invert(block, y1, y2, call, buckets)
            backward = Streams(y1, y2, torch.ones_like(y1), torch.ones_like(y2))
            block.backward(backward, call, buckets)
        for own, theirs in zip(inverse, (backward.x1, backward.x2), strict=True):
            assert torch.equal(own, theirs)
        assert isinstance(block.attention, LSHSelfAttention) == (buckets is not None)


def test_reconstruction_error_is_rounding_and_sees_a_wrong_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    tokens = torch.randint(0, 20, (2, 61))
    exact, single = reconstruction_error(model, tokens), reconstruction_error(model.float(), tokens)
    print(f"reconstruction error {exact:.1e} in float64, {single:.1e} in fp32")
    assert 0 < exact < 1e-13 and 0 < single < 1e-4
    assert 2**20 < single / exact < 2**38  # 2**29 lies between the two

    def shifted(block, y1, y2, call, buckets):  # 0.5 in one element of one stream, of the last block to be inverted
        x1, x2 = invert(block, y1, y2, call, buckets)
        if block.layer == 0:
            x2 = x2.clone()
            x2[1, 60, 15] += 0.5
        return x1, x2

    monkeypatch.setattr("reformer.diagnostics.invert", shifted)
    rms = model.embedding(tokens).square().mean().sqrt().item()
    assert reconstruction_error(model, tokens) == pytest.approx(0.5 / rms, rel=1e-3)
    assert math.isfinite(rms)
