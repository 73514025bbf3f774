"""The trainer on a GPU that is only pretended: what lives on which device, and by which group it goes to other ranks.

Tensors are where they would be on a GPU, and their kernels are the CPU's (pretended_gpu/). The tests of a real one are
in test_on_gpu.py.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed.conftest import Run, Train, assert_resumed_equals_uninterrupted, run, script, torchrun_variables
from pretended_gpu.run import RUN, built, compiler

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this build of PyTorch has CUDA of its own")

RANKS = 2
STAGE, OFFLOAD = "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.offload_optimizer"
DROPOUT = ("model.dropout=0.1", "model.attn_dropout=0.1")
BF16 = "deepspeed.bf16.enabled=true"
TAGS = ("train/loss", "train/grad_norm", "train/param_norm", "eval/loss", "eval/loss_without_lsh")

TrainOnGpu = Callable[..., Run]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(compiler()[0]):
        pytest.skip(f"there is no {compiler()[0]} to compile it with")
    return built(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def train_on_gpu(library: Path, config: Path) -> TrainOnGpu:
    """train_on_gpu(run_dir, *arguments): two ranks, as torchrun would start them."""

    def launch(run_dir: Path, *arguments: str) -> Run:
        command = [sys.executable, str(RUN), str(library), *script(config, run_dir), *arguments]
        ranks = [own | {"DS_ACCELERATOR": "cuda"} for own in torchrun_variables(RANKS)]
        done = run([command] * RANKS, run_dir, ranks)
        assert done.code == 0, done.errors
        assert "pretended GPU, nccl" in done.output
        return done

    return launch


@pytest.mark.parametrize(
    "changes",
    [(f"{STAGE}=0",), (f"{STAGE}=2", f"{OFFLOAD}.device=cpu"), (f"{STAGE}=3", "run.sequence_parallel=2", *DROPOUT)],
    ids=["zero0", "zero2-offloaded", "zero3-2parts-dropout"],
)
def test_computes_what_the_cpu_computes(
    train: Train, train_on_gpu: TrainOnGpu, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    """In one step: later, a rounding may send a token to another bucket."""
    gpu = train_on_gpu(tmp_path / "gpu", "run.steps=1", "run.histogram_every=1", *changes)
    cpu = train(1, tmp_path / "cpu", "run.steps=1", *[each for each in changes if "sequence_parallel" not in each])
    for tag in TAGS:
        assert gpu.column(tag), tag
        assert gpu.column(tag) == pytest.approx(cpu.column(tag), rel=1e-5), tag


@pytest.mark.parametrize(
    "changes",
    [
        (f"{STAGE}=2", f"{OFFLOAD}.device=cpu", f"{OFFLOAD}.pin_memory=true", BF16),
        (f"{STAGE}=3", "run.sequence_parallel=2", "deepspeed.zero_optimization.overlap_comm=true", BF16, *DROPOUT),
    ],
    ids=["zero2-offloaded", "zero3-2parts-dropout"],
)
def test_resumed_equals_uninterrupted(train_on_gpu: TrainOnGpu, tmp_path: Path, changes: tuple[str, ...]) -> None:
    assert_resumed_equals_uninterrupted(lambda: train_on_gpu(tmp_path / "run", *changes), TAGS)


MODEL = """
import logging
import torch
from reformer import Reformer, ReformerConfig
from reformer.decoding import Decoder
logging.basicConfig(level="INFO")
torch.manual_seed(0)
model = Reformer(ReformerConfig(vocab_size=32, n_layers=2, d_model=32, n_heads=1, attn_pattern=("local", "lsh"),
    lsh_chunk_len=16, local_chunk_len=16, n_hashes=2, max_seq_len=128, dropout=0.1, attn_dropout=0.1))
tokens = torch.randint(0, 32, (2, 90))
def gradients():
    model.zero_grad()
    loss = model(tokens, labels=tokens, step=0)
    loss.backward()
    decoder = Decoder(model)
    decoder(tokens[:1, :60])  # and then token by token
    return [loss.detach(), decoder(tokens[:1, :70]), *(parameter.grad.clone() for parameter in model.parameters())]
expected = gradients()
model, tokens = model.cuda(), tokens.cuda()
found = gradients()
assert {x.device.type for x in found} == {"cuda"}
print(float(torch.stack([(x.cpu() - y).norm() / y.norm() for x, y in zip(found, expected)]).max()))
"""


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "portable"])
def test_a_model_by_itself(library: Path, tmp_path: Path, fused: bool) -> None:
    """In training and token by token; by the fused kernels in Triton's interpreter, too."""
    done = run_text(MODEL, library, tmp_path, {"TRITON_INTERPRET": "1"} if fused else {})
    assert done.code == 0, done.errors
    assert (f"LSH attention runs as '{'triton' if fused else 'chunked'}'" in done.errors) and float(done.output) < 1e-5


REFUSED = """
import torch
x, index = torch.ones(2, device="cuda"), torch.tensor([0])
for refused in (
    lambda: torch.maximum(x, torch.ones(2)),
    lambda: x.index_fill_(0, index, 2.0),
    lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    lambda: torch.rand(2, device="cuda"),
    lambda: torch.empty(2, device="cuda:1"),
    lambda: torch.view_as_real(torch.ones(2, dtype=torch.complex64, device="cuda")),
):
    try:
        refused()
    except RuntimeError:
        print("refused")
    else:
        raise SystemExit(refused)
assert float(x[index]) == 1
"""
COLLECTIVE_ON_CPU = """
import torch
import torch.distributed as dist
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(2, device="cuda"))
try:
    dist.all_reduce(torch.ones(2))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [(REFUSED, "refused"), (COLLECTIVE_ON_CPU, "NCCL has no collectives")],
    ids=["device", "collective"],
)
def test_the_pretended_refuses_what_a_gpu_refuses(library: Path, tmp_path: Path, text: str, said: str) -> None:
    done = run_text(text, library, tmp_path, {})
    assert done.code == 0, done.errors
    assert said in done.output


def run_text(text: str, library: Path, folder: Path, variables: dict[str, str]) -> Run:
    """A text of Python's, run on the pretended GPU."""
    (folder / "text.py").write_text(text)
    return run([[sys.executable, str(RUN), str(library), str(folder / "text.py")]], folder, [variables])
