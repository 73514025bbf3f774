"""Models that choose what they attend to, and tokens, for tests of the decoder."""

import torch
from torch import Tensor

from reformer import Reformer, ReformerConfig

LENGTH = 35
ROUNDING = 1e-11
SHAPE = {
    "vocab_size": 13,
    "max_seq_len": 64,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "local_chunk_len": 5,
    "seed": 11,
}


def make(dtype: torch.dtype = torch.float64, **changes: object) -> Reformer:
    """Trained weights are not small: with initial ones, attention would hardly choose."""
    torch.manual_seed(3)
    model = Reformer(ReformerConfig(**{**SHAPE, "lsh_chunk_len": 4, "n_hashes": 2, **changes})).double()
    with torch.no_grad():
        for block in model.blocks:
            for name in block.attention.projections:
                block.attention.get_parameter(f"{name}_weight").mul_(3)
    return model.to(dtype).eval()


def draw(n_tokens: int = LENGTH, n_rows: int = 1) -> Tensor:
    return torch.randint(0, 13, (n_rows, n_tokens), generator=torch.Generator().manual_seed(5))
