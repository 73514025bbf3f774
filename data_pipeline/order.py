"""The order of training rows, a stateless pseudo-random permutation, and which of them each rank reads.

Row = permutation(seed, epoch, position): nothing is shuffled, stored or remembered, so a run resumes by knowing one
number, on any number of ranks, with data sets of any size. A Feistel network permutes the smallest power of four
that holds the index; an image outside the data set is permuted again ("cycle walking") until it falls inside. The
image of a bijection restricted this way is a bijection. Plain integers only: the same on every platform, forever
(NumPy's, which overflow, become plain ones first).
"""

import operator

_MASK_64 = (1 << 64) - 1
_ROUNDS = 8
"""4 rounds suffice in theory with perfect round functions (Luby and Rackoff 1988); 8 keep tiny domains even."""


def permute(index: int, length: int, seed: int, epoch: int) -> int:
    """Where `index` goes in the permutation of `range(length)` that belongs to (seed, epoch).

    Raises IndexError unless 0 <= index < length.
    """
    index, length, seed, epoch = map(operator.index, (index, length, seed, epoch))
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside a permutation of {length}")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    key = _mix(_mix(seed & _MASK_64) ^ (epoch & _MASK_64))
    image = _feistel(index, half_bits, key)
    while image >= length:  # the domain is at most 4x the length: a few turns
        image = _feistel(image, half_bits, key)
    return image


def shares(batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> list[range]:
    """A rank's micro-batches of one step, each as indices into the global batch of `batch_size` samples.

    The global batch is dealt out in order: first micro-batch to rank 0, next to rank 1, and round again. So it is the
    same on any number of ranks. Where these do not divide it, the last micro-batches are smaller or missing.
    Raises ValueError for sizes below 1 and for a rank that is not one of `world_size`.
    """
    batch_size, micro_batch_size, rank, world_size = map(
        operator.index, (batch_size, micro_batch_size, rank, world_size)
    )
    if batch_size < 1 or micro_batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} of {world_size} with a batch of {batch_size} in micro-batches of {micro_batch_size}: "
            "expected sizes of at least 1 and a rank from 0 to below the number of ranks"
        )
    starts = range(rank * micro_batch_size, batch_size, world_size * micro_batch_size)
    return [range(start, min(start + micro_batch_size, batch_size)) for start in starts]


def _feistel(value: int, half_bits: int, key: int) -> int:
    """A bijection of `range(4**half_bits)`: each round is undone by its own XOR, whatever `_mix` does."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_number in range(_ROUNDS):
        left, right = right, left ^ (_mix(key ^ _mix(right ^ (round_number << 58))) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK_64
    return value ^ value >> 31
