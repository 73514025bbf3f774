"""The feed-forward half of a block, a few thousand tokens at a time (the paper's section 3.1, "chunking").

Only one chunk's inner activations [chunk, d_ff] exist at any moment, in the backward too. The parameters are owned
by the module itself, not by inner layers, so that ZeRO-3 gathers them once per call and not once per chunk.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer.chunks import ff_chunk_tokens, map_chunks, put, token_slices
from reformer.config import ReformerConfig
from reformer.gradients import GradientSum, with_gradients


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation with statistics in x's dtype (fp32 streams) and the result in the weights' dtype."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(weight.dtype)


class FeedForward(nn.Module):
    """x [B, T, M] -> W_out act(W_in norm(x) + b_in) + b_out, position by position."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        d_model, d_ff = config.d_model, config.d_ff
        assert d_ff is not None  # filled in by the config
        self.config = config
        # relu_ in place: what goes in is the output of a product, whose gradient does not need it.
        self.activation = torch.relu_ if config.activation == "relu" else F.gelu
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))
        self.in_weight = nn.Parameter(torch.empty(d_ff, d_model))
        self.in_bias = nn.Parameter(torch.zeros(d_ff))
        self.out_weight = nn.Parameter(torch.empty(d_model, d_ff))
        self.out_bias = nn.Parameter(torch.zeros(d_model))
        nn.init.xavier_uniform_(self.in_weight)
        nn.init.xavier_uniform_(self.out_weight)

    def forward(
        self, x_BTM: Tensor, d_out_BTM: Tensor | None = None, needs_output: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The output, and None. Given the gradient of the output, the output without a graph, and a scalar.

        The scalar is <output, d_out>: its backward gives x and the parameters their gradients, each once. The
        output itself costs one product more, and is None unless it is needed. (Why it is no other method: see
        `attention.py`.)
        """
        if d_out_BTM is None:
            return map_chunks(lambda x: (self._whole(x),), x_BTM, ff_chunk_tokens(self.config, x_BTM))[0], None
        with torch.no_grad():  # a graph of the output would keep every chunk's inner activations
            out, gradients = self._with_gradients_by_chunks(x_BTM, d_out_BTM, needs_output)
        inner_product = torch.zeros(())  # only its gradient is asked for: on the CPU, where it is seen to be 1
        parameters = [*self._inner_parameters, self.out_weight, self.out_bias]
        return out, with_gradients(inner_product, [x_BTM, *parameters], gradients)

    def _with_gradients_by_chunks(
        self, x_BTM: Tensor, d_out_BTM: Tensor, needs_output: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The output if it is needed, and the gradients of x and of the parameters."""
        out = d_x = None
        batch, n_tokens, _ = x_BTM.shape
        inner_sums = GradientSum(self._inner_parameters)
        out_sums = GradientSum([self.out_weight, self.out_bias])
        for tokens in token_slices(x_BTM.shape[1], ff_chunk_tokens(self.config, x_BTM)):
            with torch.enable_grad():
                x = x_BTM[:, tokens].flatten(0, 1).detach().requires_grad_()
                inner = self._inner(x, *inner_sums.aliases)
            activations, d_out = inner.detach(), d_out_BTM[:, tokens].flatten(0, 1).to(inner.dtype)
            if needs_output:
                part = F.linear(activations, self.out_weight, self.out_bias)
                out = put(out, tokens, part.unflatten(0, (batch, -1)), n_tokens)
            out_sums.add_known([d_out.T @ activations, d_out.sum(dim=0)])
            (d_part,) = inner_sums.add(inner, [x], (d_out @ self.out_weight).to(inner.dtype))
            d_x = put(d_x, tokens, d_part.unflatten(0, (batch, -1)), n_tokens)
        assert d_x is not None
        return out, [d_x, *inner_sums.sums, *out_sums.sums]

    @property
    def _inner_parameters(self) -> list[Tensor]:
        return [self.norm_weight, self.norm_bias, self.in_weight, self.in_bias]

    def _inner(self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, in_weight: Tensor, in_bias: Tensor) -> Tensor:
        """The inner activations [N, d_ff] of tokens [N, M]: in two dimensions, since what F.linear gives for three is a
        view, and the gradient of a view that is changed in place, as by relu_, is copied three times by autograd."""
        return self.activation(
            F.linear(layer_norm(x, norm_weight, norm_bias, self.config.norm_eps), in_weight, in_bias)
        )

    def _whole(self, x_BtM: Tensor) -> Tensor:
        inner = self._inner(x_BtM.flatten(0, 1), *self._inner_parameters)
        return F.linear(inner, self.out_weight, self.out_bias).view(x_BtM.shape)
