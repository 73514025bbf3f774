"""Parts of a sequence, each with a holder of its own, compute what one holder of the whole does.

The holders are threads that exchange through a list; those of trainer/sequence_parallel.py are processes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from parity import assert_parity, gradients
from small_models import small_model
from torch import Tensor
from torch.nn import functional as F

from reformer import Reformer, attention
from reformer.call import Call
from reformer.diagnostics import ablated, observed, of_all_heads
from reformer.sequence_part import WHOLE, SequencePart

BATCH, N_HEADS, VOCAB = 2, 4, 20
STEP, SAMPLE_IDS = 3, (6, 9)


def held(n_parts: int, work: Callable[[SequencePart], Any]) -> list[Any]:
    """What each of so many holders makes of its part, all at the same time."""
    meeting = threading.Barrier(n_parts, timeout=60)
    sent: list[Tensor] = [torch.empty(0)] * n_parts

    def exchange(index: int, x: Tensor) -> Tensor:
        assert len(x) == n_parts and x.is_contiguous()
        sent[index] = x
        meeting.wait()
        received = torch.stack([other[index] for other in sent])
        meeting.wait()  # nobody sends again before all have taken theirs
        return received

    def hold(index: int) -> Any:
        try:
            return work(SequencePart(index, n_parts, lambda x: exchange(index, x)))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(n_parts) as threads:
        return list(threads.map(hold, range(n_parts)))


def make_model(**changes: object) -> Reformer:
    sizes = {"vocab_size": VOCAB, "max_seq_len": 84, "axial_shape": [12, 7], "n_heads": N_HEADS}
    return small_model(**{**sizes, "attn_pattern": ["lsh", "local", "dense"], **changes})


def make_batch(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, n_tokens), generator=generator)
    labels[:, ::5] = -100
    labels[:, : n_tokens // 4] = -100  # of four parts the first has nothing to predict
    return tokens, labels, torch.randint(1, 4, (BATCH, n_tokens), generator=generator).sort().values


def share(x: Tensor, part: SequencePart) -> Tensor:
    return x.chunk(part.n_parts, dim=1)[part.index]


def whole_run(model: Reformer, n_tokens: int) -> dict[str, Tensor]:
    tokens, labels, segments = make_batch(n_tokens)
    loss = model(tokens, labels, segment_ids=segments, step=STEP, sample_ids=SAMPLE_IDS)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def run_in_parts(model: Reformer, n_tokens: int, n_parts: int) -> dict[str, Tensor]:
    """Losses and gradients of all parts, each weighted with its number of labels, added up."""
    tokens, labels, segments = make_batch(n_tokens)
    copies = [deepcopy(model) for _ in range(n_parts)]

    def work(part: SequencePart) -> dict[str, Tensor]:
        own = copies[part.index]
        inputs, targets, segment_ids = (share(x, part) for x in (tokens, labels, segments))
        loss = own(inputs, targets, segment_ids=segment_ids, step=STEP, sample_ids=SAMPLE_IDS, part=part)
        loss = loss * (targets != -100).sum() / (labels != -100).sum()
        loss.backward()
        return {"loss": loss.detach(), **gradients(own)}

    found = held(n_parts, work)
    return {name: torch.stack([each[name] for each in found]).sum(dim=0) for name in found[0]}


@pytest.mark.parametrize("n_tokens", [4, 44, 84])
@pytest.mark.parametrize("n_parts", [2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_compute_what_the_whole_does(n_tokens: int, n_parts: int, dropout: float, tied: bool) -> None:
    model = make_model(dropout=dropout, attn_dropout=dropout, tie_embeddings=tied)
    assert_parity(run_in_parts(model, n_tokens, n_parts), whole_run(model, n_tokens), 1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_pattern": ["lsh"], "causal": False, "n_hashes": 3},
        {"attn_pattern": ["lsh", "local"], "causal": False, "attn_dropout": 0.2},
        {"attn_pattern": ["lsh"], "n_buckets": [2, 4], "duplicate_correction": True},
        {"attn_pattern": ["lsh"], "attend_across_buckets": False},
        {"attn_pattern": ["local", "lsh"], "n_layers": 1},
        {"attn_pattern": ["lsh"], "keep_ends": False, "dropout": 0.1},
        {"attn_pattern": ["lsh"], "ff_chunk_tokens": 5, "loss_chunk_tokens": 3},
    ],
    ids=str,
)
def test_in_every_mode(changes: dict[str, object]) -> None:
    model = make_model(**changes)
    assert_parity(run_in_parts(model, 44, 2), whole_run(model, 44), 1e-11)


@pytest.mark.parametrize(("n_parts", "at_once", "own"), [(2, 1, 1), (2, 2, 1), (2, 3, 2), (4, 1, 1), (4, 4, 1)])
def test_by_groups_of_heads(monkeypatch: pytest.MonkeyPatch, n_parts: int, at_once: int, own: int) -> None:
    """Of four heads: where there is room for one or three at once it is two or four, as many for every holder."""
    model = make_model(dropout=0.1, attn_dropout=0.1)
    expected = whole_run(model, 44)
    d_head = 16 // N_HEADS
    monkeypatch.setattr(attention, "GROUP_NUMBERS", at_once * BATCH * 44 * d_head)
    with counted(model) as seen:
        assert_parity(run_in_parts(model, 44, n_parts), expected, 1e-11)
    assert set(seen) == {(own, 44)}
    n_groups = N_HEADS // n_parts // own
    assert len(seen) == n_parts * n_groups * (3 + 2)  # the last block's attention is not computed again


def test_blocks_one_after_the_other_by_plain_autograd() -> None:
    """As the reference of other tests has it: gradients go back through the exchange."""
    model, (tokens, labels, segments) = make_model(), make_batch(44)
    copies = [deepcopy(model) for _ in range(2)]

    def work(part: SequencePart) -> dict[str, Tensor]:
        own, targets = copies[part.index], share(labels, part)
        y1 = y2 = own.embedding(share(tokens, part), part.start(22))
        for block in own.blocks:
            y1, y2, _ = block(y1, y2, Call(0, STEP, SAMPLE_IDS, segment_ids_BT=segments, part=part))
        logits = own.head(y1, y2).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / (labels != -100).sum()
        loss.backward()
        return {"loss": loss.detach(), **gradients(own)}

    found = held(2, work)
    joined = {name: torch.stack([each[name] for each in found]).sum(dim=0) for name in found[0]}
    assert_parity(joined, whole_run(model, 44), 1e-9)


def test_losses_and_logits_without_gradients() -> None:
    model, (tokens, labels, segments) = make_model().eval(), make_batch(44)

    @torch.no_grad()
    def results(part: SequencePart, *inputs: Tensor) -> dict[str, Tensor]:
        own_tokens, own_labels, own_segments = inputs
        options = {"segment_ids": own_segments, "n_hashes": 3, "part": part}
        return {
            "logits": model(own_tokens, **options),
            "losses": model(own_tokens, own_labels, per_token=True, **options),
        }

    found = held(2, lambda part: results(part, *(share(x, part) for x in (tokens, labels, segments))))
    joined = {name: torch.cat([each[name] for each in found], dim=1) for name in found[0]}
    assert_parity(joined, results(WHOLE, tokens, labels, segments), 1e-12)


def test_diagnostics_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, _, segments) = make_model(attn_pattern=["lsh", "local"]).eval(), make_batch(44)
    with torch.no_grad(), observed(model) as expected:
        model(tokens, segment_ids=segments)
        model(tokens.flip(1))  # changes nothing
    assert len(expected) == 6  # of two layers
    for numbers in (attention.GROUP_NUMBERS, 1):
        monkeypatch.setattr(attention, "GROUP_NUMBERS", numbers)
        copies = [deepcopy(model) for _ in range(2)]

        @torch.no_grad()
        def watched(part: SequencePart, copies: list[Reformer] = copies) -> dict[str, float]:
            with observed(copies[part.index]) as found:
                copies[part.index](share(tokens, part), segment_ids=share(segments, part), part=part)
            return found

        assert of_all_heads(held(2, watched)) == pytest.approx(expected, rel=1e-12)


def test_without_the_attention_of_lsh_layers() -> None:
    model, (tokens, _, _) = make_model().eval(), make_batch(44)
    with torch.no_grad(), ablated(model):
        expected = model(tokens)
        found = held(2, torch.no_grad()(lambda part: model(share(tokens, part), part=part)))
    assert_parity({"logits": torch.cat(found, dim=1)}, {"logits": expected}, 1e-12)


@pytest.mark.parametrize(("n_tokens", "n_parts"), [(3, 3), (48, 4), (51, 3), (33, 11), (40, 20)])
def test_a_part_drops_what_the_whole_does(n_tokens: int, n_parts: int) -> None:
    """Blocks of masks begin and end elsewhere than parts do; and no two of them are alike."""
    like = torch.empty(2, n_tokens, 6)
    whole = Call(1, 2, (3, 4), dropout=0.4).kept(like, 0, "attention")
    parts = [
        Call(1, 2, (3, 4), dropout=0.4, part=SequencePart(i, n_parts, torch.clone)).kept(
            like[:, : n_tokens // n_parts], 0, "attention"
        )
        for i in range(n_parts)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    if n_tokens > 16:
        blocks = whole.split(-(-n_tokens // 16), dim=1)
        assert not any(torch.equal(a, b) for a, b in pairwise(blocks) if a.shape == b.shape)


def test_a_part_draws_no_masks_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rand, drawn = torch.rand, []

    def recording(*size: int, **options: Any) -> Tensor:
        drawn.append(size[0])
        return rand(*size, **options)

    monkeypatch.setattr(torch, "rand", recording)
    for n_parts in (1, 4):
        for index in range(n_parts):
            part = SequencePart(index, n_parts, torch.clone)
            Call(1, 2, (3,), dropout=0.4, part=part).kept(torch.empty(1, 64 // n_parts, 6), 0, "attention")
            assert sum(drawn) == 64 // n_parts
            drawn.clear()


@contextmanager
def counted(model: Reformer) -> Iterator[list[tuple[int, int]]]:
    """Heads and tokens of each call of an inner attention."""
    seen: list[tuple[int, int]] = []
    for block in model.blocks:
        inner = block.attention.inner

        def recording(q: Tensor, *others: Tensor, _inner=inner, **options: object) -> object:
            seen.append((q.shape[1], q.shape[2]))
            return _inner(q, *others, **options)

        block.attention.inner = recording
    yield seen


def test_each_holder_attends_with_its_share_of_the_heads_to_everything() -> None:
    copies, (tokens, labels, _) = [make_model() for _ in range(2)], make_batch(44)

    def work(part: SequencePart) -> list[tuple[int, int]]:
        with counted(copies[part.index]) as seen:
            copies[part.index](share(tokens, part), share(labels, part), part=part).backward()
        return seen

    for seen in held(2, work):
        assert seen == [(N_HEADS // 2, 44)] * (3 + 2)  # the last block's attention is not computed again


def test_what_moves_is_what_the_exchange_needs() -> None:
    """Forward of an LSH layer: queries (which are the keys), values and output, half of each to the other holder."""
    copies, (tokens, _, _) = (
        [make_model(attn_pattern=["lsh"], n_layers=1, n_hashes=8) for _ in range(2)],
        make_batch(44),
    )

    @torch.no_grad()
    def work(part: SequencePart) -> int:
        moved = 0

        def counting(x: Tensor) -> Tensor:
            nonlocal moved
            moved += x[0].numel()
            return part.all_to_all(x)

        copies[part.index](share(tokens, part), part=SequencePart(part.index, part.n_parts, counting))
        return moved

    assert held(2, work) == [3 * BATCH * 22 * 16 // 2] * 2


def test_parts_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 parts needs .* \(n_heads=4\): choose another number of parts"):
        make_model()(torch.zeros(1, 4, dtype=torch.long), part=SequencePart(0, 3, torch.clone))


def test_a_part_past_the_table_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="the sequence has 88 tokens but the position table covers 12 x 7 = 84"):
        make_model()(torch.zeros(1, 44, dtype=torch.long), part=SequencePart(1, 2, torch.clone))


def test_a_penalty_on_gradients_through_an_exchange_is_refused() -> None:
    """Whoever exchanges does so past autograd: second derivatives would be left out without a word."""
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    (out,) = SequencePart(0, 2, lambda sent: sent).to_heads([x])
    with pytest.raises(RuntimeError, match=r"second derivatives .* not available through an exchange"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
