"""Memory that calls of attention share: what it is, and that nothing of one call is left in another's result."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from reformer import Reformer, ReformerConfig, attention, lsh_attention
from reformer.local import local_attention
from reformer.lsh import chunked, rounds
from reformer.lsh.scratch import scratch, shared_scratch

LIKE = torch.empty(0, dtype=torch.float64)
T, D = 75, 8


def take(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return scratch(LIKE, dtype, shapes)


def test_outside_every_call_has_its_own() -> None:
    (one,), (other,) = take((4, 3)), take((4, 3))
    assert one.shape == (4, 3) and one.dtype == torch.float32
    assert one.data_ptr() != other.data_ptr()


def test_inside_the_ith_is_the_same_memory_and_no_two_of_a_call_are() -> None:
    with shared_scratch():
        first = take((8, 3), (5, 3))
        second = take((8, 3), (2, 4))
        assert [x.data_ptr() for x in second] == [x.data_ptr() for x in first]
        assert second[1].shape == (2, 4) and second[1].is_contiguous()
        assert len({x.data_ptr() for x in first}) == 2


@pytest.mark.parametrize(("shape", "dtype"), [((9, 3), torch.float32), ((8, 3), torch.float64)])
def test_what_does_not_fit_is_taken_anew(shape: tuple[int, int], dtype: torch.dtype) -> None:
    with shared_scratch():
        (small,) = take((8, 3))
        (other,) = take(shape, dtype=dtype)
        assert other.shape == shape and other.dtype == dtype
        assert other.untyped_storage().data_ptr() != small.untyped_storage().data_ptr()
        (again,) = take(shape, dtype=dtype)
        assert again.data_ptr() == other.data_ptr()


def test_it_ends_with_the_block_and_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), shared_scratch():
        (inside,) = take((8, 3))
        raise ZeroDivisionError
    (outside,) = take((8, 3))
    assert outside.data_ptr() != inside.data_ptr()


def test_an_inner_block_leaves_the_outer_ones_memory_alone() -> None:
    with shared_scratch():
        (outer,) = take((8, 3))
        with shared_scratch():
            (inner,) = take((8, 3))
        assert inner.data_ptr() != outer.data_ptr()
        assert take((8, 3))[0].data_ptr() == outer.data_ptr()


def test_another_thread_has_its_own() -> None:
    found: list[Tensor] = []
    with shared_scratch():
        (here,) = take((8, 3))
        thread = threading.Thread(target=lambda: found.extend(take((8, 3))))
        thread.start()
        thread.join()
    assert found[0].data_ptr() != here.data_ptr()


def lsh(qk: Tensor, v: Tensor, _: Tensor, n_hashes: int = 2, **options: object) -> Tensor:
    rotations = torch.randn(2, D, n_hashes, 3, generator=torch.Generator().manual_seed(3))
    options |= {"n_hashes": n_hashes, "chunk_len": 8, "n_buckets": 6, "rotations": rotations, "backend": "chunked"}
    return lsh_attention(qk, v, **options)[0]


def local(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return local_attention(q, k, v, chunk_len=8, backend="chunked", **options)


DROPOUT = {"dropout": 0.3, "dropout_keys": torch.tensor([[3, -4], [5, 6]])}
MODES = {
    "lsh": lsh,
    "lsh, one round": partial(lsh, n_hashes=1),
    "lsh, bidirectional": partial(lsh, causal=False),
    "lsh, dropout": partial(lsh, **DROPOUT),
    "local": local,
    "local, bidirectional": partial(local, causal=False),
    "local, dropout": partial(local, **DROPOUT),
}


def run(attend: Callable[..., Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients for inputs of this size."""
    generator = torch.Generator().manual_seed(round(scale))
    inputs = [torch.randn(2, 2, T, D, generator=generator).mul(scale).to(dtype).requires_grad_() for _ in range(3)]
    out = attend(*inputs)
    gradients = torch.autograd.grad(out.double().square().sum(), inputs, allow_unused=True)
    return [out.detach(), *(x for x in gradients if x is not None)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_results_do_not_depend_on_who_computed_there_before(
    monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype, scale: float
) -> None:
    """The memory is full of NaN at first, then of another call's numbers; a scale of 1e3 takes the unbounded path."""
    attend = MODES[mode]
    monkeypatch.setattr(rounds, "TILE_SCORES_PER_THREAD", 300)  # several tiles, the last one smaller
    alone = run(attend, scale, dtype)

    def poisoned(like: Tensor, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [x.fill_(torch.nan) for x in scratch(like, dtype, shapes)]

    with shared_scratch():
        with monkeypatch.context() as patch:
            patch.setattr(chunked, "scratch", poisoned)
            first = run(attend, scale, dtype)
        kept = [x.clone() for x in first]
        run(attend, scale + 1, dtype)
        second = run(attend, scale, dtype)
    for results in (first, second):
        assert all(torch.equal(x, y) for x, y in zip(results, alone, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True)), "a later call wrote into an earlier result"


def test_a_layer_computes_all_its_heads_in_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and backward with what it computes again."""
    monkeypatch.setattr(attention, "GROUP_NUMBERS", 1)
    seen: list[list[int]] = []
    alive: list[Tensor] = []  # so that no address is given twice

    def recording(*arguments: object) -> list[Tensor]:
        tensors = scratch(*arguments)  # type: ignore[arg-type]
        seen.append([x.data_ptr() for x in tensors if len(x)])
        alive.extend(tensors)
        return tensors

    monkeypatch.setattr(chunked, "scratch", recording)
    sizes = {"vocab_size": 20, "max_seq_len": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_hashes": 2}
    model = Reformer(ReformerConfig(**sizes, lsh_chunk_len=8, attn_pattern=["lsh"]))
    tokens = torch.randint(0, 20, (1, 64))
    model(tokens, tokens).backward()
    assert len(seen) == 4 * (2 + 2 + 1)  # the last layer's forward is not computed again
    first_forward, last_forward, last_backward, first_again = seen[:4], seen[4:8], seen[8:12], seen[12:]
    assert all(pointers == first_forward[0] for pointers in first_forward)
    assert all(pointers == last_forward[0] for pointers in last_forward)
    assert all(pointers == last_backward[0] for pointers in last_backward)
    forwards, backwards = first_again[::2], first_again[1::2]
    assert all(pointers == forwards[0] for pointers in forwards)
    assert all(pointers == backwards[0] for pointers in backwards)
    assert backwards[0][: len(forwards[0])] == forwards[0]
