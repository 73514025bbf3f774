"""The fused kernels against the float64 oracles, outputs and gradients: on a GPU, or else in Triton's interpreter.

The interpreter takes milliseconds for what a GPU does in nanoseconds, so sizes are small and the cases are chosen,
not multiplied out. Fresh memory is NaN here, so that what a kernel forgets to write shows.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from reformer import lsh_attention
from reformer.local import local_attention, local_attention_reference
from reformer.lsh import dispatch, triton_attention
from reformer.lsh.rounds import Layout

if not find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    import triton.language as tl

    assert "Interpreted" in type(tl.sum).__name__, (
        "Triton was imported as a compiler before tests/reformer/conftest.py could import it as an interpreter: "
        "run tests/reformer by itself, or import what imports Triton inside of the test that needs it"
    )

Options = dict[str, object]


@pytest.fixture(autouse=True)
def _interpreter_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate: object) -> object:
    def fresh(*arguments: object, **options: object) -> Tensor:
        x = allocate(*arguments, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return fresh


def heads(n: int, n_tokens: int, d_head: int, batch: int = 1, n_heads: int = 2) -> list[Tensor]:
    """Leaves [B, H, T, D] with the strides of a model's projections, whose rows are not one behind the other."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(batch, n_tokens, n_heads, d_head, generator=generator) for _ in range(n)]
    return [x.to(DEVICE).transpose(1, 2).detach().requires_grad_() for x in rows]


