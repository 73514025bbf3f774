"""Every mode of LSH, local and dense attention against float64 oracles, in outputs and gradients; and the oracles.

Sizes, rounds, head dims and chunk lengths that test_lsh_attention.py does not have, attention dropout, tokens that
see nothing, and what is left of it in lower precision (`pytest -s` prints that table).
"""

import math
from itertools import product

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from reformer import dense as dense_module
from reformer import lsh_attention
from reformer.dense import dense_attention
from reformer.local import local_attention, local_attention_reference
from reformer.lsh.dropout import keep_factor
from reformer.lsh.reference import reach_counts
from reformer.precision import MODES, Mode, errors_of, table

# (rounds, chunk length, head dim, tokens): 1 to 3 chunks, whole ones and awkward ones
SIZES = [
    (1, 16, 32, 16),
    (2, 16, 64, 33),
    (4, 16, 128, 47),
    (8, 16, 33, 48),
    (16, 16, 7, 41),
    (4, 32, 1, 31),
    (8, 32, 32, 65),
    (8, 64, 32, 65),
    (2, 64, 5, 129),
    (4, 64, 64, 192),
    (2, 128, 32, 127),
    (1, 128, 64, 300),
    (2, 256, 33, 257),
    (1, 256, 128, 515),
]
MASKS = [(), ("padding",), ("segments",), ("padding", "segments")]


