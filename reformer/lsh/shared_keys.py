"""Keys that are queries scaled to length 1, and scores in base 2: what all portable paths share.

Keys carry a factor log2(e), so that a softmax is one of powers of 2: on CPUs exp2 is three times as fast as exp
(measured). Weights are 2 ** (score - top) with top = |q| log2(e), which no score exceeds (Cauchy-Schwarz), known
before any score is. Where queries are so long that such a weight could underflow, the largest visible score is the top.
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)

SAFE_BOUND = {torch.float32: 40.0, torch.float64: 400.0}
"""The smallest weight, 2 ** (-2 * bound), leaves its inverse as much room again before it overflows."""


def key_scale_and_bound(q: Tensor) -> tuple[Tensor, Tensor]:
    """For shared queries [..., D]: what turns them into keys, log2(e) / |q|, and |q| log2(e), both [..., 1].

    The key of a zero vector is zero, without gradient; so is that of one whose norm is no normal number of the dtype.
    In fp32, elements between 1e-18 and 1e18 are safe: beyond, squares leave its range.
    """
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    scale = (LOG2_E / norm).masked_fill_(norm < torch.finfo(q.dtype).tiny, 0)
    return scale, norm.mul_(LOG2_E)


def key_gradient_of_query(q: Tensor, dk: Tensor, key_scale: Tensor) -> Tensor:
    """What reaches q by way of k = q / |q|, all [..., D]: (dk - k (k.dk)) / |q|."""
    inverse_norm = key_scale / LOG2_E
    k = q * inverse_norm
    return dk.sub(k.mul_((k * dk).sum(dim=-1, keepdim=True))).mul_(inverse_norm)
