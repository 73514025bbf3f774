"""The output layer and its loss, without ever holding [T, vocab] logits.

Norm, products and cross entropy go by chunks of tokens; where gradients are wanted they are computed in the same pass
(three matrix products per chunk instead of four) and handed over once. Beyond what is handed over there is one chunk's
logits [t, V] at a time, always in the same memory, where they turn into their own gradient; in half precision there are
also a copy of them in that dtype and, for each chunk, a product as large as the matrix of the logits.

Axes: B batch, T tokens, t tokens of a chunk, M model, V vocabulary, K what the matrix of the logits reads: 2M, tied M.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer.chunks import loss_chunk_tokens, token_slices
from reformer.config import ReformerConfig
from reformer.feed_forward import layer_norm
from reformer.gradients import GradientSum, add_product, with_gradients

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
        self.config = config
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

    def forward(
        self, y1_BTM: Tensor, y2_BTM: Tensor, labels_BT: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Logits [B, T, V]; or, given integer labels, the mean loss in nats (fp32 or better) over labels != -100.

        The mean over no labels at all is 0. The outputs of a reversible stack get their gradients by hand: see
        `with_gradients`. With `per_token` the loss of each token [B, T] instead, 0 where its label is -100, without a
        graph; `mean_loss` of it is the mean loss, to the bit.

        Raises:
            ValueError: labels of another shape than the tokens', or one on the CPU that is no token id and not -100.
        """
        if labels_BT is None:
            normed = self._normed([y1_BTM, y2_BTM], self.norm_weight, self.norm_bias)
            read = normed if self.projection_weight is None else F.linear(normed, self.projection_weight)
            return F.linear(read, self.weight, self.bias)
        if labels_BT.shape != y1_BTM.shape[:2]:
            raise ValueError(f"labels must be {list(y1_BTM.shape[:2])} like the tokens, got {list(labels_BT.shape)}")
        streams, labels = [y1_BTM.flatten(0, 1), y2_BTM.flatten(0, 1)], labels_BT.flatten().long()
        _check_labels(labels, len(self.bias))
        if per_token or not torch.is_grad_enabled():
            losses_BT = self._losses(streams, labels).view(labels_BT.shape)
            return losses_BT if per_token else mean_loss(losses_BT, labels_BT, self.chunk_tokens(labels.device))
        # Read once, with gradients: a parametrization may compute them.
        norm, matrices = [self.norm_weight, self.norm_bias], self._matrices
        loss, d_streams, d_parameters = self._loss_and_gradients(streams, labels, norm, matrices)
        inputs = [y1_BTM, y2_BTM, *norm, *matrices]
        gradients = [*(d.view_as(y1_BTM) for d in d_streams), *d_parameters]
        return with_gradients(loss, inputs, gradients, by_hand=[y1_BTM, y2_BTM])

    def chunk_tokens(self, device: torch.device) -> int:
        """Tokens whose logits exist at a time on this device."""
        return loss_chunk_tokens(self.config, device)

    @property
    def _matrices(self) -> list[Tensor]:
        """The matrix of the logits [V, K], their bias [V] and, if tied, the projection [M, 2M]."""
        return [p for p in (self.weight, self.bias, self.projection_weight) if p is not None]

    def _normed(self, streams: list[Tensor], norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return layer_norm(torch.cat(streams, dim=-1), norm_weight, norm_bias, self.config.norm_eps)

    @torch.no_grad()
    def _losses(self, streams_TM: list[Tensor], labels_T: Tensor) -> Tensor:
        """The loss [T] of each token, 0 where its label is ignored."""
        chunk_tokens = self.chunk_tokens(labels_T.device)
        chunk = _Chunk(self._matrices, min(chunk_tokens, len(labels_T)))
        index_T1, valid_T1 = _targets(labels_T)
        losses_T1 = torch.empty_like(labels_T, dtype=_loss_dtype(streams_TM[0]))[:, None]
        for tokens in token_slices(len(labels_T), chunk_tokens):
            normed = self._normed([y[tokens] for y in streams_TM], self.norm_weight, self.norm_bias)
            nll_t1, _ = _exponentiate(chunk.logits(chunk.read(normed)[1]), index_T1[tokens])
            losses_T1[tokens] = nll_t1.where(valid_T1[tokens], 0)
        return losses_T1.flatten()

    @torch.no_grad()
    def _loss_and_gradients(
        self, streams_TM: list[Tensor], labels_T: Tensor, norm: Sequence[Tensor], matrices: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The mean loss, the gradients of both streams, and those of the norm's parameters and the matrices."""
        chunk_tokens = self.chunk_tokens(labels_T.device)
        chunk = _Chunk(matrices, min(chunk_tokens, len(labels_T)))
        index_T1, valid_T1 = _targets(labels_T)
        # Applied after the products: half precision would lose a millionth of a probability.
        share = 1 / valid_T1.sum().clamp(min=1).to(chunk.dtype)
        loss = streams_TM[0].new_zeros((), dtype=_loss_dtype(streams_TM[0]))
        d_streams_TM = [torch.empty_like(y) for y in streams_TM]
        norm_sums, matrix_sums = GradientSum(norm), GradientSum(matrices)
        for tokens in token_slices(len(labels_T), chunk_tokens):
            index_t1, valid_t1 = index_T1[tokens], valid_T1[tokens]
            with torch.enable_grad():
                parts = [y[tokens].detach().requires_grad_() for y in streams_TM]
                normed = self._normed(parts, *norm_sums.aliases)
            features, read_tK = chunk.read(normed.detach())
            logits_tV = chunk.logits(read_tK)
            nll_t1, sums_t1 = _exponentiate(logits_tV, index_t1)
            loss += nll_t1.where(valid_t1, 0).sum()
            # softmax - onehot, 0 for ignored labels: the sum's gradient, in the memory of the logits.
            counted_t1 = valid_t1.to(chunk.dtype)
            d_logits_tV = logits_tV.mul_(counted_t1 / sums_t1).scatter_add_(1, index_t1, -counted_t1)
            d_normed = chunk.backward(d_logits_tV, features, read_tK, matrix_sums.sums)
            d_parts = norm_sums.add(normed, parts, d_normed.to(normed.dtype))
            for d_stream, d_part in zip(d_streams_TM, d_parts, strict=True):
                torch.mul(d_part, share, out=d_stream[tokens])
        return loss * share, d_streams_TM, [total.mul_(share) for total in (*norm_sums.sums, *matrix_sums.sums)]


def mean_loss(losses_BT: Tensor, labels_BT: Tensor, chunk_tokens: int) -> Tensor:
    """The mean of tokens' losses over labels != -100, a scalar; 0 where there are none.

    By chunks of so many tokens, which decides how the sum is rounded: those of the head give its own result.
    """
    total = losses_BT.new_zeros(())
    for losses_t in losses_BT.flatten().split(chunk_tokens):
        total += losses_t.sum()
    return total / (labels_BT != IGNORED_LABEL).sum().clamp(min=1)


class _Chunk:
    """A head's matrices in the dtype of their products, and one chunk's logits after the other in the same memory.

    The products are in the matrices' dtype, or in autocast's; the logits in fp32 or better. These come from products
    in half precision by way of a second buffer of that dtype, in which their gradient goes back.
    """

    def __init__(self, matrices: Sequence[Tensor], n_tokens: int) -> None:
        product_dtype = _product_dtype(matrices[0])
        self.weight_VK, self.bias_V, *self.projection = [matrix.to(product_dtype) for matrix in matrices]
        self.dtype = torch.promote_types(product_dtype, torch.float32)
        self.products_tV = self.weight_VK.new_empty(n_tokens, len(self.bias_V))
        self.logits_tV = self.products_tV.to(self.dtype)  # itself, if that is its dtype

    def read(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised streams [t, 2M] in the dtype of the products, and what the matrix of the logits reads."""
        features = normed.to(self.weight_VK.dtype)
        return features, features @ self.projection[0].T if self.projection else features

    def logits(self, read_tK: Tensor) -> Tensor:
        """The logits [t, V], which the next call overwrites."""
        n_tokens = len(read_tK)
        products_tV = torch.addmm(self.bias_V, read_tK, self.weight_VK.T, out=self.products_tV[:n_tokens])
        return _converted(products_tV, self.logits_tV[:n_tokens])

    def backward(self, d_logits_tV: Tensor, features: Tensor, read_tK: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """The gradient of the normalised streams [t, 2M]; those of the matrices are added to `sums`."""
        d_weight, d_bias, *d_projection = sums
        d_bias += d_logits_tV.sum(dim=0)
        d_products_tV = _converted(d_logits_tV, self.products_tV[: len(d_logits_tV)])
        add_product(d_weight, d_products_tV.T, read_tK)
        d_read_tK = d_products_tV @ self.weight_VK
        if not self.projection:
            return d_read_tK
        add_product(d_projection[0], d_read_tK.T, features)
        return d_read_tK @ self.projection[0]


def _converted(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the buffer's dtype: x itself if it has it, else in the buffer."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What autocast, which leaves float64 alone, would compute a product with this weight in."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _loss_dtype(stream: Tensor) -> torch.dtype:
    return torch.promote_types(stream.dtype, torch.float32)


def _targets(labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """For each token its label as an index, and whether it counts."""
    valid_T = labels_T != IGNORED_LABEL
    return labels_T.where(valid_T, 0)[:, None], valid_T[:, None]


def _exponentiate(logits_tV: Tensor, index_t1: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[index] and the softmax's denominator; the logits become its numerators."""
    largest_t1 = logits_tV.amax(dim=1, keepdim=True)
    chosen_t1 = logits_tV.gather(1, index_t1) - largest_t1
    sums_t1 = logits_tV.sub_(largest_t1).exp_().sum(dim=1, keepdim=True)
    return sums_t1.log() - chosen_t1, sums_t1


def _check_labels(labels_T: Tensor, vocab_size: int) -> None:
    if labels_T.device.type != "cpu":  # one would wait for the device, where gather() refuses them too
        return
    wrong = labels_T[(labels_T != IGNORED_LABEL) & ((labels_T < 0) | (labels_T >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"labels contain {wrong[0].item()}, expected token ids from 0 to {vocab_size - 1}: "
            f"use {IGNORED_LABEL} for places to ignore, or raise vocab_size"
        )