def random_inputs(n_tokens: int, d_head: int = 8, batch: int = 2, heads: int = 2, seed: int = 0) -> list[Tensor]:
    """qk, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, n_tokens, d_head)
    qk, v, d_out = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    return [qk.requires_grad_(), v.requires_grad_(), d_out]


def make_masks(names: tuple[str, ...], n_tokens: int) -> dict[str, Tensor]:
    """Masks [2, T]; the second row is all padding."""
    generator = torch.Generator().manual_seed(2)
    masks = {}
    if "padding" in names:
        masks["key_padding_mask"] = torch.rand(2, n_tokens, generator=generator) > 0.3
        masks["key_padding_mask"][1] = False
    if "segments" in names:
        masks["segment_ids"] = torch.randint(0, 4, (2, n_tokens), generator=generator).sort().values
    return masks


def differentiated(out: Tensor, inputs: tuple[Tensor, ...], d_out: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out, inputs, d_out)
    return {"out": out.detach(), **{f"gradient {i}": x for i, x in enumerate(gradients)}}


def assert_lsh_equals_oracle(n_tokens: int, d_head: int, **options: object) -> None:
    qk, v, d_out = random_inputs(n_tokens, d_head, heads=1)
    torch.manual_seed(1)
    out, buckets = lsh_attention(qk, v, backend="chunked", **options)
    exact, _ = lsh_attention(qk, v, buckets, backend="reference", **options)
    expected = differentiated(exact, (qk, v), d_out)
    assert_parity(differentiated(out, (qk, v), d_out), expected, 1e-9)
    if options["attend_across_buckets"] and not options["dropout"]:
        dense, _ = lsh_attention(qk, v, buckets, backend="dense", **options)
        assert_parity(differentiated(dense, (qk, v), d_out), expected, 1e-9)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("across", "corrected"), product([True, False], repeat=2))
def test_lsh_of_every_size_equals_oracle(
    size: tuple[int, int, int, int], causal: bool, across: bool, corrected: bool
) -> None:
    """Masks and dropout go round by the size and the mode, so that all pairs of settings occur."""
    n_hashes, chunk_len, d_head, n_tokens = size
    turn = SIZES.index(size) + causal + 2 * across + 3 * corrected
    assert_lsh_equals_oracle(
        n_tokens,
        d_head,
        n_hashes=n_hashes,
        chunk_len=chunk_len,
        causal=causal,
        attend_across_buckets=across,
        duplicate_correction=corrected,
        dropout=(0.0, 0.3, 0.0)[turn % 3],
        dropout_keys=torch.tensor([[1], [-2]]),
        **make_masks(MASKS[turn % 4], n_tokens),
    )


@pytest.mark.parametrize("n_buckets", [(2, 2), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("across", [True, False])
def test_factorised_buckets_equal_oracle(n_buckets: tuple[int, ...], across: bool) -> None:
    assert_lsh_equals_oracle(
        150, 16, n_hashes=3, chunk_len=16, n_buckets=n_buckets, attend_across_buckets=across, dropout=0.1,
        dropout_keys=torch.zeros(2, 1, dtype=torch.int32),
    )  # fmt: skip


@pytest.mark.parametrize("chunk_len", [16, 64, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", [MASKS[0], MASKS[3]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_local_equals_oracle(chunk_len: int, causal: bool, masks: tuple[str, ...], dropout: float) -> None:
    for n_tokens in (chunk_len - 1, 2 * chunk_len + 1, 3 * chunk_len):
        q, v, d_out = random_inputs(n_tokens, 7)
        k = random_inputs(n_tokens, 7, seed=1)[0]
        options = {
            "chunk_len": chunk_len,
            "causal": causal,
            "dropout": dropout,
            "dropout_keys": torch.tensor([[5, 6], [7, -8]]),
            **make_masks(masks, n_tokens),
        }
        fast, exact = (attention(q, k, v, **options) for attention in (local_attention, local_attention_reference))
        assert_parity(differentiated(fast, (q, k, v), d_out), differentiated(exact, (q, k, v), d_out), 1e-10)


def allowed_by_hand(n_tokens: int, causal: bool, masks: dict[str, Tensor]) -> Tensor:
    """Who may see whom, [2, 1, T, T], without themselves."""
    allowed = torch.ones(2, 1, n_tokens, n_tokens, dtype=torch.bool)
    if causal:
        allowed &= torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    if "key_padding_mask" in masks:
        allowed &= masks["key_padding_mask"][:, None, None, :]
    if "segment_ids" in masks:
        allowed &= masks["segment_ids"][:, None, :, None] == masks["segment_ids"][:, None, None, :]
    return allowed & ~torch.eye(n_tokens, dtype=torch.bool)


def softmax_by_hand(qk: Tensor, allowed: Tensor) -> Tensor:
    """Probabilities [B, H, T, T] of q.k over what is allowed, or of a token for itself where nothing is."""
    scores = qk @ (qk / qk.norm(dim=-1, keepdim=True)).mT
    allowed = allowed | (~allowed.any(dim=-1, keepdim=True) & torch.eye(qk.shape[2], dtype=torch.bool))
    return scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)


def kept_by_hand(keys: Tensor, round_: int, n_tokens: int, dropout: float) -> Tensor:
    """Factors [B, H, T, T]; 1 for a token itself."""
    position = torch.arange(n_tokens)
    kept = keep_factor(keys[..., None, None], round_, position[:, None], position, dropout, torch.float64)
    return kept.masked_fill(torch.eye(n_tokens, dtype=torch.bool), 1)


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dense_equals_masked_softmax(
    n_tokens: int, causal: bool, masks: tuple[str, ...], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dense_module.BLOCK_SCORES, "cpu", 1)  # blocks of MIN_BLOCK = 64 queries
    qk, v, d_out = random_inputs(n_tokens, 7)
    keys = torch.tensor([[1, 2], [3, 4]])
    given = make_masks(masks, n_tokens)
    out = dense_attention(qk, v, causal=causal, dropout=dropout, dropout_keys=keys, **given)
    probabilities = softmax_by_hand(qk, allowed_by_hand(n_tokens, causal, given))
    exact = (probabilities * kept_by_hand(keys, 0, n_tokens, dropout)) @ v
    assert_parity(differentiated(out, (qk, v), d_out), differentiated(exact, (qk, v), d_out), 1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_lsh_with_chunks_of_the_whole_length_is_dense(causal: bool) -> None:
    qk, v, d_out = random_inputs(75, 7)
    masks = make_masks(("padding", "segments"), 75)
    dense = differentiated(dense_attention(qk, v, causal=causal, **masks), (qk, v), d_out)
    for n_hashes in (1, 4):
        out, _ = lsh_attention(qk, v, n_hashes=n_hashes, chunk_len=75, causal=causal, **masks)
        assert_parity(differentiated(out, (qk, v), d_out), dense, 1e-11)
    keys = torch.tensor([[1, 2], [3, 4]])
    dropped = dense_attention(qk, v, causal=causal, dropout=0.2, dropout_keys=keys, **masks)
    out, _ = lsh_attention(qk, v, n_hashes=1, chunk_len=80, causal=causal, dropout=0.2, dropout_keys=keys, **masks)
    assert_parity({"out": out.detach()}, {"out": dropped.detach()}, 1e-11)


@pytest.mark.parametrize("n_hashes", [2, 8])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_corrected_rounds_are_one_softmax_over_the_union(
    n_hashes: int, causal: bool, across: bool, masks: tuple[str, ...]
) -> None:
    """The union of what the rounds reach, by `reach_counts`; neither rounds nor multiplicities are left in it."""
    n_tokens, chunk_len = 70, 16
    qk, v, d_out = random_inputs(n_tokens, heads=1)
    buckets = torch.randint(0, 6, (2, 1, n_hashes, n_tokens), generator=torch.Generator().manual_seed(3))
    given = make_masks(masks, n_tokens)
    out, _ = lsh_attention(
        qk, v, buckets, n_hashes=n_hashes, chunk_len=chunk_len, causal=causal, attend_across_buckets=across,
        duplicate_correction=True, backend="chunked", **given,
    )  # fmt: skip
    zeros = torch.zeros(2, n_tokens, dtype=torch.int64)
    padding, segments = ~given.get("key_padding_mask", zeros == 0), given.get("segment_ids", zeros)
    labels = buckets + 10 * segments[:, None, None] + 1_000 * padding[:, None, None]
    options = {"causal": causal, "attend_across_buckets": across}
    counts = [
        reach_counts(buckets_RT, chunk_len, labels_RT=labels_RT, **options).sum(dim=0)
        for buckets_RT, labels_RT in zip(buckets.flatten(0, 1), labels.flatten(0, 1), strict=True)
    ]
    reached = torch.stack(counts).view(2, 1, n_tokens, n_tokens) > 0
    exact = softmax_by_hand(qk, reached & allowed_by_hand(n_tokens, causal, given)) @ v
    assert_parity(differentiated(out, (qk, v), d_out), differentiated(exact, (qk, v), d_out), 1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kind", "why"),
    [("lsh", "segments"), ("lsh", "padding"), ("local", "padding"), ("dense", "segments"), ("dense", "padding")],
)
def test_a_token_that_sees_nothing_has_its_own_value(kind: str, causal: bool, dropout: float, why: str) -> None:
    """To the bit, with and without dropout; and nothing else has a gradient."""
    n_tokens = 40
    qk, v, d_out = random_inputs(n_tokens)
    options: dict[str, object] = {"causal": causal, "dropout": dropout, "dropout_keys": torch.zeros(2, 2).int()}
    if why == "padding":
        options["key_padding_mask"] = torch.zeros(2, n_tokens, dtype=torch.bool)
    else:
        options["segment_ids"] = torch.arange(n_tokens).expand(2, -1)
    if kind == "lsh":
        out, _ = lsh_attention(qk, v, n_hashes=3, chunk_len=8, **options)
    elif kind == "dense":
        out = dense_attention(qk, v, **options)
    else:
        out = local_attention(qk, qk, v, chunk_len=8, **options)
    d_qk, d_v = torch.autograd.grad(out, (qk, v), d_out)
    assert torch.equal(out, v) and torch.equal(d_v, d_out) and d_qk.abs().max() == 0


def test_dropout_in_local_attention_may_drop_a_token_for_itself() -> None:
    """Where a token sees itself like any other, its weight is dropped like any other."""
    qk, v, _ = random_inputs(40)
    keys, segments = torch.tensor([[1, 2], [3, 4]]), torch.arange(40).expand(2, -1)
    out = local_attention(qk, qk, v, chunk_len=8, segment_ids=segments, dropout=0.5, dropout_keys=keys)
    position = torch.arange(40)[:, None, None]
    kept = keep_factor(keys[..., None, None, None], 0, position, position, 0.5, torch.float64)[..., 0]
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.allclose(out, v * kept, rtol=1e-14, atol=0)


def test_first_token_of_each_document_has_its_own_value() -> None:
    qk, v, _ = random_inputs(40)
    segments = (torch.arange(40) >= 13).long().expand(2, -1)
    options = {"segment_ids": segments, "dropout": 0.9, "dropout_keys": torch.arange(4).view(2, 2)}
    for out in (dense_attention(qk, v, **options), lsh_attention(qk, v, n_hashes=2, chunk_len=8, **options)[0]):
        assert torch.allclose(out[:, :, [0, 13]], v[:, :, [0, 13]], rtol=1e-14, atol=0)


def test_dropout_acts_on_the_probabilities_of_each_round() -> None:
    """Two rounds of one chunk each: both are dense attention, and each drops something else of it."""
    n_tokens, dropout = 30, 0.4
    qk, v, d_out = random_inputs(n_tokens)
    keys = torch.tensor([[1, 2], [3, 4]])
    probabilities = softmax_by_hand(qk, allowed_by_hand(n_tokens, True, {}))
    by_round = [(probabilities * kept_by_hand(keys, r, n_tokens, dropout)) @ v for r in range(2)]
    exact = differentiated((by_round[0] + by_round[1]) / 2, (qk, v), d_out)
    for backend in ("reference", "chunked"):
        out, _ = lsh_attention(
            qk, v, n_hashes=2, chunk_len=n_tokens, dropout=dropout, dropout_keys=keys, backend=backend
        )
        assert_parity(differentiated(out, (qk, v), d_out), exact, 1e-11)


def test_dropout_leaves_the_expected_output_as_it_is() -> None:
    """The mean over 1,000 samples that differ in nothing but their keys: 3% of the values' size, half a percent."""
    n_samples = 1000
    qk, v, _ = (x.detach().expand(n_samples, -1, -1, -1) for x in random_inputs(32, 4, batch=1, heads=1))
    buckets = torch.zeros(n_samples, 1, 2, 32, dtype=torch.int64)
    options = {"n_hashes": 2, "chunk_len": 8}
    plain, _ = lsh_attention(qk[:1], v[:1], buckets[:1], **options)
    out, _ = lsh_attention(qk, v, buckets, dropout=0.2, dropout_keys=torch.arange(n_samples)[:, None], **options)
    standard_error = out.std(dim=0) / n_samples**0.5
    assert standard_error[0, 1:].min() > 0 and standard_error.max() < 0.05
    assert ((out.mean(dim=0) - plain[0]).abs() <= 4.5 * standard_error + 1e-12).all()


