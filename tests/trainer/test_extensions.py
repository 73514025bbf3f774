"""What DeepSpeed needs to compile a part of it, where that is missing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder

from trainer.extensions import missing_for


@pytest.mark.parametrize(
    ("lacks", "expected"),
    [
        ("torch.utils.cpp_extension.is_ninja_available", "ninja"),
        ("shutil.which", "the C++ compiler "),
        ("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", "libaio with its headers"),
    ],
)
def test_what_a_machine_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: str, expected: str
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/found")
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_: True)
    monkeypatch.setattr("trainer.extensions._missing_of_cuda", lambda: "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert missing_for("AsyncIOBuilder") == ""
    monkeypatch.setattr(lacks, lambda *_: None)
    assert missing_for("AsyncIOBuilder").startswith(expected)


class Clock:
    """In the place of the module `time`, for one that waits; `meanwhile` is what happens while it sleeps."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.seconds, self.meanwhile, self.time = 0.0, meanwhile, time.time

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.meanwhile()


@pytest.mark.parametrize("extension", ["async_io", "pin_memory"])
def test_a_lock_that_nobody_holds_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], extension: str
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/found")
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: True)
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_: True)
    monkeypatch.setattr("trainer.extensions._missing_of_cuda", lambda: "")
    lock = tmp_path / extension / "lock"
    lock.parent.mkdir()
    lock.touch()
    clock = Clock(meanwhile=lock.unlink)
    monkeypatch.setattr("trainer.extensions.time", clock)
    assert missing_for("AsyncIOBuilder") == "" and not lock.exists(), "who compiles it just now was not waited for"
    said = capsys.readouterr().err
    assert said.startswith(f"waiting for {lock} to go, 480 s at most: ") and said.count("\n") == 1
    lock.touch()
    clock.meanwhile = lambda: None
    assert missing_for("AsyncIOBuilder").startswith(f"the removal of {lock}, which a compilation")
    assert 480 < clock.seconds < 490
    os.utime(lock, (time.time() - 4000,) * 2)
    assert missing_for("AsyncIOBuilder").startswith(f"the removal of {lock}, which a compilation")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock))
    assert missing_for("AsyncIOBuilder").startswith("a folder that can be written to, to compile in: ")


def test_who_waits_for_a_lock_hears_a_signal(tmp_path: Path) -> None:
    """launch/train.py blocks signals until the run listens to them; a process of its own has no other thread."""
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io/lock").touch()
    command = [sys.executable, "-c", WAITING, str(tmp_path / "async_io/lock")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr and any(line.startswith("waiting for ") for line in waiting.stderr)
        waiting.send_signal(signal.SIGUSR1)
        try:
            assert waiting.wait(timeout=60) == 75
        finally:
            waiting.kill()


WAITING = """
import signal, sys
from pathlib import Path
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
from trainer.extensions import _is_released
_is_released(Path(sys.argv[1]))
"""


def test_a_part_that_does_not_exist_for_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(create_op_builder=lambda _: None, device_name=lambda: "abacus")
    monkeypatch.setattr("trainer.extensions.get_accelerator", lambda: accelerator)
    assert missing_for("AsyncIOBuilder") == "its version for abacus"


def test_a_gpu_without_the_cuda_toolkit_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch's wheels bring what CUDA needs to run, and no nvcc. DeepSpeed's Adam for the CPU does without."""
    builders = {"FusedAdamBuilder": FusedAdamBuilder, "CPUAdamBuilder": CPUAdamBuilder}
    accelerator = SimpleNamespace(
        create_op_builder=lambda name: builders[name](), device_name=lambda: "cuda", _name="cuda"
    )
    monkeypatch.setattr("trainer.extensions.get_accelerator", lambda: accelerator)
    for builder in builders.values():
        monkeypatch.setattr(builder, "is_compatible", lambda *_: True)
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/found")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    for home, expected in (
        (None, "the CUDA toolkit with nvcc (on a cluster"),
        (str(tmp_path), f"the CUDA toolkit with nvcc, which CUDA_HOME={tmp_path} has not"),
    ):
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
        assert missing_for("FusedAdamBuilder").startswith(expected)
        assert missing_for("CPUAdamBuilder") == ""
        with monkeypatch.context() as amd:
            amd.setattr("torch.version.hip", "7.0")
            assert missing_for("FusedAdamBuilder") == ""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    assert missing_for("FusedAdamBuilder") == ""


def test_what_was_compiled_for_another_device_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    monkeypatch.setattr("trainer.extensions._missing_of_cuda", lambda: "")
    monkeypatch.setattr("trainer.extensions.installed_ops", {"async_io": True})
    for compiled_for, expected in ((get_accelerator()._name, ""), ("abacus", "ninja")):
        monkeypatch.setattr("trainer.extensions.accelerator_name", compiled_for)
        assert missing_for("AsyncIOBuilder") == expected
