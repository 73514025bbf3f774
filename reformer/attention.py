"""The attention half of a block: norm, projections, an inner attention, the output projection.

The inner attention is a callable that the layer is given, so that an oracle, a kernel or a wrapper that spreads
heads over ranks slips in without the model knowing. Buckets are values: passed in, returned, never kept.

Heads are independent, so that a long sequence goes through a layer a few heads at a time, forward and backward: of
the whole sequence there are, besides the streams, the projections of these few, their output, and their gradients. (The
last layer of a stack keeps those of all heads from its forward to its backward: see reversible.py.)
Norm and projections go by chunks of tokens, like the feed-forward layers.

Where the tokens are one part of a sequence, a group's heads are divided among the holders of its parts while they
attend: see sequence_part.py.

Axes: B batch, H heads, h heads of a group, T tokens, t tokens of a chunk, D head dim, E = h*D, M model, R hash rounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer.call import Call
from reformer.chunks import ff_chunk_tokens, map_chunks, put, token_slices
from reformer.config import ReformerConfig
from reformer.dense import dense_attention
from reformer.feed_forward import layer_norm
from reformer.gradients import GradientSum, add_product, sums_of_products, with_gradients
from reformer.local import local_attention
from reformer.lsh.dispatch import lsh_attention
from reformer.lsh.hashing import bucket_factors, draw_rotations
from reformer.lsh.scratch import shared_scratch
from reformer.sequence_part import SequencePart

GROUP_NUMBERS = 2**25
"""A group has so many heads that one of its tensors [B, h, T, D] holds so many numbers, or a single head. (Of a whole
sequence: the holders of its parts have their shares of it.)"""
GROUP_NUMBERS_GPU = 2**27
"""The same on a GPU, which has to be kept busy with few launches."""


@dataclass
class HeadGroup:
    """Some heads on their way through a layer: what is saved for their backward, which consumes it.

    Where the tokens are a part of a sequence, the tensors are of the own heads, h of them, and of all its tokens.
    """

    columns: slice
    """Where the group stands in the merged output, of H*D; and in the rows of the projections."""
    projected: list[Tensor]
    """[B, h, T, D] for each projection."""
    out: Tensor
    """The inner attention's output [B, h, T, D]; with its graph, if `projected` are its leaves."""


BY_HAND = ("project", "merged")
"""Methods of a layer whose backward is written out."""


