"""Buckets by their definition, and the sort."""

import numpy as np
import pytest
import torch

from reformer.lsh.hashing import (
    bucket_factors,
    default_buckets,
    derive_seed,
    draw_rotations,
    hash_to_buckets,
    sort_by_bucket,
)


def test_bucket_is_the_largest_of_xr_and_minus_xr() -> None:
    qk = torch.randn(2, 3, 10, 4, dtype=torch.float64)
    rotations = torch.randn(3, 4, 2, 3)
    buckets = hash_to_buckets(qk, rotations, (6,))
    for b, h, r, t in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2, 10))).tolist():
        rotated = qk[b, h, t] @ rotations[h, :, r].double()
        candidates = [*rotated.tolist(), *(-rotated).tolist()]
        assert buckets[b, h, r, t] == candidates.index(max(candidates))


def test_of_equal_directions_the_first_is_taken() -> None:
    qk = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [-2.0, 1.0]])
    buckets = hash_to_buckets(qk[None, None], torch.eye(2)[None, :, None], (4,))
    assert buckets.flatten().tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_hashed_in_fp32(dtype: torch.dtype) -> None:
    qk, rotations = torch.randn(1, 1, 2000, 16).to(dtype), draw_rotations(1, 16, 1, (64,), 0, 0, 0)
    assert torch.equal(hash_to_buckets(qk, rotations, (64,)), hash_to_buckets(qk.float(), rotations, (64,)))


def test_factors_combine_as_digits() -> None:
    qk, rotations = torch.randn(1, 1, 50, 8), torch.randn(1, 8, 1, 5)
    buckets = hash_to_buckets(qk, rotations, (4, 6))
    first = hash_to_buckets(qk, rotations[..., :2], (4,))
    second = hash_to_buckets(qk, rotations[..., 2:], (6,))
    assert torch.equal(buckets, first + 4 * second)


def test_default_number_of_buckets() -> None:
    assert default_buckets(65_536, 64) == (32, 64)
    assert default_buckets(1_048_576, 64) == (128, 256)
    assert default_buckets(4096, 64) == (128,)
    assert default_buckets(6144, 64) == (16, 16)  # 256 are the nearest to 192
    assert default_buckets(5120, 64) == (8, 16)  # 128 are nearer to 160 than 256
    assert default_buckets(1, 64) == (2,)
    assert bucket_factors(None, 65_536, 64) == (32, 64)
    assert bucket_factors((4, 8), 10, 64) == (4, 8)
    assert bucket_factors(2**24, 10, 64) == (2**24,)  # the most
    for n_tokens in range(1, 20_000, 97):
        assert all(factor % 2 == 0 for factor in default_buckets(n_tokens, 16))


def test_many_buckets_need_more_than_16_bits() -> None:
    qk = torch.randn(1, 1, 500, 16)
    factors = (256, 256)
    buckets = hash_to_buckets(qk, draw_rotations(1, 16, 1, factors, 0, 0, 0), factors)
    assert buckets.dtype == torch.int32 and buckets.min() >= 0 and buckets.max() >= 2**15


def test_rotations_are_fixed_by_seed_step_layer_round_and_head() -> None:
    def draw(n_heads: int, n_hashes: int, seed: int = 1, step: int = 2, layer: int = 3) -> torch.Tensor:
        return draw_rotations(n_heads, 8, n_hashes, (16,), seed, step, layer)

    base = draw(4, 2)
    assert torch.equal(draw(4, 4)[:, :, :2], base)  # more rounds leave the first ones alone
    assert not torch.equal(base[:, :, 0], base[:, :, 1]) and not torch.equal(base[0], base[1])
    for change in ({"seed": 2}, {"step": 3}, {"layer": 4}):
        assert not torch.equal(draw(4, 2, **change), base)
    state = torch.get_rng_state()
    draw(4, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_are_the_same_on_every_platform() -> None:
    assert derive_seed(0, 1, 2) == 5458876493991123480
    assert derive_seed(0, 12) != derive_seed(0, 1, 2)


def test_sort_is_stable_and_padded() -> None:
    buckets = torch.tensor([[[1, 0, 1, 0, 2]]], dtype=torch.int16)
    order, inverse = sort_by_bucket(buckets, 4)
    assert order.tolist() == [[[1, 3, 0, 2, 4, 5, 6, 7]]]
    assert inverse.tolist() == [[[2, 0, 3, 1, 4]]]


def test_seeds_are_of_integers_alone() -> None:
    assert derive_seed(np.int64(3), 1) == derive_seed(3, 1)
    for part in (1.5, 3.0, "3"):
        with pytest.raises(TypeError):
            derive_seed(part, 1)  # type: ignore[arg-type]
