"""One rank of two that trains a model in PyTorch's own wrappers, and its gradients there.

    python tests/distributed/wrappers_worker.py RENDEZVOUS OUTPUT RANK

OUTPUT: of torch.save, the gradients by name for each wrapper. Each rank has a sample of `batch()`.
"""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from small_models import small_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from workers import join_ranks

from reformer import Reformer

RANKS, STEPS = 2, 2


def batch(step: int) -> Tensor:
    """A row for each rank."""
    return torch.randint(0, 50, (RANKS, 101), generator=torch.Generator().manual_seed(step))


def accumulate(model: nn.Module, rank: int, steps: range = range(STEPS)) -> None:
    """Forward and backward, step by step."""
    for step in steps:
        row = batch(step)[rank : rank + 1]
        model(row, row, step=step).backward()


def replicated(model: Reformer, rank: int) -> None:
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        accumulate(wrapped, rank, range(STEPS - 1))
    accumulate(wrapped, rank, range(STEPS - 1, STEPS))


def replicated_as_a_static_graph(model: Reformer, rank: int) -> None:
    accumulate(DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True), rank)


def sharded(model: Reformer, rank: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    fully_shard(model, mesh=mesh)
    accumulate(model, rank)


def sharded_with_the_ends_apart(model: Reformer, rank: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for module in (model.embedding, model.head, model):
        fully_shard(module, mesh=mesh)
    accumulate(model, rank)


WRAPPERS: dict[str, Callable[[Reformer, int], None]] = {
    wrapper.__name__: wrapper
    for wrapper in (replicated, replicated_as_a_static_graph, sharded, sharded_with_the_ends_apart)
}


def gradients_in(wrapper: Callable[[Reformer, int], None], rank: int) -> dict[str, Tensor]:
    model = small_model()
    wrapper(model, rank)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: d.full_tensor() if hasattr(d, "full_tensor") else d for name, d in found.items()}


def main(rendezvous: str, output: str, rank: str) -> None:
    join_ranks(rendezvous, int(rank), RANKS)
    torch.save({name: gradients_in(wrapper, int(rank)) for name, wrapper in WRAPPERS.items()}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
