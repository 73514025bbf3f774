"""The fast path against the oracle, in float64, outputs and gradients, at awkward sizes; and the oracle itself."""

import math

import numpy as np
import pytest
import torch
from parity import assert_parity
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reformer import dense, lsh_attention
from reformer.lsh import dispatch, rounds
from reformer.lsh.counts import Counts
from reformer.lsh.reference import reach_counts
from reformer.lsh.shared_keys import key_scale_and_bound

LENGTHS = [1, 5, 16, 17, 63, 100]


def random_inputs(n_tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, n_tokens, 8)
    qk, v = (torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for _ in range(2))
    return qk, v


def run(qk: Tensor, v: Tensor, buckets: Tensor | None, **options: object) -> tuple[dict[str, Tensor], Tensor]:
    out, used = lsh_attention(qk, v, buckets, **options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16().half().to(out.dtype)
    d_qk, d_v = torch.autograd.grad(out, (qk, v), d_out)
    return {"out": out.detach(), "d_qk": d_qk, "d_v": d_v}, used


def assert_equals_oracle(n_tokens: int, **options: object) -> None:
    qk, v = random_inputs(n_tokens)
    torch.manual_seed(1)
    fast, buckets = run(qk, v, None, backend="chunked", **options)
    exact, _ = run(qk, v, buckets, backend="reference", **options)
    assert_parity(fast, exact, 1e-9)
    if options.get("attend_across_buckets", True):
        assert_parity(run(qk, v, buckets, backend="dense", **options)[0], exact, 1e-9)


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("n_hashes", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_oracle(n_tokens: int, n_hashes: int, causal: bool) -> None:
    assert_equals_oracle(n_tokens, n_hashes=n_hashes, chunk_len=16, causal=causal)


@pytest.mark.parametrize("n_tokens", [5, 17, 63])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attend_across_buckets", [True, False])
@pytest.mark.parametrize("duplicate_correction", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "segments", "padding and segments"])
def test_every_mode_equals_oracle(
    n_tokens: int, causal: bool, attend_across_buckets: bool, duplicate_correction: bool, masked: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    masks: dict[str, Tensor] = {}
    if "padding" in masked:
        masks["key_padding_mask"] = torch.rand(2, n_tokens, generator=generator) > 0.3
        masks["key_padding_mask"][1] = False  # a row that is all padding
    if "segments" in masked:
        masks["segment_ids"] = torch.randint(0, 3, (2, n_tokens), generator=generator).sort().values
    for n_hashes in (1, 3):
        assert_equals_oracle(
            n_tokens,
            n_hashes=n_hashes,
            chunk_len=8,
            causal=causal,
            attend_across_buckets=attend_across_buckets,
            duplicate_correction=duplicate_correction,
            **masks,
        )


@pytest.mark.parametrize("scale", [1e-150, 1e3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_queries_of_any_length_equal_oracle(scale: float, causal: bool, backend: str) -> None:
    """Beyond a norm of 277 (28 in fp32) a weight relative to the bound |q| could underflow: another path."""
    qk, v = random_inputs(63)
    with torch.no_grad():
        qk[:, :, ::2] *= scale
    options = {"n_hashes": 3, "chunk_len": 8, "causal": causal, "duplicate_correction": True}
    fast, buckets = run(qk, v, None, backend=backend, **options)
    exact, _ = run(qk, v, buckets, backend="reference", **options)
    # Tiny queries have huge gradients of their direction; compare them at their own size.
    assert_parity({"out": fast["out"], "d_v": fast["d_v"]}, {"out": exact["out"], "d_v": exact["d_v"]}, 1e-9)
    assert torch.allclose(fast["d_qk"], exact["d_qk"], rtol=1e-6, atol=1e-9 * exact["d_qk"][:, :, 1::2].abs().max())


@pytest.mark.parametrize("backend", ["chunked", "dense"])
@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 40.0), (torch.float64, 350.0)])
def test_keys_opposite_to_long_queries_leave_room_for_large_gradients(
    dtype: torch.dtype, length: float, backend: str
) -> None:
    """There the sum of weights is as small as can be, and its inverse meets the gradient (of a scaled loss)."""
    qk, v = random_inputs(16, dtype)
    with torch.no_grad():
        qk.zero_()[..., 0] = length
        qk[:, :, 8:] *= -1  # all that a later token sees before it is opposite, or itself
    buckets = torch.cat([torch.zeros(2, 2, 1, 8), torch.ones(2, 2, 1, 8)], dim=-1).long()
    out, _ = lsh_attention(qk, v, buckets, n_hashes=1, chunk_len=1, backend=backend)
    gradients = torch.autograd.grad(out, (qk, v), torch.full_like(out, 2.0**24))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("n_tokens", [1, 2, 15, 16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_sequence_of_one_chunk_takes_the_dense_path_and_is_the_same(
    n_tokens: int, causal: bool, masked: bool
) -> None:
    qk, v = random_inputs(n_tokens)
    options: dict[str, object] = {"n_hashes": 3, "chunk_len": 16, "causal": causal, "duplicate_correction": masked}
    if masked:
        options["segment_ids"] = torch.arange(n_tokens).expand(2, -1) // 3
        options["key_padding_mask"] = torch.arange(2 * n_tokens).view(2, -1) % 4 > 0
    buckets = torch.randint(0, 4, (2, 2, 3, n_tokens))
    exact, _ = run(qk, v, buckets, backend="reference", **options)
    for backend in ("auto", "dense", "chunked"):
        assert_parity(run(qk, v, buckets, backend=backend, **options)[0], exact, 1e-9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attend_across_buckets": False}, "with attend_across_buckets=False each round has its own mask"),
        ({"dropout": 0.1, "dropout_keys": torch.zeros(2, 2, dtype=torch.int32)}, "each round drops weights of its own"),
    ],
)
def test_the_dense_path_is_never_another_function(
    changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    qk, v = random_inputs(16)
    with pytest.raises(ValueError, match=f"backend='dense' cannot run: {reason}"):
        lsh_attention(qk, v, n_hashes=2, chunk_len=16, backend="dense", **changes)
    dispatch._announce.cache_clear()
    with caplog.at_level("INFO", logger="reformer.lsh"):
        lsh_attention(qk, v, n_hashes=2, chunk_len=16, **changes)
        for n_tokens in (16, 15):  # said once, whatever the length
            lsh_attention(qk[:, :, :n_tokens], v[:, :, :n_tokens], n_hashes=2, chunk_len=16)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "LSH attention runs as 'chunked'",
        "LSH attention runs as 'dense'",
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_the_dense_path_runs_as_long_as_it_is_less_work(causal: bool, caplog: pytest.LogCaptureFixture) -> None:
    """And gives nothing else than what the other paths give, on both sides of that length."""
    options = {"n_hashes": 3, "chunk_len": 8, "causal": causal}
    most = max(n for n in range(1, 100) if dispatch.dense_is_less(n, 8, 3, 8, causal))
    for n_tokens, path in ((most, "dense"), (most + 1, "chunked")):
        qk, v = random_inputs(n_tokens)
        dispatch._announce.cache_clear()
        with caplog.at_level("INFO", logger="reformer.lsh"):
            caplog.clear()
            fast, buckets = run(qk, v, None, **options)
        assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"LSH attention runs as '{path}'"]
        assert_parity(fast, run(qk, v, buckets, backend="reference", **options)[0], 1e-9)


@pytest.mark.parametrize("n_hashes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_auto_takes_hardly_more_operations_than_the_rounds(n_hashes: int, causal: bool) -> None:
    """Counted by torch, forward and backward, up to as many tokens as the rounds give keys. A causal block of queries
    is computed whole: of short sequences that is all of them."""
    options = {"n_hashes": n_hashes, "chunk_len": 16, "causal": causal}
    paths = set()
    for n_tokens in (16, 32, n_hashes * 16, n_hashes * (2 if causal else 3) * 16):
        x = torch.randn(1, 1, n_tokens, 16, requires_grad=True)
        counted = {}
        for backend in ("auto", "chunked", "dense"):
            with FlopCounterMode(display=False) as counter:
                lsh_attention(x, x, backend=backend, **options)[0].sum().backward()
            counted[backend] = counter.get_total_flops()
        paths.add("dense" if counted["auto"] == counted["dense"] else "chunked")
        assert counted["auto"] in (counted["chunked"], counted["dense"])
        assert counted["auto"] <= (1.5 if causal else 1.0) * counted["chunked"]
    assert "dense" in paths


@pytest.mark.parametrize("masked_by", ["key_padding_mask", "segment_ids"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_masked_may_be_anything_in_dense_attention(masked_by: str, bad: float) -> None:
    """The keys of such a token leave no trace in others."""
    qk, v = (x.detach() for x in random_inputs(20))
    others = torch.arange(20) != 5
    options = {"n_hashes": 2, "chunk_len": 8, "causal": False, "backend": "dense", masked_by: others.expand(2, -1)}
    exact, buckets = lsh_attention(qk, v, **options)
    qk[:, :, 5] = bad
    out, _ = lsh_attention(qk, v, buckets, **options)
    assert_parity({"out": out[:, :, others]}, {"out": exact[:, :, others]}, 1e-12)


@pytest.mark.parametrize(("n_tokens", "chunk_len"), [(1, 1), (2, 1), (4, 4), (5, 4), (8, 4), (9, 4), (21, 4)])
@pytest.mark.parametrize("n_hashes", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("once", [True, False])
def test_counts_are_those_of_the_definition(
    n_tokens: int, chunk_len: int, n_hashes: int, causal: bool, once: bool
) -> None:
    """The smallest circles of chunks too, in which a neighbour before is one behind, or the chunk itself."""
    buckets = torch.randint(0, 4, (3, n_hashes, n_tokens), generator=torch.Generator().manual_seed(4))
    counts = Counts.of(buckets, chunk_len, causal, once)
    heads, queries, keys = slice(1, 3), slice(n_tokens // 3, n_tokens), slice(0, n_tokens)
    for dtype in (torch.float32, torch.float64):
        found = counts.of_heads(heads, dtype).between(queries, keys)
        exact = torch.stack(
            [reach_counts(b, chunk_len, causal=causal, attend_across_buckets=True).sum(dim=0) for b in buckets[heads]]
        )[:, queries]
        assert found.dtype == dtype and torch.equal(found.long(), exact.clamp(max=1) if once else exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_blocks_do_not_change_the_result(causal: bool, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dense attention: three heads and then one, 20 queries three times and then 3; long queries too."""
    qk, v = random_inputs(63)
    with torch.no_grad():
        qk.mul_(scale)
    segments = torch.arange(2 * 63).view(2, 63) // 40
    options = {"n_hashes": 4, "chunk_len": 8, "causal": causal, "segment_ids": segments, "backend": "dense"}
    whole, buckets = run(qk, v, None, **options)
    monkeypatch.setitem(dense.MAX_BLOCK, "cpu", 20)
    monkeypatch.setitem(dense.BLOCK_SCORES, "cpu", 3 * 20 * 63)
    assert_parity(run(qk, v, buckets, **options)[0], whole, 1e-13)


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, v = random_inputs(300)
    options = {"n_hashes": 2, "chunk_len": 8}
    whole, buckets = run(qk, v, None, **options)
    monkeypatch.setattr(rounds, "TILE_SCORES_PER_THREAD", 3 * 8 * 16)  # three chunks a tile
    tiled, _ = run(qk, v, buckets, **options)
    assert_parity(tiled, whole, 1e-13)


def test_one_bucket_is_sliding_chunk_attention_over_positions() -> None:
    """An oracle of the oracle: with one bucket the order is the identity and a mask can be written by hand."""
    n_tokens, chunk_len = 24, 8
    qk, v = random_inputs(n_tokens)
    buckets = torch.zeros(2, 2, 1, n_tokens, dtype=torch.int64)
    out, _ = lsh_attention(qk, v, buckets, n_hashes=1, chunk_len=chunk_len, backend="reference")
    scores = qk @ (qk / qk.norm(dim=-1, keepdim=True)).mT
    for i in range(n_tokens):
        keys = [j for j in range(i) if i // chunk_len - j // chunk_len <= 1] or [i]
        expected = torch.softmax(scores[:, :, i, keys], dim=-1)[..., None, :] @ v[:, :, keys]
        assert torch.allclose(out[:, :, i], expected[:, :, 0], rtol=1e-12)


def test_duplicate_correction_is_one_softmax_over_the_union() -> None:
    n_tokens = 64
    qk, v = random_inputs(n_tokens)
    options = {"n_hashes": 4, "chunk_len": 8, "attend_across_buckets": False}
    out, buckets = lsh_attention(qk, v, duplicate_correction=True, n_buckets=4, **options)
    plain, _ = lsh_attention(qk, v, buckets, **options)
    # Whether i reaches j is read off the output: the value of j alone, through one round without any other.
    union = torch.zeros(2, 2, n_tokens, n_tokens, dtype=torch.bool)
    for j in range(n_tokens):
        one_hot = torch.zeros_like(v)
        one_hot[:, :, j] = 1
        union[..., j] = lsh_attention(qk, one_hot, buckets, **options)[0][..., 0] > 0
    scores = qk @ (qk / qk.norm(dim=-1, keepdim=True)).mT
    expected = scores.masked_fill(~union, -math.inf).softmax(dim=-1) @ v
    assert torch.allclose(out, expected, rtol=1e-9)
    assert not torch.allclose(plain, expected, rtol=1e-3)  # the correction does something


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_zero_vectors_have_no_key_and_no_gradient_through_it(dtype: torch.dtype, backend: str) -> None:
    qk, v = random_inputs(40, dtype)
    with torch.no_grad():
        qk[:, :, 3:30:5] = 0
    options = {"n_hashes": 2, "chunk_len": 8}
    fast, buckets = run(qk, v, None, backend=backend, **options)
    double_qk, double_v = (x.detach().double().requires_grad_() for x in (qk, v))
    exact, _ = run(double_qk, double_v, buckets, backend="reference", **options)
    tolerance = 1e-9 if dtype is torch.float64 else 16 * torch.finfo(dtype).eps
    assert_parity({name: x.double() for name, x in fast.items()}, exact, tolerance)


def test_the_key_of_a_vector_whose_inverse_norm_would_overflow_is_zero() -> None:
    scale, _ = key_scale_and_bound(torch.tensor([[0.0], [1e-39], [1e-30]]))
    assert scale[:2].tolist() == [[0.0], [0.0]] and 0 < scale[2].item() < torch.inf


def test_first_token_attends_to_itself() -> None:
    qk, v = random_inputs(40)
    out, _ = lsh_attention(qk, v, n_hashes=2, chunk_len=8)
    assert torch.allclose(out[:, :, 0], v[:, :, 0], rtol=1e-15)


def test_causal_output_does_not_depend_on_the_future() -> None:
    qk, v = random_inputs(50)
    buckets = torch.randint(0, 4, (2, 2, 2, 50))
    options = {"n_hashes": 2, "chunk_len": 100}  # one chunk a round: buckets of the future move nothing else
    before, _ = lsh_attention(qk, v, buckets, **options)
    changed = torch.cat([qk[:, :, :30], torch.randn(2, 2, 20, 8, dtype=qk.dtype)], dim=2)
    after, _ = lsh_attention(changed, v, buckets, **options)
    assert torch.allclose(after[:, :, :30], before[:, :, :30], rtol=1e-12)
    assert not torch.allclose(after[:, :, 30:], before[:, :, 30:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_lower_precision_is_finite_and_near(dtype: torch.dtype, backend: str) -> None:
    qk, v = random_inputs(200)
    with torch.no_grad():
        qk.mul_(4)  # scores far from zero
    options = {"n_hashes": 2, "chunk_len": 16}
    low_qk, low_v = (x.detach().to(dtype).requires_grad_() for x in (qk, v))
    low, buckets = run(low_qk, low_v, None, backend=backend, **options)
    exact, _ = run(
        low_qk.detach().double().requires_grad_(),
        low_v.detach().double().requires_grad_(),
        buckets,
        backend="reference",
        **options,
    )
    assert low["out"].dtype == dtype and low["d_qk"].dtype == dtype
    assert_parity({name: x.double() for name, x in low.items()}, exact, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_are_any_integers(dtype: torch.dtype) -> None:
    """Segment ids and buckets beyond what a float holds exactly, and negative ones, are told apart."""
    qk, v = random_inputs(64, dtype)
    segments = torch.where(torch.arange(64) < 30, 2**24, 2**24 + 1).expand(2, 64)
    buckets = torch.where(torch.rand(2, 2, 2, 64) < 0.5, -1, 2**40) + torch.randint(0, 2, (2, 2, 2, 64))
    options = {"n_hashes": 2, "chunk_len": 8, "attend_across_buckets": False, "segment_ids": segments}
    fast, _ = run(qk, v, buckets, **options)
    double_qk, double_v = (x.detach().double().requires_grad_() for x in (qk, v))
    exact, _ = run(double_qk, double_v, buckets, backend="reference", **options)
    assert_parity({name: x.double() for name, x in fast.items()}, exact, 1e-9 if dtype is torch.float64 else 1e-4)


def test_positions_beyond_what_fp32_holds_are_compared_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = torch.lt
    monkeypatch.setattr(torch, "lt", lambda key, own, out: compared.append(key.dtype) or original(key, own, out=out))
    monkeypatch.setattr("reformer.lsh.rounds.MAX_EXACT_FLOAT32", 64)
    for n_tokens, expected in ((63, torch.float32), (64, torch.float64)):
        compared.clear()
        lsh_attention(*random_inputs(n_tokens, torch.float32), n_hashes=1, chunk_len=64, backend="chunked")
        assert set(compared) == {expected}


def test_given_buckets_are_used_and_returned() -> None:
    qk, v = random_inputs(64)
    buckets = torch.randint(0, 8, (2, 2, 2, 64))
    _, used = lsh_attention(qk, v, buckets, n_hashes=2, chunk_len=8)
    assert torch.equal(used, buckets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v": torch.zeros(1, 1, 4, 3)}, "qk and v"),
        ({"buckets": torch.zeros(1, 1, 1, 4, dtype=torch.int64)}, "buckets must be integers"),
        ({"buckets": torch.zeros(1, 1, 2, 4)}, "buckets must be integers"),
        ({"buckets": torch.zeros(1, 1, 2, 4, dtype=torch.bool)}, "buckets must be integers"),
        ({"n_hashes": 0}, "n_hashes=0 must be an int of at least 1"),
        ({"n_buckets": 3}, "even"),
        ({"n_buckets": 4.0}, "even"),
        ({"chunk_len": 0}, "at least 1"),
        ({"rotations": torch.zeros(1, 2, 2, 9)}, "rotations must be"),
        ({"segment_ids": torch.zeros(1, 5)}, "segment_ids must be"),
        ({"segment_ids": torch.zeros(1, 4)}, "segment_ids must be integers, got torch.float32"),
        ({"key_padding_mask": torch.zeros(1, 4)}, "key_padding_mask must be integers or booleans, got torch.float32"),
        ({"chunk_len": 4.0}, "chunk_len=4.0 must be an int of at least 1"),
        ({"chunk_len": np.float64(4)}, r"chunk_len=np.float64\(4.0\) must be an int of at least 1"),
        ({"n_hashes": True}, "n_hashes=True must be an int of at least 1"),
        ({"n_buckets": 2**25}, "up to 16,777,216 buckets"),
        ({"backend": "cuda"}, "choose 'auto'"),
    ],
)
def test_bad_arguments_name_what_was_expected(arguments: dict[str, object], message: str) -> None:
    valid: dict[str, object] = {"qk": torch.zeros(1, 1, 4, 2), "v": torch.zeros(1, 1, 4, 2), "n_hashes": 2}
    with pytest.raises(ValueError, match=message):
        lsh_attention(**{**valid, "chunk_len": 2, **arguments})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_oracle_computes_in_float64_whatever_it_is_given(dtype: torch.dtype) -> None:
    """In half precision a token that sees only itself would lose the weights of its rounds to rounding."""
    qk, v = (x.to(dtype) for x in random_inputs(40))
    buckets = torch.randint(0, 8, (2, 2, 5, 40))
    options = {"n_hashes": 5, "chunk_len": 8, "segment_ids": torch.arange(40).expand(2, -1)}
    out, _ = lsh_attention(qk, v, buckets, backend="reference", **options)
    assert out.dtype == dtype
    exact, _ = lsh_attention(qk.double(), v.double(), buckets, backend="reference", **options)
    assert torch.equal(out, exact.to(dtype))
