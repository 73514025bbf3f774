"""The weights that a new run begins with, out of a folder (run.init_from), where they are not to be random.

The folder is read twice: before any process joins another, to find out whether it fits, and when the model is built.
"""

import hashlib
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reformer import Reformer, ReformerConfig
from reformer.config import MEMORY_ONLY
from reformer.positions import POSITION_STD
from reformer.weights import skeleton
from trainer.config import ConfigError
from trainer.distributed import Launch, all_gather, hosts, raise_together, together
from trainer.exported import read_model, tokenizer_notes

SAME = ("n_heads", "d_head", "activation")
"""Fields of the model that must be as they were: with others the same tensors, which may fit, mean something else."""
WITHOUT_EFFECT = ("dropout", "attn_dropout", *MEMORY_ONLY)
"""Those that may change without being remarked on: they are about training, or memory."""
ROWS = "embedding.positions.rows"
"""The only tensor that grows with max_seq_len, if axial_shape keeps its number of columns."""
TOKENS = ("embedding.tokens.weight", "head.weight", "head.bias")
"""Those that grow with vocab_size; with tied embeddings there is no second one."""


class Initial(NamedTuple):
    """What a run begins with."""

    parameters: dict[str, Tensor]
    """By name."""
    sha256: str
    """Of those in the folder: see `weights_sha256`."""


def read_initial(folder: Path, config: ReformerConfig, seed: int) -> Initial:
    """What a run of this model begins with; the folder is one that `check_initial` passes.

    Positions and tokens that the folder does not have are drawn by the seed: tokens around the mean of those that it
    has, as far from it as they are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `check_initial` has said it
        parameters = _parameters(read_model(folder, f"run.init_from={folder}"))
    sha256 = weights_sha256(parameters)
    shapes = _shapes(_parameters(skeleton(config)))
    grown = _grown(shapes, _shapes(parameters))
    if {**_shapes(parameters), **grown} != shapes:
        raise ConfigError(
            f"run.init_from={folder} is not what it was when it was checked: keep it until the first step"
        )
    generator = torch.Generator().manual_seed(seed)
    for name, shape in grown.items():
        there, drawn = parameters[name].float(), torch.randn(shape, generator=generator)
        if name == ROWS:
            drawn = drawn * POSITION_STD
        else:
            mean = there.mean(dim=0)
            drawn = mean + drawn * (there - mean).std()
        parameters[name] = torch.cat([parameters[name], drawn[len(there) :].to(parameters[name].dtype)])
    return Initial(parameters, sha256)


def agreed_weights(folder: Path, config: ReformerConfig, seed: int, launch: Launch, device: torch.device) -> Initial:
    """What `read_initial` gives, the same on all ranks, which call this.

    Raises ConfigError, on one of them, where the folder cannot be read there, or is another one than that of rank 0.
    """
    found = together(partial(read_initial, folder, config, seed), launch, device)
    beginning = float(int(found.sha256[:12], 16))  # 48 bits, which float64 holds
    (first,), *others = all_gather([beginning], device)
    different = [rank for rank, (digest,) in enumerate(others, start=1) if digest != first]
    names = hosts()
    if different:
        error = ConfigError(
            f"run.init_from={folder} holds other weights for rank {different[0]} on {names[different[0]]} than for "
            f"rank 0 on {names[0]}: have all nodes see the same folder"
        )
        raise_together(error, launch, device)
    return found


def check_initial(folder: Path, config: ReformerConfig, store: Path, tokenizer_sha256: str) -> list[str]:
    """What is to be said of a folder that a run of this model on this store begins with, a line for each.

    Raises ConfigError where its weights are not those of such a model, or its tokens not those of the store.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = read_model(folder, f"run.init_from={folder}")
    there = model.config.model_dump()
    own_kinds, kinds = (
        [each.attention_kind(layer) for layer in range(each.n_layers)] for each in (config, model.config)
    )
    changed = {
        name: f"model.{name} is {own!r}, and {there[name]!r} there"
        for name, own in config.model_dump().items()
        if own != there[name] and name not in WITHOUT_EFFECT and not (name == "attn_pattern" and own_kinds == kinds)
    }
    own_shapes, shapes = _shapes(_parameters(skeleton(config))), _shapes(_parameters(model))
    grown = _grown(own_shapes, shapes)
    if own_shapes != shapes | grown or any(there[name] != getattr(config, name) for name in SAME):
        said = "; ".join(what for name, what in changed.items() if name in SAME or _decides_shapes(name, config, there))
        raise ConfigError(
            f"run.init_from={folder} holds another model than [model]: {said}. Set [model] to that model"
            f"{_of_lengths(config, model.config)}, or give another folder"
        )
    of_tokenizer = tokenizer_notes(folder, f"run.init_from={folder}", store, tokenizer_sha256)
    notes = [f"{line} (run.init_from)" for line in changed.values()] + [str(each.message) for each in caught]
    first_new = {"positions": model.config.max_seq_len} if ROWS in grown else {}
    first_new |= {"tokens": model.config.vocab_size} if grown.keys() & {*TOKENS} else {}
    drawn = "{} from {} on are not in {}: they begin as random ones"
    return [
        *notes,
        *(drawn.format(name, first, folder) for name, first in first_new.items()),
        *of_tokenizer,
    ]


def _decides_shapes(name: str, config: ReformerConfig, there: Mapping[str, Any]) -> bool:
    """Whether a field that is another one there has a part in the shapes of this model, or in what it may be."""
    try:
        other = ReformerConfig(**{**config.model_dump(), name: there[name]})
    except ConfigError:  # such as an axial_shape that is not that of max_seq_len
        return True
    return _shapes(_parameters(skeleton(other))) != _shapes(_parameters(skeleton(config)))


def _of_lengths(config: ReformerConfig, there: ReformerConfig) -> str:
    """What is possible where max_seq_len is another one there."""
    assert there.axial_shape is not None  # filled in by the config
    columns = there.axial_shape[1]
    such_as = f": [{config.max_seq_len // columns}, {columns}]" if config.max_seq_len % columns == 0 else ""
    if config.max_seq_len > there.max_seq_len:
        return f" (longer sequences are possible with as many columns in axial_shape as there{such_as})"
    shorter = f" (rows may be shorter than max_seq_len: leave it at {there.max_seq_len})"
    return shorter if config.max_seq_len < there.max_seq_len else ""


def folder_sha256(folder: Path) -> str:
    """`weights_sha256` of a folder that run.init_from takes. Raises ConfigError where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weights_sha256(_parameters(read_model(folder, f"run.init_from={folder}")))


def _grown(own: Mapping[str, torch.Size], there: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes of those parameters that may have more rows than there, and have."""
    both = [name for name in (ROWS, *TOKENS) if name in own and name in there]
    return {name: own[name] for name in both if own[name][0] > there[name][0] and own[name][1:] == there[name][1:]}


def _parameters(model: Reformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in parameters.items()}


def weights_sha256(parameters: Mapping[str, Tensor]) -> str:
    """A hash of all numbers, in fp32, and of their names: the same whatever the files are that they are read from."""
    digest = hashlib.sha256()
    for name, tensor in parameters.items():
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()
