"""Local attention against one dense masked softmax, float64, outputs and gradients."""

from typing import Any

import pytest
import torch
from parity import assert_parity

from reformer.local import local_attention, local_attention_reference
from reformer.lsh.dispatch import attention_in_chunks


@pytest.mark.parametrize(
    ("n_tokens", "chunk_len"), [(1, 8), (7, 8), (8, 8), (9, 8), (50, 8), (5, 1000), (70, 100), (300, 1000)]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_dense(n_tokens: int, chunk_len: int, causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, n_tokens, 4, dtype=torch.float64, generator=generator) for _ in range(4)]
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    masks = {}
    if masked:
        masks["key_padding_mask"] = torch.rand(2, n_tokens, generator=generator) > 0.4
        masks["key_padding_mask"][1] = False
        masks["segment_ids"] = torch.randint(0, 3, (2, n_tokens), generator=generator).sort().values
    results = []
    for attention in (local_attention, local_attention_reference):
        out = attention(q, k, v, chunk_len=chunk_len, causal=causal, **masks)
        grads = torch.autograd.grad(out, (q, k, v), inputs[3])
        results.append(dict(zip(("out", "d_q", "d_k", "d_v"), (out.detach(), *grads), strict=True)))
    assert_parity(*results, 1e-12)


@pytest.mark.parametrize("length", [27.0, 39.0])
def test_keys_opposite_to_long_queries_leave_room_for_large_gradients(length: float) -> None:
    """There the sum of weights is as small as can be, and its inverse meets the gradient (of a scaled loss)."""
    q, v = torch.full((1, 1, 16, 1), length), torch.randn(1, 1, 16, 1)
    inputs = [x.requires_grad_() for x in (q, -torch.ones_like(q), v)]
    out = local_attention(*inputs, chunk_len=8, backend="chunked")
    gradients = torch.autograd.grad(out, inputs, torch.full_like(out, 2.0**40))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(1, 2, 5, 8)}, r"q and k and v must all be \[B, H, T, D\]"),
        ({"k": torch.zeros(1, 2, 6, 4)}, "q and k and v must all be"),
        (dict.fromkeys("qkv", torch.zeros(1, 2, 0, 4)), r"each at least 1, got \[1, 2, 0, 4\]"),
        (dict.fromkeys("qkv", torch.zeros(1, 2, 5, 0)), r"each at least 1, got \[1, 2, 5, 0\]"),
        ({"k": torch.zeros(1, 2, 5, 4, dtype=torch.float64)}, "one floating-point dtype"),
        ({"key_padding_mask": torch.ones(1, 6)}, r"key_padding_mask must be \[B, T\] = \[1, 5\]"),
        ({"chunk_len": 0}, "chunk_len=0 must be an int"),
        ({"backend": "dense"}, "backend='dense': choose 'auto', 'triton' or 'chunked'"),
    ],
)
def test_bad_arguments_name_what_was_expected(changes: dict[str, object], message: str) -> None:
    heads = {name: torch.zeros(1, 2, 5, 4) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        local_attention(**{**heads, "chunk_len": 2, **changes})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "first"), [(torch.int64, 2**62), (torch.uint16, 0), (torch.uint8, 254)])
def test_segments_are_any_integers(dtype: torch.dtype, first: int, causal: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(40) >= 13)[None].long()
    options = {"chunk_len": 8, "causal": causal}
    found = local_attention(q, k, v, segment_ids=(first + segments).to(dtype), **options)
    assert torch.equal(found, local_attention(q, k, v, segment_ids=segments, **options))
    assert not torch.equal(found, local_attention(q, k, v, **options))


@pytest.mark.parametrize(
    ("n_tokens", "chunk_len", "expected"), [(5, 256, 16), (16, 256, 16), (150, 256, 256), (70, 100, 100)]
)
def test_a_chunk_that_is_longer_than_the_sequence_is_one_that_kernels_know(
    n_tokens: int, chunk_len: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def attend(*arguments: Any) -> torch.Tensor:
        lengths.append(arguments[3].chunk_len)
        return attention_in_chunks(*arguments)

    monkeypatch.setattr("reformer.local.attention_in_chunks", attend)
    local_attention(*torch.randn(3, 1, 1, n_tokens, 4), chunk_len=chunk_len)
    assert lengths == [expected]
    local_attention(*torch.randn(3, 1, 1, 257, 4), chunk_len=5000)
    assert lengths[1:] == [320], "with a sixth more padding, not twenty times"
