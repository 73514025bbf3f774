"""What the reversible stack keeps: nothing per layer but buckets, neither between the passes nor in the backward."""

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from small_models import plain_stack, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reformer import attention
from reformer.call import Call
from reformer.lsh import chunked, hashing, rounds
from reformer.reversible import reversible_stack

make_model = partial(small_model, ff_chunk_tokens=30, loss_chunk_tokens=29, dropout=0.1)
BUCKET_BYTES = 2 * 2 * 2 * 101 * 2
"""Of a layer: B * H * R * T * int16."""
STREAM_BYTES = 2 * 101 * 16 * 8
"""Of a stream: B * T * M * float64."""
DEPTHS = (2, 3, 12)


def saved_bytes(n_layers: int, attn_pattern: tuple[str, ...]) -> int:
    """Bytes alive between forward and backward: saved by autograd nodes, or tensors that Python can see."""
    model = make_model(n_layers=n_layers, attn_pattern=attn_pattern)
    tokens = torch.randint(0, 50, (2, 101))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {id(x) for x in gc.get_objects() if issubclass(type(x), Tensor)}
    embedded = model.embedding(tokens).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        streams = reversible_stack(model.blocks, embedded, embedded, Call(0, 0, (0, 1), 0.1))
    gc.collect()
    for x in gc.get_objects():
        if issubclass(type(x), Tensor) and id(x) not in before:
            note(x)
    assert streams[0].requires_grad
    return sum(storages.values())


def test_a_layer_saves_its_buckets_and_nothing_else() -> None:
    assert saved_bytes(6, ("local",)) == saved_bytes(2, ("local",))
    assert saved_bytes(6, ("lsh",)) - saved_bytes(2, ("lsh",)) == 4 * BUCKET_BYTES


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators made and nobody has let go of yet; `peak` is the most of it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Storages of `known` tensors do not count, whoever has a view of them."""
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.sizes and address not in self.known:
            self.sizes[address] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.live -= self.sizes.pop(address)


def counting_without(*leaves: Tensor) -> LiveBytes:
    """Of these, which get gradients of zero, neither counts."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    gc.collect()
    return LiveBytes([tensor for leaf in leaves for tensor in (leaf, leaf.grad)])


