"""Attention dropout: the right rate, no correlation between anything and anything, the same zeros every time."""

import pytest
import torch
from torch import Tensor

from reformer.lsh.dropout import check_dropout, keep_factor, keep_factor_of_words, keep_threshold, mix

N = 1024
"""Queries and keys of a mask: statistics over N * N weights have a standard error of 1 / N."""
LIMIT = 4.5
"""Standard errors; among the hundred numbers compared below, one in 1,500 runs would exceed this by chance."""


def mask(key: int = 7, round_: int = 0, dropout: float = 0.1) -> Tensor:
    """Factors [N, N]."""
    position = torch.arange(N)
    return keep_factor(torch.tensor(key), round_, position[:, None], position, dropout, torch.float64)


def standardised(key: int = 7, round_: int = 0, dropout: float = 0.1) -> Tensor:
    """Mean 0 and variance 1 if the rate is right."""
    return (mask(key, round_, dropout) * (1 - dropout) - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("key", [0, 7, -(2**31)])
def test_keep_rate(dropout: float, key: int) -> None:
    factors = mask(key, dropout=dropout)
    assert set(factors.unique().tolist()) == {0.0, 1 / (1 - dropout)}
    assert abs(standardised(key, dropout=dropout).mean().item()) * N < LIMIT


def test_no_dropout_keeps_all_and_almost_one_drops_almost_all() -> None:
    assert (mask(dropout=0.0) == 1).all()
    assert (mask(dropout=1 - 2**-40) != 0).sum() < 3


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("key", [0, 1, 7])
def test_nothing_is_correlated(dropout: float, key: int) -> None:
    x = standardised(key, dropout=dropout)
    products = {
        "keys side by side": x[:, 1:] * x[:, :-1],
        "queries side by side": x[1:] * x[:-1],
        "along the diagonal": x[1:, 1:] * x[:-1, :-1],
        "three keys in a row": x[:, 2:] * x[:, 1:-1] * x[:, :-2],
        "four corners": x[1:, 1:] * x[:-1, :-1] * x[1:, :-1] * x[:-1, 1:],
        "query and key exchanged": x * x.T,
        "next round": x * standardised(key, 1, dropout),
        "next head": x * standardised(key + 1, 0, dropout),
        "next round and previous head": x * standardised(key - 1, 1, dropout),
        "a bit of the key": x * standardised(key ^ 2**30, 0, dropout),
        "next key shifted by a place": x[:, 1:] * standardised(key + 1, 0, dropout)[:, :-1],
    }
    for name, product in products.items():
        assert abs(product.mean().item()) * N < LIMIT, name


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_a_mask_has_no_low_rank_part(dropout: float) -> None:
    """The largest singular value of independent numbers is 2 sqrt(N); a pattern of any rows and columns is more."""
    assert torch.linalg.matrix_norm(standardised(dropout=dropout), 2) < 2.1 * N**0.5


def test_a_mask_depends_on_positions_alone() -> None:
    whole = mask()
    query, key = torch.randperm(N)[:50], torch.randperm(N)[:70]
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
        part = keep_factor(torch.tensor(7), 0, query[:, None].to(dtype), key.to(dtype), 0.1, torch.float64)
        assert torch.equal(part, whole[query[:, None], key])
    keys = torch.tensor([3, 7], dtype=torch.int32)[:, None, None]
    both = keep_factor(keys, 0, query[:, None], key[None, :], 0.1, torch.float64)
    assert torch.equal(both[1], part) and torch.equal(both[0], mask(3)[query[:, None], key])


def words(key: int, tag: int, round_: int, position: int) -> int:
    """The definition in unsigned arithmetic, as a kernel does it."""

    def mixed(word: int) -> int:
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    return mixed((mixed((mixed((key ^ tag) % 2**32) + round_) % 2**32) + position) % 2**32)


@pytest.mark.parametrize("key", [0, 7, -123456789, 2**31 - 1])
def test_equals_the_definition_in_unsigned_arithmetic(key: int) -> None:
    positions = [0, 1, 65_535, 1_000_000]
    factors = keep_factor(
        torch.tensor(key), 3, torch.tensor(positions)[:, None], torch.tensor(positions), 0.5, torch.float32
    )
    for i, query in enumerate(positions):
        for j, place in enumerate(positions):
            hashed = ((words(key, 0x2545F491, 3, query) | 1) ^ (words(key, 0x6C8E9CF5, 3, place) & ~1)) ** 2 % 2**32
            signed = hashed - 2**32 if hashed >= 2**31 else hashed
            assert factors[i, j] == (2.0 if signed >= 0 else 0.0)


def test_a_hash_at_the_threshold_is_kept_and_one_below_is_dropped() -> None:
    """Two words whose xor is 1 hash to 1."""
    one, none = torch.ones(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    for threshold, is_kept in ((1, True), (2, False)):
        dropout = (threshold + 2**31) / 2**32
        assert keep_threshold(dropout) == threshold
        assert bool(keep_factor_of_words(one, none, dropout, torch.float32)) == is_kept


def test_mix_is_a_bijection_of_the_words_it_is_given() -> None:
    word = torch.arange(-(2**17), 2**17, dtype=torch.int32) * 16411
    assert mix(word).unique().numel() == word.unique().numel()


@pytest.mark.parametrize(
    ("dropout", "keys", "message"),
    [
        (-0.1, None, "dropout=-0.1 must be at least 0 and less than 1"),
        (1.0, None, "dropout=1.0 must be at least 0 and less than 1"),
        (0.1, None, r"dropout=0.1 needs dropout_keys, one integer per sample and head \[2, 3\]"),
        (0.1, torch.zeros(3, 2, dtype=torch.int32), r"\[2, 3\] = \[B, H\], got torch.int32 \[3, 2\]"),
        (0.1, torch.zeros(2, 3, dtype=torch.int16), r"must be int32 or int64 .* got torch.int16"),
        (0.1, torch.zeros(2, 3), r"must be int32 or int64 .* got torch.float32"),
    ],
)
def test_errors_name_what_was_expected(dropout: float, keys: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dropout(dropout, keys, (2, 3))
