"""The output layer and its loss, without ever holding [T, vocab] logits.

Norm, projection and cross entropy go by chunks of tokens; where gradients are wanted they are computed in the
same pass (three matrix products per chunk instead of four) and handed over once.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer.config import ReformerConfig
from reformer.feed_forward import layer_norm
from reformer.gradients import GradientSum, with_gradients

IGNORED_LABEL = -100

EMBEDDING_STD = 0.3
"""Of the initial token embedding: it must not drown under the first layers' outputs. 0.02 took twice the steps
(measured)."""


class OutputHead(nn.Module):
    """Reads the two streams side by side: logits = W norm([y1; y2]) + b (as the authors' code and others do).

    Tied to the token embedding E [V, M], it has no W of its own, but W = E P with a projection P [M, 2M]. E is then a
    parameter of this module too, so that ZeRO-3 gathers it for a call of either.
    """

    def __init__(self, config: ReformerConfig, embedding_VM: Tensor | None = None) -> None:
        super().__init__()
        d_model, width = config.d_model, 2 * config.d_model
        assert config.loss_chunk_tokens is not None  # filled in by the config
        self.chunk_tokens, self.norm_eps = config.loss_chunk_tokens, config.norm_eps
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.weight: Tensor
        # Either way the logits of a normalised input start at unit variance.
        if embedding_VM is None:
            self.weight = nn.Parameter(torch.randn(config.vocab_size, width) / math.sqrt(width))
            self.register_parameter("projection_weight", None)
        else:
            std = 1 / (EMBEDDING_STD * math.sqrt(d_model * width))
            self.weight, self.projection_weight = embedding_VM, nn.Parameter(torch.randn(d_model, width) * std)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, y1_BTM: Tensor, y2_BTM: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; or, given labels, the mean loss in nats (fp32 or better) over labels != -100.

        The mean over no labels at all is 0.
        """
        optional = [] if self.projection_weight is None else [self.projection_weight]
        parameters = [self.norm_weight, self.norm_bias, self.weight, self.bias, *optional]
        if labels_BT is None:
            return _logits(y1_BTM, y2_BTM, *parameters, eps=self.norm_eps)
        y1, y2, labels = y1_BTM.flatten(0, 1), y2_BTM.flatten(0, 1), labels_BT.flatten()
        total = torch.zeros((), dtype=torch.promote_types(y1.dtype, torch.float32), device=y1.device)
        scale = 1 / (labels != IGNORED_LABEL).sum().clamp(min=1).to(total.dtype)
        if not torch.is_grad_enabled():
            for tokens in _slices(len(labels), self.chunk_tokens):
                total += _nll_sum(y1[tokens], y2[tokens], labels[tokens], *parameters, eps=self.norm_eps)
            return total * scale
        d_y1, d_y2 = torch.empty_like(y1), torch.empty_like(y2)
        sums = GradientSum(parameters)
        for tokens in _slices(len(labels), self.chunk_tokens):
            with torch.enable_grad():
                chunk = [y[tokens].detach().requires_grad_() for y in (y1, y2)]
                loss = _nll_sum(*chunk, labels[tokens], *sums.aliases, eps=self.norm_eps) * scale
            d_y1[tokens], d_y2[tokens] = sums.add(loss, chunk)
            total += loss.detach()
        gradients = [d_y1.view_as(y1_BTM), d_y2.view_as(y2_BTM), *sums.totals()]
        return with_gradients(total, [y1_BTM, y2_BTM, *parameters], gradients)


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _logits(
    y1: Tensor,
    y2: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    normed = layer_norm(torch.cat([y1, y2], dim=-1), norm_weight, norm_bias, eps)
    return F.linear(normed if projection is None else F.linear(normed, projection), weight, bias)


def _nll_sum(y1: Tensor, y2: Tensor, labels: Tensor, *parameters: Tensor, eps: float) -> Tensor:
    logits = _logits(y1, y2, *parameters, eps=eps)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
