"""What one forward pass is given besides its tokens, as a value: nothing of it is kept on a module.

The randomness of a pass (hash rotations, dropout masks) is a pure function of this value and of the layer, so that
the backward of a reversible stack, another rank, or a resumed run draws the same numbers, and torch's global
random state is neither used nor changed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reformer.lsh.hashing import derive_seed


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
    """Documents packed in one row; they do not see each other."""
    attn_dropout: float = 0.0
    """Of attention weights; 0 in evaluation."""
    n_hashes: int | None = None
    """Rounds of LSH attention in place of the configuration's; round r is the same whatever their number."""

    def dropout_scale(self, like_BTM: Tensor, layer: int, half: Literal["attention", "feed_forward"]) -> Tensor | None:
        """Factors [B, T, M]: 0 where an element is dropped, 1 / (1 - p) elsewhere; None without dropout."""
        if not self.dropout:
            return None
        masks = []
        for sample_id in self.sample_ids:
            seed = derive_seed(self.seed, self.step, layer, int(half == "attention"), sample_id)
            generator = torch.Generator(like_BTM.device).manual_seed(seed)
            masks.append(torch.rand(like_BTM.shape[1:], generator=generator, device=like_BTM.device) >= self.dropout)
        # In fp32 or better: the forward and the backward of a block must use the same numbers, whatever they scale.
        return torch.stack(masks).to(torch.promote_types(like_BTM.dtype, torch.float32)) / (1 - self.dropout)

    def attn_dropout_keys(self, layer: int, n_heads: int, device: torch.device) -> Tensor | None:
        """int32 [B, H], what decides which attention weights are dropped; None without attention dropout."""
        if not self.attn_dropout:
            return None
        keys = [
            [derive_seed(self.seed, self.step, layer, 2, sample_id, head) % 2**32 - 2**31 for head in range(n_heads)]
            for sample_id in self.sample_ids
        ]
        return torch.tensor(keys, dtype=torch.int32, device=device)
