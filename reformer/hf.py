"""Weights and configuration of Hugging Face's Reformer: a folder with `config.json` and `model.safetensors`.

Nothing is guessed. Every tensor and every setting that decides what the model computes has its counterpart here, and
what has none is refused by name. transformers itself is not needed, and nothing is unpickled.

`ReformerModelWithLMHead` (causal) and `ReformerForMaskedLM` (bidirectional, LSH layers only: without a causal mask,
Hugging Face's local attention sees from one end of the sequence to the other) compute what ours computes, given the
same buckets, except that

- transformers 5 does not add `lm_head.bias`, transformers 4 and the authors' code do: see `load_hf`, `save_hf`;
- their LSH keys are x / sqrt(mean(x^2) + 1e-6) where ours are exactly x / sqrt(mean(x^2)), a relative difference of
  5e-7 at elements of size 1;
- their rotations come from torch's global generator, and num_buckets=null means a power of two there, written into
  the configuration at the first sequence; ours follow from `seed` and `n_buckets=None` from each sequence's length;
- a length that is no multiple of both kinds' chunk lengths is padded further there, which moves the places at which
  hash rounds meet, and needs max_position_embeddings for the padded length;
- in a bidirectional model, one hash round of exactly two chunks has the other chunk before and behind it there, its
  keys counted twice, and once here;
- their dropout also drops embeddings, positions, inner feed-forward activations and the head's input;
- their causal loss shifts the labels itself.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer.config import ConfigError, ReformerConfig
from reformer.hf_names import ATTN_DROPOUT, CARRIED, DEFAULTS, FIELDS, KIND_TENSORS, TENSORS, tensor_names
from reformer.lsh.hashing import bucket_factors
from reformer.model import Reformer
from reformer.weights import (
    CONFIG_FILE,
    HEAD,
    WEIGHTS_FILE,
    check_tensors,
    read_config,
    read_tensors,
    refuse_shared,
    skeleton,
    write_folder,
)


def load_hf(folder: str | Path, attn_dropout: float | None = None) -> Reformer:
    """The model in a folder that Hugging Face's `save_pretrained` or our `save_hf` wrote, in the file's dtypes.

    It is in evaluation mode: `model.train()` before training it.

    attn_dropout: in place of the folder's, which must be one for both kinds of layers (transformers' defaults are two).

    A `lm_head.bias` that is not zero is taken over and warned of: the authors' code and transformers 4 add it to the
    logits, transformers 5 leaves it out.

    Raises:
        ConfigError: a file is missing or damaged, a setting or tensor has no counterpart, is missing or misshapen.
    """
    folder = Path(folder)
    config = config_from_hf(read_config(folder), attn_dropout)
    tensors = read_tensors(
        folder,
        "only one file of safetensors is read, no pickle and no shards; load the folder with transformers and save it "
        "again by save_pretrained(folder, max_shard_size='1TB')",
    )
    model = skeleton(config)
    expected = state_to_hf(model.state_dict(), config)
    way_out = "give a ReformerModelWithLMHead or ReformerForMaskedLM, saved whole, with its own config.json"
    check_tensors(tensors, expected, f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}", way_out)
    state = state_from_hf(tensors, config)
    if state["head.bias"].any():
        warnings.warn(
            f"{folder}: lm_head.bias is not zero. It is added to the logits, as by transformers 4; "
            "transformers 5 leaves it out, so that its logits differ by just this bias",
            stacklevel=2,
        )
    # Copies: what is read is a view of the file, which someone may overwrite.
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return model.eval()


def save_hf(
    model: Reformer,
    folder: str | Path,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that transformers' `from_pretrained` and our `load_hf` read. It appears when it is complete.

    Since transformers 5 ignores the bias of the head, one that is not zero is written as an equal change of the
    head's norm and weight (`fold_head_bias`), and a tied head with a matrix of its own (`untied`). All else as it is.
    Warns where max_seq_len is no multiple of the chunks: transformers pads up to one, and has no positions for that;
    and where LSH layers have n_buckets=None, a number that transformers takes from the first sequence for all others.

    bos_token_id, eos_token_id: what documents began and ended with, for transformers' `generate`; None: with nothing.
    others: more files to put beside these, their contents by name.

    Raises:
        ConfigError: the configuration has no counterpart, a parameter is not whole (partitioned by ZeRO-3), or shares
            its memory with another.
        FileExistsError: there is something in the folder already.
    """
    if not isinstance(model, Reformer):
        raise ConfigError(f"{type(model).__name__} is not a Reformer: give the Reformer itself, not a wrapper")
    config = {**config_to_hf(model.config), "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    expected = skeleton(model.config).state_dict()
    way_out = "give the Reformer itself, not a wrapper, with its parameters gathered from all ranks"
    check_tensors(state, expected, "the model does not fit its configuration", way_out)
    refuse_shared({name: tensor for name, tensor in state.items() if name != HEAD or not model.config.tie_embeddings})
    tensors = state_to_hf(fold_head_bias(untied(state)), model.config)
    _warn_of_padding(model.config)
    _warn_of_buckets(model.config)
    write_folder(Path(folder), config, tensors, others)


def config_from_hf(values: Mapping[str, Any], attn_dropout: float | None = None) -> ReformerConfig:
    """Our configuration from the contents of config.json; keys that do not shape the model are ignored.

    attn_dropout: as in `load_hf`.

    Raises ConfigError for what our model cannot express, with the key, its value and a way out.
    """
    given = {} if attn_dropout is None else dict.fromkeys(ATTN_DROPOUT.values(), attn_dropout)
    hf = {**DEFAULTS, **values, **given}
    _check_expressible(hf)
    layers = tuple(hf["attn_layers"])
    fields = {
        **{ours: hf[theirs] for ours, theirs in FIELDS.items()},
        **hf["longhand"],
        "attn_dropout": hf[ATTN_DROPOUT[layers[0]]],
        "attn_pattern": _shortest_period(layers),
        "n_layers": len(layers),
    }
    try:
        return ReformerConfig(**fields)
    except ConfigError as error:
        known = {**FIELDS, "attn_dropout": ATTN_DROPOUT[layers[0]]}
        names = [f"{ours} is {theirs}" for ours, theirs in known.items() if re.search(rf"\b{ours}\b", str(error))]
        raise ConfigError(f"{error}\nIn config.json, {', '.join(names) or 'see longhand'}") from None


def config_to_hf(config: ReformerConfig) -> dict[str, Any]:
    """The contents of config.json for our configuration. Raises ConfigError for what transformers cannot express."""
    translated = {*FIELDS, *CARRIED, "attn_dropout", "attn_pattern", "n_layers", "tie_embeddings"}
    for name, field in ReformerConfig.model_fields.items():
        if name not in translated and getattr(config, name) != field.default:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no counterpart in Hugging Face's Reformer, which computes with "
                f"{field.default!r}: such a model cannot be exported; train one with {name}={field.default!r}"
            )
    layers = [config.attention_kind(layer) for layer in range(config.n_layers)]
    if "dense" in layers:
        raise ConfigError(
            f"attn_pattern={config.attn_pattern}: Hugging Face's Reformer has no dense attention; load the weights "
            "into a model with 'lsh' in its place, which has the same parameters, and export that"
        )
    if not config.causal and "local" in layers:
        raise ConfigError(f"causal=False with attn_pattern={config.attn_pattern}: {_WRAPS}, so it cannot be exported")
    plain = config.model_dump(mode="json")
    return {
        **{theirs: plain[ours] for ours, theirs in FIELDS.items()},
        "architectures": ["ReformerModelWithLMHead" if config.causal else "ReformerForMaskedLM"],
        "model_type": "reformer",
        "attn_layers": layers,
        "axial_pos_embds": True,
        "hash_seed": None,
        "tie_word_embeddings": False,
        **{f"{kind}_num_chunks_before": 1 for kind in KIND_TENSORS},
        **{f"{kind}_num_chunks_after": 0 if config.causal else 1 for kind in KIND_TENSORS},
        **dict.fromkeys(ATTN_DROPOUT.values(), config.attn_dropout),
        # Its cached decoding hashes each token with new rotations and looks it up among buckets of the old ones.
        "use_cache": False,
        # Their defaults would be ordinary tokens of our vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "longhand": {name: plain[name] for name in CARRIED},
    }


