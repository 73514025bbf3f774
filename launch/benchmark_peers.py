"""What `launch/benchmark.py` times: our model and those that a user would pick instead, at the same sizes.

Every function here builds one model and returns a function that runs one training step (forward and backward) on a
batch of tokens [1, T]. Each runs in a process of its own, so that its peak memory is its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reformer import Reformer, ReformerConfig, lsh_attention

Step = Callable[[Tensor], None]


@dataclass(frozen=True)
class Sizes:
    """Sizes that all peers share."""

    seq_len: int = 65_536
    d_model: int = 256
    n_layers: int = 2
    n_heads: int = 4
    n_hashes: int = 4
    chunk_len: int = 64
    vocab_size: int = 256

    @property
    def axial_shape(self) -> tuple[int, int]:
        rows = 2 ** (round(math.log2(self.seq_len)) // 2)
        return rows, self.seq_len // rows

    @property
    def axial_dims(self) -> tuple[int, int]:
        return self.d_model // 4, self.d_model - self.d_model // 4


def ours(sizes: Sizes) -> Step:
    """Longhand's Reformer."""
    model = Reformer(
        ReformerConfig(
            vocab_size=sizes.vocab_size,
            max_seq_len=sizes.seq_len,
            d_model=sizes.d_model,
            n_layers=sizes.n_layers,
            n_heads=sizes.n_heads,
            n_hashes=sizes.n_hashes,
            lsh_chunk_len=sizes.chunk_len,
            attn_pattern=("lsh",),
        )
    )
    return lambda tokens: model(tokens, tokens).backward()


def huggingface(sizes: Sizes) -> Step:
    """transformers' ReformerModelWithLMHead."""
    from transformers import ReformerConfig as HFConfig
    from transformers import ReformerModelWithLMHead

    config = HFConfig(
        attn_layers=["lsh"] * sizes.n_layers,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.seq_len,
        hidden_size=sizes.d_model,
        feed_forward_size=4 * sizes.d_model,
        num_attention_heads=sizes.n_heads,
        attention_head_size=sizes.d_model // sizes.n_heads,
        num_hashes=sizes.n_hashes,
        num_buckets=None,
        lsh_attn_chunk_length=sizes.chunk_len,
        axial_pos_shape=sizes.axial_shape,
        axial_pos_embds_dim=sizes.axial_dims,
        is_decoder=True,
        use_cache=False,
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        chunk_size_feed_forward=min(4096, sizes.seq_len),
    )
    model = ReformerModelWithLMHead(config).train()
    return lambda tokens: model(tokens, labels=tokens).loss.backward()


def lucidrains(sizes: Sizes) -> Step:
    """The package reformer-pytorch."""
    from reformer_pytorch import ReformerLM

    model = ReformerLM(
        num_tokens=sizes.vocab_size,
        dim=sizes.d_model,
        depth=sizes.n_layers,
        max_seq_len=sizes.seq_len,
        heads=sizes.n_heads,
        dim_head=sizes.d_model // sizes.n_heads,
        bucket_size=sizes.chunk_len,
        n_hashes=sizes.n_hashes,
        causal=True,
        ff_chunks=max(1, sizes.seq_len // 4096),
        axial_position_emb=True,
        axial_position_shape=sizes.axial_shape,
    ).train()
    return lambda tokens: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


class _DenseBlock(nn.Module):
    """A pre-norm Transformer block on PyTorch's own fused attention."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.n_heads = sizes.n_heads
        self.norms = nn.ModuleList([nn.LayerNorm(sizes.d_model) for _ in range(2)])
        self.qkv = nn.Linear(sizes.d_model, 3 * sizes.d_model, bias=False)
        self.out = nn.Linear(sizes.d_model, sizes.d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(sizes.d_model, 4 * sizes.d_model), nn.ReLU(), nn.Linear(4 * sizes.d_model, sizes.d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        chunks = [self.feed_forward(self.norms[1](chunk)) for chunk in x.split(4096, dim=1)]
        return x + torch.cat(chunks, dim=1)


def dense(sizes: Sizes) -> Step:
    """A Transformer with dense attention (scaled_dot_product_attention), every block checkpointed."""
    embedding = nn.Embedding(sizes.vocab_size, sizes.d_model)
    positions = nn.Parameter(torch.randn(sizes.seq_len, sizes.d_model) * 0.02)
    blocks = nn.ModuleList([_DenseBlock(sizes) for _ in range(sizes.n_layers)])
    head = nn.Linear(sizes.d_model, sizes.vocab_size)

    def step(tokens: Tensor) -> None:
        x = embedding(tokens) + positions
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        losses = [
            checkpoint(_summed_loss, head, part, labels, use_reentrant=False)
            for part, labels in zip(x.split(4096, dim=1), tokens.split(4096, dim=1), strict=True)
        ]
        (torch.stack(losses).sum() / tokens.numel()).backward()

    return step


def _summed_loss(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(x).flatten(0, 1), labels.flatten(), reduction="sum")


def ours_attention(sizes: Sizes) -> Step:
    """One layer of lsh_attention, without a model around it."""
    qk, v = _heads(sizes, 2)
    return lambda _: lsh_attention(qk, v, n_hashes=sizes.n_hashes, chunk_len=sizes.chunk_len)[0].sum().backward()


def dense_attention(sizes: Sizes) -> Step:
    """One layer of scaled_dot_product_attention."""
    q, k, v = _heads(sizes, 3)
    return lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def _heads(sizes: Sizes, n: int) -> list[Tensor]:
    shape = (1, sizes.n_heads, sizes.seq_len, sizes.d_model // sizes.n_heads)
    return [torch.randn(shape, requires_grad=True) for _ in range(n)]


PEERS: dict[str, dict[str, Callable[[Sizes], Any]]] = {
    "model": {"ours": ours, "huggingface": huggingface, "lucidrains": lucidrains, "dense": dense},
    "attention": {"ours": ours_attention, "dense": dense_attention},
}
