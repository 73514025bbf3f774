"""The reversible stack against plain autograd: the same gradients, from the same buckets, dropout and dtypes.

Whatever the order of calls: passes inside of passes, several before one backward, one that failed in between.
"""

import gc
from functools import partial
from typing import Any

import pytest
import small_models
import torch
from parity import assert_parity, gradients
from small_models import make_batch, plain_stack, small_model
from torch import Tensor, nn

from reformer import Reformer, lsh_attention
from reformer.call import Call
from reformer.reversible import Streams, reversible_stack

make_model = partial(small_model, n_layers=4, ff_chunk_tokens=30, loss_chunk_tokens=29)


def plain_loss(model: Reformer, tokens: Tensor, labels: Tensor, segments: Tensor | None, step: int = 0) -> Tensor:
    """The model without a custom Function."""
    dropout, attn_dropout = (p if model.training else 0.0 for p in (model.config.dropout, model.config.attn_dropout))
    call = Call(model.config.seed, step, tuple(range(len(tokens))), dropout, segments, attn_dropout)
    return small_models.plain_loss(model, tokens, labels, call)


@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.parametrize(("dropout", "attn_dropout"), [(0.0, 0.0), (0.2, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep_ends", [True, False])
def test_gradients_equal_plain_autograd(
    n_layers: int, dropout: float, attn_dropout: float, causal: bool, keep_ends: bool
) -> None:
    options = {"dropout": dropout, "attn_dropout": attn_dropout, "causal": causal, "keep_ends": keep_ends}
    model = make_model(n_layers=n_layers, attn_pattern=["lsh", "local"], **options)
    tokens, labels, segments = make_batch()
    loss = model(tokens, labels, segment_ids=segments, step=3)
    loss.backward()
    reversible = gradients(model)
    expected = plain_loss(model, tokens, labels, segments, step=3)
    expected.backward()
    assert_parity({"loss": loss.detach(), **reversible}, {"loss": expected.detach(), **gradients(model)}, 1e-9)


@pytest.mark.parametrize("keep_ends", [True, False])
def test_every_parameter_gets_its_gradient_once(keep_ends: bool) -> None:
    model = make_model(dropout=0.1, keep_ends=keep_ends)
    counts = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name, parameter in model.named_parameters():

        def count(_: Tensor, name: str = name) -> None:
            counts[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    tokens, labels, _ = make_batch()
    model(tokens, labels, step=0).backward()
    assert set(counts.values()) == {1}, counts


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


def test_accumulation_over_batches_of_other_lengths_is_a_sum() -> None:
    model = make_model(dropout=0.1, attn_dropout=0.1)
    batches = [(*make_batch(n_tokens), step) for step, n_tokens in enumerate((101, 8, 37))]
    sum(plain_loss(model, *batch) for batch in batches).backward()
    plain = gradients(model)
    for tokens, labels, segments, step in batches:
        model(tokens, labels, segment_ids=segments, step=step).backward()
    assert_parity(gradients(model), plain, 1e-9)


def test_evaluation_of_another_length_between_forward_and_backward() -> None:
    model = make_model(dropout=0.1, attn_dropout=0.1)
    batch = make_batch()
    plain_loss(model, *batch).backward()
    plain = gradients(model)
    loss = model(batch[0], batch[1], segment_ids=batch[2], step=0)
    model.eval()
    for n_tokens in (120, 3):  # LSH attention of 3 tokens takes another path
        model(*make_batch(n_tokens)[:2], step=7)
    loss.backward()
    assert_parity(gradients(model), plain, 1e-9)


class Pass:
    """A forward and a backward of a model, each run once, whenever it is asked for first."""

    def __init__(self, model: Reformer) -> None:
        self.model, self.batch = model, make_batch(43)
        self.loss: Tensor | None = None
        self.done: set[str] = set()

    def forward(self, *_: object) -> None:
        if "forward" not in self.done:
            self.done.add("forward")
            tokens, labels, segments = self.batch
            with torch.enable_grad():
                self.loss = self.model(tokens, labels, segment_ids=segments, step=5)

    def backward(self, *_: object) -> None:
        if "backward" not in self.done:
            self.done.add("backward")  # first, since a forward of the same model may ask for it again
            self.forward()
            self.loss.backward()

    def plain_loss(self) -> Tensor:
        return plain_loss(self.model, *self.batch, step=5)


@pytest.mark.parametrize("is_same", [False, True])
@pytest.mark.parametrize("moment", ["forward in forward", "backward in backward", "both in backward"])
def test_a_pass_inside_of_a_pass(is_same: bool, moment: str) -> None:
    """Passes of another model, or of the same one, begun or ended in the middle of one's forward or backward."""
    outer = make_model(dropout=0.1)
    inner = Pass(outer if is_same else make_model(attn_dropout=0.2, n_layers=3))
    models = nn.ModuleList([outer] if is_same else [outer, inner.model])
    tokens, labels, segments = make_batch()
    plain_loss(outer, tokens, labels, segments).backward()
    inner.plain_loss().backward()
    plain = gradients(models)
    attention = outer.blocks[2].attention  # of neither end of the stack: it runs in the backward too
    if moment == "forward in forward":
        hook = attention.register_forward_hook(inner.forward)
    elif moment == "backward in backward":
        inner.forward()
        hook = attention.norm_weight.register_hook(inner.backward)
    loss = outer(tokens, labels, segment_ids=segments, step=0)
    if moment == "both in backward":
        hook = attention.register_forward_hook(inner.backward)
    assert inner.done == (set() if moment == "both in backward" else {"forward"})
    loss.backward()
    hook.remove()
    assert inner.done == ({"forward"} if moment == "forward in forward" else {"forward", "backward"})
    inner.backward()
    assert_parity(gradients(models), plain, 1e-9)


@pytest.mark.parametrize("is_one_after_the_other", [False, True])
def test_the_same_blocks_in_two_stacks_at_once(is_one_after_the_other: bool) -> None:
    model = make_model()
    x, call = torch.randn(2, 2, 50, 16, dtype=torch.float64), Call(0, 1, (0, 1), 0.1)
    results = []
    for stack in (reversible_stack, plain_stack):
        leaves = [part.clone().requires_grad_() for part in x]
        first = stack(model.blocks, leaves[0], leaves[1], call)
        second = stack(model.blocks, *(first if is_one_after_the_other else leaves[::-1]), call)
        (first[0].square().sum() + (second[0] * second[1]).sum()).backward()
        results.append({"x1": leaves[0].grad, "x2": leaves[1].grad, **gradients(model.blocks)})
    assert_parity(*results, 1e-9)


def test_global_random_state_is_left_alone() -> None:
    model = make_model(dropout=0.3, attn_dropout=0.3)
    tokens, labels, _ = make_batch()
    state = torch.get_rng_state()
    loss = model(tokens, labels, step=0)
    assert torch.equal(torch.get_rng_state(), state)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_is_restored_in_the_backward() -> None:
    model = make_model(n_layers=3).float()
    tokens, labels, _ = make_batch()
    dtypes = []
    block = model.blocks[1]  # neither end of the stack, where less is computed again
    inner = block.attention.inner
    block.attention.inner = lambda q, *others, **options: dtypes.append(q.dtype) or inner(q, *others, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels)
    loss.backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("forward_dtype", [None, torch.bfloat16, torch.float16])
def test_the_backward_is_the_same_under_any_autocast_and_leaves_it_as_it_was(forward_dtype: torch.dtype | None) -> None:
    model = make_model(n_layers=3, dropout=0.1).float()
    tokens, labels, _ = make_batch()
    results = []
    for backward_dtype in (None, torch.bfloat16, torch.float16):
        with autocast(forward_dtype):
            loss = model(tokens, labels, step=0)
        with autocast(backward_dtype):
            loss.backward()
            assert torch.is_autocast_enabled("cpu") == (backward_dtype is not None)
            assert backward_dtype in (None, torch.get_autocast_dtype("cpu"))
        assert not torch.is_autocast_enabled("cpu")
        results.append(gradients(model))
    with autocast(forward_dtype):  # nor does it matter that one statement holds both
        model(tokens, labels, step=0).backward()
    results.append(gradients(model))
    for other in results[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in results[0].items())


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


class Interrupted(Exception):
    """What a test raises where nothing else does."""


@pytest.mark.parametrize("half", ["attention", "feed_forward"])
def test_an_error_in_the_middle_of_a_backward_leaves_nothing_behind(half: str) -> None:
    model = make_model(dropout=0.1)
    tokens, labels, segments = make_batch()
    plain_loss(model, tokens, labels, segments).backward()
    plain = gradients(model)

    def fail(*_: object) -> None:
        raise Interrupted

    with autocast(torch.bfloat16):
        loss = model(tokens, step=0).square().mean()
    known = visible_tensors()
    hook = getattr(model.blocks[1], half).register_forward_hook(fail)
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(Interrupted):
            loss.backward(retain_graph=True)
        assert torch.get_autocast_dtype("cpu") == torch.float16
    hook.remove()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError, match="this stack was differentiated already: run the forward again"):
        loss.backward()
    del loss
    model.zero_grad()
    assert visible_tensors() <= known
    model(tokens, labels, segment_ids=segments, step=0).backward()
    assert_parity(gradients(model), plain, 1e-9)


def visible_tensors() -> set[int]:
    """The tensors that Python can see."""
    gc.collect()
    return {id(x) for x in gc.get_objects() if issubclass(type(x), Tensor)}


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
    with pytest.raises(RuntimeError, match=r"second derivatives .* not available through chunked layers"):
        model(tokens, labels).backward(create_graph=True)
    for head in (lambda y1, y2: y1.sum(), lambda y1, y2: (y1 * y2).sum()):
        x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
        y = reversible_stack(model.blocks, x, x, Call(0, 0, (0, 1)))
        with pytest.raises(RuntimeError, match=r"second derivatives .* not available through a reversible stack"):
            torch.autograd.grad(head(*y), x, create_graph=True)


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_that_change_between_forward_and_backward_are_noticed(optimizer_type: Any) -> None:
    """Autograd does not see them, and blocks reconstructed with others would give no function's gradient."""
    model, (tokens, labels, _) = make_model(), make_batch()
    optimizer = optimizer_type(model.parameters(), lr=0.1)
    first, second = model(tokens, labels), model(tokens, labels, step=1)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place between forward and backward: take the optimizer's step"):
        second.backward()
    model(tokens, labels, step=1).backward()


def test_parameters_that_are_lent_for_the_forward_are_refused() -> None:
    model, (tokens, labels, _) = make_model(), make_batch()
    lent = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
    loss = torch.func.functional_call(model, lent, (tokens, labels))
    with pytest.raises(RuntimeError, match="the blocks have other parameters than in the forward"):
        loss.backward()
    loss = model(tokens, labels)
    model.blocks[-1].register_parameter("late", nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="the blocks have other parameters than in the forward"):
        loss.backward()


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
    block = model.blocks[1]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        x1, x2 = x, torch.randn(2, 101, 16)
        y1, y2, buckets = block(x1, x2, call)
        seen = Streams(y1, y2, torch.ones_like(y1), torch.ones_like(y2))
        block.backward(seen, call, buckets)
    assert_parity({"x1": seen.x1, "x2": seen.x2}, {"x1": x1, "x2": x2}, 1e-5)


def test_dense_attention_is_differentiated_under_autocast() -> None:
    for options in ({"attn_pattern": ["dense"]}, {"lsh_chunk_len": 128, "attn_pattern": ["lsh"]}):
        model = make_model(n_layers=2, **options).float()
        tokens, labels, _ = make_batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, labels, step=0)
        loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