def state_to_hf(state: Mapping[str, Tensor], config: ReformerConfig) -> dict[str, Tensor]:
    """The tensors of our state_dict under Hugging Face's names; axial tables [rows, D] become [rows, 1, D]."""
    tensors = {theirs: state[ours] for ours, theirs in tensor_names(config).items()}
    rows, columns = TENSORS["embedding.positions.rows"], TENSORS["embedding.positions.columns"]
    return {**tensors, rows: tensors[rows].unsqueeze(1), columns: tensors[columns].unsqueeze(0)}


def state_from_hf(tensors: Mapping[str, Tensor], config: ReformerConfig) -> dict[str, Tensor]:
    """The inverse of `state_to_hf`."""
    state = {ours: tensors[theirs] for ours, theirs in tensor_names(config).items()}
    rows, columns = "embedding.positions.rows", "embedding.positions.columns"
    return {**state, rows: state[rows].squeeze(1), columns: state[columns].squeeze(0)}


def _warn_of_padding(config: ReformerConfig) -> None:
    """Of the lengths up to max_seq_len that transformers refuses."""
    kinds = {config.attention_kind(layer) for layer in range(config.n_layers)}
    lengths = {"local": config.local_chunk_len, "lsh": config.lsh_chunk_len}
    multiple, shortest = math.lcm(*(lengths[kind] for kind in kinds)), min(lengths[kind] for kind in kinds)
    most = max(shortest, config.max_seq_len // multiple * multiple)
    if most < config.max_seq_len:
        warnings.warn(
            f"max_seq_len={config.max_seq_len} is no multiple of {multiple}, to which transformers pads sequences that "
            f"are longer than a chunk: it refuses those of more than {most} tokens",
            stacklevel=3,
        )


def _warn_of_buckets(config: ReformerConfig) -> None:
    """Of a number of buckets that is not the same for long."""
    if config.has_lsh and config.n_buckets is None:
        longest = list(bucket_factors(None, config.max_seq_len, config.lsh_chunk_len))
        warnings.warn(
            "n_buckets=None: transformers takes a number of hash buckets from the first sequence that it sees and "
            f"keeps it, ours follows from each one's length. Give the model one (model.n_buckets={longest} is ours "
            "for max_seq_len), or write it into config.json as num_buckets",
            stacklevel=3,
        )


def untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function without tied embeddings: a head's matrix E P [V, 2M] in place of E and P."""
    others, weight = dict(state), state["head.weight"]
    projection = others.pop("head.projection_weight", None)
    if projection is None:
        return others
    return {**others, "head.weight": (weight.double() @ projection.double()).to(weight.dtype)}


def fold_head_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function with a head bias of zero: the bias b moves into the head's norm (g, s) and weight W.

    The head computes W (g z + s) + b with z normalised, so that sum(z) = 0. Then W' = W + u (1/g)^T changes nothing
    but the constant, by u sum(s/g); s' = s + c g turns it into W s + c W g + u (sum(s/g) + c n) for n elements of z,
    which is W s + b for u = (b - c W g) / (sum(s/g) + c n). c = ±1 keeps the divisor away from zero.

    Raises ConfigError where an element of g is (nearly) zero, since 1/g would not leave W its precision.
    """
    weight, bias, gain, shift = (
        state[f"head.{name}"].double() for name in ("weight", "bias", "norm_weight", "norm_bias")
    )
    if not bias.any():
        return dict(state)
    if gain.abs().min() < 1e-3 * gain.abs().max():
        raise ConfigError(
            f"head.norm_weight has elements from {gain.abs().min():.1e} to {gain.abs().max():.1e}, so that head.bias, "
            "which transformers 5 ignores, cannot move there: set head.bias to zero (the logits change)"
        )
    total = (shift / gain).sum()
    c = 1.0 if total >= 0 else -1.0
    u = (bias - c * weight @ gain) / (total + c * len(gain))
    folded = {
        "head.weight": weight + torch.outer(u, 1 / gain),
        "head.norm_bias": shift + c * gain,
        "head.bias": torch.zeros_like(bias),
    }
    return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in folded.items()}}


_WRAPS = (
    "without a causal mask, Hugging Face's local attention sees from one end of the sequence to the other, ours not"
)
_TRAINED_WITH = "the weights were trained with another attention; change the value in config.json to use ours with them"


def _check_expressible(hf: Mapping[str, Any]) -> None:
    if "attn_pattern" in hf:
        raise ConfigError("this config.json is one of launch/export.py or save_model: read the folder with load_model")
    layers, shape, causal = hf["attn_layers"], hf["axial_pos_shape"], hf["is_decoder"]
    if not isinstance(layers, list | tuple) or not layers or any(kind not in list(KIND_TENSORS) for kind in layers):
        raise ConfigError(f"attn_layers={layers!r}: expected a list of 'local' and 'lsh', one for each layer")
    if not isinstance(causal, bool):
        raise ConfigError(f"is_decoder={causal!r} in config.json: expected true or false")
    if not causal and "local" in layers:
        raise ConfigError(
            f"is_decoder={causal!r} with local layers: {_WRAPS}; import a causal model, or lsh layers only"
        )
    needed: dict[str, tuple[Any, str]] = {
        "model_type": ("reformer", "give the folder of a Reformer"),
        "axial_pos_embds": (True, "ours has axial position embeddings only; import a model that has them"),
        "tie_word_embeddings": (
            False,
            "the head is twice as wide as the embedding; set it to false and give it weights",
        ),
        "hash_seed": (None, "our rotations follow from ReformerConfig's seed; set it to null in config.json"),
    }
    for kind in sorted(set(layers)):
        needed[f"{kind}_num_chunks_before"] = (1, _TRAINED_WITH)
        needed[f"{kind}_num_chunks_after"] = (0 if causal else 1, _TRAINED_WITH)
        needed[ATTN_DROPOUT[kind]] = (
            hf[ATTN_DROPOUT[layers[0]]],
            "local and lsh layers share one attn_dropout; name it, which changes nothing but training, by "
            "load_hf(folder, attn_dropout=0.0), or give both keys the same value",
        )
    for key, (value, way_out) in needed.items():
        if hf[key] != value:
            raise ConfigError(f"{key}={hf[key]!r} in config.json, where ours computes with {value!r}: {way_out}")
    two_axes = isinstance(shape, list | tuple) and [type(axis) for axis in shape] == [int, int]
    if not two_axes or math.prod(shape) != hf["max_position_embeddings"]:
        raise ConfigError(
            f"axial_pos_shape={shape!r} and max_position_embeddings={hf['max_position_embeddings']!r}: ours has two "
            "axes and exactly as many positions as they span; set max_position_embeddings to their product"
        )
    longhand = hf["longhand"]
    if not isinstance(longhand, Mapping) or not set(longhand) <= set(CARRIED):
        raise ConfigError(f"longhand={longhand!r}: expected an object of nothing but {CARRIED}; remove what is else")


def _shortest_period(layers: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when it is repeated."""
    lengths = range(1, len(layers) + 1)
    return next(layers[:n] for n in lengths if all(kind == layers[i % n] for i, kind in enumerate(layers)))
