"""A script, on a machine that seems to have a GPU.

    python tests/pretended_gpu/run.py LIBRARY SCRIPT ARGUMENTS

LIBRARY is what `built` has made of backend.cpp. With TRITON_INTERPRET=1 the fused kernels run too, in Triton's
interpreter; otherwise the device is too old for them.
"""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__)
SOURCE = RUN.with_name("backend.cpp")


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parent


def built(folder: Path) -> Path:
    """The device, compiled into a folder: 10 seconds."""
    library, torch = folder / "pretended_gpu.so", torch_folder()
    includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    flags = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w", *includes]
    links = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library), *links], check=True)
    return library


def main(library: str, script: str, *arguments: str) -> None:
    # Before torch is imported: it asks once whether there is CUDA, and keeps the answer.
    ctypes.CDLL(str(torch_folder() / "lib/libtorch_cpu.so"))
    ctypes.CDLL(library)
    import device
    import nccl

    device.install(fused_kernels=os.environ.get("TRITON_INTERPRET") == "1")
    nccl.install()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
