"""Whether tests can offload to NVMe here: DeepSpeed's async_io must have been compiled, which takes minutes."""

import os
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

from trainer.extensions import missing_for


def why_not() -> str:
    """The reason, or nothing."""
    if missing := missing_for("AsyncIOBuilder"):
        return f"DeepSpeed's async_io cannot be compiled without {missing}"
    with tempfile.NamedTemporaryFile() as file:
        try:  # async_io reads and writes past the system's cache, which some file systems in memory refuse
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            return f"{tempfile.gettempdir()} does not take O_DIRECT: {error.strerror}"
    built = Path(cpp_extension._get_build_directory("async_io", verbose=False)) / "async_io.so"
    return "" if built.exists() else f"DeepSpeed's async_io is not compiled yet (no {built}): see .ci/run"
