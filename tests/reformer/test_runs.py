"""Runs of several rounds and heads: the same attention, to rounding, as one round of one head at a time."""

from itertools import product

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from reformer import lsh_attention
from reformer.local import local_attention
from reformer.lsh import rounds
from reformer.lsh.hashing import sort_by_bucket
from reformer.lsh.rounds import Layout, Run

BATCH, HEADS, TOKENS, WIDTH, CHUNK = 2, 3, 37, 8, 8  # 5 chunks a round, the last one with padding
ROUNDS = 3


def results(
    kind: str, causal: bool, scale: float, tokens: int, n_rounds: int = ROUNDS, **options: object
) -> dict[str, Tensor]:
    """Output and gradients of LSH or local attention in float64, from inputs that are always the same."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator, dtype=torch.float64)

    inputs = [normal().requires_grad_() for _ in range(3)]
    with torch.no_grad():  # heads of very unlike queries, keys and values, lest one hides what another does to it
        inputs[0] *= scale * 10.0 ** torch.tensor([-2, 0, 1])[:, None, None]
        inputs[1] *= 10.0 ** torch.tensor([2, 1, -1])[:, None, None]
    options = {"chunk_len": CHUNK, "causal": causal, **options}
    if kind == "local":
        out = local_attention(*inputs, **options)
    else:
        buckets = torch.randint(0, 3, (BATCH, HEADS, n_rounds, tokens), generator=generator)
        inputs = [inputs[0], inputs[2]]
        out, _ = lsh_attention(*inputs, buckets, n_hashes=n_rounds, backend="chunked", **options)
    grads = torch.autograd.grad(out, inputs, normal())
    return {"out": out.detach(), **{f"d{i}": grad for i, grad in enumerate(grads)}}


def everything(tokens: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(BATCH, tokens, generator=generator) > 0.3
    seen[1] = False
    return {
        "key_padding_mask": seen,
        "segment_ids": torch.randint(0, 3, (BATCH, tokens), generator=generator).sort().values,
        "dropout": 0.3,
        "dropout_keys": torch.arange(BATCH * HEADS).view(BATCH, HEADS) * 1000,
    }


LSH_ONLY = ({}, {"attend_across_buckets": False}, {"duplicate_correction": True})
CASES = [("local", {}), *(("lsh", options) for options in LSH_ONLY)]
CASES.append(("lsh", {"attend_across_buckets": False, "duplicate_correction": True}))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("tokens", [TOKENS, 5 * CHUNK, CHUNK - 1, 1])
def test_runs_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, object], causal: bool, scale: float, tokens: int
) -> None:
    for more in ({}, everything(tokens)):
        monkeypatch.setattr(rounds, "RUN_PLACES", 1)
        alone = results(kind, causal, scale, tokens, **options, **more)
        places = -(-tokens // CHUNK) * CHUNK
        # Two of three rounds; all of one head; of two and of four heads (the last runs are smaller); all at once.
        for most in (2 * places, 3 * places, 2 * (3 * places + 2 * CHUNK), 4 * (3 * places + 2 * CHUNK), 2**13):
            monkeypatch.setattr(rounds, "RUN_PLACES", most)
            assert_parity(results(kind, causal, scale, tokens, **options, **more), alone, 1e-9)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["bounded", "unbounded"])
def test_later_runs_of_several_rounds_are_added_too(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Of five rounds two, two, and one."""
    found = []
    for most in (1, 2 * 5 * CHUNK):
        monkeypatch.setattr(rounds, "RUN_PLACES", most)
        found.append(results("lsh", True, scale, TOKENS, n_rounds=5))
    assert_parity(found[1], found[0], 1e-9)


def test_a_head_of_long_keys_next_to_one_of_long_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they have scores that neither one's bound knows of, and that overflow in fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, TOKENS, WIDTH, generator=generator) for _ in range(3))
    q *= torch.tensor([0.01, 1])[:, None, None]
    k *= torch.tensor([100, 0.01])[:, None, None]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = []
    for most in (1, 2**13):
        monkeypatch.setattr(rounds, "RUN_PLACES", most)
        out = local_attention(*inputs, chunk_len=CHUNK)
        grads = torch.autograd.grad(out.sum(), inputs)
        found.append({"out": out.detach(), **{f"d{i}": x for i, x in enumerate(grads)}})
    assert_parity(found[1], found[0], 1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["local", "lsh"])
@pytest.mark.parametrize("bad", [0, 1])
def test_numbers_that_are_none_stay_in_their_sample(kind: str, causal: bool, bad: int) -> None:
    inputs = [torch.randn(2, HEADS, TOKENS, WIDTH) for _ in range(3 if kind == "local" else 2)]
    for x in inputs:
        x[bad] = torch.inf
        x.requires_grad_()
    if kind == "local":
        out = local_attention(*inputs, chunk_len=CHUNK, causal=causal)
    else:
        out, _ = lsh_attention(*inputs, n_hashes=ROUNDS, chunk_len=CHUNK, causal=causal, backend="chunked")
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x[1 - bad].isfinite().all()


def layout(n_heads: int, n_rounds: int, tokens: int, causal: bool) -> Layout:
    buckets = torch.randint(0, 4, (n_heads, n_rounds, tokens), generator=torch.Generator().manual_seed(2))
    return Layout(*sort_by_bucket(buckets, CHUNK), CHUNK, causal, is_lsh=True)


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, (1, 1)), (79, (1, 1)), (80, (1, 2)), (159, (1, 3)), (160, (1, 4)), (336, (2, 4)), (9999, (5, 4))],
)
def test_how_much_a_run_has(monkeypatch: pytest.MonkeyPatch, most: int, expected: tuple[int, int]) -> None:
    """Five heads, four rounds of 40 places; each head has 8 more around it."""
    monkeypatch.setattr(rounds, "RUN_PLACES", most)
    assert layout(5, 4, TOKENS, causal=True).at_once == expected


@pytest.mark.parametrize("causal", [True, False])
def test_a_run_finds_every_token_where_it_stands(causal: bool) -> None:
    given = layout(4, 3, TOKENS, causal)
    for heads, of_rounds in ((slice(1, 4), slice(0, 3)), (slice(2, 3), slice(1, 3)), (slice(0, 1), slice(2, 3))):
        run = Run(given, heads, of_rounds, torch.float32)
        assert (run.n_places, run.n_key_places) == (len(run.query_rows), len(run.key_rows))
        wanted = [
            TOKENS * head + token for _, head, token in product(range(run.n_rounds), range(run.n_heads), range(TOKENS))
        ]
        assert run.query_rows[run.inverse].tolist() == wanted
        counts = run.is_padding_CL1.flatten().logical_not()
        assert sorted(run.inverse.tolist()) == counts.nonzero().flatten().tolist()
