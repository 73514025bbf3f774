"""Axial position embeddings (the paper's appendix): a table of T positions as the sum of two short ones.

Position t = row * columns + column has the vector [rows[row]; columns[column]], so that 65,536 positions of
width 1,024 cost 128 * 256 + 512 * 768 numbers and not 67 million.
"""

import torch
from torch import Tensor, nn

from reformer.config import ReformerConfig

POSITION_STD = 0.02
"""Of initial position embeddings."""


class AxialPositions(nn.Module):
    """Embeddings [T, M] of T of the max_seq_len positions."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        assert config.axial_shape is not None and config.axial_dims is not None  # filled in by the config
        (n_rows, n_columns), (d_rows, d_columns) = config.axial_shape, config.axial_dims
        self.rows = nn.Parameter(torch.randn(n_rows, d_rows) * POSITION_STD)
        self.columns = nn.Parameter(torch.randn(n_columns, d_columns) * POSITION_STD)

    def forward(self, n_tokens: int, start: int = 0) -> Tensor:
        """Those of the positions start, start + 1, …"""
        n_rows, n_columns = len(self.rows), len(self.columns)
        stop = start + n_tokens
        if stop > n_rows * n_columns:
            raise ValueError(
                f"the sequence has {stop} tokens but the position table covers {n_rows} x {n_columns} = "
                f"{n_rows * n_columns}: raise max_seq_len (and axial_shape), or cut the sequence"
            )
        first_row, end_row = start // n_columns, -(-stop // n_columns)
        grid = (end_row - first_row, n_columns, -1)
        table = torch.cat([self.rows[first_row:end_row, None].expand(grid), self.columns[None].expand(grid)], dim=-1)
        skipped = start - first_row * n_columns
        return table.flatten(0, 1)[skipped : skipped + n_tokens]
