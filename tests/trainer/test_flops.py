"""Model FLOPs against what torch counts, against 6 N T, and by hand."""

import functools
from typing import Any

import pytest
import torch
from small_models import plain_loss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.call import Call
from trainer.flops import forward_flops, training_flops

TINY: dict[str, Any] = {
    "vocab_size": 30, "max_seq_len": 64, "d_model": 12, "n_layers": 3, "n_heads": 2, "d_head": 5, "d_ff": 20,
    "n_hashes": 3, "lsh_chunk_len": 8, "local_chunk_len": 4,
}  # fmt: skip


def counted(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def plain_step(model: Reformer, n_tokens: int) -> None:
    """Forward and backward by plain autograd, so that no layer is computed again."""
    tokens = torch.randint(0, 30, (1, n_tokens))
    plain_loss(model, tokens, tokens, Call(0)).backward()


@pytest.mark.parametrize("n_tokens", [1, 13, 64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_with_dense_attention_torch_counts_the_same(n_tokens: int, causal: bool, is_tied: bool) -> None:
    """The oracle of attention has a score for every pair of tokens, and everything else is a plain product."""
    config = ReformerConfig(**TINY, attn_pattern=("dense",), causal=causal, tie_embeddings=is_tied)
    model = Reformer(config)

    def oracle(qk: Tensor, v: Tensor, *, causal: bool, **_: object) -> Tensor:
        buckets = torch.zeros(1, 2, 1, n_tokens, dtype=torch.int64)
        options = {"n_hashes": 1, "chunk_len": n_tokens, "causal": causal}
        return lsh_attention(qk, v, buckets, backend="reference", **options)[0]

    for block in model.blocks:
        block.attention.inner = oracle
    assert counted(lambda: plain_step(model, n_tokens)) == training_flops(config, n_tokens)


@pytest.mark.parametrize("pattern", [("local",), ("lsh",), ("local", "lsh")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_buckets", [None, 6, (4, 6)])
def test_attention_in_chunks_computes_that_and_its_scores_again(
    pattern: tuple[str, ...],
    causal: bool,
    n_buckets: int | tuple[int, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole chunks and one head at a time, so that nothing is padded. Its backward computes the scores again: one
    product more than needed."""
    monkeypatch.setattr("reformer.lsh.rounds.RUN_PLACES", 1)
    config = ReformerConfig(
        **{**TINY, "n_hashes": 2}, attn_pattern=pattern, causal=causal, n_buckets=n_buckets
    )  # with 3 rounds a bidirectional one would be dense
    forward = forward_flops(config, 64)
    attention = forward["local_attention"] + forward["lsh_attention"]
    step = functools.partial(plain_step, Reformer(config), 64)
    assert attention > 0 and counted(step) == training_flops(config, 64) + attention // 2


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_that_are_matrices_cost_six_a_token(is_tied: bool) -> None:
    """The "6 N" of PaLM's appendix B: 2 forward, 4 backward."""
    config = ReformerConfig(**TINY, attn_pattern=("local", "lsh", "dense"), tie_embeddings=is_tied)
    model = Reformer(config)
    matrices = [p for block in [*model.blocks, model.head] for p in block.parameters() if p.ndim == 2]
    forward = forward_flops(config, 37)
    parts = forward["projections"] + forward["feed_forward"] + forward["head"]
    assert 3 * parts == 6 * sum(p.numel() for p in matrices) * 37


def test_by_hand() -> None:
    """100 tokens in a local, an LSH and a local layer; 2 heads of 5; scores and weighted values: 4 FLOPs a number."""
    config = ReformerConfig(**{**TINY, "max_seq_len": 100})
    assert forward_flops(config, 100) == {
        "projections": 2 * 100 * 12 * 10 * (4 + 3 + 4),
        "feed_forward": 2 * 100 * 3 * 2 * 12 * 20,
        "head": 2 * 100 * 24 * 30,
        "local_attention": 2 * (100 * 2 * 5 * 4) * 8,  # two layers, two chunks of 4
        "lsh_attention": 3 * (100 * 2 * 5 * 4) * 16,  # three rounds, two chunks of 8
        "dense_attention": 0,
        "hashing": 3 * (100 * 2 * 5 * 2) * 13,  # 26 buckets, half as many columns
    }


def test_nobody_sees_more_than_there_is() -> None:
    """Up to as many tokens as all rounds give keys, 3 times 2 chunks of 8, LSH attention costs what dense does."""
    lsh, dense = (ReformerConfig(**TINY, attn_pattern=(kind,)) for kind in ("lsh", "dense"))
    for n_tokens in (1, 5, 8, 9, 47, 48):
        assert forward_flops(lsh, n_tokens)["lsh_attention"] == forward_flops(dense, n_tokens)["dense_attention"]
    assert forward_flops(lsh, 64)["lsh_attention"] == forward_flops(dense, 64)["dense_attention"] * 48 // 64
    local = ReformerConfig(**TINY, attn_pattern=("local",), causal=False)
    keys = [forward_flops(local, n)["local_attention"] // (3 * n * 2 * 5 * 4) for n in (1, 7, 11, 12, 13, 64)]
    assert keys == [1, 7, 11, 12, 12, 12]


def test_a_reversible_stack_gets_no_credit_for_what_it_computes_again() -> None:
    config = ReformerConfig(**TINY)
    model, tokens = Reformer(config), torch.zeros(1, 64, dtype=torch.int64)
    assert counted(lambda: model(tokens, tokens).backward()) > 1.1 * training_flops(config, 64)


@pytest.mark.parametrize("seq_len", [0, -1, 65])
def test_lengths_that_the_model_does_not_have_are_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"seq_len={seq_len} must be from 1 to max_seq_len=64"):
        training_flops(ReformerConfig(**TINY), seq_len)
