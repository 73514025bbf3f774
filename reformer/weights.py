"""A model in a folder: its configuration in `config.json`, its weights in `model.safetensors`.

The folder is all that is needed to use the model, with torch and safetensors. Nothing is unpickled, a folder appears
when it is complete, and one that does not hold just the tensors of its configuration is refused.

    config.json          {"format": "longhand-reformer", "version": 1, "model": the fields of ReformerConfig}
    model.safetensors    the parameters by name; the matrix of tied embeddings once, as embedding.tokens.weight

Other files may lie beside them, such as the tokenizer that launch/export.py adds: they are not read here.
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reformer.config import ConfigError, ReformerConfig
from reformer.model import Reformer

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT = {"format": "longhand-reformer", "version": 1}
EMBEDDING, HEAD = "embedding.tokens.weight", "head.weight"
"""What is one matrix in a model with tied embeddings."""
OF_A_RUN = ("checkpoints", "run.json", "SHA256SUMS")
"""What tells a folder of the trainer's, of a run or of a checkpoint (trainer/run_files.py, trainer/checkpoint.py)."""


def save_model(
    folder: str | Path, config: ReformerConfig, weights: Mapping[str, Tensor], others: Mapping[str, bytes] | None = None
) -> None:
    """Write a folder that `load_model` reads: a configuration, and parameters by name, as in model.state_dict().

    others: more files to put beside these, their contents by name.

    Raises:
        ConfigError: a parameter is missing, unknown or of another shape, as those that ZeRO-3 has partitioned are; or
            shares its memory with another, which a folder cannot say.
        FileExistsError: there is something in the folder already.
    """
    way_out = "give all parameters of a Reformer, whole, by the names that its state_dict() has"
    own = _checked(config, weights, "the weights do not fit the configuration", way_out)
    refuse_shared(own)
    write_folder(Path(folder), {**FORMAT, "model": config.model_dump(mode="json")}, own, others)


def load_model(folder: str | Path) -> Reformer:
    """The model in a folder that `save_model` wrote, on the CPU in the file's dtypes.

    It is in evaluation mode, without dropout; `.train()` brings that back, to train it further.

    Raises ConfigError where a file is missing or damaged, or does not fit the other.
    """
    folder = Path(folder)
    return assemble(
        _own_config(folder),
        read_tensors(folder, "copy the whole folder again"),
        f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}",
        "copy both files of the same folder, or take the code that they were written with",
    ).eval()


def assemble(
    config: ReformerConfig,
    weights: Mapping[str, Tensor],
    complaint: str = "the weights do not fit the configuration",
    way_out: str = "give those of a model of this configuration",
) -> Reformer:
    """A model of copies of these parameters, by name, in training mode, as a new one is.

    Raises ConfigError where they are not those of the configuration.

    complaint, way_out: what the error begins with.
    """
    # Copies: a tensor may be a view of a file, which someone may overwrite.
    state = {name: tensor.clone() for name, tensor in _checked(config, weights, complaint, way_out).items()}
    model = skeleton(config)
    if config.tie_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.tokens.weight
    return model


def _checked(
    config: ReformerConfig, weights: Mapping[str, Tensor], complaint: str, way_out: str
) -> Mapping[str, Tensor]:
    """The weights, those of tied embeddings once. Raises ConfigError where they are not those of the configuration."""
    own = dict(weights)
    is_there_twice = config.tie_embeddings and {HEAD, EMBEDDING} <= own.keys()
    if is_there_twice and not torch.equal(own.pop(HEAD), own[EMBEDDING]):
        raise ConfigError(f"{complaint}: {way_out}\n  tie_embeddings=True, but {HEAD} is not {EMBEDDING}")
    check_tensors(own, dict(skeleton(config).named_parameters()), complaint, way_out)
    return own


def skeleton(config: ReformerConfig) -> Reformer:
    """A model of this configuration without memory or random numbers behind it."""
    with torch.device("meta"):
        return Reformer(config)


