"""The one place where a model meets DeepSpeed: build the engine, run a micro-batch, take a step.

The loss is scaled so that every update is that of the mean over all tokens of the global batch, on any number of ranks,
with any accumulation, under ZeRO 0 to 3, whichever rank got the rows, or the parts of them, with more to predict.
"""

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from reformer import Reformer
from trainer.batches import Batch
from trainer.config import RunConfig
from trainer.deepspeed_settings import as_data_parallel


def build_engine(config: RunConfig, deepspeed_config: Mapping[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with its optimizer."""
    _calm_deepspeed()
    # Not under deepspeed.zero.Init, even for ZeRO-3: it takes the parameters of each submodule away before the module
    # around it can initialise them, and the weights would not be those that the same seed gives under ZeRO 0 to 2.
    torch.manual_seed(config.run.seed)
    model = Reformer(config.model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        config=_with_plain_linear(as_data_parallel(deepspeed_config, config.run.sequence_parallel)),
    )
    if engine.bfloat16_enabled() and not engine.zero_optimization():
        # In this mode DeepSpeed takes a step on zero gradients at start-up: undo its weight decay and its count.
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def _with_plain_linear(deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration in which ZeRO-3 leaves torch.nn.functional.linear alone unless it says otherwise.

    DeepSpeed's own, which it puts in place for the whole process, rounds a product before it adds the bias: in bf16
    the same weights would give another loss than under ZeRO 0 to 2, and tokens would move to other buckets.
    """
    config = deepcopy(dict(deepspeed_config))
    config["zero_optimization"] = {"memory_efficient_linear": False, **config.get("zero_optimization", {})}
    return config


def _calm_deepspeed() -> None:
    """Keep it from compiling and from repeating what concerns its authors."""
    if get_accelerator().device_name() == "cpu":
        # On a CPU it would compile a C++ extension, for a minute, that only its inference makes use of.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Of the next update; it follows from the step's number alone (schedule.py), so no state has to be kept."""
    groups = engine.optimizer.param_groups
    # Where ZeRO-3 has a part of the optimizer on the CPU, the rest has groups of its own.
    if rest := getattr(engine.optimizer, "backup_optimizer", None):
        groups = groups + rest.param_groups
    for group in groups:
        group["lr"] = lr


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices take the optimizer's weight decay; biases, norms, embeddings and positions take none."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and "embedding" not in name and "position" not in name].append(parameter)
    decayed = {"params": groups[True]}
    plain = {"params": groups[False], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def forward(engine: deepspeed.DeepSpeedEngine, batch: Batch, step: int) -> torch.Tensor:
    """The mean loss of a micro-batch in nats; `step` seeds its hash rotations and dropout."""
    return engine(
        batch.tokens,
        batch.labels,
        segment_ids=batch.segment_ids,
        step=step,
        sample_ids=batch.sample_ids,
        part=batch.part,
    )


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor, n_tokens: int, global_tokens: float) -> None:
    """Add a micro-batch's part of the gradient of the mean loss over `global_tokens` tokens.

    DeepSpeed divides by the accumulation steps here and averages over ranks later; both are undone beforehand.
    """
    undo = engine.gradient_accumulation_steps() * engine.world_size
    # A loss that is not finite can have a gradient that is. Made NaN, that reaches the norm, by which all ranks skip.
    finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
    engine.backward(loss * (n_tokens * undo / max(global_tokens, 1.0)) * finite)


@dataclass(frozen=True)
class StepResult:
    """What became of a step; the same on all ranks."""

    norm: float
    """Of the gradient, before clipping."""
    skipped: bool
    """Whether the loss or the norm was not finite: then no weight, no moment and no count of the optimizer changed, the
    gradient is gone, and the norm is inf or NaN, whatever it was."""


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> StepResult | None:
    """Count a micro-batch; after the last one of a step, update the weights, unless it is to be skipped."""
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if engine.optimizer is engine.basic_optimizer:
        return _plain_step(engine)
    engine.step()
    skipped = not engine.was_step_applied()
    if skipped and isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        # Of ZeRO 1 and 2. On the CPU, DeepSpeed 0.19.8's keeps the gradients of bf16 weights, and adds the next ones to
        # what is not finite: it would skip every step from then on.
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None
    return StepResult(float(engine.get_global_grad_norm()), skipped)


def _plain_step(engine: deepspeed.DeepSpeedEngine) -> StepResult:
    """Without ZeRO and in fp32: torch's own optimizer steps, and no one keeps the norm or skips anything."""
    norm = float(_gradient_norm(engine.module))  # the gradients are whole here
    if math.isfinite(norm):
        engine.step()
        return StepResult(norm, skipped=False)
    # An optimizer leaves parameters without gradients alone. DeepSpeed's clipping, before it, fails without any.
    hook = engine.optimizer.register_step_pre_hook(lambda *_: engine.zero_grad())
    engine.step()
    hook.remove()
    return StepResult(norm, skipped=True)


def _gradient_norm(model: nn.Module) -> torch.Tensor:
    """In float64: torch's own, in fp32, was off by up to 1e-4 at three million parameters (measured)."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
