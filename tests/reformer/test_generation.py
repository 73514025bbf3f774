"""Continuations: which token is chosen, from what, and that nothing but logits, seed and place decides it."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from reformer import Reformer, ReformerConfig
from reformer.generation import INTEGERS, choose, continue_tokens

CONFIG = ReformerConfig(vocab_size=11, max_seq_len=24, d_model=12, n_layers=2, n_heads=2, lsh_chunk_len=4)
LOGITS = torch.tensor([0.2, 0.1, 0.4, 0.3]).log()


@pytest.fixture
def model() -> Reformer:
    torch.manual_seed(0)
    return Reformer(CONFIG).eval()


def test_each_token_is_of_the_model_s_logits_for_all_before_it(model: Reformer) -> None:
    tokens = torch.tensor([3, 1, 4])
    found = continue_tokens(model, CONFIG, tokens, 9, temperature=0)
    assert found.dtype == torch.int64 and len(found) == 9
    whole = torch.cat([tokens, found])
    for place in range(3, 12):
        with torch.no_grad():
            assert whole[place] == model(whole[None, :place])[0, -1].argmax()


def test_a_text_is_the_same_in_two_goes_and_by_another_window(model: Reformer) -> None:
    tokens, options = torch.tensor([3, 1, 4]), {"temperature": 3.0, "top_p": 0.9, "seed": 7}
    state = torch.get_rng_state()
    whole = continue_tokens(model, CONFIG, tokens, 12, **options)
    first = continue_tokens(model, CONFIG, tokens, 5, **options)
    rest = continue_tokens(model, CONFIG, torch.cat([tokens, first]), 7, **options)
    assert torch.equal(whole, torch.cat([first, rest]))
    assert torch.equal(whole, continue_tokens(lambda x: model(x)[:, -1:], CONFIG, tokens, 12, **options))
    assert not torch.equal(whole, continue_tokens(model, CONFIG, tokens, 12, **{**options, "seed": 8}))
    assert len(whole.unique()) > 3
    assert torch.equal(torch.get_rng_state(), state)


def test_several_sequences_are_continued_as_each_alone(model: Reformer) -> None:
    tokens, options = torch.tensor([[3, 1, 4], [3, 1, 4], [0, 10, 2]]), {"temperature": 3.0, "top_p": 0.9}
    found = continue_tokens(model, CONFIG, tokens, 12, seed=[7, 8, 7], **options)
    for row, seed in enumerate((7, 8, 7)):
        assert torch.equal(found[row], continue_tokens(model, CONFIG, tokens[row], 12, seed=seed, **options))
    assert len({tuple(row) for row in found.tolist()}) == 3
    assert continue_tokens(model, CONFIG, tokens, 0, seed=[7, 8, 7]).shape == (3, 0)
    for seed in (7, np.int64(7), torch.tensor(7)):
        assert continue_tokens(model, CONFIG, tokens[:1], 12, seed=seed, **options).tolist() == found[:1].tolist()


def test_passes_are_as_many_as_tokens(model: Reformer) -> None:
    lengths: list[int] = []

    def forward(tokens: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        lengths.append(tokens.shape[1])
        return model(tokens)

    continue_tokens(forward, CONFIG, torch.tensor([1, 2]), 22)
    assert lengths == list(range(2, 24))
    assert continue_tokens(forward, CONFIG, torch.tensor([1, 2]), 0).shape == (0,)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_any_integer_type(model: Reformer, dtype: torch.dtype) -> None:
    """A tokenizer's are uint16 or uint32."""
    tokens = torch.tensor([3, 1, 4])
    found = continue_tokens(model, CONFIG, tokens.to(dtype), 5)
    assert found.dtype == torch.int64 and torch.equal(found, continue_tokens(model, CONFIG, tokens, 5))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.2, 0.1, 0.4, 0.3]),
        (0.5, 1.0, [4 / 30, 1 / 30, 16 / 30, 9 / 30]),
        (1.0, 0.85, [2 / 9, 0, 4 / 9, 3 / 9]),  # 0.4 + 0.3 are too few
        (1.0, 0.5, [0, 0, 4 / 7, 3 / 7]),
        (1.0, 0.1, [0, 0, 1, 0]),
        (0.0, 1.0, [0, 0, 1, 0]),
    ],
)
def test_shares_of_the_draws(temperature: float, top_p: float, expected: list[float]) -> None:
    n = 4000
    counts = Counter(choose(LOGITS, seed, temperature, top_p) for seed in range(n))
    shares = [counts[token] / n for token in range(4)]
    assert shares == pytest.approx(expected, abs=0.025)  # three standard deviations
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.full((5000,), -torch.inf, dtype=torch.bfloat16)
    logits[[17, 4999]] = 0.0
    assert {choose(logits, seed, 1.0, 1.0) for seed in range(50)} == {17, 4999}


