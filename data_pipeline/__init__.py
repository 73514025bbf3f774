"""Turns a corpus into a sharded Zarr store of very long token sequences, and reads it back.

Floor 1 of the project: it imports neither the model nor the trainer, and PyTorch only in dataset.py, so that a
machine that merely preprocesses text needs no PyTorch. One property rules everything here: **a store is a pure
function of its inputs and settings**, byte-identical for any number of workers. docs/layout.md says
what each file is for.
"""