class _Attention(nn.Module):
    """What all kinds share. Parameters are the module's own: see `FeedForward` for why."""

    projections: tuple[str, ...]
    inner: Callable[..., Any]
    """Attention of heads that are projected; the seam that oracles and diagnostics replace, on a layer."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        assert config.d_head is not None  # filled in by the config
        self.config, self.layer, self.n_heads = config, layer, config.n_heads
        self.d_head, inner_width = config.d_head, config.n_heads * config.d_head
        self.norm_weight = nn.Parameter(torch.ones(config.d_model))
        self.norm_bias = nn.Parameter(torch.zeros(config.d_model))
        for name in self.projections:
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(inner_width, config.d_model)))
        self.out_weight = nn.Parameter(torch.empty(config.d_model, inner_width))
        for name in (*self.projections, "out"):
            nn.init.xavier_uniform_(self.get_parameter(f"{name}_weight"))

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse what the backward of `_with_gradients`, which knows these projections alone, would get wrong."""
        super().__init_subclass__(**options)
        for name in BY_HAND:
            if getattr(cls, name) is not getattr(_Attention, name):
                raise TypeError(f"{cls.__name__}.{name} would get no gradient: put what it is to do into `inner`")

    def __setattr__(self, name: str, value: Any) -> None:
        """The same for what is put into a layer; a module as `inner` is a function, and not one of its children."""
        if name in BY_HAND:
            raise TypeError(f"{name} of a layer would get no gradient: put what it is to do into `inner`")
        if name != "inner":
            return super().__setattr__(name, value)
        owner = getattr(value, "__self__", value)
        if isinstance(owner, nn.Module) and any(True for _ in owner.parameters()):
            raise TypeError("`inner` has parameters, which would get no gradient: give a function without any")
        return object.__setattr__(self, name, value)

    def forward(
        self,
        x_BTM: Tensor,
        call: Call,
        buckets: Tensor | None = None,
        *,
        held: list[HeadGroup] | None = None,
        d_out_BTM: Tensor | None = None,
        needs_output: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The output [B, T, M], and LSH attention's buckets [B, H, R, T]; given buckets, nothing is hashed.

        Where the tokens are a part of a sequence, the buckets are those of the heads that this holder attends with, of
        the whole sequence.

        With an empty list `held` the output has no graph, and what the backward needs is put there.

        Given the gradient of the output, as in `FeedForward`: the output without a graph (None unless it is needed),
        and the scalar <output, d_out>, whose backward gives x and the parameters their gradients, each once. What is
        in `held` is not computed again. (Backwards, too, are calls of `forward`: DeepSpeed's ZeRO-3 gathers a module's
        parameters by its hooks.)
        """
        if d_out_BTM is not None:
            groups = _taken(held) if held else self._groups(x_BTM, call, buckets, differentiable=True)
            with torch.no_grad(), shared_scratch():
                out, gradients = self._with_gradients(x_BTM, call.part, groups, d_out_BTM, needs_output)
            inner_product = torch.zeros(())  # only its gradient is asked for: on the CPU, where it is seen to be 1
            parameters = [self.norm_weight, self.norm_bias, *self.projection_weights, self.out_weight]
            self._refuse_others(parameters)
            return out, with_gradients(inner_product, [x_BTM, *parameters], gradients)
        out, used = None, []
        with shared_scratch():
            for group, bucket in self._groups(x_BTM, call, buckets, differentiable=held is not None):
                out = self.merged(call.part.to_tokens([group.out])[0], group.columns, out)
                used.append(bucket)
                if held is not None:
                    held.append(group)
                del group  # before the next one is made
        found = [bucket for bucket in used if bucket is not None]
        return out, torch.cat(found, dim=1) if found else None

    def _refuse_others(self, known: list[Tensor]) -> None:
        """Raise a RuntimeError for parameters to be trained beside those that get their gradients by hand, and what
        these are made of: by torch.nn.utils.parametrize, or weight_norm."""
        made_of = ("parametrizations.", *(f"{name}_weight_" for name in (*self.projections, "out", "norm")))
        others = [
            name
            for name, own in self.named_parameters()
            if own.requires_grad and all(own is not each for each in known) and not name.startswith(made_of)
        ]
        if others:
            raise RuntimeError(f"an attention layer has parameters that would get no gradient: {', '.join(others)}")

    def attend(
        self, projected: list[Tensor], call: Call, buckets: Tensor | None, heads: slice
    ) -> tuple[Tensor, Tensor | None]:
        """The inner attention's output [B, h, T, D] for some heads, and buckets if there are any.

        Of a whole sequence: where the tokens of the layer are a part of one, these heads are this holder's.
        """
        raise NotImplementedError

    def project(self, x_BTM: Tensor, columns: slice = slice(None)) -> list[Tensor]:
        """Norm and projections, [B, h, T, D] for each projection, of the heads that stand in these columns."""
        weights = [weight[columns] for weight in self.projection_weights]

        def projected(x_BtM: Tensor) -> tuple[Tensor, ...]:
            normed = layer_norm(x_BtM, self.norm_weight, self.norm_bias, self.config.norm_eps)
            return tuple(self._heads(F.linear(normed, weight)) for weight in weights)

        return [x.transpose(1, 2) for x in map_chunks(projected, x_BTM, self._at_once(x_BTM))]

    @property
    def projection_weights(self) -> list[Tensor]:
        return [getattr(self, f"{name}_weight") for name in self.projections]

    def mode(self, call: Call, heads: slice, device: torch.device) -> dict[str, Any]:
        """The arguments that every kind of inner attention takes."""
        keys_BH = call.attn_dropout_keys(self.layer, self.n_heads, device)
        return {
            "causal": self.config.causal,
            "segment_ids": call.segment_ids_BT,
            "dropout": call.attn_dropout,
            "dropout_keys": None if keys_BH is None else keys_BH[:, heads],
        }

    def _at_once(self, x_BT: Tensor) -> int:
        """Tokens that norm and projections take at a time."""
        return ff_chunk_tokens(self.config, x_BT)

    def _slices(self, x_BT: Tensor) -> Iterator[slice]:
        return token_slices(x_BT.shape[1], self._at_once(x_BT))

    def _heads(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.unflatten(-1, (-1, self.d_head))

    def _groups(
        self, x_BTM: Tensor, call: Call, buckets: Tensor | None, differentiable: bool
    ) -> Iterator[tuple[HeadGroup, Tensor | None]]:
        """All heads, group by group, with the buckets of each; `differentiable` in the sense of `HeadGroup.out`."""
        numbers = GROUP_NUMBERS if x_BTM.device.type == "cpu" else GROUP_NUMBERS_GPU
        n_samples, n_tokens, n_parts = x_BTM.shape[0], call.part.seq_len(x_BTM.shape[1]), call.part.n_parts
        at_once = max(1, numbers // (n_samples * n_tokens * self.d_head))
        at_once = -(-at_once // n_parts) * n_parts  # every holder gets as many of a group
        for start in range(0, self.n_heads, at_once):
            heads = slice(start, min(start + at_once, self.n_heads))
            held = None if buckets is None else buckets[:, call.part.held_heads(heads)]
            yield self._group(x_BTM, call, held, heads, differentiable)

    def _group(
        self, x_BTM: Tensor, call: Call, buckets: Tensor | None, heads: slice, differentiable: bool
    ) -> tuple[HeadGroup, Tensor | None]:
        columns = slice(heads.start * self.d_head, heads.stop * self.d_head)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not differentiable):
            projected = call.part.to_heads(self.project(x_BTM, columns))
        if differentiable:
            projected = [x_BhTD.requires_grad_() for x_BhTD in projected]
        with torch.set_grad_enabled(torch.is_grad_enabled() or differentiable):
            out_BhTD, used = self.attend(projected, call, buckets, call.part.own_heads(heads))
        return HeadGroup(columns, projected, out_BhTD), used

    def merged(self, out_BhTD: Tensor, columns: slice = slice(None), total_BTM: Tensor | None = None) -> Tensor:
        """The output projection [B, T, M] of the heads that stand in these columns, added to that of others."""
        out_BThD, weight = out_BhTD.transpose(1, 2), self.out_weight[:, columns]
        if total_BTM is None or torch.is_grad_enabled():
            at_once = self._at_once(out_BThD)
            (part_BTM,) = map_chunks(lambda x: (F.linear(x.flatten(2), weight),), out_BThD, at_once)
            return part_BTM if total_BTM is None else total_BTM + part_BTM
        for tokens in self._slices(out_BThD):
            total_BTM[:, tokens] += F.linear(out_BThD[:, tokens].flatten(2), weight)
        return total_BTM

    def _with_gradients(
        self,
        x_BTM: Tensor,
        part: SequencePart,
        groups: Iterator[tuple[HeadGroup, Tensor | None]],
        d_out_BTM: Tensor,
        needs_output: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The output if it is needed, and the gradients of x, the norm's parameters, the projections and the merge."""
        out_BTM, d_x_BTM = None, torch.empty_like(x_BTM)
        weight_sums = sums_of_products([*self.projection_weights, self.out_weight])
        *projection_sums, out_sum = weight_sums
        for group, _ in groups:
            (out_BhTD,) = part.to_tokens([group.out.detach()])
            d_projected_BhTD = self._through_merge(group, part, out_BhTD, d_out_BTM, out_sum)
            # Here, not where the most is alive.
            out_BTM = self.merged(out_BhTD, group.columns, out_BTM) if needs_output else None
            self._through_projections(x_BTM, group.columns, d_projected_BhTD, projection_sums, d_x_BTM)
            del group, out_BhTD, d_projected_BhTD  # before the next group is made
        return out_BTM, [d_x_BTM, *self._through_norm(x_BTM, d_x_BTM), *weight_sums]

    def _through_merge(
        self, group: HeadGroup, part: SequencePart, out_BhTD: Tensor, d_out_BTM: Tensor, out_sum: Tensor
    ) -> list[Tensor]:
        """The gradients of a group's projections [B, h, T, D]; adds that of the output projection to its sum.

        out_BhTD: the group's output, of the tokens of the layer. The group gives up its own.
        """
        dtype, weight = group.out.dtype, self.out_weight[:, group.columns]
        batch, n_tokens, _ = d_out_BTM.shape
        d_BThD = None
        for tokens in self._slices(d_out_BTM):
            d_out = d_out_BTM[:, tokens].flatten(0, 1).to(dtype)
            out = out_BhTD[:, :, tokens].transpose(1, 2).flatten(2).flatten(0, 1)
            add_product(out_sum[:, group.columns], d_out.T, out, is_first=tokens.start == 0)
            d_BThD = put(d_BThD, tokens, self._heads((d_out @ weight).unflatten(0, (batch, -1))), n_tokens)
        assert d_BThD is not None
        d_out_of_heads = part.to_heads([d_BThD.transpose(1, 2).to(dtype)])
        del d_BThD
        d_projected = torch.autograd.grad([group.out], group.projected, d_out_of_heads)
        group.projected, group.out = [], out_BhTD
        return part.to_tokens(d_projected)

    def _through_projections(
        self, x_BTM: Tensor, columns: slice, d_BhTD: list[Tensor], sums: list[Tensor], d_normed_BTM: Tensor
    ) -> None:
        """Adds a group's gradients of the projections' weights to their sums, and of norm(x) to that of others."""
        weights = torch.cat([weight[columns] for weight in self.projection_weights])
        for tokens in self._slices(x_BTM):
            normed_BtM = layer_norm(x_BTM[:, tokens], self.norm_weight, self.norm_bias, self.config.norm_eps)
            # Side by side by one copy: the projections, of each its heads, of each its numbers.
            d_projected = torch.cat([d[:, :, tokens].transpose(1, 2) for d in d_BhTD], dim=2).flatten(2).flatten(0, 1)
            normed = normed_BtM.flatten(0, 1).to(d_projected.dtype)
            for total, d in zip(sums, d_projected.chunk(len(sums), dim=-1), strict=True):
                add_product(total[columns], d.T, normed, is_first=tokens.start == 0)
            part = (d_projected @ weights).view_as(normed_BtM)
            if columns.start:
                d_normed_BTM[:, tokens] += part
            else:
                d_normed_BTM[:, tokens] = part

    def _through_norm(self, x_BTM: Tensor, d_BTM: Tensor) -> list[Tensor]:
        """From the gradient of norm(x) to that of x, in its place; returns those of the norm's parameters."""
        sums = GradientSum([self.norm_weight, self.norm_bias])
        norm_weight, norm_bias = sums.aliases
        for tokens in self._slices(x_BTM):
            with torch.enable_grad():
                x_BtM = x_BTM[:, tokens].detach().requires_grad_()
                normed_BtM = layer_norm(x_BtM, norm_weight, norm_bias, self.config.norm_eps)
            (d_BTM[:, tokens],) = sums.add(normed_BtM, [x_BtM], d_BTM[:, tokens].to(normed_BtM.dtype))
        return sums.sums


def _taken(held: list[HeadGroup]) -> Iterator[tuple[HeadGroup, None]]:
    """The groups, each one's only reference handed over."""
    while held:
        yield held.pop(0), None


class LocalSelfAttention(_Attention):
    """Sliding-chunk attention with separate queries and keys."""

    projections = ("query", "key", "value")
    inner = staticmethod(local_attention)

    def attend(self, projected: list[Tensor], call: Call, buckets: Tensor | None, heads: slice) -> tuple[Tensor, None]:
        mode = self.mode(call, heads, projected[0].device)
        return self.inner(*projected, chunk_len=self.config.local_chunk_len, **mode), None


class DenseSelfAttention(_Attention):
    """Attention to everything, with the parameters of `LSHSelfAttention`, so that each can use the other's."""

    projections = ("qk", "value")
    inner = staticmethod(dense_attention)

    def attend(self, projected: list[Tensor], call: Call, buckets: Tensor | None, heads: slice) -> tuple[Tensor, None]:
        return self.inner(*projected, **self.mode(call, heads, projected[0].device)), None


class LSHSelfAttention(_Attention):
    """Multi-round LSH attention with shared queries and keys."""

    projections = ("qk", "value")
    inner = staticmethod(lsh_attention)

    def attend(
        self, projected: list[Tensor], call: Call, buckets: Tensor | None, heads: slice
    ) -> tuple[Tensor, Tensor]:
        config, (qk, v) = self.config, projected
        n_hashes = call.n_hashes or config.n_hashes
        factors = bucket_factors(config.n_buckets, qk.shape[2], config.lsh_chunk_len)
        rotations = None
        if buckets is None:
            rotations = draw_rotations(
                config.n_heads, qk.shape[-1], n_hashes, factors, call.seed, call.step, self.layer
            )[heads]
        return self.inner(
            qk,
            v,
            buckets,
            n_hashes=n_hashes,
            chunk_len=config.lsh_chunk_len,
            n_buckets=factors,
            attend_across_buckets=config.attend_across_buckets,
            duplicate_correction=config.duplicate_correction,
            rotations=rotations,
            **self.mode(call, heads, qk.device),
        )
