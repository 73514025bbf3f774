"""The loss of every token of a document, put together from the rows that hold its stretches, as arrays in a folder.

FILE.npy         float32 [n_tokens]: of each token of a document, BOS and EOS with them, its loss in nats given those
                 before it in its row; NaN where it was not predicted. To the end of the last stretch that was scored.
documents.json   [{file, document: its number in the store, name: in documents.jsonl}], in that order
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.dataset import IGNORED_LABEL
from data_pipeline.staging import staged
from data_pipeline.store import Store


class TokenLosses:
    """Filled row by row; four bytes for each token in the rows."""

    def __init__(self) -> None:
        self._stretches: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)

    def add(self, losses_T: Tensor, labels_T: Tensor, segments: Sequence[Sequence[int]]) -> None:
        """Of a row: the losses in nats of its labels, and its segments as `Store.segments_of` has them."""
        losses = losses_T.float().cpu().where(labels_T != IGNORED_LABEL, torch.nan).numpy()
        for start, length, document, document_start in segments:
            # A label is the token after.
            self._stretches[document].append((document_start + 1, losses[start : start + length - 1]))

    def of(self, document: int) -> np.ndarray:
        """float32 [n_tokens] of a document."""
        stretches = self._stretches[document]
        losses = np.full(max(begin + len(stretch) for begin, stretch in stretches), np.nan, np.float32)
        for begin, stretch in stretches:
            into = losses[begin : begin + len(stretch)]
            into[:] = np.where(np.isnan(stretch), into, stretch)
        return losses

    def write(self, folder: Path, store: Store) -> None:
        """Raises DataError where the folder cannot be written, or has something in it."""
        numbers = sorted(self._stretches)
        names = store.names_of(self._stretches)
        index = [{"file": f"{number:08d}.npy", "document": number, "name": names[number]} for number in numbers]
        with staged(folder) as unfinished:
            unfinished.mkdir()
            for number, about in zip(numbers, index, strict=True):
                np.save(unfinished / str(about["file"]), self.of(number))
            (unfinished / "documents.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