def peak_bytes(n_layers: int, pattern: str, stack: Callable[..., tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """The most bytes alive at any time of forward and backward, and those alive between the two."""
    model = make_model(n_layers=n_layers, attn_pattern=(pattern,))
    x = torch.randn(2, 101, 16, dtype=torch.float64, requires_grad=True)
    with counting_without(x, *model.parameters()) as counted:
        y1, y2 = stack(model.blocks, x, x, Call(0, 0, (0, 1), 0.1, None, 0.1))
        between = counted.live
        loss = (y1 * y2).sum()
        del y1, y2
        loss.backward()
    return counted.peak, between


@pytest.mark.parametrize("pattern", ["local", "lsh", "dense"])
def test_the_peak_of_a_step_grows_with_depth_by_buckets_only(pattern: str) -> None:
    """In a stack of two, no block reconstructs two streams while the inputs of the first block are kept."""
    bucket_bytes = BUCKET_BYTES if pattern == "lsh" else 0
    (peak_2, kept_2), (peak_3, kept_3), (peak_12, kept_12) = (peak_bytes(n, pattern, reversible_stack) for n in DEPTHS)
    print(f"{pattern}: peaks {peak_2}, {peak_3}, {peak_12}; between forward and backward {kept_2}, {kept_3}, {kept_12}")
    assert kept_12 - kept_2 == 10 * bucket_bytes
    assert peak_12 - peak_3 == 9 * bucket_bytes
    assert peak_3 - peak_2 <= 4 * STREAM_BYTES + bucket_bytes
    plain = [peak_bytes(n, pattern, plain_stack)[0] for n in (2, 12)]
    assert plain[1] - plain[0] > 10 * 10 * STREAM_BYTES  # what the same count shows where every layer keeps its own


LONG_TOKENS = 1024


def peak_streams(
    monkeypatch: pytest.MonkeyPatch, pattern: str, heads_at_once: int, ff_chunk_tokens: int = 32, keep_ends: bool = True
) -> float:
    """The peak of a step of three layers in units of one stream [T, M], where all that is of a fixed size is small."""
    monkeypatch.setattr(attention, "GROUP_NUMBERS", heads_at_once * LONG_TOKENS * 4)
    monkeypatch.setattr(rounds, "TILE_SCORES_PER_THREAD", 512)
    monkeypatch.setattr(rounds, "RUN_PLACES", 64)
    monkeypatch.setattr(hashing, "HASH_TOKENS", 64)
    monkeypatch.setattr(chunked, "FINISH_TOKENS", 64)
    sizes = {"max_seq_len": LONG_TOKENS, "d_ff": 128, "n_layers": 3, "n_heads": 4, "n_hashes": 1, "dropout": 0.0}
    model = make_model(**sizes, ff_chunk_tokens=ff_chunk_tokens, n_buckets=4, attn_pattern=(pattern,))
    tokens = torch.randint(0, 50, (1, LONG_TOKENS))
    x = model.embedding(tokens).detach().requires_grad_()
    with counting_without(x, *model.parameters()) as counted:
        model.head(*reversible_stack(model.blocks, x, x, Call(0, 0, (0,)), keep_ends), tokens).backward()
    return counted.peak / x.nbytes


@pytest.mark.parametrize(("pattern", "limits"), [("local", (17.0, 15.0, 14.0)), ("lsh", (14.6, 13.1, 12.2))])
def test_the_peak_of_a_step_in_streams(
    monkeypatch: pytest.MonkeyPatch, pattern: str, limits: tuple[float, float, float]
) -> None:
    """With all four heads at once, two, and one at a time; the limits are what was seen and at most 0.35 above it."""
    peaks = [peak_streams(monkeypatch, pattern, heads_at_once) for heads_at_once in (4, 2, 1)]
    print(f"{pattern}: {', '.join(f'{peak:.2f}' for peak in peaks)} streams")
    assert all(peak <= limit for peak, limit in zip(peaks, limits, strict=True))


@pytest.mark.parametrize("pattern", ["local", "lsh", "dense"])
def test_a_forward_lets_go_of_heads_before_it_takes_others(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(attention, "GROUP_NUMBERS", 1)  # a head is more
    model = make_model(max_seq_len=LONG_TOKENS, n_layers=1, n_heads=4, attn_pattern=(pattern,)).eval()
    layer, made, alive = model.blocks[0].attention, [], []
    group = attention.HeadGroup

    def counted(*of: object) -> attention.HeadGroup:
        made.append(weakref.ref(new := group(*of)))
        alive.append(sum(each() is not None for each in made))
        return new

    monkeypatch.setattr(attention, "HeadGroup", counted)
    with torch.no_grad():
        layer(torch.randn(1, LONG_TOKENS, 16, dtype=torch.float64), Call(0))
    assert alive == [1, 1, 1, 1]


@pytest.mark.parametrize("pattern", ["local", "lsh", "dense"])
def test_a_backward_lets_go_of_heads_before_their_projections_are_differentiated(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(attention, "GROUP_NUMBERS", 1)  # a head is more
    model = make_model(max_seq_len=LONG_TOKENS, n_layers=1, n_heads=4, attn_pattern=(pattern,)).eval()
    layer, projected, alive = model.blocks[0].attention, [], []
    group, differentiate = attention.HeadGroup, layer._through_projections

    def noted(columns: slice, tensors: list[Tensor], out: Tensor) -> attention.HeadGroup:
        projected.extend(map(weakref.ref, tensors))
        return group(columns, tensors, out)

    def counted(*of: Any) -> None:
        alive.append(sum(each() is not None for each in projected))
        differentiate(*of)

    monkeypatch.setattr(attention, "HeadGroup", noted)
    monkeypatch.setattr(layer, "_through_projections", counted)
    x = torch.randn(1, LONG_TOKENS, 16, dtype=torch.float64).requires_grad_()
    layer(x, Call(0), d_out_BTM=torch.ones_like(x))
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize(("pattern", "limit"), [("local", 10.4), ("lsh", 10.4)])
def test_without_what_the_ends_keep_the_peak_is_lower(
    monkeypatch: pytest.MonkeyPatch, pattern: str, limit: float
) -> None:
    peak = peak_streams(monkeypatch, pattern, 1, keep_ends=False)
    print(f"{pattern}: {peak:.2f} streams")
    assert peak <= limit


def test_the_count_of_streams_sees_inner_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward layer in one piece holds its inner activations, eight times as wide, three times."""
    assert 35 < peak_streams(monkeypatch, "local", 1, ff_chunk_tokens=LONG_TOKENS) < 39


def test_a_long_autocast_region_does_not_grow() -> None:
    """Autocast keeps its copy of every weight that it meets until the region ends, those of each pass's aliases too."""
    model = make_model(n_layers=4).float()
    tokens = torch.randint(0, 50, (2, 101))
    live = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16), LiveBytes(model.parameters()) as counted:
        for _ in range(3):
            model(tokens, tokens, step=0).backward()
            gc.collect()
            live.append(counted.live)
    assert live[0] > 0, "the copies of the parameters themselves are kept"
    assert live[2] == live[1] == live[0]
