"""Turns a corpus into a sharded Zarr store of very long token sequences, and reads it back.

Floor 1 of the project: it imports neither the model nor the trainer, and PyTorch only in two files, so that a
machine that merely preprocesses text needs no PyTorch. One property rules everything here: **a store is a pure
function of its inputs and settings**, byte-identical for any number of workers.

In the order things happen:

    cli.py           python -m data_pipeline tokenizer | build | verify | inspect | decode
    config.py        what a build is asked to do, checked
    files.py         which files are the input, and their bytes
    compression.py   .gz, .zst and .xz expanded, to the last byte that can be had
    documents.py     documents out of files, and what is wrong with them; the work cut into tasks
    records.py       JSON lines and Parquet
    arrays.py        .npy and .npz of integers
    blocks.py        from bytes as they come to UTF-8 in blocks that depend on the document alone
    tokenizer.py     bytes <-> token ids, exactly (SentencePiece, or plain bytes)
    training.py      a SentencePiece model out of a sample of the corpus
    splits.py        which document is held out
    duplicates.py    which documents are copies of an earlier one
    packing.py       which token goes to which row
    jobs.py          work that any number of processes share through a directory, and that survives them
    team.py          who they are: this process, MPI ranks, SLURM tasks
    scratch.py       tokens and facts between the two halves of a build
    planning.py      which documents are kept, and where everything goes
    inputs.py        are the input files those that a build began with?
    stages.py        the story: start, tokenize, plan, write, finish
    build.py         who goes through it, and what comes of it
    progress.py      how far it is
    manifest.py      what a store has to contain
    layout.py        the Zarr layout: the only file that knows it
    store.py         a store and what was appended to it, as one
    staging.py       nothing half-written is ever taken for whole
    verify.py        is every byte still what was built?
    decode.py        the exact text back
    report.py        statistics for people
    output.py        a reader of standard output may leave before the end
    order.py         (seed, epoch, position) -> row; which rank reads which
    mixture.py       several data sets in one, by weight
    dataset.py       rows as torch tensors
    loader.py        read ahead, in order, each rank its share: these two import PyTorch
"""
