"""The loss on held-out rows, exactly: the sum over all tokens of all ranks, divided once.

What is special: ranks share the rows, and the last ones get blank rows where there are too few, since under ZeRO-3
all must take part in every forward pass. The result does not depend on the number of ranks.
"""

import math
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch

from data_pipeline.dataset import RowDataset
from trainer.batches import Batch, blank, collate, evaluation_shares
from trainer.distributed import Launch, all_sum, together
from trainer.engine import forward


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
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers, unlike the loss."""
        return self.nll / math.log(2) / self.n_bytes if self.n_bytes else math.nan


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine,
    rows: RowDataset,
    n_rows: int,
    token_bytes: torch.Tensor,
    launch: Launch,
    device: torch.device,
    n_hashes: int | None = None,
) -> Score:
    """Score the first `n_rows` rows, with `n_hashes` rounds of LSH attention, or as many as the model is trained with.

    Hash rotations are always those of step 0, so results are comparable.
    """
    engine.eval()
    nll = torch.zeros((), dtype=torch.float64, device=device)
    n_tokens = n_bytes = 0
    micro_batch_size = engine.train_micro_batch_size_per_gpu()
    for share in evaluation_shares(n_rows, micro_batch_size, launch.rank, launch.world_size):
        batch = together(partial(_read, rows, share, token_bytes, device), launch, device)
        nll += forward(engine, batch, step=0, n_hashes=n_hashes).double() * batch.n_tokens
        n_tokens += batch.n_tokens
        n_bytes += batch.n_bytes
    engine.train()
    return Score(*all_sum([nll, n_tokens, n_bytes], device))


def _read(rows: RowDataset, share: list[int | None], token_bytes: torch.Tensor, device: torch.device) -> Batch:
    samples = [blank(rows[0]) if row is None else rows[row] for row in share]
    return collate(samples, range(len(share)), token_bytes, device)
