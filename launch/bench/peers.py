"""What `launch/benchmark.py` measures: ours, and what a user would pick instead, made to do equal work.

Every peer is built by a function: a model with its loss (`MODELS`), or a function that takes one training step
(`PEERS`): forward and backward, no dropout, a batch of one sequence. Each runs in a process of its own, so that
its peak memory is its own. Equal are:

model      Width, layers, heads, vocabulary, a feed-forward layer four times as wide that takes `chunk_tokens` at a
           time, axial positions. Nobody keeps more than a layer's activations: Reformers are reversible, the dense
           model is checkpointed.
attention  What stands between the projections of one layer: from qk and v [1, T, M] as a projection leaves them to
           the merged heads [1, T, M], and back to the gradients of qk and v. Hugging Face's layer projects inside:
           there, its two projections are replaced by the given tensors.
LSH        Rounds, and chunks that see themselves and the one before. 2 * T / chunk_len buckets in ours and in Hugging
           Face's, which both factorise them when they are many; reformer-pytorch has T / bucket_size, never factorised,
           and its bucket_size is the length of a chunk. Its option attn_chunks would save memory, but it keeps one
           chunk's buckets for the backward of all of them, so that its gradients are those of another function.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.call import Call
from reformer.dense import dense_attention
from reformer.model import Embedding

Step = Callable[[], None]
Loss = Callable[[Tensor], Tensor]
Model = tuple[nn.Module, Loss]
"""A model, and the loss that it gives for tokens [1, T] as their own labels."""
Built = TypeVar("Built", Step, Model)


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
    chunk_tokens: int = 4096
    """Tokens that pass through a feed-forward layer, or a head that can be chunked, at a time."""


@dataclass(frozen=True)
class Peer(Generic[Built]):
    """One of those that are compared."""

    build: Callable[[Sizes], Built]
    module: str | None = None
    """What it imports besides torch and ours (torch.utils.checkpoint imports torch._dynamo when it is used)."""
    package: str | None = None
    """What has to be installed for that, besides this project's own requirements."""
    mixes_dtypes: bool = False
    """It fails with parameters that are not fp32: a lower precision is had by autocast."""


def config_of(sizes: Sizes) -> ReformerConfig:
    """Our configuration, which the dense model takes its embedding from too."""
    return ReformerConfig(
        vocab_size=sizes.vocab_size,
        max_seq_len=sizes.seq_len,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        n_hashes=sizes.n_hashes,
        lsh_chunk_len=sizes.chunk_len,
        ff_chunk_tokens=sizes.chunk_tokens,
        attn_pattern=("lsh",),
    )


def random_tokens(sizes: Sizes) -> Tensor:
    """What a model is trained on here, int64 [1, T]."""
    return torch.randint(0, sizes.vocab_size, (1, sizes.seq_len))


def model_step(model: nn.Module, loss_of: Loss, sizes: Sizes) -> Step:
    """A step of a whole model: the loss of random tokens [1, T], and the gradients of all parameters."""
    model.train()
    tokens_BT = random_tokens(sizes)

    def step() -> None:
        model.zero_grad()
        loss_of(tokens_BT).backward()

    return step


def step_of(build: Callable[[Sizes], Model], sizes: Sizes) -> Step:
    """A step of the model that is built."""
    model, loss_of = build(sizes)
    return model_step(model, loss_of, sizes)


