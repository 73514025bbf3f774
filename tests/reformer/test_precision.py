"""What reversibility does in lower precision: bounds of the numbers that `python -m reformer.precision` prints."""

import pytest
import torch
from parity import assert_parity, gradients
from torch import Tensor

import reformer.precision
from reformer import Reformer, ReformerConfig
from reformer.call import Call
from reformer.diagnostics import by_blocks, invert
from reformer.precision import NUMERICS, Numerics, StackErrors, stack_errors
from reformer.reversible import reversible_stack

SMALL = ReformerConfig(vocab_size=64, max_seq_len=300, d_model=32, n_heads=2, n_hashes=2, ff_chunk_tokens=128)
SMOOTH = SMALL.model_copy(update={"activation": "gelu"})
"""A single activation on the other side of relu's kink would count as much as all rounding."""


BOUNDS = {
    "fp32": (1e-4, 3e-6),
    "autocast bf16": (0.8, 3e-2),
    "bf16 weights": (1e-5, 2e-2),
    "fp16 weights": (1e-5, 3e-3),
    "bf16 weights and streams": (3.0, 6e-2),
}
"""Of inputs and gradients at 6 layers: about four times what was seen (2e-5, 7e-7; 0.2, 8e-3; 0, 5e-3; 4e-7, 7e-4;
0.6, 1e-2). Updates in half precision are added to streams in fp32 almost always without any rounding."""


def test_bounds_cover_all_numerics() -> None:
    assert BOUNDS.keys() == NUMERICS.keys()


@pytest.mark.parametrize("name", NUMERICS)
def test_errors_of_a_stack_are_bounded(name: str) -> None:
    errors = stack_errors(NUMERICS[name], 6, SMOOTH)
    print(f"{name}: {errors}")
    of_inputs, of_gradients = BOUNDS[name]
    assert errors.inputs <= of_inputs and errors.gradients <= of_gradients
    if NUMERICS[name].streams == torch.float32:  # reversibility costs about as much as the dtype itself, or less
        assert errors.gradients <= 3 * errors.rounding


@pytest.mark.parametrize(("activation", "most"), [("relu", 0.05), ("gelu", 2e-5)])
def test_single_gradients_are_off_by_a_little_with_relu_alone(activation: str, most: float) -> None:
    """Of each tensor the largest difference from plain autograd by its largest element: docs/training.md."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = Reformer(SMALL.model_copy(update={"n_layers": 6, "activation": activation})).float()
        tokens = torch.randint(64, (1, 300))
        x = model.embedding(tokens).detach()
        found = []
        for streams in (
            reversible_stack(model.blocks, x, x, Call(0)),
            by_blocks(model, x, Call(0))[0],
        ):
            sum(y.square().sum() for y in streams).backward()
            found.append(gradients(model.blocks))
        assert_parity(*found, most)


def test_streams_in_bf16_are_what_cannot_be_reconstructed() -> None:
    wide, narrow = (stack_errors(NUMERICS[f"bf16 weights{name}"], 6, SMOOTH) for name in ("", " and streams"))
    assert narrow.inputs > 0.1 > 1000 * wide.inputs


def test_float64_is_exact() -> None:
    errors = stack_errors(Numerics(torch.float64, streams=torch.float64), 6, SMALL)
    assert errors.inputs < 1e-13 and errors.gradients < 1e-14


def test_a_wrong_inverse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(block, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = invert(block, *inputs)
        x1[0, 7, 3] += 0.5 if block.layer == 0 else 0.0
        return x1, x2

    monkeypatch.setattr("reformer.diagnostics.invert", shifted)
    assert 0.5 < stack_errors(NUMERICS["fp32"], 2, SMALL).inputs < 5


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = reformer.precision.reversible_stack

    def scaled(*inputs: object) -> tuple[Tensor, Tensor]:
        y1, y2 = stack(*inputs)
        return 1.1 * y1, 1.1 * y2

    monkeypatch.setattr(reformer.precision, "reversible_stack", scaled)
    assert stack_errors(NUMERICS["fp32"], 2, SMALL).gradients == pytest.approx(0.1, rel=1e-3)


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    stack_errors(NUMERICS["fp32"], 1, SMALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each mode and dtype, and for each numerics and depth."""
    monkeypatch.setattr(reformer.precision, "stack_errors", lambda *_: StackErrors(1e-5, 2e-6, 3e-7))
    monkeypatch.setattr(reformer.precision, "MODES", {"local causal": reformer.precision.MODES["local causal"]})
    reformer.precision.main()
    modes, stack = capsys.readouterr().out.strip().split("\n\n")
    assert len(modes.splitlines()) == 1 + 3
    rows = [line.split()[-4:] for line in stack.splitlines()]
    assert rows[0] == ["layers", "inputs", "gradients", "rounding"]
    assert rows[1:] == [[depth, "1.0e-05", "2.0e-06", "3.0e-07"] for _ in NUMERICS for depth in ("2", "6", "12", "24")]
