"""The Reformer: embedding and axial positions, a reversible stack, and an output head that computes its own loss.

Both residual streams start as the embedded tokens, run in fp32 whatever the parameters' dtype (float64 stays
float64), and are read side by side at the end.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reformer.arguments import INTEGERS, check_is_tensor, check_tokens, whole_number
from reformer.call import Call
from reformer.config import ReformerConfig
from reformer.loss import EMBEDDING_STD, OutputHead
from reformer.positions import AxialPositions
from reformer.reversible import ReversibleBlock, reversible_stack
from reformer.sequence_part import WHOLE, SequencePart


class Embedding(nn.Module):
    """Tokens [B, T] from position `start` on -> [B, T, M]: token embedding plus position embedding."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.tokens.weight, std=EMBEDDING_STD)
        self.positions = AxialPositions(config)

    def forward(self, tokens_BT: Tensor, start: int = 0) -> Tensor:
        ids_BT = tokens_BT.to(torch.int64, copy=True)  # the backward reads them again
        return self.tokens(ids_BT) + self.positions(tokens_BT.shape[1], start)


class Reformer(nn.Module):
    """A language model over sequences of any length up to config.max_seq_len."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        if not isinstance(config, ReformerConfig):
            raise TypeError(
                f"config must be a ReformerConfig, got {type(config).__name__}: give Reformer(ReformerConfig(…)), and "
                "ReformerConfig(**values) of a table"
            )
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList([ReversibleBlock(config, layer) for layer in range(config.n_layers)])
        self.head = OutputHead(config, self.embedding.tokens.weight if config.tie_embeddings else None)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        step: int | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        n_hashes: int | None = None,
        per_token: bool = False,
        part: SequencePart = WHOLE,
    ) -> Tensor:
        """Logits [B, T, V]; or, given labels, the mean loss in nats over labels != -100, an fp32 scalar.

        Args:
            tokens: integers [B, T] of any type.
            labels: integers [B, T], the token to be predicted at each place (already shifted), -100 to ignore it.
            segment_ids: integer [B, T]; tokens of different segments (documents) do not see each other.
            step: with the model's seed, fixes the hash rotations and dropout masks of this pass: in training, how many
                updates came before. None: the rotations of step 0, which in training is warned of, and no dropout may
                be drawn.
            sample_ids: index of each sample in the global batch, which keys its dropout; 0, 1, … if not given.
            n_hashes: rounds of LSH attention, more or fewer than the model was trained with; None: as configured.
            per_token: the loss of each token, fp32 [B, T], in place of their mean; 0 where its label is -100. Under
                torch.no_grad() only.
            part: the tokens, labels and segment_ids are one of the equal parts that sequences are cut into, whose other
                holders make the same pass, of as many tokens, at the same time. What is returned is of this part alone.
                A parameter's gradient, added up over the parts, each weighted with its number of labels, is that of
                the sequence.

        A token sees none that come after it, if the model is causal. But which of those before it LSH attention shows
        it, among the hash's candidates, depends on where all tokens of its segment come to lie when they are sorted,
        later ones too, and on which places the segments before it leave them.

        `loss.backward()` adds to `.grad` of the blocks' parameters, once for each forward, and raises RuntimeError
        where they have been replaced since the forward, or changed so that autograd knows of it. It does so whenever it
        passes through the blocks to a gradient that is asked for, be that all or, by torch.autograd.grad or `inputs=`,
        the embedding's; asked for those of blocks alone it does not come to them, and finds none. With labels,
        gradients of what goes into the head are not to be had by torch.autograd.grad either: it finds zeros (take the
        loss of the logits). Blocks are computed again: weights that a parametrization makes must come out the same (no
        noise, no spectral_norm), outside of torch's parametrize.cached(); hooks on a block or its halves are called
        again, with other arguments, and must not change what it returns.

        Raises:
            ValueError: tokens that are not [B, T], no integers or, on a CPU, not below vocab_size; n_hashes below 1, or
                in a model without LSH attention; labels or segment_ids of another shape or no integers; any of these
                that are no tensors; dropout in training without a step; per_token without labels, or where gradients
                are wanted; a number of parts that does not divide n_heads.
            TypeError: a step, n_hashes or sample_ids that are no whole numbers.
            RuntimeError: parameters on the meta device, or tied embeddings that are two parameters by now.
        """
        self._check(tokens, labels, segment_ids, step, sample_ids, n_hashes, per_token, part)
        ids = range(len(tokens)) if sample_ids is None else sample_ids
        call = Call(
            seed=self.config.seed,
            step=0 if step is None else whole_number("step", step),
            sample_ids=tuple(whole_number("sample_ids", sample_id) for sample_id in ids),
            dropout=self.config.dropout if self.training else 0.0,
            # Copied: the backward reads it again, when the caller's memory may hold the next batch.
            segment_ids_BT=None if segment_ids is None else part.whole(segment_ids).clone(),
            attn_dropout=self.config.attn_dropout if self.training else 0.0,
            n_hashes=None if n_hashes is None else whole_number("n_hashes", n_hashes),
            part=part,
        )
        return self.head(*self._streams(tokens, call), labels, per_token)

    def check_parameters(self) -> None:
        """Raise RuntimeError for some on the meta device, or tied embeddings that are two parameters by now."""
        on_meta = next((name for name, parameter in self.named_parameters() if parameter.is_meta), None)
        if on_meta is not None:
            raise RuntimeError(
                f"{on_meta} is on the meta device, which has shapes but no numbers: give the model memory and weights, "
                "model.to_empty(device='cpu') and then model.load_state_dict(…), or build it on a real device"
            )
        # A head that somebody put in the place of ours is not tied.
        is_tied = self.config.tie_embeddings and isinstance(self.head, OutputHead)
        if is_tied and self.head.weight is not self.embedding.tokens.weight:
            raise RuntimeError(
                "tie_embeddings=True, but the embedding and the head have a matrix each, as to_empty() and "
                "load_state_dict(assign=True) leave them: set model.head.weight = model.embedding.tokens.weight"
            )

    def _check(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        segment_ids: Tensor | None,
        step: int | None,
        sample_ids: Sequence[int] | Tensor | None,
        n_hashes: int | None,
        per_token: bool,
        part: SequencePart,
    ) -> None:
        """Raises what `forward` says."""
        self.check_parameters()
        if step is None and self.training and (self.config.dropout or self.config.attn_dropout):
            raise ValueError(
                "training with dropout needs a step, from which its masks follow: pass step=, the number of updates so "
                "far, or call model.eval()"
            )
        if step is None and self.training and torch.is_grad_enabled() and self.config.has_lsh:
            warnings.warn(
                "training without a step repeats the hash rotations of step 0 in every pass: pass step=, the number of "
                "updates so far, or call model.eval()",
                stacklevel=5,  # whoever calls the module, beyond forward and two of torch's
            )
        if n_hashes is not None and (whole_number("n_hashes", n_hashes) < 1 or not self.config.has_lsh):
            raise ValueError(
                f"n_hashes={n_hashes} must be at least 1, and some layer must use LSH attention "
                f"(attn_pattern is {self.config.attn_pattern}); leave it out to keep the model's {self.config.n_hashes}"
            )
        check_is_tensor(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be [B, T], each at least 1, got {list(tokens.shape)}")
        check_tokens(tokens, self.config.vocab_size)
        if sample_ids is not None:
            _check_sample_ids(sample_ids, len(tokens))
        for name, given in (("labels", labels), ("segment_ids", segment_ids)):
            if given is not None:
                check_is_tensor(given, name)
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(f"segment_ids must be {list(tokens.shape)} like tokens, got {list(segment_ids.shape)}")
        if labels is not None and (labels.shape != tokens.shape or labels.dtype not in INTEGERS):
            raise ValueError(
                f"labels must be integers {list(tokens.shape)} like tokens, got {labels.dtype} {list(labels.shape)}"
            )
        if per_token and (labels is None or torch.is_grad_enabled()):
            raise ValueError(
                "per_token gives the loss of each token without gradients: give labels, in torch.no_grad()"
            )
        if self.config.n_heads % part.n_parts:
            raise ValueError(
                f"a sequence in {part.n_parts} parts needs a number of heads that can be divided by it "
                f"(n_heads={self.config.n_heads}): choose another number of parts"
            )

    def _streams(self, tokens_BT: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The two streams [B, T, M] after the stack; what goes into it does not outlive this call."""
        x = self.embedding(tokens_BT, call.part.start(tokens_BT.shape[1]))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return reversible_stack(self.blocks, x, x, call, self.config.keep_ends)


def _check_sample_ids(sample_ids: Sequence[int] | Tensor, n_samples: int) -> None:
    """Raises TypeError unless there are several, and ValueError unless they are as many as the samples."""
    try:
        n_ids = len(sample_ids)
    except TypeError:
        raise TypeError(f"sample_ids={sample_ids!r} must be a list of whole numbers, one for each sample") from None
    if n_ids != n_samples:
        raise ValueError(f"sample_ids has {n_ids} entries for a batch of {n_samples}: give one for each sample")
