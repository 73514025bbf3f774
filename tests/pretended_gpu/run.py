"""A script, on a machine that seems to have a GPU.

    python tests/pretended_gpu/run.py LIBRARY SCRIPT ARGUMENTS

LIBRARY is what `built` has made of backend.cpp. With TRITON_INTERPRET=1 the fused kernels run too, in Triton's
interpreter; otherwise the device is too old for them.
"""

import atexit
import ctypes
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

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
    subprocess.run([*compiler(), *flags, str(SOURCE), "-o", str(library), *links], check=True)
    return library


def compiler() -> list[str]:
    """The words of a C++ compiler's command."""
    return shlex.split(os.environ.get("CXX", "c++"))


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
    run_to_the_end(script)


def run_to_the_end(script: str) -> NoReturn:
    """Run the script, and leave with its exit code.

    Without the interpreter's own end: autograd's thread of the device, if it wants the interpreter just then, aborts
    the process.
    """
    code: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
