"""Documents in one row, and padding: what tokens are sorted by, and that a document loses nothing by its company."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from reformer import lsh_attention
from reformer.lsh import hashing
from reformer.lsh.hashing import sort_by_bucket, sort_labels
from reformer.lsh.reference import lexicographic, reach_counts
from reformer.lsh.rounds import renumbered

L, R = 8, 3
LENGTHS = (5 * L, L, 3 * L)


def numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint16])
@pytest.mark.parametrize("with_segments", [True, False])
@pytest.mark.parametrize("with_padding", [True, False])
def test_tokens_are_sorted_by_padding_segment_bucket_and_position(
    dtype: torch.dtype, with_segments: bool, with_padding: bool
) -> None:
    """Whatever integers segments are, wherever they stand, and whatever buckets a caller has."""
    buckets = (numbers(5, 2, 2, R, 30) - 2 * dtype.is_signed).to(dtype)
    if dtype == torch.int64:
        buckets = buckets * 2**61
    segments = torch.tensor([-(2**62), 7, 2**62])[numbers(3, 2, 30)] if with_segments else None
    mask = numbers(3, 2, 30) > 0 if with_padding else None
    numbered = (None, 0) if segments is None else renumbered(segments)
    labels = sort_labels(buckets, *numbered, mask)
    order, _ = sort_by_bucket(labels.flatten(0, 1), 30)
    for b in range(2):
        padding = torch.zeros(30, dtype=torch.bool) if mask is None else ~mask[b]
        segment = torch.zeros(30, dtype=torch.int64) if segments is None else segments[b]
        for h in range(2):
            slow = lexicographic(padding, segment, buckets[b, h])
            for r in range(R):
                places = [(padding[t].item(), segment[t].item(), buckets[b, h, r, t].item(), t) for t in range(30)]
                expected = [place[-1] for place in sorted(places)]
                assert order.view(2, 2, R, 30)[b, h, r].tolist() == expected
                assert slow[r].argsort(stable=True).tolist() == expected


def test_on_a_gpu_short_buckets_are_spaced_by_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which asks it for nothing, and is the same order."""
    assert hashing._bounds(SimpleNamespace(device=torch.device("cuda"), dtype=torch.int16)) == (-(2**15), 2**15 - 1)
    buckets = (numbers(5, 2, 2, R, 30) * 9000 - 2**15).to(torch.int16)
    segments, n_segments = renumbered(numbers(3, 2, 30))
    near = sort_labels(buckets, segments, n_segments, segments > 0)
    monkeypatch.setattr(hashing, "_bounds", lambda buckets: (-(2**15), 2**15 - 1))
    far = sort_labels(buckets, segments, n_segments, segments > 0)
    assert far.dtype == torch.int32 and far.max() > near.max()
    assert torch.equal(far.argsort(stable=True), near.argsort(stable=True))
    many = sort_labels(buckets, segments, 2**15, None)
    assert many.dtype == torch.int64 and torch.equal(many, sort_labels(buckets, segments, n_segments, None))


def test_without_segments_and_padding_tokens_are_sorted_by_their_buckets() -> None:
    buckets = numbers(5, 1, 2, R, 30)
    assert sort_labels(buckets, None, 0, None) is buckets


@pytest.mark.parametrize(
    ("backend", "across"),
    [("chunked", True), ("chunked", False), ("dense", True), ("reference", True), ("reference", False)],
)
def test_a_document_finds_in_company_what_it_finds_alone(backend: str, across: bool) -> None:
    """But for the first chunk of each round, which alone looks back to the round before. Causal, whole chunks."""
    n_tokens = sum(LENGTHS)
    segments = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    qk, v = torch.randn(2, 1, 2, n_tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    buckets = numbers(6, 1, 2, R, n_tokens)
    options = {"n_hashes": R, "chunk_len": L, "attend_across_buckets": across, "backend": backend}
    out, _ = lsh_attention(qk, v, buckets, segment_ids=segments[None], **options)
    n_compared = 0
    for start, length in zip((0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]), LENGTHS, strict=True):
        own = slice(start, start + length)
        alone, _ = lsh_attention(qk[:, :, own], v[:, :, own], buckets[..., own], **options)
        _, place = sort_by_bucket(buckets[0, ..., own], L)
        same = (place >= L).all(dim=1)  # [H, T]
        assert torch.allclose(out[0, :, own][same], alone[0][same], rtol=0, atol=1e-12)
        n_compared += int(same.sum())
    assert n_compared > 30


def test_padding_takes_no_place_among_what_it_pads() -> None:
    """However much there is of it, a token finds as many others."""
    buckets, found = numbers(6, 1, R, 5 * L), []
    for n_padding in (0, 20 * L):
        more = torch.cat([buckets, numbers(6, 1, R, n_padding)], dim=-1)[0]
        is_padding = torch.arange(more.shape[-1]) >= 5 * L
        labels = lexicographic(is_padding, torch.zeros_like(is_padding), more)
        counts = reach_counts(more, L, causal=True, attend_across_buckets=True, labels_RT=labels)
        found.append(counts[:, : 5 * L, : 5 * L].sum(dim=0) > 0)
    _, place = sort_by_bucket(buckets, L)
    same = (place[0] >= L).all(dim=0)
    assert same.sum() > 10 and torch.equal(found[0][same], found[1][same])


def test_padding_of_many_documents_needs_twice_as_many_labels() -> None:
    buckets = torch.tensor([[[[-(2**15), 2**15 - 1]]]], dtype=torch.int16)
    labels = sort_labels(buckets, torch.tensor([[19_999, 0]]), 20_000, torch.tensor([[False, True]]))
    assert labels.dtype == torch.int64 and labels.flatten().argsort().tolist() == [1, 0]


def test_large_buckets_of_the_callers_own() -> None:
    buckets = torch.tensor([[[[2**31 - 2, 2**31 - 1]]]], dtype=torch.int32)
    labels = sort_labels(buckets, torch.tensor([[1, 0]]), 2, None)
    assert labels.dtype == torch.int32 and labels.flatten().argsort().tolist() == [1, 0]
