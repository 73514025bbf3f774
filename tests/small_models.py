"""Small models for tests, and the plainest way through one: block after block, whole logits, plain autograd."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer import Reformer, ReformerConfig
from reformer.call import Call

SMALL: dict[str, Any] = {
    "vocab_size": 50, "max_seq_len": 120, "d_model": 16, "n_layers": 3, "n_heads": 2, "n_hashes": 2,
    "lsh_chunk_len": 8, "local_chunk_len": 8,
}  # fmt: skip


def small_model(**changes: object) -> Reformer:
    """The same one in every call, in float64."""
    torch.manual_seed(0)
    return Reformer(ReformerConfig(**{**SMALL, **changes})).double()


def make_batch(n_tokens: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of tokens, labels of which the first few are ignored, and segments."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 50, (2, n_tokens), generator=generator) for _ in range(2))
    labels[:, :7] = -100
    return tokens, labels, torch.randint(1, 4, (2, n_tokens), generator=generator).sort().values


def plain_stack(blocks: nn.ModuleList, x1: Tensor, x2: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    for block in blocks:
        x1, x2, _ = block(x1, x2, call)
    return x1, x2


def plain_loss(model: Reformer, tokens: Tensor, labels: Tensor, call: Call) -> Tensor:
    x = model.embedding(tokens)
    return F.cross_entropy(model.head(*plain_stack(model.blocks, x, x, call)).flatten(0, 1), labels.flatten())


class LowRank(nn.Module):
    """An adapter for torch.nn.utils.parametrize (LoRA): a matrix of rank 2 is added to a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(n, 2, dtype=weight.dtype)) for n in weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b.T