@contextmanager
def built_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors and parameters are on this device and of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def step_on(peer: Peer[Step], sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Step:
    """A peer's step with parameters and inputs in this dtype, ours with its residual streams in fp32."""
    by_autocast = peer.mixes_dtypes and dtype != torch.float32
    with built_on(device, torch.float32 if by_autocast else dtype):
        step = peer.build(sizes)
    if not by_autocast:
        return step

    def step_under_autocast() -> None:
        with torch.autocast(device.type, dtype):
            step()

    return step_under_autocast


def ours(sizes: Sizes) -> Model:
    """Longhand's Reformer."""
    model = Reformer(config_of(sizes))
    return model, lambda tokens: model(tokens, tokens, step=0)


def ours_by_autograd(sizes: Sizes) -> Model:
    """The same, its blocks one after the other under plain autograd, which keeps what each needs for its backward."""
    model = Reformer(config_of(sizes))

    def loss_of(tokens_BT: Tensor) -> Tensor:
        call = Call(model.config.seed, sample_ids=tuple(range(len(tokens_BT))))
        y1 = y2 = model.embedding(tokens_BT)
        for block in model.blocks:
            y1, y2, _ = block(y1, y2, call)
        return model.head(y1, y2, tokens_BT)

    return model, loss_of


def huggingface_config(sizes: Sizes) -> Any:
    """transformers' ReformerConfig; num_buckets=None lets it choose them by the length, as it recommends."""
    from transformers import ReformerConfig as HFConfig

    ours = config_of(sizes)
    return HFConfig(
        attn_layers=["lsh"] * sizes.n_layers,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.seq_len,
        hidden_size=sizes.d_model,
        feed_forward_size=ours.d_ff,
        num_attention_heads=sizes.n_heads,
        attention_head_size=ours.d_head,
        num_hashes=sizes.n_hashes,
        num_buckets=None,
        lsh_attn_chunk_length=sizes.chunk_len,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        axial_pos_shape=ours.axial_shape,
        axial_pos_embds_dim=ours.axial_dims,
        is_decoder=True,
        use_cache=False,
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        chunk_size_feed_forward=min(sizes.chunk_tokens, sizes.seq_len),
        chunk_size_lm_head=min(sizes.chunk_tokens, sizes.seq_len),
    )


def huggingface(sizes: Sizes) -> Model:
    """transformers' ReformerModelWithLMHead."""
    from transformers import ReformerModelWithLMHead

    model = ReformerModelWithLMHead(huggingface_config(sizes))
    return model, lambda tokens: model(tokens, labels=tokens).loss


def lucidrains(sizes: Sizes) -> Model:
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
        ff_chunks=math.ceil(sizes.seq_len / sizes.chunk_tokens),
        axial_position_emb=True,
        axial_position_shape=config_of(sizes).axial_shape,
    )
    return model, lambda tokens: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


class _DenseAttention(nn.Module):
    """Norm, projections and PyTorch's own fused causal attention."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.n_heads = sizes.n_heads
        self.norm = nn.LayerNorm(sizes.d_model)
        self.qkv = nn.Linear(sizes.d_model, 3 * sizes.d_model, bias=False)
        self.out = nn.Linear(sizes.d_model, sizes.d_model, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BTM)).chunk(3, dim=-1)
        return self.out(attend_densely(q, k, v, self.n_heads))


class DenseModel(nn.Module):
    """A pre-norm Transformer that checkpoints each half of a block, the second by chunks; gives the loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d_model, d_ff = sizes.d_model, 4 * sizes.d_model
        self.chunk_tokens = sizes.chunk_tokens
        self.embedding = Embedding(config_of(sizes))
        self.attentions = nn.ModuleList([_DenseAttention(sizes) for _ in range(sizes.n_layers)])
        self.feed_forwards = nn.ModuleList(
            [
                nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
                for _ in range(sizes.n_layers)
            ]
        )
        self.head = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, sizes.vocab_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            x = x + _recomputed(attention, x)
            x = torch.cat([part + _recomputed(feed_forward, part) for part in x.split(self.chunk_tokens, dim=1)], dim=1)
        parts = zip(x.split(self.chunk_tokens, dim=1), tokens_BT.split(self.chunk_tokens, dim=1), strict=True)
        losses = [_recomputed(self._summed_loss, part, labels) for part, labels in parts]
        return torch.stack(losses).sum() / tokens_BT.numel()

    def _summed_loss(self, x_BTM: Tensor, labels_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x_BTM).flatten(0, 1), labels_BT.flatten(), reduction="sum")


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The function's value, of which only the inputs are kept for the backward."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def dense(sizes: Sizes) -> Model:
    """A Transformer with dense attention (scaled_dot_product_attention), checkpointed."""
    model = DenseModel(sizes)
    return model, model


