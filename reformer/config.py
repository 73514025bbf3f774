"""The model's configuration: frozen, typed, checked as a whole when it is made.

Every field says what it means in one sentence; every relation between fields is checked here, so that a
`ReformerConfig` that exists can be built. Errors name the value, what was expected and a way out.
"""

import json
import math
import operator
import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from reformer.arguments import is_boolean
from reformer.lsh.hashing import bucket_factors

AttentionKind = Literal["local", "lsh", "dense"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the value and the way out."""


class StrictConfig(BaseModel):
    """A frozen pydantic model that takes values as they are, refuses unknown fields and names the nearest real one.

    NumPy's integers are taken as the numbers that they are.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
    elsewhere: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names that people often put into this table -> where they belong."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**{name: _plain(value) for name, value in values.items()})
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """No field changes: raises ConfigError, which says how to make another configuration."""
        try:
            super().__setattr__(name, value)
        except ValidationError:
            kind = type(self).__name__
            another = (
                f"make another one for {name}={value!r}, {kind}(**{{**config.model_dump(), {name!r}: {value!r}}}), "
                "without what is to follow from it"
            )
            way_out = another if name in type(self).model_fields else f"it has no field {name!r}, either"
            raise ConfigError(f"a {kind} does not change: {way_out}") from None


def _plain(value: Any) -> Any:
    """Whole numbers of NumPy's, also within lists, as Python's; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value) if type(value) in (list, tuple) else value
    if isinstance(value, int) or not hasattr(value, "__index__") or is_boolean(value):
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array, or a boolean of NumPy's
        return value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem of a pydantic error: the field, what is wrong with it, the value given.

    A nested StrictConfig explains itself; its lines come out behind the name of its table, as in TOML.
    """
    lines = []
    for problem in error.errors():
        name, given = ".".join(str(part) for part in problem["loc"]), problem["input"]
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key '{name}': {_known(name, model)}")
        elif problem["type"] == "missing":
            lines.append(f"'{name}' is missing: give it a value")
        elif problem["type"] == "tuple_type":
            lines.append(f"'{name}': input should be a list{_listed(given)} (got {given!r})")
        elif problem["type"] in ("bool_type", "bool_parsing"):
            lines.append(f"'{name}': input should be a valid boolean (got {given!r}): give true or false")
        elif problem["type"] == "path_type":
            lines.append(f"'{name}': input should be a path (got {given!r}): put it in quotes")
        elif problem["type"] in ("dict_type", "model_type"):
            lines.append(f"'{name}': input should be a table of keys and values (got {given!r})")
        elif problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            lines.extend(f"[{name}] {line}" if name else line for line in message.splitlines())
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            lines.append(f"'{name}': {message} (got {given!r})")
    return "\n".join(lines)


def _listed(given: Any) -> str:
    """The list that somebody may have meant by a text, as TOML and JSON write it."""
    if isinstance(given, int | float):
        return ""
    words = [word.strip("'\"") for word in re.split(r"[\s,]+", str(given).strip("[]() ")) if word]
    return f", such as {json.dumps([int(word) if word.isdecimal() else word for word in words])}" if words else ""


def _known(name: str, model: type[BaseModel]) -> str:
    """Where an unknown key may belong."""
    if issubclass(model, StrictConfig) and name in model.elsewhere:
        return model.elsewhere[name]
    known = list(model.model_fields)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"the known keys are {', '.join(known)}"


MEMORY_ONLY = ("ff_chunk_tokens", "loss_chunk_tokens", "keep_ends")
"""Fields that decide about memory, and about rounding, but not about what is computed."""


class ReformerConfig(StrictConfig):
    """Shape and behaviour of a `Reformer` (Kitaev, Kaiser, Levskaya, ICLR 2020)."""

    vocab_size: int = Field(ge=2)
    """Number of token ids."""
    max_seq_len: int = Field(default=65_536, ge=1)
    """Longest sequence in tokens; the axial position table covers exactly this many."""
    d_model: int = Field(default=256, ge=1)
    """Width of each of the two residual streams."""
    n_layers: int = Field(default=6, ge=1)
    """Number of reversible blocks, each one attention and one feed-forward layer."""
    attn_pattern: tuple[AttentionKind, ...] = Field(default=("local", "lsh"), strict=False)
    """Attention of each layer, repeated from the first layer on; "dense" uses the weights of "lsh"."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads per layer."""
    d_head: int | None = Field(default=None, ge=1)
    """Width of one head; d_model / n_heads when not given."""
    d_ff: int | None = Field(default=None, ge=1)
    """Inner width of the feed-forward layers; 4 * d_model when not given."""
    activation: Literal["relu", "gelu"] = "relu"
    """Non-linearity of the feed-forward layers; relu in the authors' code."""
    causal: bool = True
    """Whether a token sees only itself and earlier tokens. The trainer needs true; false is for library use."""
    n_hashes: int = Field(default=4, ge=1)
    """LSH rounds per layer; more rounds recover more of full attention, at proportional cost."""
    n_buckets: int | Annotated[tuple[int, ...], Strict(False)] | None = None
    """Hash buckets, a number or even factors; about 2 * tokens / lsh_chunk_len when not given."""
    lsh_chunk_len: int = Field(default=64, ge=1)
    """Tokens per chunk of the sorted sequence in LSH attention."""
    attend_across_buckets: bool = True
    """Whether LSH attention uses all keys in its chunks, as published models do, or its own bucket's."""
    duplicate_correction: bool = False
    """Whether a key that several rounds reach counts once (the paper's eq. 16) or once per round."""
    local_chunk_len: int = Field(default=64, ge=1)
    """Tokens per chunk of local attention; a token sees its own chunk and the one before."""
    axial_shape: tuple[int, int] | None = Field(default=None, strict=False)
    """Factors (rows, columns) of max_seq_len for the axial position table; near-square when not given."""
    axial_dims: tuple[int, int] | None = Field(default=None, strict=False)
    """Widths of the two axial tables, summing to d_model; a quarter and three quarters when not given."""
    ff_chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens that pass through a feed-forward layer, or the projections of an attention layer, at a time; when not
    given, 4096 on a CPU, and on a GPU enough for 2^27 inner activations per micro-batch."""
    loss_chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose logits exist at a time when the loss is computed; when not given, 2048 on a CPU, or fewer of a
    large vocabulary, and on a GPU so many that their logits or, if more, their features are 2^26 numbers."""
    keep_ends: bool = True
    """Whether the forward keeps what the backward of the first and last block would otherwise recompute: three streams
    and one layer's heads. False saves that memory at the cost of one attention forward."""
    tie_embeddings: bool = False
    """Whether the output head reads the token embedding as its matrix."""
    norm_eps: float = Field(default=1e-6, gt=0.0)
    """Added to the variance in every layer normalisation; 1e-6 in the authors' code."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an element of a sub-layer's output in training."""
    attn_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an attention weight, after the softmax of its round, in training."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the hash rotations and of dropout."""

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        """Fill in the fields that follow from others, so that a config always shows its real numbers."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        d_model = filled.get("d_model", cls.model_fields["d_model"].default)
        n_heads = filled.get("n_heads", cls.model_fields["n_heads"].default)
        max_seq_len = filled.get("max_seq_len", cls.model_fields["max_seq_len"].default)
        if all(isinstance(number, int) and number > 0 for number in (d_model, n_heads, max_seq_len)):
            if filled.get("d_head") is None:
                if d_model % n_heads:
                    raise ValueError(
                        f"d_model={d_model} is not divisible by n_heads={n_heads}: change one of them, or give d_head"
                    )
                filled["d_head"] = d_model // n_heads
            if filled.get("d_ff") is None:
                filled["d_ff"] = 4 * d_model
            if filled.get("axial_shape") is None:
                filled["axial_shape"] = near_square(max_seq_len)
            if filled.get("axial_dims") is None:
                filled["axial_dims"] = (d_model // 4, d_model - d_model // 4)
        return filled

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        rows, columns = self.axial_shape or (1, self.max_seq_len)
        if (n_positions := max(rows, 0) * max(columns, 0)) != self.max_seq_len:
            raise ValueError(
                f"axial_shape=({rows}, {columns}) covers {n_positions} positions, but max_seq_len="
                f"{self.max_seq_len}: give factors whose product is max_seq_len, such as "
                f"{near_square(self.max_seq_len)}, or leave axial_shape out"
            )
        if self.axial_dims is not None and (sum(self.axial_dims) != self.d_model or min(self.axial_dims) < 0):
            raise ValueError(
                f"axial_dims={self.axial_dims} must sum to d_model={self.d_model}: "
                f"give [{self.d_model // 4}, {self.d_model - self.d_model // 4}], or leave axial_dims out"
            )
        if not self.attn_pattern:
            raise ValueError("attn_pattern is empty: give the kinds of attention, such as ('local', 'lsh')")
        if self.n_buckets is not None:
            bucket_factors(self.n_buckets, self.max_seq_len, self.lsh_chunk_len)
        return self

    @property
    def has_lsh(self) -> bool:
        """Whether some layer uses LSH attention."""
        return any(self.attention_kind(layer) == "lsh" for layer in range(self.n_layers))

    def attention_kind(self, layer: int) -> AttentionKind:
        """The kind of attention of layer `layer`, counted from 0."""
        return self.attn_pattern[layer % len(self.attn_pattern)]


def near_square(n: int) -> tuple[int, int]:
    """The factors (rows, columns) of n with rows <= columns that are closest to each other."""
    rows = next(divisor for divisor in range(math.isqrt(n), 0, -1) if n % divisor == 0)
    return rows, n // rows