def check_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str, way_out: str) -> None:
    """ConfigError for each tensor that is missing, unexpected, of another shape or no floating-point number."""
    problems = [f"{name} is missing" for name in expected if name not in actual]
    problems += [f"{name} is {_stranger(name)}" for name in actual if name not in expected]
    for name in actual.keys() & expected.keys():
        if actual[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(actual[name].shape)}, expected {list(expected[name].shape)}")
        elif hasattr(actual[name], "full_tensor"):
            problems.append(f"{name} is sharded, expected the whole: get_model_state_dict() with full_state_dict=True")
        elif not actual[name].is_floating_point():
            problems.append(f"{name} is {actual[name].dtype}, expected floating-point numbers")
    if problems:
        raise ConfigError(f"{complaint}: {way_out}\n  " + "\n  ".join(sorted(problems)))


def _stranger(name: str) -> str:
    """What a tensor of this name is."""
    if ".parametrizations." in name:
        return "a parametrization's: take that off (torch.nn.utils.parametrize.remove_parametrizations), as of LoRA"
    return "not part of such a model"


def refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    """ConfigError where one's memory is another's: read again, they would be two, and trained apart."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(tensor.data_ptr(), name) if tensor.data_ptr() else name
        if other != name:
            raise ConfigError(
                f"{name} and {other} share their memory, which no folder of weights can say: give copies "
                "(tensor.clone()), which compute the same, but are two parameters to whoever trains them further"
            )


def refuse_existing(folder: Path) -> None:
    """Raise a FileExistsError where there is something already."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: remove it, or give another name")


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], others: Mapping[str, bytes] | None = None
) -> None:
    """Both files of a folder and `others`, contents by name; it appears when complete. FileExistsError as above.

    A process that is killed meanwhile leaves a folder `.NAME.….partial` behind, which may be removed.
    """
    # No rename puts a folder in a link's place.
    folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder.absolute()
    refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")  # two may write at once: the first wins
    partial.mkdir(parents=True)
    try:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # which is no OSError
            raise OSError(f"cannot write the weights of {folder}: {error}") from None
        shutil.copymode(
            partial / CONFIG_FILE, partial / WEIGHTS_FILE
        )  # safetensors gives no one else the right to read
        for name, content in (others or {}).items():
            (partial / name).write_bytes(content)
        refuse_existing(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `config.json`, ours or Hugging Face's. Raises ConfigError where there is none."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError:
        files = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        raise ConfigError(f"{folder} is not a folder: give the folder that {files} are in") from None
    except FileNotFoundError:
        if any((folder / name).exists() for name in OF_A_RUN):
            raise ConfigError(export_first(folder, str(folder))) from None
        wrote = "launch/export.py, save_model, save_hf or Hugging Face's save_pretrained"
        raise ConfigError(f"{path} is missing: give a folder that {wrote} wrote") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): copy the folder again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold an object with the model's settings, got {type(values).__name__}")
    return values


def export_first(folder: Path, name: str) -> str:
    """What is said of a run's folder, or a checkpoint's, in the place of a model's.

    name: what the folder is called.
    """
    return (
        f"{name} is a run or a checkpoint of one: export its model first, python launch/export.py {folder} "
        "--output exported, and give that folder"
    )


def is_hf(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of Hugging Face's Reformer."""
    return config.get("model_type") == "reformer"


def read_tensors(folder: Path, if_missing: str) -> dict[str, Tensor]:
    """What `model.safetensors` holds, as views of the file. Raises ConfigError where it is missing or damaged.

    if_missing: what to do then.
    """
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: {if_missing}") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged ({error}): copy it again") from None


def _own_config(folder: Path) -> ReformerConfig:
    path, values = folder / CONFIG_FILE, read_config(folder)
    if is_hf(values):
        raise ConfigError(f"{path} is of Hugging Face's Reformer: read the folder with reformer.hf.load_hf")
    if {key: values.get(key) for key in FORMAT} != FORMAT:
        raise ConfigError(f"{path} does not say {FORMAT}: give a folder that this version's save_model wrote")
    try:
        return ReformerConfig(**values["model"])
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no configuration of this version: {error}") from None
