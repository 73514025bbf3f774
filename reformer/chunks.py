"""A function of tokens, a few thousand at a time: what it needs in between exists for one chunk only.

Axes: B batch, T tokens, t tokens of a chunk, M model (or any other width).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from reformer.config import ReformerConfig

FF_CHUNK_TOKENS, FF_CHUNK_NUMBERS_GPU = 4096, 2**27
"""Tokens that a feed-forward layer takes at a time unless the configuration says it: on a CPU, so that their inner
activations stay near the cache; on a GPU so many that these are so many numbers, since each chunk costs launches."""
LOSS_CHUNK_TOKENS, LOSS_CHUNK_LOGITS, LOSS_CHUNK_NUMBERS_GPU = 2048, 2**24, 2**26
"""The same for the loss: at most so many tokens and so many logits on a CPU, and logits or features on a GPU."""


def ff_chunk_tokens(config: ReformerConfig, x_BTM: Tensor) -> int:
    """Tokens of each sample of x [B, T, M] that pass through a layer's products at a time."""
    if config.ff_chunk_tokens is not None:
        return config.ff_chunk_tokens
    if x_BTM.device.type == "cpu":
        return FF_CHUNK_TOKENS
    assert config.d_ff is not None  # filled in by the config
    return max(1, FF_CHUNK_NUMBERS_GPU // (len(x_BTM) * max(config.d_ff, config.d_model)))


def loss_chunk_tokens(config: ReformerConfig, device: torch.device) -> int:
    """Tokens, of all samples together, whose logits exist at a time when the loss is computed."""
    if config.loss_chunk_tokens is not None:
        return config.loss_chunk_tokens
    if device.type == "cpu":
        return max(1, min(LOSS_CHUNK_TOKENS, LOSS_CHUNK_LOGITS // config.vocab_size))
    return max(1, LOSS_CHUNK_NUMBERS_GPU // max(config.vocab_size, 2 * config.d_model))


def token_slices(n_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """The chunks of n_tokens as slices."""
    for start in range(0, n_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, n_tokens))


def map_chunks(
    function: Callable[[Tensor], tuple[Tensor, ...]], x_BTM: Tensor, chunk_tokens: int
) -> tuple[Tensor, ...]:
    """What `function` gives for [B, T, M], made from what it gives for chunks [B, t, M].

    Without gradients one chunk's results are alive at a time; with them, autograd has to see all.
    """
    chunks = (function(x_BtM) for x_BtM in x_BTM.split(chunk_tokens, dim=1))
    if torch.is_grad_enabled():
        return tuple(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
    results: list[Tensor] = []
    for tokens, parts in zip(token_slices(x_BTM.shape[1], chunk_tokens), chunks, strict=True):
        so_far: Sequence[Tensor | None] = results or [None] * len(parts)
        results = [put(result, tokens, part, x_BTM.shape[1]) for result, part in zip(so_far, parts, strict=True)]
    return tuple(results)


def put(result: Tensor | None, tokens: slice, part_Bt: Tensor, n_tokens: int) -> Tensor:
    """The result [B, T, …] with a chunk's part at its tokens; None becomes memory for all, or a part that is all."""
    if result is None:
        if part_Bt.ndim == 3 and part_Bt.shape[1] == n_tokens:
            return part_Bt
        result = _whole(part_Bt, n_tokens)
    result[:, tokens] = part_Bt
    return result


def _whole(part_Bt: Tensor, n_tokens: int) -> Tensor:
    """Memory for all tokens of a result [B, t, …, M]; of one by heads, [B, t, H, D], a head's tokens stand together."""
    batch, _, *middle, width = part_Bt.shape
    return part_Bt.new_empty(batch, *middle, n_tokens, width).movedim(-2, 1)