def test_dropout_does_not_depend_on_tiles_or_on_what_else_is_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, v, _ = (x.detach() for x in random_inputs(200))
    keys = torch.tensor([[1, 2], [3, 4]])
    options = {"n_hashes": 2, "chunk_len": 8, "dropout": 0.3}
    whole, buckets = lsh_attention(qk, v, dropout_keys=keys, **options)
    local, dense = (
        attention(*inputs, dropout=0.3, dropout_keys=keys, **chunk)
        for attention, inputs, chunk in (
            (local_attention, (qk, qk, v), {"chunk_len": 8}),
            (dense_attention, (qk, v), {}),
        )
    )
    monkeypatch.setattr("reformer.lsh.rounds.TILE_SCORES_PER_THREAD", 3 * 8 * 16)  # three chunks a tile
    monkeypatch.setitem(dense_module.BLOCK_SCORES, "cpu", 1)
    part = (slice(1, 2), slice(1, 2))
    qk, v, keys, buckets = (x[part] for x in (qk, v, keys, buckets))
    again = {
        "lsh": lsh_attention(qk, v, buckets, dropout_keys=keys, **options)[0],
        "local": local_attention(qk, qk, v, chunk_len=8, dropout=0.3, dropout_keys=keys),
        "dense": dense_attention(qk, v, dropout=0.3, dropout_keys=keys),
    }
    assert_parity(again, {"lsh": whole[part], "local": local[part], "dense": dense[part]}, 1e-13)


