"""A few heads at a time, as long sequences take them, compute what all heads at once do."""

import pytest
import torch
from parity import assert_parity, gradients
from small_models import plain_loss, small_model
from torch import Tensor

from reformer import Reformer, attention
from reformer.call import Call
from reformer.diagnostics import observed

T, N_HEADS, D_HEAD = 50, 3, 8
AT_ONCE = {1: 2 * T * D_HEAD, 2: 2 * 2 * T * D_HEAD + 5}
"""Heads in a group -> GROUP_NUMBERS for a batch of two; two heads leave a last group of one."""


def make_model(**changes: object) -> Reformer:
    sizes = {"d_model": N_HEADS * D_HEAD, "n_layers": 4, "n_heads": N_HEADS, "attn_pattern": ["lsh", "local", "dense"]}
    return small_model(**{**sizes, **changes})


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(0, 20, (2, 2, T))
    return tokens, labels, torch.tensor([[1] * 20 + [2] * 30, [1] * T])


def loss_and_gradients(model: Reformer) -> dict[str, Tensor]:
    tokens, labels, segments = make_batch()
    loss = model(tokens, labels, segment_ids=segments, step=3)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_groups_of_heads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, at_once: int, n_layers: int, dropout: float
) -> None:
    model = make_model(n_layers=n_layers, dropout=dropout, attn_dropout=dropout)
    whole = loss_and_gradients(model)
    monkeypatch.setattr(attention, "GROUP_NUMBERS", AT_ONCE[at_once])
    assert_parity(loss_and_gradients(model), whole, 1e-12)


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_inner_attention_gets_so_many_heads(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(attention, "GROUP_NUMBERS", AT_ONCE[at_once])
    model, seen = make_model(), []
    for block in model.blocks:
        inner = block.attention.inner

        def recording(q: Tensor, *others: Tensor, _inner=inner, **options: object) -> object:
            seen.append(q.shape[1])
            return _inner(q, *others, **options)

        block.attention.inner = recording
    loss_and_gradients(model)
    groups = {1: [1, 1, 1], 2: [2, 1]}[at_once]
    assert seen == groups * (4 + 3)  # the last block's attention is not computed again


@pytest.mark.parametrize("needs_output", [True, False])
def test_an_output_that_nobody_needs_is_not_made(needs_output: bool) -> None:
    x = torch.randn(1, T, N_HEADS * D_HEAD, dtype=torch.float64).requires_grad_()
    for block in make_model().blocks:
        out, _ = block.attention(x, Call(0), d_out_BTM=torch.ones_like(x), needs_output=needs_output)
        assert (out is not None) == needs_output


@pytest.mark.parametrize("at_once", [1, 2])
def test_plain_autograd_by_groups(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """The blocks called one after the other, as the reference of other tests has it."""
    model = make_model()
    tokens, labels, segments = make_batch()
    whole = loss_and_gradients(model)
    monkeypatch.setattr(attention, "GROUP_NUMBERS", AT_ONCE[at_once])
    loss = plain_loss(model, tokens, labels, Call(0, 3, (0, 1), segment_ids_BT=segments))
    loss.backward()
    assert_parity({"loss": loss.detach(), **gradients(model)}, whole, 1e-9)


@pytest.mark.parametrize("at_once", [1, 2])
def test_logits_by_groups(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    model = make_model()
    tokens, _, segments = make_batch()
    whole = model(tokens, segment_ids=segments)
    monkeypatch.setattr(attention, "GROUP_NUMBERS", AT_ONCE[at_once])
    with torch.no_grad():
        assert_parity({"logits": model(tokens, segment_ids=segments)}, {"logits": whole.detach()}, 1e-12)


def test_buckets_and_diagnostics_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    tokens, _, segments = make_batch()
    found = []
    for numbers in (attention.GROUP_NUMBERS, AT_ONCE[1], AT_ONCE[2]):
        monkeypatch.setattr(attention, "GROUP_NUMBERS", numbers)
        with torch.no_grad(), observed(model) as diagnostics:
            model(tokens, segment_ids=segments)
            model(tokens[:1, :20])  # a later pass, by other groups
        found.append(diagnostics)
    assert len(found[0]) == 6  # two LSH layers
    assert found[1] == pytest.approx(found[0], rel=1e-12) and found[2] == pytest.approx(found[0], rel=1e-12)
