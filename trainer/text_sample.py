"""A held-out text as the model continues it, for a reader of TensorBoard.

The passes that this takes are as many on every rank, whatever the model says, since under ZeRO-3 all must take part in
each. They are as many as tokens are drawn, over a short text: 64 of them cost 0.4 times as much as evaluating one row
of 65,536 tokens (measured, the demo's model). Everything follows from the weights: what decides a draw beside them is
the same at every evaluation.
"""

import re
from functools import partial

import deepspeed
import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from reformer.generation import continue_tokens
from trainer.batches import Rows
from trainer.config import RunConfig
from trainer.distributed import Launch, together
from trainer.sampling import spelling, within_documents

PROMPT_TOKENS = 256
"""The most tokens of the text that are given."""
TOP_P = 0.95
"""Tokens that share the last twentieth of the probability are not drawn: one of them spoils what follows."""


@torch.no_grad()
def sample_continuation(
    engine: deepspeed.DeepSpeedEngine,
    rows: Rows,
    config: RunConfig,
    launch: Launch,
    device: torch.device,
) -> str | None:
    """The beginning of the first held-out row, and run.sample_tokens tokens that the model adds, as Markdown.

    None where run.sample_tokens is 0, the row has nothing in it, or the model has diverged. All ranks call this, for an
    engine in evaluation mode. Raises DataError, on one rank while the others end, where the row or the store's
    tokenizer is damaged.
    """
    if not config.run.sample_tokens:
        return None
    row = together(partial(rows.__getitem__, 0), launch, device)
    prompt = beginning(row.tokens, row.segment_ids).to(device)
    n_tokens = min(config.run.sample_tokens, config.model.max_seq_len - len(prompt))
    if not len(prompt) or not n_tokens:
        return None
    tokenizer = together(lambda: rows.store.tokenizer, launch, device)
    of_rounds = partial(engine, n_hashes=config.run.eval_n_hashes)
    forward = within_documents(of_rounds, tokenizer, rows.store.manifest.eos)
    try:
        added = continue_tokens(forward, config.model, prompt, n_tokens, top_p=TOP_P)
    except FloatingPointError:  # on all ranks alike; the loss says it, too
        return None
    return as_markdown(prompt, added, tokenizer)


def beginning(tokens_T: Tensor, segment_ids_T: Tensor) -> Tensor:
    """Of a row's first document half, so that there is something to go on with, and at most PROMPT_TOKENS tokens."""
    n_tokens = int((segment_ids_T == 1).sum())
    return tokens_T[: min(-(-n_tokens // 2), PROMPT_TOKENS)]


def as_markdown(prompt_T: Tensor, added_T: Tensor, tokenizer: Tokenizer) -> str:
    """The text that was given and what was added, to the first end of a document."""
    added = added_T.tolist()
    n_added = added.index(tokenizer.eos_id) if tokenizer.eos_id in added else len(added)
    end = ", where the text ends" if n_added < len(added) else ""
    return (
        f"**{len(prompt_T)} tokens of a held-out text:**\n\n{literal(as_text(tokenizer, prompt_T))}\n\n"
        f"**the model's next {n_added}{end}:**\n\n{literal(as_text(tokenizer, added_T[:n_added]))}"
    )


def as_text(tokenizer: Tokenizer, ids_T: Tensor) -> str:
    """Bytes that are not UTF-8 are replaced; of integers, the numbers."""
    spelled = spelling(tokenizer)
    text = spelled(ids_T) + spelled(ids_T[:0])
    return text.rstrip(" ") if tokenizer.kind == "integers" else text


def literal(text: str) -> str:
    """A block of Markdown that shows the text as it is; control characters are replaced, TensorBoard drops some."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
    return "\n".join(f"    {line}" for line in text.split("\n"))