def test_zero_vectors_have_zero_keys_without_gradient() -> None:
    """A key of norm 1 does not exist for them; dividing by a tiny norm gave gradients of 1e38."""
    qk, v, d_out = random_inputs(40)
    with torch.no_grad():
        qk[:, :, 5:20:3] = 0
    buckets = torch.zeros(2, 2, 1, 40, dtype=torch.int64)
    exact, _ = lsh_attention(qk, v, buckets, n_hashes=1, chunk_len=40, backend="reference")
    exact = differentiated(exact, (qk, v), d_out)
    assert exact["gradient 0"].abs().max() < 100
    assert_parity(differentiated(dense_attention(qk, v), (qk, v), d_out), exact, 1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(1, 1, 4, 3)}, r"qk and v must all be \[B, H, T, D\]"),
        ({"v": torch.zeros(1, 1, 4, 2).half()}, r"one floating-point dtype, got \[torch.float32, torch.float16\]"),
        ({"segment_ids": torch.zeros(1, 5)}, r"segment_ids must be \[B, T\] = \[1, 4\], got \[1, 5\]"),
        ({"dropout": 0.1}, "needs dropout_keys"),
        ({"dropout": 1.5}, "less than 1"),
    ],
)
def test_dense_errors_name_what_was_expected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_attention(**{"qk": torch.zeros(1, 1, 4, 2), "v": torch.zeros(1, 1, 4, 2), **changes})