def outcome(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.device, torch.bfloat16)
    grads = torch.autograd.grad(out, list(inputs.values()), d_out.to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


def exactly(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def assert_lsh_equals_oracle(
    n_tokens: int, n_hashes: int, chunk_len: int, d_head: int, causal: bool, tolerance: float = 5e-6, **options: object
) -> None:
    dtype = options.pop("dtype", torch.float32)
    batch = len(options["segment_ids"]) if "segment_ids" in options else 1
    qk, v = (x.detach().to(dtype).requires_grad_() for x in heads(2, n_tokens, d_head, batch))
    buckets = torch.randint(0, 4, (batch, 2, n_hashes, n_tokens), generator=torch.Generator().manual_seed(1))
    options = {
        "n_hashes": n_hashes,
        "chunk_len": chunk_len,
        "causal": causal,
        **{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()},
    }
    out, _ = lsh_attention(qk, v, buckets.to(DEVICE), backend="triton", **options)
    fast = outcome(out, {"qk": qk, "v": v})
    assert {x.dtype for x in fast.values()} == {dtype}
    qk, v = exactly(qk), exactly(v)
    out, _ = lsh_attention(qk, v, buckets.to(DEVICE), backend="reference", **options)
    assert_parity({name: x.double() for name, x in fast.items()}, outcome(out, {"qk": qk, "v": v}), tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n_tokens", "n_hashes", "chunk_len", "d_head"),
    [
        (1, 1, 16, 16),
        (1, 4, 16, 16),
        (5, 2, 16, 24),
        (16, 1, 16, 32),
        (17, 4, 16, 16),
        (63, 1, 32, 32),
        (63, 2, 16, 24),
    ],
)
def test_equals_oracle(n_tokens: int, n_hashes: int, chunk_len: int, d_head: int, causal: bool) -> None:
    assert_lsh_equals_oracle(n_tokens, n_hashes, chunk_len, d_head, causal)


def test_many_chunks_and_rounds() -> None:
    assert_lsh_equals_oracle(100, 4, 16, 16, causal=True)


@pytest.mark.parametrize("d_head", [64, 128])
@pytest.mark.parametrize("with_all", [False, True])
def test_chunks_that_fill_the_tensor_cores_equal_oracle(d_head: int, with_all: bool) -> None:
    """As they are trained: blocks of 64 rows in half precision, several documents in a row."""
    everything = {
        "attend_across_buckets": False,
        "duplicate_correction": True,
        "dropout": 0.2,
        "dropout_keys": torch.tensor([[1, 2]]),
    }
    options = {"segment_ids": (torch.arange(200) >= 70)[None].long(), **(everything if with_all else {})}
    tolerance = 16 * torch.finfo(torch.bfloat16).eps
    assert_lsh_equals_oracle(200, 4, 64, d_head, True, tolerance, dtype=torch.bfloat16, **options)


def masks(n_tokens: int) -> Options:
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(2, n_tokens, generator=generator) > 0.3
    seen[1] = False  # a row that is all padding
    return {
        "key_padding_mask": seen,
        "segment_ids": torch.randint(0, 3, (2, n_tokens), generator=generator).sort().values,
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        masks(40),
        {"attend_across_buckets": False},
        {"dropout": 0.4, "dropout_keys": torch.tensor([[7, -(2**31)]])},
    ],
    ids=lambda options: "-".join(options),
)
def test_modes_equal_oracle(causal: bool, options: Options) -> None:
    assert_lsh_equals_oracle(40, 2, 16, 16, causal, **options)


@pytest.mark.parametrize("attend_across_buckets", [True, False])
def test_duplicate_correction_equals_oracle(attend_across_buckets: bool) -> None:
    options = {"duplicate_correction": True, "attend_across_buckets": attend_across_buckets}
    assert_lsh_equals_oracle(20, 2, 16, 16, causal=False, **options)


def test_everything_at_once_equals_oracle() -> None:
    options = {"attend_across_buckets": False, "duplicate_correction": True, "dropout": 0.2, **masks(18)}
    assert_lsh_equals_oracle(18, 2, 16, 16, causal=True, dropout_keys=torch.tensor([[1, 2], [3, 4]]), **options)


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_of_several_blocks_equal_oracle(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """As chunks of 128 are on a GPU: a program has a part of a chunk, and loops over all of its window."""
    monkeypatch.setitem(triton_attention.BLOCK, 4, 16)
    assert_lsh_equals_oracle(70, 1, 32, 16, causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype) -> None:
    assert_lsh_equals_oracle(63, 2, 16, 32, True, 16 * torch.finfo(dtype).eps, dtype=dtype)


def test_norms_of_queries_in_half_precision_are_fp32() -> None:
    q = torch.randn(1, 16, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    *_, key_scale = triton_attention._forward(q, None, q, layout_of(16, 16))
    torch.testing.assert_close(key_scale.double(), 1 / q.double().norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU multiplies in half precision, which is as coarse")
def test_rounds_are_added_up_in_fp32() -> None:
    """Added up in bf16, eight rounds are off by two units in the last place."""
    assert_lsh_equals_oracle(32, 8, 16, 16, True, 1.25 * torch.finfo(torch.bfloat16).eps, dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-6, 300.0])
def test_large_and_small_queries_equal_oracle(scale: float) -> None:
    """Scores in the hundreds: their sum of weights would be lost in a logsumexp."""
    qk, v = heads(2, 40, 16)
    with torch.no_grad():
        qk[:, :, ::2] *= scale
    buckets = torch.zeros(1, 2, 2, 40, dtype=torch.int64, device=DEVICE)
    options = {"n_hashes": 2, "chunk_len": 16}
    fast = outcome(lsh_attention(qk, v, buckets, backend="triton", **options)[0], {"qk": qk, "v": v})
    qk, v = exactly(qk), exactly(v)
    exact = outcome(lsh_attention(qk, v, buckets, backend="reference", **options)[0], {"qk": qk, "v": v})
    assert_parity({name: x.double() for name, x in fast.items()}, exact, 1e-3 if scale > 1 else 5e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n_tokens", "options"),
    [(1, {}), (63, {}), (40, masks(40)), (40, {"dropout": 0.4, "dropout_keys": torch.tensor([[7, 8]])})],
)
def test_local_equals_oracle(n_tokens: int, options: Options, causal: bool) -> None:
    batch = 2 if "segment_ids" in options else 1
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    inputs = dict(zip("qkv", heads(3, n_tokens, 24, batch), strict=True))
    fast = outcome(local_attention(**inputs, chunk_len=16, causal=causal, backend="triton", **options), inputs)
    inputs = {name: exactly(x) for name, x in inputs.items()}
    exact = outcome(local_attention_reference(**inputs, chunk_len=16, causal=causal, **options), inputs)
    # One token alone has no gradient of its query: what there is, is rounding.
    assert_parity({name: x.double() for name, x in fast.items()}, exact, 5e-6 if n_tokens > 1 else 1e-3)


def columns(n: int, n_tokens: int, d_head: int) -> list[Tensor]:
    """Leaves [1, 2, T, D] whose last stride is not 1."""
    return [x.detach().mT.contiguous().mT.requires_grad_() for x in heads(n, n_tokens, d_head)]


def sums(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a gradient of the output that is one number, expanded."""
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    return {"out": out.detach(), **{f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


def test_heads_and_gradients_of_any_strides_equal_oracle() -> None:
    inputs = dict(zip("qkv", columns(3, 20, 16), strict=True))
    fast = sums(local_attention(**inputs, chunk_len=16, backend="triton"), inputs)
    inputs = {name: exactly(x) for name, x in inputs.items()}
    exact = sums(local_attention_reference(**inputs, chunk_len=16), inputs)
    assert_parity({name: x.double() for name, x in fast.items()}, exact, 5e-6)


def test_buckets_of_any_strides_equal_oracle() -> None:
    """Of each token those of all rounds, as a caller may have them."""
    qk, v = columns(2, 20, 16)
    buckets = torch.randint(0, 3, (1, 2, 20, 2), generator=torch.Generator().manual_seed(1)).to(DEVICE).mT
    options = {"n_hashes": 2, "chunk_len": 16, "attend_across_buckets": False, "duplicate_correction": True}
    out, _ = lsh_attention(qk, v, buckets, backend="triton", **options)
    fast = sums(out, {"qk": qk, "v": v})
    qk, v = exactly(qk), exactly(v)
    out, _ = lsh_attention(qk, v, buckets, backend="reference", **options)
    assert_parity({name: x.double() for name, x in fast.items()}, sums(out, {"qk": qk, "v": v}), 5e-6)


def test_zero_vectors_equal_oracle() -> None:
    qk, v = heads(2, 40, 16)
    with torch.no_grad():
        qk[:, :, 3:30:5] = 0
    buckets = torch.arange(40, device=DEVICE).remainder(3).expand(1, 2, 2, 40)
    out, _ = lsh_attention(qk, v, buckets, n_hashes=2, chunk_len=16, backend="triton")
    fast = outcome(out, {"qk": qk, "v": v})
    qk, v = exactly(qk), exactly(v)
    out, _ = lsh_attention(qk, v, buckets, n_hashes=2, chunk_len=16, backend="reference")
    assert_parity({name: x.double() for name, x in fast.items()}, outcome(out, {"qk": qk, "v": v}), 5e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here, and the interpreter runs one program after the other")
def test_two_runs_are_equal_to_the_bit() -> None:
    results = []
    for _ in range(2):
        qk, v = heads(2, 5000, 64)
        buckets = torch.arange(5000, device=DEVICE).remainder(3).expand(1, 2, 2, 5000)
        out, _ = lsh_attention(qk, v, buckets, n_hashes=2, chunk_len=16, backend="triton")
        results.append(outcome(out, {"qk": qk, "v": v}))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_penalty_on_gradients_is_refused() -> None:
    qk, v = heads(2, 17, 16)
    out, _ = lsh_attention(qk, v, n_hashes=1, chunk_len=16, backend="triton")
    with pytest.raises(RuntimeError, match=r"second derivatives .* through the fused kernels of attention"):
        torch.autograd.grad(out.sum(), qk, create_graph=True)


def layout_of(n_tokens: int, chunk_len: int, **options: object) -> Layout:
    order = torch.arange(n_tokens, dtype=torch.int32, device=DEVICE).expand(1, 1, -1)
    return Layout(order, order, chunk_len, **{"causal": True, "is_lsh": True, **options})


@pytest.mark.parametrize(
    ("q", "layout", "reason"),
    [
        (torch.zeros(1, 64, 16, dtype=torch.float64), layout_of(64, 16), "float64"),
        (torch.zeros(1, 48, 16), layout_of(48, 24), "16, 32, 64, 128, 256, not 24"),
        (torch.zeros(1, 64, 256), layout_of(64, 16), "up to 128, not to 256"),
        (torch.zeros(1, 64, 16), layout_of(64, 16, is_lsh=False), "keys of their own"),
    ],
)
def test_what_cannot_run_says_why(q: Tensor, layout: Layout, reason: str) -> None:
    assert reason in (triton_attention.why_not(q.to(DEVICE), None, layout) or "")
    with pytest.raises(ValueError, match=f"cannot run: .*{reason}"):
        dispatch.attention_in_chunks(q.to(DEVICE), None, q.to(DEVICE), layout, "triton")
    with pytest.raises(ValueError, match=f"the Triton path cannot run: .*{reason}.*; take backend='chunked' or 'auto'"):
        triton_attention.triton_attention(q.to(DEVICE), None, q.to(DEVICE), layout)


def test_a_head_may_be_128_wide_and_no_wider() -> None:
    reasons = [triton_attention.why_no_kernel(torch.zeros(1, 64, width, device=DEVICE)) for width in (128, 129)]
    assert reasons == [None, "its head dims go up to 128, not to 129"]


def test_keys_of_their_own_go_with_one_local_round() -> None:
    q = torch.zeros(1, 32, 16, device=DEVICE)
    order = torch.arange(32, dtype=torch.int32).expand(1, 1, -1)
    for n_rounds, is_refused in ((1, False), (2, True)):
        rounds = order.expand(1, n_rounds, -1)
        reason = triton_attention.why_not(q, q, Layout(rounds, rounds, 16, causal=True, is_lsh=False))
        assert (reason is not None) == is_refused


@pytest.mark.parametrize(("capability", "is_refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus_of_which_generations_run_it(
    capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=torch.float32, shape=(1, 64, 16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this one")
    monkeypatch.setattr(torch.version, "hip", None)
    expected = "this one is older than compute capability 8.0" if is_refused else None
    assert triton_attention.why_no_kernel(gpu) == expected


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("True", True), ("ON", True), ("0", False), ("", False)])
def test_the_interpreter_is_on_where_triton_takes_it_to_be(
    value: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton_attention.interpreting() == expected


def test_on_the_cpu_it_runs_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 64, 16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on the CPU; choose 'auto'"):
        lsh_attention(q[None], q[None], n_hashes=1, chunk_len=16, backend="triton")


def test_the_path_taken_is_said_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._announce.cache_clear()
    q = torch.zeros(1, 1, 40, 16)  # more than two chunks: not dense
    with caplog.at_level("INFO", logger="reformer.lsh"):
        for backend in ("auto", "chunked", "auto", "chunked"):
            lsh_attention(q, q, n_hashes=1, chunk_len=16, backend=backend)
        local_attention(q, q, q, chunk_len=16)
        local_attention(*[q.to(DEVICE)] * 3, chunk_len=16, backend="triton")
    assert [record.getMessage() for record in caplog.records] == [
        "LSH attention runs as 'chunked': the tensors are on the CPU",
        "LSH attention runs as 'chunked': it was asked for",
        "local attention runs as 'chunked': the tensors are on the CPU",
        f"local attention runs as 'triton': the tensors are on the {DEVICE.upper()}",
    ]


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The interpreter forgives what the compiler does not: types, specialised arguments, shared memory.

    What spills more than a few registers is slow, as fp32 was with half as many warps (2.9 KB).
    """
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    name, *figures = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    shared, stack = (list(map(int, column)) for column in figures)
    assert len(name) == 30
    assert max(shared) <= 227 * 1024  # what a program may have on an H100 and H200
    assert max(stack) <= 256
