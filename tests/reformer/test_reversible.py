"""The reversible stack against plain autograd: the same gradients, nothing kept per layer but buckets."""

import gc

import pytest
import torch
from parity import assert_parity, gradients
from torch import Tensor
from torch.nn import functional as F

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.call import Call
from reformer.reversible import reversible_stack

SMALL = {
    "vocab_size": 50,
    "max_seq_len": 120,
    "d_model": 16,
    "n_layers": 4,
    "n_heads": 2,
    "n_hashes": 2,
    "lsh_chunk_len": 8,
    "local_chunk_len": 8,
    "ff_chunk_tokens": 30,
    "loss_chunk_tokens": 29,
}


def make_model(**changes: object) -> Reformer:
    torch.manual_seed(0)
    return Reformer(ReformerConfig(**{**SMALL, **changes})).double()


def make_batch(n_tokens: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 50, (2, n_tokens), generator=generator) for _ in range(2))
    labels[:, :7] = -100
    return tokens, labels, torch.randint(1, 4, (2, n_tokens), generator=generator).sort().values


def plain_loss(model: Reformer, tokens: Tensor, labels: Tensor, segments: Tensor | None, step: int = 0) -> Tensor:
    """The model without a custom Function: blocks one after the other, whole logits, plain autograd."""
    dropout = model.config.dropout if model.training else 0.0
    call = Call(model.config.seed, step, tuple(range(len(tokens))), dropout, segments)
    y1 = y2 = model.embedding(tokens)
    for block in model.blocks:
        y1, y2, _ = block(y1, y2, call)
    return F.cross_entropy(model.head(y1, y2).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_plain_autograd(n_layers: int, dropout: float, causal: bool) -> None:
    model = make_model(n_layers=n_layers, dropout=dropout, causal=causal, attn_pattern=["lsh", "local"])
    tokens, labels, segments = make_batch()
    loss = model(tokens, labels, segment_ids=segments, step=3)
    loss.backward()
    reversible = gradients(model)
    expected = plain_loss(model, tokens, labels, segments, step=3)
    expected.backward()
    assert_parity({"loss": loss.detach(), **reversible}, {"loss": expected.detach(), **gradients(model)}, 1e-9)


def test_every_parameter_gets_its_gradient_once() -> None:
    model = make_model(dropout=0.1)
    counts = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name, parameter in model.named_parameters():

        def count(_: Tensor, name: str = name) -> None:
            counts[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    tokens, labels, _ = make_batch()
    model(tokens, labels).backward()
    assert set(counts.values()) == {1}, counts


def saved_bytes(n_layers: int, attn_pattern: tuple[str, ...]) -> int:
    """Bytes alive between forward and backward: saved by autograd nodes, or tensors that Python can see."""
    model = make_model(n_layers=n_layers, attn_pattern=attn_pattern, dropout=0.1)
    tokens, _, _ = make_batch()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {id(x) for x in gc.get_objects() if isinstance(x, Tensor)}
    embedded = model.embedding(tokens).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        streams = reversible_stack(model.blocks, embedded, embedded, Call(0, 0, (0, 1), 0.1))
    gc.collect()
    for x in gc.get_objects():
        if isinstance(x, Tensor) and id(x) not in before:
            note(x)
    assert streams[0].requires_grad
    return sum(storages.values())


def test_a_layer_saves_its_buckets_and_nothing_else() -> None:
    assert saved_bytes(6, ("local",)) == saved_bytes(2, ("local",))
    bucket_bytes = 2 * 2 * 2 * 101 * 2  # B * H * R * T * int16
    assert saved_bytes(6, ("lsh",)) - saved_bytes(2, ("lsh",)) == 4 * bucket_bytes


def test_the_backward_uses_the_buckets_of_the_forward() -> None:
    """Reconstructed inputs differ by rounding; hashed again, tokens would change buckets."""
    model = make_model(n_layers=3, attn_pattern=["lsh"])
    calls: list[tuple[bool, Tensor]] = []

    def recording(qk: Tensor, v: Tensor, buckets: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
        out, used = lsh_attention(qk, v, buckets, **options)
        calls.append((buckets is not None, used))
        return out, used

    for block in model.blocks:
        block.attention.inner = recording
    tokens, labels, _ = make_batch()
    model(tokens, labels).backward()
    assert [given for given, _ in calls] == [False] * 3 + [True] * 2  # the last block keeps its attention's graph
    for (_, forward), (_, backward) in zip(calls[:2], reversed(calls[3:]), strict=True):
        assert torch.equal(forward, backward)


def test_two_forwards_before_one_backward_and_evaluation_between() -> None:
    model = make_model(dropout=0.1)
    tokens, labels, segments = make_batch()
    expected = plain_loss(model, tokens, labels, segments, 1) + plain_loss(model, tokens, labels, None, 2)
    expected.backward()
    plain = gradients(model)
    first = model(tokens, labels, segment_ids=segments, step=1)
    second = model(tokens, labels, step=2)
    model.eval()
    with torch.no_grad():
        model(tokens, labels, step=5)
    model.train()
    (first + second).backward()
    assert_parity(gradients(model), plain, 1e-9)


def test_global_random_state_is_left_alone() -> None:
    model = make_model(dropout=0.3)
    tokens, labels, _ = make_batch()
    state = torch.get_rng_state()
    model(tokens, labels).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_is_restored_in_the_backward() -> None:
    model = make_model(n_layers=3).float()
    tokens, labels, _ = make_batch()
    dtypes = []
    block = model.blocks[1]  # neither end of the stack, where less is computed again
    merge = block.attention.merge
    block.attention.merge = lambda out: dtypes.append(out.dtype) or merge(out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels)
    loss.backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_a_second_backward_is_refused() -> None:
    model = make_model()
    embedded = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    y1, _ = reversible_stack(model.blocks, embedded, embedded, Call(0, 0, (0, 1)))
    y1.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        y1.sum().backward()


def test_second_derivatives_are_refused() -> None:
    model = make_model()
    tokens, labels, _ = make_batch()
    with pytest.raises(RuntimeError, match="second derivatives"):
        model(tokens, labels).backward(create_graph=True)


def test_a_frozen_embedding_does_not_freeze_the_stack() -> None:
    model = make_model()
    model.embedding.requires_grad_(False)
    tokens, labels, _ = make_batch()
    model(tokens, labels).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.blocks.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_backward_reconstructs_what_the_forward_saw_in_half_precision_with_dropout(autocast: bool) -> None:
    """The factors of dropout must be the same numbers in both passes, whatever the dtype of what they scale."""
    model = make_model(dropout=0.1).to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(2, 101, 16)
    call = Call(0, 1, (0, 1), 0.1)
    block, seen = model.blocks[1], []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        x1, x2 = x, torch.randn(2, 101, 16)
        y1, y2, buckets = block(x1, x2, call)
        seen = block.backward(y1, y2, torch.ones_like(y1), torch.ones_like(y2), call, buckets)
    assert_parity({"x1": seen[0], "x2": seen[1]}, {"x1": x1, "x2": x2}, 1e-5)


def test_dense_attention_is_differentiated_under_autocast() -> None:
    for options in ({"attn_pattern": ["dense"]}, {"lsh_chunk_len": 128, "attn_pattern": ["lsh"]}):
        model = make_model(n_layers=2, **options).float()
        tokens, labels, _ = make_batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, labels)
        loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