@pytest.mark.parametrize("kind", ["lsh", "local", "dense"])
def test_a_padding_mask_of_integers_is_one_of_what_is_not_zero(kind: str) -> None:
    qk, v, _ = random_inputs(40)
    seen = make_masks(("padding",), 40)["key_padding_mask"]
    attend = {
        "lsh": lambda mask: lsh_attention(
            qk, v, torch.zeros(2, 2, 1, 40).long(), n_hashes=1, chunk_len=8, key_padding_mask=mask
        )[0],
        "local": lambda mask: local_attention(qk, qk, v, chunk_len=8, key_padding_mask=mask),
        "dense": lambda mask: dense_attention(qk, v, key_padding_mask=mask),
    }[kind]
    assert torch.equal(attend(2 * seen.int()), attend(seen)) and not torch.equal(attend(seen), attend(None))


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_dropout_needs_keys(kind: str) -> None:
    x = torch.zeros(2, 3, 4, 2)
    with pytest.raises(ValueError, match=r"dropout=0.1 needs dropout_keys, .* \[2, 3\]"):
        if kind == "lsh":
            lsh_attention(x, x, n_hashes=1, chunk_len=2, dropout=0.1)
        else:
            local_attention(x, x, x, chunk_len=2, dropout=0.1)


def explained(dtype: torch.dtype, largest_score: float) -> tuple[float, float]:
    """The largest errors of output and gradients that rounding explains.

    Results are rounded to the dtype; a score s, computed in fp32, is off by |s| eps, and so is its weight's logarithm.
    The backward starts from the rounded output, and where the softmax is saturated gradients are small differences.
    """
    rounding, computing = torch.finfo(dtype).eps, (4 + largest_score) * torch.finfo(torch.float32).eps
    return rounding + computing, 4 * (rounding + computing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_errors_of_lower_precision_are_what_rounding_explains(mode: Mode, dtype: torch.dtype) -> None:
    errors = errors_of(mode, dtype)  # infinite for what is not finite
    of_output, of_gradients = explained(dtype, errors.largest_score)
    assert errors.out <= of_output
    assert max(errors.gradients.values()) <= of_gradients


def test_table_of_errors() -> None:
    printed = table((torch.bfloat16,))
    print(f"\n{printed}")
    assert len(printed.splitlines()) == 1 + len(MODES)


def test_dropout_keys_that_change_before_the_backward() -> None:
    """As where a caller draws them anew into the same memory."""
    qk, v = torch.randn(2, 1, 2, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for change in (0, 1):
        leaves, keys = [qk.clone().requires_grad_(), v.clone().requires_grad_()], torch.tensor([[3, 4]])
        out = dense_attention(*leaves, dropout=0.5, dropout_keys=keys)
        keys += change
        found.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
