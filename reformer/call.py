"""What one forward pass is given besides its tokens, as a value: nothing of it is kept on a module.

The randomness of a pass (hash rotations, dropout masks) is a pure function of this value and of the layer, so that
the backward of a reversible stack, another rank, or a resumed run draws the same numbers, and torch's global
random state is neither used nor changed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reformer.lsh.hashing import derive_seed, to_device
from reformer.sequence_part import WHOLE, SequencePart

DROPOUT_BLOCKS = 16
"""A sequence's dropout masks are drawn in so many blocks, so that one part of it needs not draw those of the others."""


@dataclass(frozen=True)
class Call:
    """One forward pass."""

    seed: int
    """The model's seed."""
    step: int = 0
    """Draws new rotations and dropout masks at every step of training."""
    sample_ids: tuple[int, ...] = ()
    """For each sample its index in the global batch: equal samples get equal dropout on any number of ranks."""
    dropout: float = 0.0
    """0 in evaluation."""
    segment_ids_BT: Tensor | None = None
    """Documents packed in one row; they do not see each other. Of the whole sequence, also where this is a part."""
    attn_dropout: float = 0.0
    """Of attention weights; 0 in evaluation."""
    n_hashes: int | None = None
    """Rounds of LSH attention in place of the configuration's; round r is the same whatever their number."""
    part: SequencePart = WHOLE
    """Which part of a sequence the tokens are."""

    def kept(self, like_BTM: Tensor, layer: int, half: Literal["attention", "feed_forward"]) -> Tensor | None:
        """bool [B, T, M], False where an element of a half's output is dropped; None without dropout."""
        if not self.dropout:
            return None
        place = (self.seed, self.step, layer, int(half == "attention"))
        kept_BTM = torch.empty_like(like_BTM, dtype=torch.bool)
        for kept_TM, sample_id in zip(kept_BTM, self.sample_ids, strict=True):
            self._draw(kept_TM, derive_seed(*place, sample_id))
        return kept_BTM

    def _draw(self, kept_TM: Tensor, seed: int) -> None:
        """Which elements of a sample are not dropped: the same however its sequence is cut into parts."""
        n_tokens, width = kept_TM.shape
        start, block_len = self.part.start(n_tokens), -(-self.part.seq_len(n_tokens) // DROPOUT_BLOCKS)
        for block in range(start // block_len, (start + n_tokens - 1) // block_len + 1):
            generator = torch.Generator(kept_TM.device).manual_seed(derive_seed(seed, block))
            uniform = torch.rand(block_len, width, generator=generator, device=kept_TM.device, dtype=torch.float32)
            begin = block * block_len - start  # where the block stands among these tokens
            own = kept_TM[max(begin, 0) : begin + block_len]
            torch.ge(uniform[max(-begin, 0) :][: len(own)], self.dropout, out=own)

    def attn_dropout_keys(self, layer: int, n_heads: int, device: torch.device) -> Tensor | None:
        """int32 [B, H], what decides which attention weights are dropped; None without attention dropout."""
        if not self.attn_dropout:
            return None
        keys = [
            [derive_seed(self.seed, self.step, layer, 2, sample_id, head) % 2**32 - 2**31 for head in range(n_heads)]
            for sample_id in self.sample_ids
        ]
        return to_device(torch.tensor(keys, dtype=torch.int32, device="cpu"), device)
