"""A sequence continued by a model, token by token.

Every new token is one call of `forward` with all tokens before it: of the model itself, which computes what it computes
in training, all of it every time; or of a Decoder (decoding.py), which computes what is new. The choice of a token is a
function of its logits, the seed and its place. The model itself therefore gives the same text in two calls as in one,
and on any rank (a Decoder of LSH layers remembers where its first call ended).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reformer.arguments import INTEGERS, check_is_tensor, check_tokens, whole_number
from reformer.config import ReformerConfig
from reformer.lsh.hashing import derive_seed


@torch.no_grad()
def continue_tokens(
    forward: Callable[[Tensor], Tensor],
    config: ReformerConfig,
    tokens: Tensor,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """The `n_tokens` tokens that follow tokens [T], int64 [n_tokens] on their device; [B, n_tokens] of tokens [B, T].

    Args:
        forward: tokens [B, T] -> logits [B, T, V], or those of the last place alone [B, 1, V]: a Decoder of the model,
            or the model or a wrapper of it, in evaluation mode, without dropout.
        config: the model's.
        tokens: integers [T] of any type, at least one, or [B, T] of several sequences of one length.
        n_tokens: how many to add; as many calls are made, whatever comes out of them.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws from the fewest tokens that have this share of the probability.
        seed: of the draws; of several sequences, B of them.

    Raises:
        ValueError: as `check_continuation` does, or for another number of seeds, before anything is computed.
        FloatingPointError: the logits are NaN, as those of a model that has diverged.
    """
    check_continuation(config, tokens, n_tokens, temperature, top_p)
    n_tokens = whole_number("n_tokens", n_tokens)
    seeds = [whole_number("seed", own) for own in (seed if isinstance(seed, Sequence) else [seed])]
    window_BT = (tokens if tokens.ndim == 2 else tokens[None]).long()
    if len(seeds) != len(window_BT):
        raise ValueError(f"{len(seeds)} seeds for {len(window_BT)} sequences: give seed=[…] with one for each")
    n_before = window_BT.shape[1]
    for place in range(n_before, n_before + n_tokens):
        logits_BV = forward(window_BT)[:, -1].cpu()
        added = [
            choose(logits_V, derive_seed(own, place), temperature, top_p)
            for logits_V, own in zip(logits_BV, seeds, strict=True)
        ]
        window_BT = torch.cat([window_BT, window_BT.new_tensor(added)[:, None]], dim=1)
    return window_BT[:, n_before:].view(*tokens.shape[:-1], n_tokens)


def check_continuation(
    config: ReformerConfig, tokens: Tensor, n_tokens: int, temperature: float = 1.0, top_p: float = 1.0
) -> None:
    """Raise a ValueError where tokens [T] or [B, T] cannot be continued so.

    That is for a model that is not causal, tokens that are no rows of ids below vocab_size or too few to begin with, a
    result longer than max_seq_len, and an n_tokens, temperature or top_p that is none; TypeError for an n_tokens
    that is no whole number.
    """
    if not config.causal:
        raise ValueError("a model with causal=False saw the following tokens in training: it cannot continue a text")
    check_is_tensor(tokens)
    if tokens.ndim not in (1, 2) or tokens.dtype not in INTEGERS:
        raise ValueError(
            f"the tokens are {tokens.dtype} {list(tokens.shape)}, expected integers [T], or [B, T] of several "
            "sequences of one length"
        )
    if not tokens.numel():
        raise ValueError("there is no token to begin with: give at least one, such as BOS")
    check_tokens(tokens.cpu(), config.vocab_size)
    n_before, n_tokens = tokens.shape[-1], whole_number("n_tokens", n_tokens)
    room = config.max_seq_len - n_before
    if n_tokens > room:
        fewer = config.max_seq_len - n_tokens
        way_out = f"add at most {room}" if room > 0 else f"give at most {fewer}" if fewer > 0 else "give and add fewer"
        raise ValueError(
            f"{n_before} tokens and {n_tokens} more are beyond max_seq_len={config.max_seq_len}: {way_out}"
        )
    for name, value in (("n_tokens", n_tokens), ("temperature", temperature)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def choose(logits_V: Tensor, seed: int, temperature: float, top_p: float) -> int:
    """A token drawn from softmax(logits / temperature), among the likeliest that have top_p of the probability.

    The draw is made on the CPU, from one number in float64 that follows from the seed.
    """
    logits_V = logits_V.double().cpu()
    if logits_V.isnan().any():
        raise FloatingPointError("the model's logits are not numbers (NaN): its weights are damaged, or have diverged")
    if temperature == 0:
        return int(logits_V.argmax())
    # Without the maximum first, a tiny temperature would make infinities of them.
    p_V, token_V = ((logits_V - logits_V.max()) / temperature).softmax(dim=0).sort(descending=True, stable=True)
    total_V = p_V.cumsum(dim=0)
    kept = int((total_V - p_V < top_p).sum())  # the last of them is the one that reaches top_p
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand((), dtype=torch.float64, generator=generator, device="cpu") * total_V[kept - 1]
    return int(token_V[min(int(torch.searchsorted(total_V, at)), kept - 1)])
