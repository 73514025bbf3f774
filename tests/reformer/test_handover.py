"""The streams' gradients go from the head to the stack by hand: none is lost, none is counted twice."""

from collections import deque

import pytest
import torch
from parity import assert_parity, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from reformer import Reformer, ReformerConfig
from reformer.call import Call


def make_model() -> Reformer:
    torch.manual_seed(0)
    return Reformer(
        ReformerConfig(vocab_size=20, max_seq_len=64, d_model=16, n_layers=3, n_heads=2, lsh_chunk_len=8)
    ).double()


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(0, 20, (2, 2, 50))
    return tokens, labels


def test_what_reaches_the_streams_by_autograd_is_added() -> None:
    """Another loss on the same streams, as a probe or a regulariser would have."""
    model, (tokens, labels) = make_model(), make_batch()
    streams: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: streams.extend(inputs[:2]))
    (3 * model(tokens, labels) + streams[0].square().mean() + (streams[0] * streams[1]).mean()).backward()
    hook.remove()
    found = gradients(model)

    y1 = y2 = model.embedding(tokens)
    for block in model.blocks:
        y1, y2, _ = block(y1, y2, Call(0, 0, (0, 1)))
    loss = F.cross_entropy(model.head(y1, y2).flatten(0, 1), labels.flatten())
    (3 * loss + y1.square().mean() + (y1 * y2).mean()).backward()
    assert_parity(found, gradients(model), 1e-9)


def test_the_streams_own_gradients_are_not_what_the_backward_writes_to() -> None:
    """A loss made of logits is given to the stack by autograd, whose tensors others may hold."""
    model, (tokens, _) = make_model(), make_batch()
    streams: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: streams.extend(inputs[:2]))
    logits = model(tokens)
    for stream in streams:
        stream.retain_grad()
    logits.square().mean().backward()
    y1, y2 = (stream.detach().requires_grad_() for stream in streams[:2])
    expected = torch.autograd.grad(model.head(y1, y2).square().mean(), [y1, y2])
    assert_parity({"y1": streams[0].grad, "y2": streams[1].grad}, dict(zip(("y1", "y2"), expected, strict=True)), 1e-12)


def test_a_wrapper_that_copies_what_the_head_is_given_is_an_error() -> None:
    model, (tokens, labels) = make_model(), make_batch()
    head = model.head

    class Copying(nn.Module):
        weight = head.weight

        def forward(self, y1: Tensor, y2: Tensor, labels: Tensor, handed: deque) -> Tensor:
            return head(y1, y2, labels, deque(handed))

    model.head = Copying()
    loss = model(tokens, labels)
    with pytest.raises(RuntimeError, match="not with a copy"):
        loss.backward()
