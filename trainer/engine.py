"""The one place where a model meets DeepSpeed: build the engine, run a micro-batch, take a step.

What is special: the loss is scaled so that every update is that of the mean over all tokens of the global batch, on
any number of ranks, with any accumulation, under ZeRO 0 to 3, whichever rank got the rows with more to predict.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from reformer import Reformer
from trainer.batches import Batch
from trainer.config import LoopConfig, RunConfig
from trainer.schedule import lr_factor


def build_engine(config: RunConfig, deepspeed_config: Mapping[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with its optimizer and learning rate schedule."""
    _calm_deepspeed()
    # Not under deepspeed.zero.Init, even for ZeRO-3: it takes the parameters of each submodule away before the module
    # around it can initialise them, and the weights would not be those that the same seed gives under ZeRO 0 to 2.
    torch.manual_seed(config.run.seed)
    model = Reformer(config.model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        lr_scheduler=partial(_scheduler, config.run),
        config=_with_plain_linear(deepspeed_config),
    )
    if engine.bfloat16_enabled() and not engine.zero_optimization():
        # Here DeepSpeed has already taken a step, on gradients of zero: weights decayed, Adam counted one too many.
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


def _scheduler(run: LoopConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    factor = partial(
        lr_factor,
        steps=run.steps,
        warmup_steps=run.warmup_steps,
        decay=run.decay,
        final_ratio=run.final_lr_ratio,
    )
    return LambdaLR(optimizer, factor)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices take the optimizer's weight decay; biases, norms, embeddings and positions take none."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and "embedding" not in name and "position" not in name].append(parameter)
    decayed = {"params": groups[True]}
    plain = {"params": groups[False], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def forward(engine: deepspeed.DeepSpeedEngine, batch: Batch, step: int, n_hashes: int | None = None) -> torch.Tensor:
    """The mean loss of a micro-batch in nats; `step` seeds its hash rotations and dropout.

    n_hashes: rounds of LSH attention, if not as many as configured.
    """
    return engine(
        batch.tokens,
        batch.labels,
        segment_ids=batch.segment_ids,
        step=step,
        sample_ids=batch.sample_ids,
        n_hashes=n_hashes,
    )


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor, n_tokens: int, global_tokens: float) -> None:
    """Add a micro-batch's part of the gradient of the mean loss over `global_tokens` tokens.

    DeepSpeed divides by the accumulation steps here and averages over ranks later; both are undone beforehand.
    """
    undo = engine.gradient_accumulation_steps() * engine.world_size
    engine.backward(loss * (n_tokens * undo / max(global_tokens, 1.0)))


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Count a micro-batch; after the last one of a step, update the weights and return the gradient's norm.

    The norm is that before clipping.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    # Without ZeRO and in fp32, torch's own optimizer steps and no one keeps the norm; the gradients are whole here.
    unkept = engine.optimizer is engine.basic_optimizer
    norm = _gradient_norm(engine.module) if unkept else None
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def _gradient_norm(model: nn.Module) -> torch.Tensor:
    """In float64: torch's own, in fp32, was off by up to 1e-4 at three million parameters (measured)."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