def attention_step(attend: Callable[..., Tensor], n_inputs: int, sizes: Sizes) -> Step:
    """A step of attention alone: from n_inputs tensors [1, T, M] to one, and back to the gradients of the inputs."""
    shape = (1, sizes.seq_len, sizes.d_model)
    inputs_BTM = [torch.randn(shape, requires_grad=True) for _ in range(n_inputs)]
    gradient_BTM = torch.randn(shape)

    def step() -> None:
        torch.autograd.grad(attend(*inputs_BTM), inputs_BTM, gradient_BTM)

    return step


def heads_of(x_BTM: Tensor, n_heads: int) -> Tensor:
    """[B, T, M] -> [B, H, T, D]."""
    return x_BTM.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merged(x_BHTD: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, M]."""
    return x_BHTD.transpose(1, 2).flatten(2)


def attend_densely(q_BTM: Tensor, k_BTM: Tensor, v_BTM: Tensor, n_heads: int) -> Tensor:
    q, k, v = (heads_of(x, n_heads) for x in (q_BTM, k_BTM, v_BTM))
    return merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def ours_attention(sizes: Sizes) -> Step:
    """Longhand's lsh_attention."""

    def attend(qk_BTM: Tensor, v_BTM: Tensor) -> Tensor:
        qk, v = heads_of(qk_BTM, sizes.n_heads), heads_of(v_BTM, sizes.n_heads)
        return merged(lsh_attention(qk, v, n_hashes=sizes.n_hashes, chunk_len=sizes.chunk_len)[0])

    return attention_step(attend, 2, sizes)


def ours_densely(sizes: Sizes) -> Step:
    """Longhand's dense attention with shared queries and keys: what LSH attention approximates."""

    def attend(qk_BTM: Tensor, v_BTM: Tensor) -> Tensor:
        return merged(dense_attention(heads_of(qk_BTM, sizes.n_heads), heads_of(v_BTM, sizes.n_heads)))

    return attention_step(attend, 2, sizes)


class _Given(nn.Module):
    """Stands where a projection stood, and gives what it is given for it."""

    x: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def huggingface_attention(sizes: Sizes) -> Step:
    """transformers' LSHSelfAttention, without its projections."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    layer = LSHSelfAttention(huggingface_config(sizes)).train()
    layer.query_key, layer.value = _Given(), _Given()

    def attend(qk_BTM: Tensor, v_BTM: Tensor) -> Tensor:
        layer.query_key.x, layer.value.x = qk_BTM, v_BTM
        return layer(qk_BTM).hidden_states

    return attention_step(attend, 2, sizes)


def lucidrains_attention(sizes: Sizes) -> Step:
    """reformer-pytorch's LSHAttention."""
    from reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=sizes.chunk_len, n_hashes=sizes.n_hashes, causal=True).train()

    def attend(qk_BTM: Tensor, v_BTM: Tensor) -> Tensor:
        qk, v = (heads_of(x, sizes.n_heads).flatten(0, 1) for x in (qk_BTM, v_BTM))
        return merged(layer(qk, v)[0].unflatten(0, (1, sizes.n_heads)))

    return attention_step(attend, 2, sizes)


def sdpa(sizes: Sizes) -> Step:
    """scaled_dot_product_attention, with keys of their own."""
    return attention_step(lambda q, k, v: attend_densely(q, k, v, sizes.n_heads), 3, sizes)


HUGGINGFACE = ("transformers.models.reformer.modeling_reformer", "transformers")
LUCIDRAINS = ("reformer_pytorch", "reformer-pytorch")
MODELS: dict[str, Peer[Model]] = {
    "ours": Peer(ours),
    "huggingface": Peer(huggingface, *HUGGINGFACE, mixes_dtypes=True),
    "lucidrains": Peer(lucidrains, *LUCIDRAINS),
    "dense": Peer(dense, "torch._dynamo"),
}
PEERS: dict[str, dict[str, Peer[Step]]] = {
    "model": {
        name: Peer(partial(step_of, peer.build), peer.module, peer.package, peer.mixes_dtypes)
        for name, peer in MODELS.items()
    },
    "attention": {
        "ours": Peer(ours_attention),
        "ours-dense": Peer(ours_densely),
        "huggingface": Peer(huggingface_attention, *HUGGINGFACE),
        "lucidrains": Peer(lucidrains_attention, *LUCIDRAINS),
        "dense": Peer(sdpa),
    },
}
