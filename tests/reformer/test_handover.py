"""The streams' gradients go from head to stack by hand, where nothing stands between; none is lost or doubled."""

from collections.abc import Callable

import pytest
import torch
from parity import assert_parity, gradients
from small_models import plain_stack, small_model
from torch import Tensor
from torch.nn import functional as F

from reformer import Reformer
from reformer.call import Call
from reformer.gradients import Handed

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
CHANGES: dict[str, Change] = {
    "scaled": lambda y1, y2: (2 * y1, y2),
    "swapped": lambda y1, y2: (y2, y1),
    "one detached": lambda y1, y2: (y1.detach(), y2),
    "mixed": lambda y1, y2: (y1, y1 + y2),
    "halved on the way back": lambda y1, y2: (y1, y2.register_hook(lambda d: d / 2) and y2),
}


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(0, 20, (2, 2, 50))
    return tokens, labels


def plain_streams(model: Reformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    x = model.embedding(tokens)
    return plain_stack(model.blocks, x, x, Call(0, 0, (0, 1)))


def plain_loss(model: Reformer, y1: Tensor, y2: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(y1, y2).flatten(0, 1), labels.flatten())


def watched(model: Reformer) -> list[Tensor]:
    """Filled in with the streams that the head gets."""
    streams: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: streams.extend(inputs[:2]))
    return streams


def test_the_model_does_hand_them_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    give = Handed.give
    monkeypatch.setattr(Handed, "give", lambda self, gradients: given.append(len(gradients)) or give(self, gradients))
    model, (tokens, labels) = small_model(), make_batch()
    model(tokens, labels).backward()
    assert given.count(2) == 1


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_stands_between_stack_and_head_counts(change: Change) -> None:
    model, (tokens, labels) = small_model(), make_batch()
    hook = model.head.register_forward_pre_hook(lambda _, inputs: (*change(*inputs[:2]), *inputs[2:]))
    model(tokens, labels).backward()
    hook.remove()
    found = gradients(model)
    plain_loss(model, *change(*plain_streams(model, tokens)), labels).backward()
    assert_parity(found, gradients(model), 1e-9)


def test_what_reaches_the_streams_by_autograd_is_added() -> None:
    """Another loss on the same streams, as a probe or a regulariser would have."""
    model, (tokens, labels) = small_model(), make_batch()
    streams = watched(model)
    loss = model(tokens, labels)
    y1, y2 = streams[:2]
    (3 * loss + y1.square().mean() + (y1 * y2).mean()).backward()
    found = gradients(model)
    y1, y2 = plain_streams(model, tokens)
    (3 * plain_loss(model, y1, y2, labels) + y1.square().mean() + (y1 * y2).mean()).backward()
    assert_parity(found, gradients(model), 1e-9)


def test_several_heads_on_the_same_streams_add_up() -> None:
    model, (tokens, labels) = small_model(), make_batch()
    others = labels.roll(3, 1)
    y = model._streams(tokens, Call(0, 0, (0, 1)))
    (model.head(*y, labels) + 2 * model.head(*y, others)).backward()
    found = gradients(model)
    y = plain_streams(model, tokens)
    (plain_loss(model, *y, labels) + 2 * plain_loss(model, *y, others)).backward()
    assert_parity(found, gradients(model), 1e-9)


@pytest.mark.parametrize("loss_first", [False, True])
def test_a_backward_that_does_not_come_from_the_head(loss_first: bool) -> None:
    """What the head gave in another pass, which did not reach the stack, is not for this one."""
    model, (tokens, labels) = small_model(), make_batch()
    streams = watched(model)
    loss = model(tokens, labels)
    if loss_first:
        torch.autograd.grad(loss, [model.head.weight], retain_graph=True)
    (streams[0] * streams[1]).mean().backward()
    found = gradients(model.blocks)
    y1, y2 = plain_streams(model, tokens)
    (y1 * y2).mean().backward()
    assert_parity(found, gradients(model.blocks), 1e-9)


@pytest.mark.parametrize("with_labels", [False, True])
def test_the_streams_gradients_can_be_kept(with_labels: bool) -> None:
    """A tensor that others hold is not what the stack's backward writes to."""
    model, (tokens, labels) = small_model(), make_batch()
    streams = watched(model)
    loss = model(tokens, labels) if with_labels else model(tokens).square().mean()
    for stream in streams:
        stream.retain_grad()
    loss.backward()
    y1, y2 = (stream.detach().requires_grad_() for stream in streams[:2])
    same = plain_loss(model, y1, y2, labels) if with_labels else model.head(y1, y2).square().mean()
    expected = torch.autograd.grad(same, [y1, y2])
    assert_parity({"y1": streams[0].grad, "y2": streams[1].grad}, dict(zip(("y1", "y2"), expected, strict=True)), 1e-12)


def test_full_backward_hooks_see_the_streams_gradients() -> None:
    model, (tokens, labels) = small_model(), make_batch()
    seen: list[Tensor] = []
    model.head.register_full_backward_hook(lambda module, d_inputs, d_outputs: seen.extend(d_inputs[:2]))
    model(tokens, labels).backward()
    assert len(seen) == 2 and all(d.abs().max() > 0 for d in seen)
