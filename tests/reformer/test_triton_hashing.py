"""The fused hashing against `hash_to_buckets` and the definition: on a GPU, or else in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from reformer import lsh_attention
from reformer.lsh import dispatch
from reformer.lsh.hashing import bucket_dtype, hash_to_buckets
from reformer.lsh.triton_hashing import BLOCK, PARTS, in_bf16_parts, triton_hash

if not find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def vectors(batch: int, n_heads: int, n_tokens: int, d_head: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D] with the strides of a projection whose heads stand side by side."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch, n_tokens, n_heads, d_head, generator=generator)
    return rows.to(DEVICE, dtype).transpose(1, 2)


def rotations_for(n_heads: int, d_head: int, n_hashes: int, factors: tuple[int, ...]) -> Tensor:
    return torch.randn(n_heads, d_head, n_hashes, sum(factors) // 2, generator=torch.Generator().manual_seed(1))


def shortfall(qk: Tensor, rotations: Tensor, factors: tuple[int, ...], buckets: Tensor) -> float:
    """How far the projections that the buckets stand for are below the largest, at most, by exact projections."""
    projected = torch.einsum("bhtd,hdrf->bhrtf", qk.double().cpu(), rotations.double())
    rest, worst = buckets.cpu().long(), 0.0
    for part, factor in zip(projected.split([factor // 2 for factor in factors], dim=-1), factors, strict=True):
        both = torch.cat([part, -part], dim=-1)
        chosen = both.gather(-1, (rest % factor)[..., None])[..., 0]
        worst = max(worst, (both.amax(dim=-1) - chosen).max().item())
        rest = rest // factor
    assert not rest.any()
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "n_hashes", "factors"),
    [
        ((1, 1, 1, 16), 1, (2,)),
        ((2, 3, 128 + 5, 24), 2, (4, 6)),
        ((1, 2, 128, 64), 3, (34, 200)),  # more directions than are looked at together
        ((1, 1, 2 * 128 - 1, 8), 2, (6, 4, 8)),
        ((1, 1, 70, 128), 1, (256, 256)),  # beyond int16
    ],
)
def test_equals_the_definition(
    shape: tuple[int, int, int, int], n_hashes: int, factors: tuple[int, ...], dtype: torch.dtype
) -> None:
    """At whole blocks of tokens, just above, and just below."""
    assert 128 % BLOCK[PARTS[dtype]] == 0
    qk, rotations = vectors(*shape, dtype), rotations_for(shape[1], shape[3], n_hashes, factors)
    buckets = triton_hash(qk, rotations, factors)
    assert buckets.dtype == bucket_dtype(factors)
    assert buckets.shape == (*shape[:2], n_hashes, shape[2])
    assert shortfall(qk, rotations, factors, buckets) < 1e-5  # projections are about 10
    portable = hash_to_buckets(qk, rotations.to(DEVICE), factors)
    assert (buckets != portable).float().mean() < 0.002
    assert shortfall(qk, rotations, factors, portable) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equals_the_first_counts(dtype: torch.dtype) -> None:
    """Whole numbers, whose sums are exact: every tie is one, between signs and between groups of directions, too."""
    generator = torch.Generator().manual_seed(0)
    factors = (300, 12)
    qk = torch.randint(-1, 2, (1, 2, 200, 8), generator=generator).to(DEVICE, dtype)
    qk[:, :, ::7] = 0  # all projections are equal
    rotations = torch.randint(-1, 2, (2, 8, 2, 156), generator=generator).float()
    buckets = triton_hash(qk, rotations, factors)
    assert torch.equal(buckets, hash_to_buckets(qk.cpu(), rotations, factors).to(DEVICE))
    assert not buckets[:, :, :, ::7].any()


def test_rotations_may_have_any_strides() -> None:
    qk, rotations = vectors(1, 2, 40, 16, torch.bfloat16), rotations_for(2, 16, 3, (6, 10))
    permuted = rotations.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not permuted.is_contiguous() and torch.equal(permuted, rotations)
    assert torch.equal(triton_hash(qk, permuted, (6, 10)), triton_hash(qk, rotations, (6, 10)))


def test_three_parts_in_bf16_are_the_number() -> None:
    x = torch.cat([torch.randn(1000) * 10.0**power for power in range(-20, 20, 5)])
    parts = in_bf16_parts(x)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().sum(dim=0), x.double())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_numbers_that_are_none_get_some_bucket() -> None:
    qk = vectors(1, 1, 40, 16, torch.float32)
    qk[:, :, ::3] = torch.nan
    qk[:, :, 1::3, 0] = torch.inf
    buckets = triton_hash(qk, rotations_for(1, 16, 2, (6, 10)), (6, 10))
    assert buckets.min() >= 0 and buckets.max() < 60


def test_lsh_attention_hashes_by_it_where_its_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, rotations = vectors(1, 2, 40, 16, torch.float32), rotations_for(2, 16, 2, (4,))
    options = {"n_hashes": 2, "chunk_len": 16, "n_buckets": 4, "rotations": rotations}
    hashed = []
    monkeypatch.setattr(dispatch, "triton_hash", lambda *given: hashed.append(1) or triton_hash(*given))
    _, fused = lsh_attention(qk, qk, backend="triton", **options)
    assert len(hashed) == 1
    for backend in ("chunked", "reference", *(["auto"] if DEVICE == "cpu" else [])):
        assert torch.equal(lsh_attention(qk, qk, backend=backend, **options)[1], fused)
    lsh_attention(qk.double(), qk.double(), backend="auto", **options)
    assert len(hashed) == 1


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match=r"fused hashing cannot run: .*float64; take hash_to_buckets"):
        triton_hash(vectors(1, 1, 4, 16, torch.float64), rotations_for(1, 16, 1, (4,)), (4,))
