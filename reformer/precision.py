"""How far attention in fp32, bf16 and fp16 is from float64, mode by mode: numbers to print and to bound.

Both sides get the same inputs, rounded to the dtype, and the same buckets, so that what is seen is the error of the
computation and the rounding of its results, not that of its inputs. Shapes are awkward on purpose.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from reformer.dense import dense_attention
from reformer.local import local_attention, local_attention_reference
from reformer.lsh import lsh_attention
from reformer.lsh.dispatch import Backend

BATCH, HEADS, TOKENS, D_HEAD, CHUNK = 2, 2, 203, 64, 32


@dataclass(frozen=True)
class Mode:
    """A way of using attention."""

    kind: Literal["lsh", "local", "dense"]
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    """Queries and keys are N(0, scale^2)."""
    masks: tuple[str, ...] = ()
    """Of `make_masks`."""


MODES = {
    "lsh causal": Mode("lsh"),
    "lsh bidirectional": Mode("lsh", {"causal": False}),
    "lsh own bucket": Mode("lsh", {"attend_across_buckets": False}),
    "lsh union of rounds": Mode("lsh", {"duplicate_correction": True, "n_hashes": 8}),
    "lsh masked": Mode("lsh", masks=("padding", "segments")),
    "lsh all alone": Mode("lsh", masks=("alone",)),
    "lsh dropout": Mode("lsh", {"dropout": 0.1}),
    "lsh large scores": Mode("lsh", scale=10.0),
    "lsh huge scores": Mode("lsh", {"causal": False}, scale=1000.0, masks=("padding",)),
    "local causal": Mode("local"),
    "local bidirectional": Mode("local", {"causal": False, "dropout": 0.1}, masks=("padding", "segments")),
    "local huge scores": Mode("local", scale=30.0),
    "dense causal": Mode("dense"),
    "dense bidirectional": Mode("dense", {"causal": False, "dropout": 0.1}, masks=("padding", "segments")),
    "dense huge scores": Mode("dense", scale=1000.0),
}


@dataclass(frozen=True)
class Errors:
    """max |x - exact| / max |exact| of the output and of the gradients, infinite where a number is not finite."""

    largest_score: float
    out: float
    gradients: Mapping[str, float]


def errors_of(mode: Mode, dtype: torch.dtype, device: str = "cpu", backend: Backend = "auto") -> Errors:
    """One mode with inputs of `dtype` on `device` against the oracle in float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, TOKENS, D_HEAD)
    scales = {"q": mode.scale, "k": mode.scale, "v": 1.0, "d_out": 1.0}
    if mode.kind != "local":
        del scales["k"]
    inputs = {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, scale in scales.items()}
    options = {**mode.options, **make_masks(mode.masks)}
    if options.get("dropout"):
        options["dropout_keys"] = torch.arange(BATCH * HEADS).view(BATCH, HEADS)
    n_hashes = options.setdefault("n_hashes", 2) if mode.kind == "lsh" else 1
    buckets = torch.randint(0, 8, (BATCH, HEADS, n_hashes, TOKENS), generator=generator)
    fast = _differentiated(mode.kind, _moved(inputs, device), buckets, _moved(options, device), backend)
    exact = _differentiated(mode.kind, _moved(inputs, dtype=torch.float64), buckets, options, "reference")
    relative = {name: _relative_error(fast[name].cpu(), exact[name]) for name in exact}
    q = inputs["q"].double()
    key_norm = inputs["k"].double().norm(dim=-1).max() * D_HEAD**-0.5 if mode.kind == "local" else 1.0
    return Errors((q.norm(dim=-1).max() * key_norm).item(), relative.pop("out"), relative)


def explained(dtype: torch.dtype, largest_score: float) -> tuple[float, float]:
    """The largest errors of output and gradients that rounding explains.

    Results are rounded to the dtype; a score s, computed in fp32, is off by |s| eps, and so is its weight's logarithm.
    The backward starts from the rounded output, and where the softmax is saturated gradients are small differences.
    """
    rounding, computing = torch.finfo(dtype).eps, (4 + largest_score) * torch.finfo(torch.float32).eps
    return rounding + computing, 4 * (rounding + computing)


def make_masks(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Masks [B, T]: a third of the tokens and the whole of the last row; documents; a document for each token."""
    position = torch.arange(TOKENS).expand(BATCH, -1)
    masks = {}
    if "padding" in names:
        masks["key_padding_mask"] = (position % 3 > 0) & (torch.arange(BATCH) < BATCH - 1)[:, None]
    if "segments" in names:
        masks["segment_ids"] = (position >= 90).long() + (position >= 91).long()
    if "alone" in names:
        masks["segment_ids"] = position
    return masks


def table(dtypes: tuple[torch.dtype, ...], device: str = "cpu", backend: Backend = "auto") -> str:
    """A line per mode and dtype, ready to print."""
    lines = [f"{'mode':22}{'dtype':>10}{'|score|':>9}{'out':>10}{'gradients':>11}"]
    for name, mode in MODES.items():
        for dtype in dtypes:
            errors = errors_of(mode, dtype, device, backend)
            columns = f"{errors.largest_score:9.1f}{errors.out:10.1e}{max(errors.gradients.values()):11.1e}"
            lines.append(f"{name:22}{str(dtype).removeprefix('torch.'):>10}{columns}")
    return "\n".join(lines)


def _differentiated(
    kind: str, inputs: Mapping[str, Tensor], buckets: Tensor, options: Mapping[str, Any], backend: Backend
) -> dict[str, Tensor]:
    """Output and gradients by name; backend "reference" is the oracle of any kind."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "d_out"}
    q, v = leaves["q"], leaves["v"]
    buckets = buckets.to(q.device)
    if kind == "lsh":
        out, _ = lsh_attention(q, v, buckets, chunk_len=CHUNK, backend=backend, **options)
    elif kind == "local" and backend == "reference":
        out = local_attention_reference(q, leaves["k"], v, chunk_len=CHUNK, **options)
    elif kind == "local":
        out = local_attention(q, leaves["k"], v, chunk_len=CHUNK, backend=backend, **options)
    elif backend == "reference":  # one round of one chunk
        out, _ = lsh_attention(q, v, buckets, n_hashes=1, chunk_len=TOKENS, backend=backend, **options)
    else:
        out = dense_attention(q, v, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs["d_out"])
    return {"out": out.detach(), **{f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def _moved(values: Mapping[str, Any], device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {
        name: x.detach().to(device, dtype or x.dtype, copy=True) if isinstance(x, Tensor) else x
        for name, x in values.items()
    }


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative to the largest number; to 1 where all are zero, as the gradients of tokens that are alone."""
    if not (actual.isfinite().all() and exact.isfinite().all()):
        return float("inf")
    largest = exact.abs().max().item()
    return ((actual.double() - exact).abs().max() / (largest or 1.0)).item()
