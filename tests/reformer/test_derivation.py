"""reformer/lsh/README.md says the truth: its equations, by number, in float64, against `lsh_attention`.

Forward and backward are written out by hand, one line an equation, with nothing of the code but the dropout factors.

Axes: R hash rounds, T tokens, D head dim; one sample and head.
"""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from parity import assert_parity
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import reformer.lsh as lsh
from reformer import lsh_attention
from reformer.local import local_attention
from reformer.lsh import chunked, counts, dispatch, dropout, hashing, reference, rounds, scratch, shared_keys
from reformer.lsh.dropout import keep_factor
from reformer.lsh.hashing import default_buckets, hash_to_buckets

README = (Path(inspect.getfile(lsh)).parent / "README.md").read_text(encoding="utf-8")


def buckets_by_hand(q: Tensor, rotations_DRF: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(1) and (2)."""
    rows = []
    for r in range(rotations_DRF.shape[1]):
        digits = [
            torch.cat([q @ part, -q @ part], dim=-1).argmax(dim=-1)
            for part in rotations_DRF[:, r].split([f // 2 for f in factors], dim=-1)
        ]
        bucket = digits[-1]
        for digit, factor in zip(reversed(digits[:-1]), reversed(factors[:-1]), strict=True):
            bucket = digit + factor * bucket
        rows.append(bucket)
    return torch.stack(rows)


def reach_by_hand(
    b_RT: Tensor,
    L: int,
    causal: bool,
    across: bool,
    padding: list[bool] | None = None,
    segments: list[int] | None = None,
) -> Tensor:
    """(3) to (6): n [R, T, T]."""
    (R, T), b = b_RT.shape, b_RT.tolist()
    C = math.ceil(T / L)
    pi, s = padding or [False] * T, segments or [0] * T
    key = [[(pi[i], s[i], b[r][i], i) for i in range(T)] for r in range(R)]
    p = [[sum(key[r][j] < key[r][i] for j in range(T)) for i in range(T)] for r in range(R)]  # (3)
    g = [[r * C + p[r][i] // L for i in range(T)] for r in range(R)]  # (4)
    n = torch.zeros(R, T, T, dtype=torch.float64)
    for r in range(R):
        for i in range(T):
            window = {(g[r][i] + step) % (R * C) for step in ((0, -1) if causal else (0, -1, 1))}  # (5)
            for j in range(T):
                if across:
                    n[r, i, j] = sum(g[other][j] in window for other in range(R))  # (6)
                else:
                    n[r, i, j] = float(g[r][j] in window and b[r][j] == b[r][i])
    return n


def forward_by_hand(q: Tensor, v: Tensor, n: Tensor, mu: Tensor, m: Tensor, correct: bool) -> dict[str, Tensor]:
    """(8) to (19), each form of the output that the text says is the same."""
    c = n * mu  # (8)
    if correct:
        c = c / n.sum(dim=0).clamp(min=1)  # (18)
    k = q / q.norm(dim=-1, keepdim=True)
    s = q @ k.T  # (9)
    lse_r = (c * s.exp()).sum(dim=-1).log()
    o_r = torch.nan_to_num(m * c * (s - lse_r[..., None]).exp(), posinf=0.0) @ v  # (10)
    share = (lse_r - lse_r.logsumexp(dim=0)).exp()
    by_rounds = (share[..., None] * o_r).sum(dim=0)  # (11)
    by_mean = (m * c * s.exp()).sum(dim=0) @ v / (c * s.exp()).sum(dim=(0, 2))[:, None]  # (12)
    tau = q.norm(dim=-1)  # (14)
    w = c * (s - tau[:, None]).exp()  # (13)
    Z = w.sum(dim=(0, 2))
    o = (m * w).sum(dim=0) @ v / Z[:, None]  # (19)
    by_pairs = by_maxima(m, c, s / math.log(2), v)
    alone = Z == 0
    o[alone] = by_pairs[alone] = by_rounds[alone] = by_mean[alone] = v[alone]  # section 7
    assert (s.abs() <= tau[:, None] * (1 + 1e-12)).all()  # (14)
    visible = (c > 0).any(dim=0)
    assert (
        (s - tau[:, None]).exp()[visible] >= (-2 * tau[:, None]).exp().expand_as(s)[visible] * (1 - 1e-12)
    ).all()  # (15)
    once = n.sum(dim=0).clamp(max=1) if correct else n.sum(dim=0)
    c_all = mu * once
    by_counts = (c_all * s.exp()) @ v / (c_all * s.exp()).sum(dim=1)[:, None]  # (29), which has no dropout
    by_counts[alone] = v[alone]
    return {
        "by_counts": by_counts,
        "o": o,
        "by_rounds": by_rounds,
        "by_mean": by_mean,
        "by_maxima": by_pairs,
        "k": k,
        "w": w,
        "Z": Z,
    }


def by_maxima(m: Tensor, c: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """The output by (16) and (17), round after round, in base 2."""
    lowest = torch.finfo(sigma.dtype).min
    total = None
    for r in range(len(c)):
        visible = c[r] > 0
        tau = sigma.masked_fill(~visible, -math.inf).amax(dim=-1).clamp(min=lowest)  # (16)
        w = c[r] * (torch.minimum(sigma, tau[:, None]) - tau[:, None]).exp2()
        found = (tau, w.sum(dim=-1), (m[r] * w) @ v)
        if total is None:
            total = found
            continue
        top = torch.maximum(total[0], tau)  # (17)
        old, new = (total[0] - top).exp2(), (tau - top).exp2()
        total = (top, old * total[1] + new * found[1], old[:, None] * total[2] + new[:, None] * found[2])
    assert total is not None
    return total[2] / total[1][:, None]


def backward_by_hand(q: Tensor, v: Tensor, m: Tensor, g: Tensor, f: dict[str, Tensor]) -> dict[str, Tensor]:
    """(20) to (26)."""
    alone = f["Z"] == 0
    Z = f["Z"].masked_fill(alone, 1)[:, None]
    P = f["w"] / Z
    dv = torch.einsum("rij,id->jd", m * P, g) + alone[:, None] * g  # (20)
    dP = m * (g @ v.T)  # (21)
    delta = (P * dP).sum(dim=(0, 2))
    dS = P * (dP - delta[:, None])  # (22)
    assert torch.allclose(delta[~alone], (g * f["o"]).sum(dim=-1)[~alone], rtol=1e-9, atol=1e-12)  # (23)
    g_hat = g / Z
    delta_hat = (g_hat * f["o"]).sum(dim=-1, keepdim=True)
    assert torch.allclose(dS, f["w"] * (m * (g_hat @ v.T) - delta_hat), rtol=1e-9, atol=1e-12)  # (26)
    dq = dS.sum(dim=0) @ f["k"]  # (24)
    dk = dS.sum(dim=0).T @ q
    k = f["k"]
    dq = dq + (dk - k * (k * dk).sum(dim=-1, keepdim=True)) / q.norm(dim=-1, keepdim=True)  # (25)
    return {"d_qk": dq, "d_v": dv}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equations(causal: bool, across: bool, correct: bool, p: float) -> None:
    T, L, R, factors = 21, 4, 3, (4, 2)
    generator = torch.Generator().manual_seed(3)
    q, v, g = (torch.randn(T, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    rotations = torch.randn(1, 5, R, 3, generator=generator)
    segments = torch.arange(T) // 10  # the last token is alone in its segment
    masked = torch.rand(T, generator=generator) > 0.2
    key = torch.tensor([[12345]])

    options = {"n_hashes": R, "chunk_len": L, "causal": causal, "attend_across_buckets": across}
    options |= {"segment_ids": segments[None], "key_padding_mask": masked[None], "duplicate_correction": correct}
    options |= {"dropout": p, "dropout_keys": key if p else None, "backend": "chunked"}
    leaves = [x[None, None].clone().requires_grad_() for x in (q, v)]
    out, buckets = lsh_attention(*leaves, n_buckets=factors, rotations=rotations, **options)
    d_qk, d_v = torch.autograd.grad(out, leaves, g[None, None])

    b = buckets_by_hand(q, rotations[0].double(), factors)
    assert torch.equal(b, buckets[0, 0].long())
    n = reach_by_hand(b, L, causal, across, (~masked).tolist(), segments.tolist())
    i, j = torch.arange(T)[:, None], torch.arange(T)
    mu = ((j != i) & ((j < i) if causal else (j >= 0)) & masked & (segments[:, None] == segments)).double()  # (7)
    m = torch.stack([keep_factor(key[0], r, i, j, p, torch.float64) for r in range(R)])
    forward = forward_by_hand(q, v, n, mu, m, correct)
    backward = backward_by_hand(q, v, m, g, forward)
    assert (forward["Z"] == 0).any() and (forward["Z"] > 0).sum() > T // 2
    expected = {"out": forward["o"], **backward}
    assert_parity({"out": out.detach()[0, 0], "d_qk": d_qk[0, 0], "d_v": d_v[0, 0]}, expected, 1e-11)
    same = dict.fromkeys(("by_rounds", "by_mean", "by_maxima", *(() if p else ("by_counts",))), forward["o"])
    assert_parity({name: forward[name] for name in same}, same, 1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_counts_are_a_product_of_chunks(causal: bool) -> None:
    """A, B and N of (29), and what the code makes of them."""
    T, L, R = 21, 4, 3
    C = math.ceil(T / L)
    b = torch.randint(0, 4, (R, T), generator=torch.Generator().manual_seed(5))
    p = [[sum((int(b[r, j]), j) < (int(b[r, i]), i) for j in range(T)) for i in range(T)] for r in range(R)]  # (3)
    g = torch.tensor([[r * C + p[r][i] // L for i in range(T)] for r in range(R)])  # (4)
    A = torch.stack([(g == chunk).sum(dim=0) for chunk in range(R * C)])
    B = sum(A.roll(-step, 0) for step in ((0, -1) if causal else (0, -1, 1)))  # (5)
    N = A.T @ B
    assert torch.equal(N, reach_by_hand(b, L, causal, True).sum(dim=0).long())
    whole = slice(0, T)
    pairs = counts.Counts.of(b[None], L, causal, once=False).of_heads(slice(0, 1), torch.float64)
    found = pairs.between(whole, whole)
    assert torch.equal(found[0].long(), N)


def test_a_key_may_stand_twice_in_a_window() -> None:
    """Section 3: a key is found at its place in the round and in the halo."""
    b = torch.tensor([[0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1]])  # token 3 ends round 0 and begins round 1
    n = reach_by_hand(b, 2, causal=True, across=True)
    assert n[1, 0, 3] == 2 and n.max() == 2
    assert torch.equal(n.long(), reference.reach_counts(b, 2, causal=True, attend_across_buckets=True))


def test_a_logsumexp_would_lose_what_section_5_says() -> None:
    for tau, spacing in ((60.0, 2**-18), (1000.0, 2**-14)):
        lower = torch.nextafter(torch.tensor(tau), torch.tensor(math.inf)).item() - tau
        assert lower == spacing


def test_the_safe_bound_of_the_text_is_that_of_the_code() -> None:
    single, double = (chunked.SAFE_BOUND[dtype] for dtype in (torch.float32, torch.float64))
    text = " ".join(README.split())
    assert f"`SAFE_BOUND`: {single:.0f} in fp32, where $2^{{-{2 * single:.0f}}}$" in text
    assert f"and {double:.0f} in float64" in text and f"$2^{{{2 * single:.0f}}} do_i$" in text
    for dtype, bound in chunked.SAFE_BOUND.items():
        assert 2.0 ** (-2 * bound) >= torch.finfo(dtype).tiny


def test_costs_are_those_of_the_text() -> None:
    """(28), of tensors that divide into chunks."""
    T, L, R, D = 256, 16, 3, 8
    for causal, W in ((True, 2 * L), (False, 3 * L)):
        qk, v = (torch.randn(1, 1, T, D, requires_grad=True) for _ in range(2))
        buckets = torch.randint(0, 8, (1, 1, R, T))
        with FlopCounterMode(display=False) as forward:
            out, _ = lsh_attention(qk, v, buckets, n_hashes=R, chunk_len=L, causal=causal, backend="chunked")
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert forward.get_total_flops() == T * 4 * R * W * D
        assert backward.get_total_flops() == T * 10 * R * W * D
    factors = (8, 4)
    with FlopCounterMode(display=False) as hashing_flops:
        hash_to_buckets(torch.randn(1, 1, T, D), torch.randn(1, D, R, sum(factors) // 2), factors)
    assert hashing_flops.get_total_flops() == T * R * D * sum(factors)


def test_the_default_number_of_buckets_is_that_of_the_text() -> None:
    for n_tokens in (64, 4096):
        assert default_buckets(n_tokens, 64) == (2 * n_tokens // 64,)
    assert default_buckets(65_536, 64) == (32, 64)


def test_names_of_the_text_are_names_of_the_code() -> None:
    modules = (chunked, counts, dispatch, dropout, hashing, reference, rounds, scratch, shared_keys)
    code = "\n".join(inspect.getsource(module) for module in modules)
    code += inspect.getsource(local_attention)
    names = set(re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:=\w+)?`", README))
    assert len(names) > 20
    for name in names:
        if name.endswith(".py"):
            assert (Path(inspect.getfile(lsh)).parent / name).is_file(), name
        else:
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", code), f"`{name}` is in the README but not in the code"


def test_equations_are_numbered_in_order() -> None:
    tags = [int(tag) for tag in re.findall(r"\\tag\{(\d+)\}", README)]
    assert tags == list(range(1, len(tags) + 1))
    mentioned = {int(number) for number in re.findall(r"\((\d+)\)", README)}
    assert mentioned <= set(tags)
