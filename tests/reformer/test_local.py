"""Local attention against one dense masked softmax, float64, outputs and gradients."""

import pytest
import torch
from parity import assert_parity

from reformer.local import local_attention, local_attention_reference


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_dense(n_tokens: int, causal: bool, masked: bool) -> None:
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
        out = attention(q, k, v, chunk_len=8, causal=causal, **masks)
        grads = torch.autograd.grad(out, (q, k, v), inputs[3])
        results.append(dict(zip(("out", "d_q", "d_k", "d_v"), (out.detach(), *grads), strict=True)))
    assert_parity(*results, 1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(1, 2, 5, 8)}, r"q and k and v must all be \[B, H, T, D\]"),
        ({"k": torch.zeros(1, 2, 6, 4)}, "q and k and v must all be"),
        ({"k": torch.zeros(1, 2, 5, 4, dtype=torch.float64)}, "one floating-point dtype"),
        ({"key_padding_mask": torch.ones(1, 6)}, r"key_padding_mask must be \[B, T\] = \[1, 5\]"),
        ({"chunk_len": 0}, "chunk_len=0 must be an int"),
    ],
)
def test_bad_arguments_name_what_was_expected(changes: dict[str, object], message: str) -> None:
    heads = {name: torch.zeros(1, 2, 5, 4) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        local_attention(**{**heads, "chunk_len": 2, **changes})
