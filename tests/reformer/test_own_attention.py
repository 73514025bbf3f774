"""Attention and feed-forward of a user's own, as docs/library.md has them; what would train wrongly is refused."""

import copy
from typing import Any

import pytest
import torch
from parity import assert_parity, gradients
from small_models import LowRank, make_batch, plain_loss, small_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reformer import Reformer
from reformer.attention import LocalSelfAttention
from reformer.call import Call
from reformer.local import local_attention


def rotary(x_BHTD: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv:2104.09864, equation 34), with the halves of D as pairs."""
    half = x_BHTD.shape[-1] // 2
    angles_Td = torch.outer(torch.arange(x_BHTD.shape[-2]), 10_000.0 ** (-torch.arange(half) / half)).to(x_BHTD)
    first, second = x_BHTD.chunk(2, dim=-1)
    cos, sin = angles_Td.cos(), angles_Td.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, **mode: Any) -> Tensor:
    return local_attention(rotary(q), rotary(k), v, **mode)


def assert_trained_as_by_plain_autograd(model: Reformer) -> dict[str, Tensor]:
    """Returns the gradients, and the loss."""
    tokens, labels, _ = make_batch()
    loss = model(tokens, labels, step=0)
    loss.backward()
    found = {"loss": loss.detach(), **gradients(model)}
    model.zero_grad()
    expected = plain_loss(model, tokens, labels, Call(seed=0, step=0, sample_ids=(0, 1)))
    expected.backward()
    assert_parity(found, {"loss": expected.detach(), **gradients(model)}, 1e-12)
    return found


def test_its_gradients_are_those_of_plain_autograd() -> None:
    model, usual = small_model(attn_pattern=["local"]), small_model(attn_pattern=["local"])
    tokens, labels, _ = make_batch()
    for block in model.blocks:
        block.attention.inner = rotary_attention
    assert abs(model(tokens, labels, step=0) - usual(tokens, labels, step=0)) > 1e-6, "it is not used"
    assert_trained_as_by_plain_autograd(model)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(
        self, x: Tensor, d_out: Tensor | None = None, needs_output: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        out = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return (out, None) if d_out is None else (out.detach(), (out * d_out).sum())


def test_a_feed_forward_has_the_gradients_of_plain_autograd() -> None:
    model = small_model()
    for block in model.blocks:
        block.feed_forward = SwiGLU().double()
    assert_trained_as_by_plain_autograd(model)


@pytest.mark.parametrize("name", ["project", "merged"])
def test_a_method_that_the_backward_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Own\.{name} would get no gradient: put what it is to do into `inner`"):
        type("Own", (LocalSelfAttention,), {name: lambda self, x: x})


def test_parameters_that_would_not_be_trained_are_refused() -> None:
    model = small_model()
    attention, (tokens, labels, _) = model.blocks[0].attention, make_batch()
    linear = nn.Linear(8, 8).double()
    for inner in (linear, linear.forward):
        with pytest.raises(TypeError, match="`inner` has parameters, which would get no gradient"):
            attention.inner = inner
    with pytest.raises(TypeError, match="project of a layer would get no gradient"):
        attention.project = lambda x, columns: [x, x]
    attention.temperature = nn.Parameter(torch.ones(2), requires_grad=False)
    model(tokens, labels, step=0).backward()
    attention.temperature.requires_grad_()
    with pytest.raises(RuntimeError, match="parameters that would get no gradient: temperature"):
        model(tokens, labels, step=0).backward()


def test_a_module_without_parameters_is_called() -> None:
    class Zero(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **mode: Any) -> Tensor:
            return torch.zeros_like(v) * (q + k + v)

    model = small_model(attn_pattern=["local"])
    tokens, labels, _ = make_batch()
    before = model(tokens, labels, step=0)
    for block in model.blocks:
        block.attention.inner = Zero()
    assert copy.deepcopy(model)(tokens, labels, step=0) == model(tokens, labels, step=0) != before


@pytest.mark.parametrize("name", ["qk_weight", "out_weight"])
def test_adapters_have_the_gradients_of_plain_autograd(name: str) -> None:
    model = small_model()
    attention = model.blocks[1].attention
    parametrize.register_parametrization(attention, name, LowRank(getattr(attention, name)))
    assert assert_trained_as_by_plain_autograd(model)[f"blocks.1.attention.parametrizations.{name}.0.a"].any()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_has_the_gradients_of_plain_autograd() -> None:
    model = small_model()
    torch.nn.utils.weight_norm(model.blocks[1].attention, "out_weight")
    assert assert_trained_as_by_plain_autograd(model)["blocks.1.attention.out_weight_g"].any()
