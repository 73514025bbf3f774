"""How far fp32, bf16 and fp16 are from exact: attention mode by mode, and the reversible stack by depth.

    python -m reformer.precision

Attention is compared with float64. Both sides get the same inputs, rounded to the dtype, and the same buckets, so
that what is seen is the error of the computation and the rounding of its results, not that of its inputs. Shapes are
awkward on purpose.

A reversible stack reconstructs its inputs, but for rounding, and differentiates at what it reconstructed. Its table
says how far that is from the inputs, and how far its gradients are from those of plain autograd in the same dtypes,
beside what the dtypes themselves do to the latter.

Axes: B batch, T tokens, M model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from reformer.call import Call
from reformer.config import ReformerConfig
from reformer.dense import dense_attention
from reformer.diagnostics import by_blocks, inverse_error
from reformer.local import local_attention, local_attention_reference
from reformer.lsh.dispatch import Backend, lsh_attention
from reformer.model import Reformer
from reformer.reversible import reversible_stack

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


def errors_of(mode: Mode, dtype: torch.dtype) -> Errors:
    """One mode with inputs of `dtype` against the oracle in float64."""
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
    fast = _differentiated(mode.kind, inputs, buckets, options, "auto")
    exact_inputs = {name: x.detach().double() for name, x in inputs.items()}
    exact = _differentiated(mode.kind, exact_inputs, buckets, options, "reference")
    relative = {name: _relative_error(fast[name], exact[name]) for name in exact}
    q = inputs["q"].double()
    key_norm = inputs["k"].double().norm(dim=-1).max() * D_HEAD**-0.5 if mode.kind == "local" else 1.0
    return Errors((q.norm(dim=-1).max() * key_norm).item(), relative.pop("out"), relative)


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


def table(dtypes: tuple[torch.dtype, ...]) -> str:
    """A line per mode and dtype, ready to print."""
    lines = [f"{'mode':22}{'dtype':>10}{'|score|':>9}{'out':>10}{'gradients':>11}"]
    for name, mode in MODES.items():
        for dtype in dtypes:
            errors = errors_of(mode, dtype)
            columns = f"{errors.largest_score:9.1f}{errors.out:10.1e}{max(errors.gradients.values()):11.1e}"
            lines.append(f"{name:22}{str(dtype).removeprefix('torch.'):>10}{columns}")
    return "\n".join(lines)


def _differentiated(
    kind: str, inputs: Mapping[str, Tensor], buckets: Tensor, options: Mapping[str, Any], backend: Backend
) -> dict[str, Tensor]:
    """Output and gradients by name; backend "reference" is the oracle of any kind."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "d_out"}
    q, v = leaves["q"], leaves["v"]
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


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative to the largest number; to 1 where all are zero, as the gradients of tokens that are alone."""
    if not (actual.isfinite().all() and exact.isfinite().all()):
        return float("inf")
    largest = exact.abs().max().item()
    return ((actual.double() - exact).abs().max() / (largest or 1.0)).item()


@dataclass(frozen=True)
class Numerics:
    """The dtypes of a reversible stack."""

    weights: torch.dtype
    streams: torch.dtype = torch.float32
    """Of the two residual streams; a model keeps them in fp32 or better."""
    autocast: bool = False
    """Whether products are in bf16 by autocast."""


NUMERICS = {
    "fp32": Numerics(torch.float32),
    "autocast bf16": Numerics(torch.float32, autocast=True),
    "bf16 weights": Numerics(torch.bfloat16),
    "fp16 weights": Numerics(torch.float16),
    "bf16 weights and streams": Numerics(torch.bfloat16, streams=torch.bfloat16),
}
"""The last is for comparison: no model is so."""

DEPTHS = (2, 6, 12, 24)
STACK = ReformerConfig(vocab_size=256, max_seq_len=2048, d_model=128, n_heads=4, n_hashes=2)
"""Local and LSH layers in turn. All of the table takes two minutes of one CPU core, most of them for fp16."""


@dataclass(frozen=True)
class StackErrors:
    """What a backward that reconstructs its inputs does to them and to the gradients.

    Gradients are those of the inputs and of all parameters as one vector, errors |difference| / |vector|, Euclidean.
    """

    inputs: float
    """max |x - x'| / rms x, x' what the whole stack's inverse makes of its outputs."""
    gradients: float
    """Of the reversible backward, from those of plain autograd in the same dtypes. With relu, an activation that is
    reconstructed on the other side of 0 counts as a whole: in fp32, 12 layers, 2.5e-4, and 1.3e-6 with gelu."""
    rounding: float
    """Of plain autograd, from those in float64 with the same weights, inputs and buckets: what to compare with."""


def stack_errors(numerics: Numerics, n_layers: int, config: ReformerConfig = STACK) -> StackErrors:
    """Of a freshly initialised stack of n_layers, in training but for dropout; d_y is N(0, 1 / T).

    The global random state is left alone.
    """
    config, call = config.model_copy(update={"n_layers": n_layers}), Call(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reformer(config).to(numerics.weights)
        embedded = model.embedding(torch.randint(config.vocab_size, (1, config.max_seq_len)))
        d_y = [torch.randn(embedded.shape) * config.max_seq_len**-0.5 for _ in range(2)]
    x = embedded.detach().to(numerics.streams).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=numerics.autocast):
        y, buckets = by_blocks(model, x, call)
        error = inverse_error(model, x, y, buckets, call)
        plain = _gradient_vector(model, x, y, d_y)
        reversible = _gradient_vector(model, x, reversible_stack(model.blocks, x, x, call), d_y)
    model, x = model.double(), x.detach().double().requires_grad_()
    exact = _gradient_vector(model, x, by_blocks(model, x, call, buckets)[0], d_y)
    return StackErrors(
        error, ((reversible - plain).norm() / plain.norm()).item(), ((plain - exact).norm() / exact.norm()).item()
    )


def stack_table() -> str:
    """A line per dtypes and depth, ready to print."""
    lines = [f"{'reversible stack':26}{'layers':>8}{'inputs':>10}{'gradients':>11}{'rounding':>10}"]
    for name, numerics in NUMERICS.items():
        for n_layers in DEPTHS:
            errors = stack_errors(numerics, n_layers)
            lines.append(f"{name:26}{n_layers:8}{errors.inputs:10.1e}{errors.gradients:11.1e}{errors.rounding:10.1e}")
    return "\n".join(lines)


def _gradient_vector(model: Reformer, x_BTM: Tensor, y: tuple[Tensor, Tensor], d_y: Sequence[Tensor]) -> Tensor:
    """The gradients of the inputs and of all parameters, one behind the other in float64; none is left behind."""
    torch.autograd.backward(y, [d.to(stream.dtype) for d, stream in zip(d_y, y, strict=True)])
    parts = []
    for leaf in (x_BTM, *model.blocks.parameters()):
        assert leaf.grad is not None
        parts.append(leaf.grad.double().flatten())
        leaf.grad = None
    return torch.cat(parts)


def main() -> None:
    print(table((torch.float32, torch.bfloat16, torch.float16)))
    print()
    print(stack_table())


if __name__ == "__main__":
    main()
