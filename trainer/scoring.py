"""How well tokens are predicted: sums over them, as a whole and by their place in their documents."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.dataset import IGNORED_LABEL

FIRST_RANGE, FIRST_RANGE_OF_SHORT_ROWS = 1024, 4
"""Where the first range of positions ends; each of the others ends at four times the position of the one before."""


@dataclass(frozen=True)
class Score:
    """How well tokens are predicted, made of sums so that it is exact."""

    nll: float
    """Sum of the tokens' negative log-likelihoods in nats."""
    n_tokens: float
    n_bytes: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.n_tokens if self.n_tokens else math.nan

    @property
    def bits_per_token(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers, unlike the loss."""
        return self.nll / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss): of so many equally likely tokens one would be as hard to predict."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


def masked_sums(losses_BT: Tensor, labels_BT: Tensor, mask: Tensor) -> Tensor:
    """The loss and the number [2] of the tokens to predict in a mask that broadcasts to [B, T], float64."""
    counted_BT = (labels_BT != IGNORED_LABEL) & mask
    return torch.stack([losses_BT.double().where(counted_BT, 0).sum(), counted_BT.sum().double()])


def range_ends(seq_len: int) -> list[int]:
    """Where ranges of positions end, in rows of so many tokens; the first begins at 0, each other where one ends."""
    ends = [FIRST_RANGE if seq_len > FIRST_RANGE else FIRST_RANGE_OF_SHORT_ROWS]
    while ends[-1] < seq_len:
        ends.append(4 * ends[-1])
    return ends


def range_masks(position_BT: Tensor, ends: Sequence[int]) -> Iterator[Tensor]:
    """Of each range of positions, which tokens [B, T] are in it."""
    for begin, end in zip([0, *ends], ends, strict=False):
        yield (begin <= position_BT) & (position_BT < end)


def positions(segment_ids_BT: Tensor) -> Tensor:
    """For each token how many of its own segment are before it, int64 [B, T]: what a causal model may look back on."""
    place_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    begins_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return place_T - place_T.where(begins_BT, 0).cummax(dim=1).values


def range_name(end: int, seq_len: int) -> str:
    """A range of positions in rows of so many tokens, by its end; names of one length are in the order of ranges."""
    return f"{end // 1024:05d}K" if seq_len > FIRST_RANGE else f"{end:05d}"


def source_tag(name: str, value: str) -> str:
    """The tag of a value of held-out rows of a store of data.mixture."""
    return f"eval/source/{name}/{value}"
