"""All that may stand in a run's TOML file, said by the configuration itself: a file to begin with."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from reformer.config import ReformerConfig, StrictConfig
from trainer.config import DataConfig, LoopConfig, SourceConfig
from trainer.exported import read_model

WIDTH = 100
TABLES: dict[str, type[StrictConfig]] = {
    "model": ReformerConfig,
    "data": DataConfig,
    "data.mixture.NAME": SourceConfig,
    "run": LoopConfig,
}
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
HEAD = """\
# All keys of a run's TOML file, with their defaults. A key without a default is marked "needed", or may be left out.
# DeepSpeed's JSON (ds_config.json) has the batch, the optimizer, the precision and ZeRO.
"""


def template(init_from: Path | None = None) -> str:
    """A TOML file in which every key is a comment, below what it means.

    init_from: a folder as of run.init_from, which is given then, as are the values of [model] that it needs. Raises
    ConfigError where there is no model in it.
    """
    given: dict[str, dict[str, Any]] = {}
    if init_from is not None:
        model = read_model(init_from, str(init_from)).config.model_dump(mode="json", exclude_defaults=True)
        given = {"model": model, "run": {"init_from": str(init_from)}}
    tables = (_table(name, model, given.get(name, {})) for name, model in TABLES.items())
    return "\n".join([HEAD, *(line for table in tables for line in table)])


def _table(name: str, model: type[StrictConfig], given: Mapping[str, Any]) -> Iterator[str]:
    yield f"# [{name}]" if "NAME" in name else f"[{name}]"
    for key, field in model.model_fields.items():
        if key == "mixture":  # has tables of its own
            continue
        text = f"{' '.join((field.description or '').split())} ({_expected(field)})"
        yield from textwrap.wrap(text, WIDTH, initial_indent="## ", subsequent_indent="## ")
        default = field.get_default(call_default_factory=True)
        # Numbers, texts, truth values and lists of them are the same in JSON and TOML.
        if key in given:
            yield f"{key} = {json.dumps(given[key], ensure_ascii=False)}"  # TOML knows no pairs of surrogates
        else:
            yield f"# {key} =" if default in (None, PydanticUndefined) else f"# {key} = {json.dumps(default)}"
        yield ""


def _expected(field: FieldInfo) -> str:
    """The kind of a value, its bounds, and whether it must be given."""
    bounds = [(said, getattr(one, name, None)) for one in field.metadata for name, said in BOUNDS.items()]
    said = [f"{said} {value:{',' if isinstance(value, int) else 'g'}}" for said, value in bounds if value is not None]
    return ", ".join([_kind(field.annotation), *said]) + ("; needed" if field.is_required() else "")


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    kinds = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is Literal:
        return " or ".join(map(json.dumps, kinds))
    if get_origin(annotation) is tuple:
        return f"list of {_kind(kinds[0])}" if kinds[-1] is Ellipsis else f"list of {len(kinds)}: {_kind(kinds[0])}"
    return " or ".join(map(_kind, kinds)) if kinds else KINDS[annotation]
