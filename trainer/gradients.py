"""The whole gradient of each parameter, wherever ZeRO keeps its parts: for histograms of it.

It is looked at between the backward of a step's last micro-batch and the update, when it is summed over micro-batches
and ranks and nothing has been clipped. One parameter is put together at a time, so that this takes the memory of the
largest one and not of the model.
"""

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad


def gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and gradient of each parameter that has one, as the norm in engine.StepResult counts it.

    The tensors have the parameters' shapes, are not to be changed, and are right until the next is asked for. All
    ranks must go through all of them, since each is put together by all.
    """
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            yield name, gradient
