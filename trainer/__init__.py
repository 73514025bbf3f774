"""The trainer: a Reformer, a store of sequences and DeepSpeed; the only package that knows the other two."""

import os

import torch

if not torch.accelerator.is_available():
    # Found out for itself, DeepSpeed warns of it in every process.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