def test_a_token_that_reaches_top_p_exactly_is_the_last_that_is_drawn() -> None:
    assert {choose(torch.zeros(4), seed, 1.0, 0.5) for seed in range(50)} == {0, 1}


def test_logits_that_are_no_numbers_give_no_token() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match=r"not numbers \(NaN\): its weights are damaged, or have diverged"):
            choose(torch.tensor([0.0, torch.nan]), 0, temperature, 0.9)
        assert choose(torch.tensor([-torch.inf, 0.0]), 0, temperature, 0.9) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": CONFIG.model_copy(update={"causal": False})}, "causal=False saw the following tokens"),
        ({"tokens": torch.zeros(0, dtype=torch.int64)}, "give at least one, such as BOS"),
        ({"tokens": torch.tensor([1.0])}, r"the tokens are torch.float32 \[1\], expected integers"),
        ({"tokens": torch.tensor([True])}, r"the tokens are torch.bool \[1\], expected integers"),
        ({"tokens": torch.tensor([[[1]]])}, r"torch.int64 \[1, 1, 1\], expected integers \[T\], or \[B, T\] of"),
        ({"tokens": torch.ones(2, 0).long(), "seed": [0, 1]}, "give at least one, such as BOS"),
        ({"tokens": torch.ones(2, 1).long()}, r"1 seeds for 2 sequences: give seed=\[…\] with one for each"),
        ({"seed": [0, 1]}, "2 seeds for 1 sequences"),
        ({"tokens": torch.ones(2, 23).long(), "seed": [0, 1]}, "23 tokens and 2 more are beyond max_seq_len=24: add"),
        ({"tokens": torch.tensor([4, 11])}, "the tokens are from 4 to 11, expected ids from 0 to 10 .vocab_size=11"),
        ({"tokens": torch.tensor([4, -1])}, "the tokens are from -1 to 4, expected ids from 0 to 10"),
        ({"tokens": torch.tensor([4, 300]).to(torch.uint16)}, "the tokens are from 4 to 300"),
        ({"n_tokens": 24}, "1 tokens and 24 more are beyond max_seq_len=24: add at most 23"),
        ({"tokens": torch.ones(24).long()}, "24 tokens and 2 more are beyond max_seq_len=24: give at most 22"),
        ({"tokens": torch.ones(25).long()}, "25 tokens and 2 more are beyond max_seq_len=24: give at most 22"),
        ({"tokens": torch.ones(25).long(), "n_tokens": 24}, "max_seq_len=24: give and add fewer"),
        ({"n_tokens": -1}, "n_tokens=-1 must be at least 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_continued(changes: dict[str, object], message: str) -> None:
    def forward(tokens: Tensor) -> Tensor:
        raise AssertionError("before anything is computed")

    options = {"config": CONFIG, "tokens": torch.tensor([1]), "n_tokens": 2, **changes}
    with pytest.raises(ValueError, match=message):
        continue_tokens(forward, **options)


@pytest.mark.parametrize("temperature", [1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    assert choose(torch.tensor([300.0, 100.0, 500.0, 0.0, -500.0]), 0, temperature, 0.9) == 2
