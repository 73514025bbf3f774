"""Which optimizer it will be, and whether its settings are ones that it takes. Functions to problems.

An optimizer's own signature and its own opinion decide, so that settings are those of the installed PyTorch; what only
DeepSpeed's versions of Adam cannot do, and where Adafactor would be another function, is added.
"""

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from reformer.config import ReformerConfig
from trainer import extensions
from trainer.check_deepspeed import nearest
from trainer.check_offload import device_of
from trainer.deepspeed_settings import table

ADAM, ADAFACTOR = ("adam", "adamw"), "Adafactor"
"""DeepSpeed takes the former in upper or lower case; the latter must be spelled as in torch.optim."""

DEEPSPEED_ADAM = {"torch_adam", "adam_w_mode"}
"""Settings that DeepSpeed adds to those of torch's AdamW."""

OWN_ADAM = {"lr", "betas", "eps", "weight_decay", "amsgrad", *DEEPSPEED_ADAM}
"""Those of torch's AdamW, and of DeepSpeed, that DeepSpeed's own Adam takes too."""


def optimizer(deepspeed: Mapping[str, Any]) -> list[str]:
    """The optimizer is one that trains here, with settings of its own, on a ZeRO stage that is sound."""
    given = table(deepspeed, "optimizer")
    kind, params = given.get("type"), table(given, "params")
    if str(kind).lower() in ADAM:
        return _settings(params, torch.optim.AdamW, DEEPSPEED_ADAM) or _adam(deepspeed)
    if kind == ADAFACTOR:
        return _settings(params, torch.optim.Adafactor, set()) or _adafactor(deepspeed)
    return [f'deepspeed.optimizer.type={kind!r}: give "AdamW", "Adam" or "Adafactor"']


def tables_of_no_width(model: ReformerConfig, deepspeed: Mapping[str, Any]) -> list[str]:
    """Adafactor divides by the number of elements of each parameter."""
    dims = model.axial_dims or ()
    if table(deepspeed, "optimizer").get("type") != ADAFACTOR or 0 not in dims:
        return []
    return [f"model.axial_dims={list(dims)}: Adafactor cannot train a table of width 0: give numbers above 0, or AdamW"]


def _settings(params: Mapping[str, Any], make: type[torch.optim.Optimizer], added: set[str]) -> list[str]:
    """Keys that the optimizer does not have, and values that it does not take."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    del defaults["params"]
    known = {*defaults, *added}
    problems = [f"deepspeed.optimizer.params.{key}: {nearest(key, known)}" for key in params if key not in known]
    if not (_is_number(params.get("lr")) and params["lr"] > 0):
        lr = f"={params['lr']!r}" if "lr" in params else ""
        problems.append(f"deepspeed.optimizer.params.lr{lr}: give the peak learning rate as a finite number above 0")
    problems = problems or [
        f"deepspeed.optimizer.params.{key}={value!r}: give a value like {json.dumps(defaults.get(key, True))}"
        for key, value in params.items()
        if not _is_like(value, defaults.get(key))
    ]
    return problems or _objections(make, {key: value for key, value in params.items() if key not in added})


def _is_like(value: Any, default: Any) -> bool:
    """Whether a setting is of the kind of its default; a default of None is that of a switch, or of a number in a pair.

    Numbers must be finite: an optimizer takes a NaN and trains nothing.
    """
    if isinstance(default, tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(default)
            and all(
                _is_number(one) or (one is None and usual is None) for one, usual in zip(value, default, strict=True)
            )
        )
    if default is None or isinstance(default, bool):
        return value is None or isinstance(value, bool)
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _objections(make: type[torch.optim.Optimizer], params: Mapping[str, Any]) -> list[str]:
    """What the optimizer itself says to its settings."""
    try:
        make([torch.zeros(1)], **params)
    except (ValueError, RuntimeError) as error:
        return [f"deepspeed.optimizer.params: {error}"]
    return []


def _adam(deepspeed: Mapping[str, Any]) -> list[str]:
    """Which Adam it will be: torch's, or one of DeepSpeed's, which it compiles on the first use."""
    given = table(deepspeed, "optimizer")
    params = table(given, "params")
    if given["type"].lower() == "adamw" and params.get("adam_w_mode") is False:
        return [
            "deepspeed.optimizer.params.adam_w_mode=False: AdamW always decays weights by themselves, and DeepSpeed "
            'would ignore this: set deepspeed.optimizer.type="Adam" for a decay that is part of the gradient, or leave '
            "it out"
        ]
    if params.get("torch_adam"):
        # Also where it is offloaded: zero_force_ds_cpu_optimizer is about an optimizer that the caller has made.
        return []
    offloaded = device_of(table(deepspeed, "zero_optimization"), "offload_optimizer") != "none"
    problems = [
        f"deepspeed.optimizer.params.{key}: DeepSpeed's own Adam does not take it; leave it out, or add torch_adam=true"
        for key in params
        if key not in OWN_ADAM
    ]
    if missing := extensions.missing_for("CPUAdamBuilder" if offloaded else "FusedAdamBuilder"):
        problems.append(
            f"deepspeed.optimizer: DeepSpeed compiles an Adam of its own, which needs {missing}: see to that, or set "
            "deepspeed.optimizer.params.torch_adam=true for PyTorch's"
        )
    return problems


def _adafactor(deepspeed: Mapping[str, Any]) -> list[str]:
    """Adafactor factors matrices; under ZeRO it would see parts of one long vector and compute something else."""
    stage = table(deepspeed, "zero_optimization").get("stage", 0)
    if stage == 0:
        return []
    return [
        f"deepspeed.optimizer.type='{ADAFACTOR}' under ZeRO stage {stage}: it takes means over the rows and columns of "
        "whole matrices, and ZeRO gives it slices that have neither: set deepspeed.zero_optimization.stage=0 "
        "(Adafactor has next to no state that ZeRO could share out), or use AdamW"
    ]
