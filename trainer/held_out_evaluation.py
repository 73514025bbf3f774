"""What is said about a model on held-out rows: its loss, exactly, where in documents it is made, and without LSH.

Ranks share the rows, and the last ones get blank rows where there are too few, since under ZeRO-3 all must take part in
every forward pass. Sums over all tokens of all ranks are divided once, so that nothing depends on the number of ranks.
The tags, all of the model after so many steps, hash rotations those of step 0:

    eval/loss                   nats per token, of run.eval_rows held-out rows, drawn at random, always the same
    eval/bits_per_token         the same in bits
    eval/bits_per_byte          bits per byte of text: comparable between tokenizers, unlike the loss
    eval/perplexity             exp(eval/loss)
    eval/loss_at/00016K         nats per token, of the tokens that have at least 4K and fewer than 16K of their own
                                document before them in the row: what falls with the distance is the use of a context
                                of that length. 1K, 4K, 16K, … as far as rows reach; of rows of up to 1,024 tokens
                                00004, 00016, …
    eval/loss_without_lsh       of the first run.ablation_rows of these rows, with nothing in place of LSH attention; a
                                row costs 0.7 times as much again (measured, the demo's model)
    eval/lsh_gain               by how much that is more than the loss of the same rows with it. Near 0, LSH layers do
                                nothing; otherwise it says that they are used, not how well a model would do that was
                                trained without them
    eval/source/NAME/loss,      of a store of data.mixture that has an eval_split: as many rows of it, drawn likewise
    eval/source/NAME/bits_per_byte
    lsh/…, reversible/…         see metrics.py; of the first row, on the ranks that have it in the first pass
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from reformer.diagnostics import ablated
from reformer.loss import mean_loss
from trainer.batches import Batch, Rows, blank, collate, evaluation_shares, part_of
from trainer.config import RunConfig
from trainer.diagnostics import diagnosed
from trainer.distributed import Launch, all_sum, together
from trainer.scoring import Score, masked_sums, positions, range_ends, range_masks, range_name, source_tag
from trainer.sequence_parallel import Place
from trainer.text_sample import sample_continuation


@dataclass(frozen=True)
class Totals:
    """Of some rows."""

    all: Score
    first: Score
    """Of the first few of them; without bytes."""
    by_position: dict[int, Score]
    """Of the tokens in each range of positions, by its end: see `range_ends`; without bytes."""


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation reports."""

    values: dict[str, float]
    """By tag: see the top of this file."""
    by_position: dict[int, float]
    """eval/loss_at/… by the position at which each range ends; of ranges with something to predict."""
    sample: str | None
    """A held-out text continued, as Markdown: see text_sample.py; None where none is asked for."""


