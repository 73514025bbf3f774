"""Diagnostics of the model on the first held-out row, at little cost, under every ZeRO stage.

Rank 0 has this row, or with those after it shares it, in its first forward pass of an evaluation, and LSH attention is
watched while that pass runs. The parameters are there, whatever the stage, so none is gathered again. The
reconstruction by the reversible stack needs passes of its own, on the row's first few thousand tokens, and calls the
layers one by one: under ZeRO-3 their hooks gather the parameters. So all ranks compute the same, in step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import deepspeed
import torch

from reformer.diagnostics import observed, of_all_heads, reconstruction_error
from trainer.batches import Rows
from trainer.distributed import Launch, all_gather, together
from trainer.sequence_parallel import Place

RECONSTRUCTED_TOKENS = 4096
"""The error hardly depends on the length: 1.2e-5 on 1,024 tokens, 1.4e-5 on 65,536 (measured, the demo's model)."""


@contextmanager
def diagnosed(
    engine: deepspeed.DeepSpeedEngine, rows: Rows, launch: Launch, place: Place, device: torch.device
) -> Iterator[dict[str, float]]:
    """Around an evaluation: a dictionary that holds the row's numbers by tag after the statement, on rank 0.

    The tags are those of metrics.py.
    """
    row = together(partial(rows.__getitem__, 0), launch, device)
    n_tokens = int((row.segment_ids != 0).sum())  # the rest is padding
    with observed(engine.module, n_tokens) as found:
        yield found
    if place.n_parts > 1:  # of the first row each of the first ranks has seen some heads
        seen = all_gather(list(found.values()), device)[: place.n_parts]
        found |= of_all_heads([dict(zip(found, values, strict=True)) for values in seen])
    tokens, segment_ids = (x[None, :RECONSTRUCTED_TOKENS].to(device) for x in (row.tokens, row.segment_ids))
    found["reversible/reconstruction_error"] = reconstruction_error(engine.module, tokens, segment_ids=segment_ids)
