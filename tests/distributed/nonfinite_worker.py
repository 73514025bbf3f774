"""One rank of runs with steps that are not finite, through the trainer's own functions.

    python tests/distributed/nonfinite_worker.py CASES RENDEZVOUS OUTPUT RANK

Each case is run twice: with the faults, and with those steps left out. CASES and OUTPUT are files of torch.save; a case
that fails is an error's text in OUTPUT, and the others go on.
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from matrix_worker import CPU, masters, read, weights, work_through
from torch import Tensor
from zero_matrix import ADAMW, Case, deepspeed_config, run_config

from trainer.distributed import all_sum
from trainer.engine import StepResult, backward, build_engine, forward, optimizer_step, set_learning_rate


@dataclass(frozen=True)
class Fault:
    """Something that is not finite in one micro-batch of one rank."""

    kind: str
    """"loss": it is `value`, with the gradient of before; "gradient": all of it, with the loss of before; or the name
    of a parameter: one element of its gradient."""
    value: float
    rank: int
    micro: int


FAULTS: list[Fault | None] = [
    Fault("loss", math.nan, rank=1, micro=0),  # before the optimizer has any state
    None,
    Fault("loss", math.inf, rank=0, micro=1),
    Fault("gradient", math.nan, rank=0, micro=0),
    None,
    Fault("embedding.tokens.weight", math.inf, rank=0, micro=0),
    None,
    Fault("head.projection_weight", math.nan, rank=1, micro=1),
    None,
]
"""By step. What one left behind would show in the next that is sound."""


@dataclass
class State:
    """What a step may change, on this rank."""

    weights: dict[str, Tensor]
    optimizer: list[Tensor]
    """Moments and counts, of this rank's part."""


@dataclass
class Course:
    """What became of a run."""

    states: list[State]
    """After each step."""
    results: list[StepResult | None]
    """What the trainer was told about it; None for a step that was left out."""
    masters: dict[str, Tensor]
    """The fp32 parameters at the end."""


def run(case: Case, folder: Path, with_faults: bool) -> Course:
    engine = build_engine(run_config(case), deepspeed_config(case, folder))
    try:
        states, results = [], []
        for step, fault in enumerate(FAULTS):
            results.append(train_step(engine, step, fault) if with_faults or not fault else None)
            states.append(state(engine))
        return Course(states, results, masters(engine))
    finally:
        engine.destroy()


def train_step(engine: deepspeed.DeepSpeedEngine, step: int, fault: Fault | None) -> StepResult:
    """One update as Trainer.step makes it, with a fault in one micro-batch."""
    batches = read(engine, step)
    (n_tokens,) = all_sum([sum(batch.n_tokens for batch in batches)], CPU)
    set_learning_rate(engine, ADAMW["lr"])
    result = None
    for micro, batch in enumerate(batches):
        here = fault if fault and (fault.rank, fault.micro) == (dist.get_rank(), micro) else None
        with Injected(engine.module, here) as inject:
            loss = inject(forward(engine, batch, step))
            backward(engine, loss, batch.n_tokens, n_tokens)
            result = optimizer_step(engine)
    assert result is not None
    return result


class Injected:
    """The place of a fault, for one micro-batch."""

    def __init__(self, model: torch.nn.Module, fault: Fault | None) -> None:
        self.model, self.fault, self.hook = model, fault, None

    def __enter__(self) -> "Injected":
        if self.fault and self.fault.kind not in ("loss", "gradient"):
            self.hook = self.model.get_parameter(self.fault.kind).register_hook(self.spoil)
        return self

    def __exit__(self, *_: object) -> None:
        if self.hook:
            self.hook.remove()

    def __call__(self, loss: Tensor) -> Tensor:
        if self.fault and self.fault.kind == "loss":
            return loss + self.fault.value
        if self.fault and self.fault.kind == "gradient":
            loss = loss.clone()
            loss.register_hook(lambda gradient: gradient * self.fault.value)
        return loss

    def spoil(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = self.fault.value
        return gradient


def state(engine: deepspeed.DeepSpeedEngine) -> State:
    parts = [tensor for entry in engine.basic_optimizer.state.values() for tensor in entry.values()]
    copies = [tensor.detach().clone() for tensor in parts if isinstance(tensor, Tensor)]
    return State(weights(engine), copies)


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Where the run with the faults differs from the one in which those steps are left out."""
    ours, theirs = (run(case, folder, with_faults) for with_faults in (True, False))
    return {
        "results": ours.results,
        "expected_results": theirs.results,
        "differences": [differences(*pair) for pair in zip(ours.states, theirs.states, strict=True)],
        "masters": unequal(ours.masters, theirs.masters),
        "moved": [bool(unequal(before.weights, after.weights)) for before, after in pairwise(ours.states)],
        "n_optimizer_tensors": len(ours.states[-1].optimizer),
    }


def differences(ours: State, theirs: State) -> list[str]:
    """The names of what is not equal bit for bit."""
    apart = unequal(ours.weights, theirs.weights)
    if len(ours.optimizer) != len(theirs.optimizer):
        apart.append(f"{len(ours.optimizer)} tensors of optimizer state in place of {len(theirs.optimizer)}")
    pairs = enumerate(zip(ours.optimizer, theirs.optimizer, strict=False))
    return apart + [f"optimizer state {i}" for i, (our, their) in pairs if not torch.equal(our, their)]


def unequal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def main(cases_file: str, rendezvous: str, output: str, rank: str) -> None:
    work_through(torch.load(cases_file, weights_only=False), compare, rendezvous, output, rank)


if __name__ == "__main__":
    main(*sys.argv[1:])