@dataclass(frozen=True)
class Evaluator:
    """A run's engine, and what it takes to score rows with it on all ranks."""

    engine: deepspeed.DeepSpeedEngine
    config: RunConfig
    launch: Launch
    place: Place
    """Of this rank, joined."""
    device: torch.device
    token_bytes: Tensor
    """int64 [V], the bytes that each token stands for."""

    def held_out(self, rows_of: Mapping[str, Rows]) -> HeldOut:
        """Everything that an evaluation reports. All ranks call it, and make the same passes.

        rows_of: held-out rows of data.store, as "", and of the mixture's stores by name, of which the loss alone is
        reported.

        Raises DataError, on one rank while the others end, where a row or the store's tokenizer is damaged.
        """
        plan, engine, launch, device = self.config.run, self.engine, self.launch, self.device
        rows = rows_of[""]
        n_ablated = min(plan.ablation_rows, len(rows)) if self.config.model.has_lsh else 0
        watch: AbstractContextManager[dict[str, float]] = nullcontext({})
        if plan.diagnostics:
            watch = diagnosed(engine, rows, launch, self.place, device)
        engine.eval()
        with watch as diagnostics:
            scores = self.score(rows, len(rows), n_ablated)
        by_position = {end: score.loss for end, score in scores.by_position.items() if score.n_tokens}
        values = overall(scores.all)
        values |= {position_tag(end, rows.store.seq_len): loss for end, loss in by_position.items()}
        if n_ablated:
            with ablated(engine.module):
                without = self.score(rows, n_ablated, n_ablated).first.loss
            values |= {"eval/loss_without_lsh": without, "eval/lsh_gain": without - scores.first.loss}
        known = {str(rows.identity): scores.all}
        of_sources = {name: own for name, own in rows_of.items() if name}
        for name, own in of_sources.items():
            try:
                if (identity := str(own.identity)) not in known:
                    known[identity] = self.score(own, len(own), n_first=0).all
            except DataError as error:
                raise DataError(
                    f"{error}. Evaluations read it; to go on without, leave out data.mixture.{name}.eval_split"
                ) from error
            score = known[identity]
            values |= {source_tag(name, "loss"): score.loss, source_tag(name, "bits_per_byte"): score.bits_per_byte}
        sample = sample_continuation(engine, rows, self.config, launch, device)
        engine.train()
        return HeldOut(values | diagnostics, by_position, sample)

    @torch.no_grad()
    def score(self, rows: Rows, n_rows: int, n_first: int) -> Totals:
        """Of the first `n_rows` rows, and of these the first `n_first`, for an engine in evaluation mode.

        With config.run.eval_n_hashes rounds of LSH attention, or as many as the model is trained with. Hash rotations
        are always those of step 0, so results are comparable.
        """
        engine, place, device = self.engine, self.place, self.device
        ends = range_ends(rows.store.seq_len)
        nll = torch.zeros((), dtype=torch.float64, device=device)
        # `masked_sums` of n_first, and of each range.
        parts = torch.zeros(1 + len(ends), 2, dtype=torch.float64, device=device)
        n_tokens = n_bytes = 0
        micro_batch_size = engine.train_micro_batch_size_per_gpu()
        for share in evaluation_shares(n_rows, micro_batch_size, place.replica, place.n_replicas):
            batch = together(partial(self._read, rows, share), self.launch, device)
            losses_BT = self._losses(batch)
            # Its mean as the model itself gives it, to the bit, which a sum in float64 would not be.
            mean = mean_loss(losses_BT, batch.labels, engine.module.head.chunk_tokens(device))
            nll += mean.double() * batch.n_tokens
            n_tokens += batch.n_tokens
            n_bytes += batch.n_bytes
            is_first_B = torch.tensor([row is not None and row < n_first for row in share], device=device)
            masks = [is_first_B[:, None], *range_masks(_positions(batch), ends)]
            parts += torch.stack([masked_sums(losses_BT, batch.labels, mask) for mask in masks])
        nll_sum, tokens_sum, bytes_sum, *sums = all_sum([nll, n_tokens, n_bytes, *parts.flatten()], device)
        first, *by_range = (Score(*pair, n_bytes=0) for pair in zip(sums[::2], sums[1::2], strict=True))
        return Totals(Score(nll_sum, tokens_sum, bytes_sum), first, dict(zip(ends, by_range, strict=True)))

    def _read(self, rows: Rows, share: Sequence[int | None]) -> Batch:
        part = self.place.sequence
        samples = [part_of(blank(rows[0]) if row is None else rows[row], part) for row in share]
        return collate(samples, range(len(share)), self.token_bytes, self.device, part)

    def _losses(self, batch: Batch) -> Tensor:
        """The loss [B, T] of each token, 0 where there is nothing to predict."""
        return self.engine(
            batch.tokens,
            batch.labels,
            segment_ids=batch.segment_ids,
            sample_ids=batch.sample_ids,
            n_hashes=self.config.run.eval_n_hashes,
            per_token=True,
            part=batch.part,
        )


def overall(score: Score) -> dict[str, float]:
    """The values of all rows, by tag."""
    return {
        "eval/loss": score.loss,
        "eval/bits_per_byte": score.bits_per_byte,
        "eval/bits_per_token": score.bits_per_token,
        "eval/perplexity": score.perplexity,
    }


def _positions(batch: Batch) -> Tensor:
    """`positions` of a batch's tokens [B, T] in their whole sequences."""
    n_tokens = batch.segment_ids.shape[1]
    start = batch.part.start(n_tokens)
    return positions(batch.part.whole(batch.segment_ids))[:, start : start + n_tokens]


def position_tag(end: int, seq_len: int) -> str:
    """The tag of a range of positions in rows of so many tokens."""
    return f"eval/loss_at/{range_name(end, seq_len)}"
