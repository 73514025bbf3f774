"""Axial position embeddings (the paper's appendix): a table of T positions as the sum of two short ones.

Position t = row * columns + column has the vector [rows[row]; columns[column]], so that 65,536 positions of
width 1,024 cost 128 * 256 + 512 * 768 numbers and not 67 million.
"""

import torch
from torch import Tensor, nn

from reformer.config import ReformerConfig


class AxialPositions(nn.Module):
    """Embeddings [T, M] of the first T of max_seq_len positions."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        assert config.axial_shape is not None and config.axial_dims is not None  # filled in by the config
        (n_rows, n_columns), (d_rows, d_columns) = config.axial_shape, config.axial_dims
        self.rows = nn.Parameter(torch.randn(n_rows, d_rows) * 0.02)
        self.columns = nn.Parameter(torch.randn(n_columns, d_columns) * 0.02)

    def forward(self, n_tokens: int) -> Tensor:
        n_rows, n_columns = len(self.rows), len(self.columns)
        if n_tokens > n_rows * n_columns:
            raise ValueError(
                f"the sequence has {n_tokens} tokens but the position table covers {n_rows} x {n_columns} = "
                f"{n_rows * n_columns}: raise max_seq_len (and axial_shape), or cut the sequence"
            )
        used_rows = -(-n_tokens // n_columns)
        grid = (used_rows, n_columns, -1)
        table = torch.cat([self.rows[:used_rows, None].expand(grid), self.columns[None].expand(grid)], dim=-1)
        return table.flatten(0, 1)[:n_tokens]
