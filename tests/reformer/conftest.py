"""Imports Triton as an interpreter where there is no GPU, before a test imports it as a compiler by way of others.

Triton decides when it is imported, function by function, which of the two it is. Nobody else is to find the variable
in the environment.
"""

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import reformer.lsh.triton_hash_kernel
        import reformer.lsh.triton_kernels  # noqa: F401
