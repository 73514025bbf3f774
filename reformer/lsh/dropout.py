"""Which attention weights are dropped: a pure function of a key, the round and the two original positions.

No mask is stored and no generator has a state: the backward, another tile size, another device or a kernel works
out the same zeros from the same integers. All arithmetic is on 32-bit words and wraps; written for unsigned words,
with `mix` the bijective finaliser "lowbias32" of C. Wellons (https://nullprogram.com/blog/2018/07/31/):

    query word  a_i = mix(mix(mix(key ^ QUERY_TAG) + round) + i) | 1
    key word    b_j = mix(mix(mix(key ^ KEY_TAG) + round) + j) & ~1
    hash       h_ij = (a_i ^ b_j)^2
    dropped where h_ij, read as a signed word, is less than round(p * 2^32) - 2^31

All the mixing is done per token, and one xor, one product and one comparison are left per pair. That is enough because
a_i ^ b_j is odd: squares of odd words take their 29 upper bits equally often, and the upper bits, which decide the
comparison, depend on all the lower ones. Two queries (or keys) are correlated only where their words agree in some 25
lower bits, one pair in millions.

Axes: L queries, W keys.
"""

import torch
from torch import Tensor

from reformer.arguments import check_is_tensor

QUERY_TAG, KEY_TAG = 0x2545F491, 0x6C8E9CF5
"""Any two different words, so that a query's word says nothing about that of the key at the same position."""


def check_dropout(dropout: float, dropout_keys: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless 0 <= dropout < 1 and, where it is not 0, there are integer keys of `shape`."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} must be at least 0 and less than 1")
    if dropout and dropout_keys is None:
        raise ValueError(
            f"dropout={dropout} needs dropout_keys, one integer per sample and head {list(shape)}, "
            "which say what is dropped; give them, or dropout=0"
        )
    if dropout_keys is None:
        return
    check_is_tensor(dropout_keys, "dropout_keys")
    if dropout_keys.shape != shape or dropout_keys.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"dropout_keys must be int32 or int64 {list(shape)} = [B, H], "
            f"got {dropout_keys.dtype} {list(dropout_keys.shape)}"
        )


def keep_factor(
    key: Tensor, round_: int, query_position: Tensor, key_position: Tensor, dropout: float, dtype: torch.dtype
) -> Tensor:
    """What each weight is multiplied by: 0 where it is dropped, 1 / (1 - dropout) elsewhere.

    Args:
        key: integers of the range of int32, broadcasting with the positions; one per sample and head.
        round_: the hash round of the softmax that the weight belongs to.
        query_position: original positions [..., L, 1], of any dtype that holds them exactly.
        key_position: original positions [..., 1, W].
        dropout: the probability of dropping a weight, at least 0 and less than 1.
        dtype: of the result [..., L, W].
    """
    query_word, key_word = query_words(key, round_, query_position), key_words(key, round_, key_position)
    return keep_factor_of_words(query_word, key_word, dropout, dtype)


def query_words(key: Tensor, round_: int | Tensor, position: Tensor) -> Tensor:
    """The words a_i, int32, of the queries at these original positions, in these rounds."""
    return _words(key, QUERY_TAG, round_, position).bitwise_or_(1)


def key_words(key: Tensor, round_: int | Tensor, position: Tensor) -> Tensor:
    """The words b_j, int32, of the keys at these original positions, for queries of these rounds."""
    return _words(key, KEY_TAG, round_, position).bitwise_and_(~1)


def keep_factor_of_words(query_word: Tensor, key_word: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """The factors [..., L, W] of words [..., L, 1] and [..., 1, W]: all that is left to do per pair."""
    hashed = query_word ^ key_word
    # In place, the comparison writes 0 and 1 as int32: boolean output was seven times slower (measured on a CPU).
    return hashed.mul_(hashed).ge_(keep_threshold(dropout)).to(dtype).mul_(1 / (1 - dropout))


def keep_threshold(dropout: float) -> int:
    """A weight is kept where its hash, as a signed 32-bit word, is at least this."""
    return min(round(dropout * 2**32) - 2**31, 2**31 - 1)


def mix(word: Tensor) -> Tensor:
    """A bijection of int32 words (which wrap) that flips each bit with probability 1/2 when any bit changes."""
    word = _shifted_xor(word, 16) * 0x7FEB352D
    word = _shifted_xor(word, 15) * (0x846CA68B - 2**32)  # the same word as a signed number
    return _shifted_xor(word, 16)


def _shifted_xor(word: Tensor, bits: int) -> Tensor:
    """word ^ (word >> bits); torch's shift copies the sign, which is masked away."""
    return word ^ ((word >> bits) & (2 ** (32 - bits) - 1))


def _words(key: Tensor, tag: int, round_: int | Tensor, position: Tensor) -> Tensor:
    stream = mix(mix(key.to(torch.int32) ^ tag) + round_)
    return mix(stream + position.to(torch.int32))
