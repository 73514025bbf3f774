"""What ranks must have alike: what is said where one of them does not, and that it is said by one alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import IDENTITY

from trainer import agreement
from trainer.agreement import refuse_different
from trainer.config import ConfigError
from trainer.distributed import Launch

CPU = torch.device("cpu")
Say = Callable[[int, dict[str, Any], str | None], None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """say(rank, the other's identity, the other's trace): what this rank of two says of the run in tmp_path."""

    def call(rank: int, other: dict[str, Any], trace: str | None) -> None:
        def gather(found: list[Any], own: tuple[str, dict[str, Any]]) -> None:
            assert own[0].startswith(".partial-"), "as `remove_leftovers` removes"
            found[rank], found[1 - rank] = own, (trace or own[0], agreement.flatten(other))

        monkeypatch.setattr(agreement.dist, "all_gather_object", gather)
        monkeypatch.setattr(agreement, "hosts", lambda: ["alpha", "beta"])
        monkeypatch.setattr(agreement, "together", lambda action, *_: action())
        refuse_different(tmp_path, {"a": (1, 2), "b": {"c": 3}}, Launch("test", rank, 2, rank, 2), CPU)

    return call


def test_one_run(say: Say, tmp_path: Path) -> None:
    same = {"a": [1, 2], "b": {"c": 3}}
    say(0, same, None)
    checkpoints = tmp_path / "checkpoints"
    assert not any(checkpoints.iterdir()), "what the others were to see is gone"
    (checkpoints / "trace").mkdir()
    say(1, same, "trace")
    refuse_different(tmp_path / "alone", IDENTITY, Launch("test"), CPU)
    assert not (tmp_path / "alone").exists()


def test_a_folder_that_cannot_be_written_to(say: Say, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(
        ConfigError, match=f"cannot write to run.dir={tmp_path}: Not a directory: choose another folder"
    ):
        say(0, {"a": [1, 2], "b": {"c": 3}}, None)


def test_another_run(say: Say) -> None:
    other = {"a": [1, 2, 3], "b": {"c": 4, "d": 5}, "e": 6}
    message = (
        r"rank 1 on beta has another run than rank 0 on alpha: a is \[1, 2, 3\] and not \[1, 2\]; b.c is 4 and not 3; "
        r"b.d is 5 and not None; and 1 more. Have all nodes see the same configuration and the same store"
    )
    with pytest.raises(ConfigError, match=message):
        say(0, other, None)
    with pytest.raises(ConfigError, match=r"than rank 0 on alpha: b.c is None and not 3. Have all nodes"):
        say(0, {"a": [1, 2]}, None)


def test_another_folder(say: Say, tmp_path: Path) -> None:
    message = (
        f"rank 1 on beta does not see in run.dir={tmp_path} what rank 0 on alpha writes there: have all nodes see the"
    )
    with pytest.raises(ConfigError, match=message):
        say(1, {"a": [1, 2], "b": {"c": 3}}, ".partial-seen-elsewhere")
