"""Options of several values: what is given in several goes comes together, and replaces the default."""

import sys
from types import ModuleType
from typing import Any

import benchmark
import evaluate
import gpu_check
import pytest


@pytest.mark.parametrize(
    ("script", "words", "option", "values"),
    [
        (evaluate, ["folder", "store"], "attention", [2, "dense", "none"]),
        (gpu_check, [], "seq-len", [256, 512]),
        (gpu_check, [], "peers", ["ours", "huggingface"]),
        (benchmark, ["model"], "seq-len", [256, 65_536]),
        (benchmark, ["model"], "peers", ["ours", "huggingface"]),
        (benchmark, ["memory"], "parts", ["depth", "length"]),
        (benchmark, ["memory"], "depths", [2, 3]),
        (benchmark, ["pipeline"], "parts", ["read", "stall"]),
        (benchmark, ["pipeline"], "workers", [4, 2]),
        (benchmark, ["pipeline"], "corpus", ["a", "b"]),
        (benchmark, ["faults"], "part", ["kills", "signals"]),
        (benchmark, ["faults"], "modes", ["process", "mpirun"]),
    ],
)
def test_no_go_replaces_another(
    script: ModuleType, words: list[str], option: str, values: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [str(value) for value in values]
    goes = [word for value in given for word in (f"--{option}", value)]
    monkeypatch.setattr(sys, "argv", ["script", *words, *goes])
    assert list(map(str, getattr(script.parse_arguments(), option.replace("-", "_")))) == given
