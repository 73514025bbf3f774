"""NCCL's place taken by gloo: collectives of tensors on the pretended GPU, which refuse those on the CPU, too."""

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

BACKEND = "nccl_by_gloo"


class Work(dist._Work):
    """What is over already."""

    def wait(self, timeout=None):
        return True


class PretendedNCCL(dist.ProcessGroup):
    """The collectives that the trainer and DeepSpeed make, over when they return: a missing wait goes unnoticed."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def allreduce(self, tensors, opts):
        copies = [host(x) for x in tensors]
        for x, copy in zip(tensors, copies, strict=True):
            x.copy_(self.reduced(copy, opts.reduceOp))
        return Work()

    def reduced(self, copy, op):
        """The sum, mean, largest or smallest over all ranks of a tensor on the CPU, in its place."""
        opts = dist.AllreduceOptions()
        opts.reduceOp = dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op
        self.gloo.allreduce([copy], opts).wait()
        return copy.div_(self.size()) if op == dist.ReduceOp.AVG else copy

    def broadcast(self, tensors, opts):
        copies = [host(x) for x in tensors]
        self.gloo.broadcast(copies, opts).wait()
        for x, copy in zip(tensors, copies, strict=True):
            x.copy_(copy)
        return Work()

    def allgather(self, outputs, inputs, opts=None):
        for parts, own in zip(outputs, inputs, strict=True):
            copies = [host(x) for x in parts]
            self.gloo.allgather([copies], [host(own)]).wait()
            for x, copy in zip(parts, copies, strict=True):
                x.copy_(copy)
        return Work()

    def all_gather_single(self, output, own, opts=None):
        self.allgather([list(output.view(-1).chunk(self.size()))], [own.view(-1)])
        return Work()

    def reduce_scatter_single(self, output, whole, opts):
        if whole.dtype != output.dtype or whole.numel() != self.size() * output.numel():
            raise RuntimeError("NCCL: the tensors of a reduce-scatter do not fit together")
        parts = self.reduced(host(whole), opts.reduceOp).view(-1).chunk(self.size())
        output.view(-1).copy_(parts[self.rank()])
        return Work()

    def all_to_all_single(self, output, own, output_sizes, input_sizes, opts=None):
        copy = host(output)
        self.gloo.alltoall_base(copy, host(own), output_sizes, input_sizes).wait()
        output.copy_(copy)
        return Work()

    def barrier(self, opts=None):
        self.gloo.barrier().wait()
        return Work()

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def host(x):
    """A copy on the CPU."""
    if x.device.type != "cuda":
        raise RuntimeError("NCCL has no collectives of tensors on the CPU")
    if not x.is_contiguous():
        raise RuntimeError("NCCL has no collectives of tensors that are not contiguous")
    return x.cpu()


def install() -> None:
    """Have torch.distributed make such groups where NCCL's are asked for."""
    dist.Backend.register_backend(BACKEND, PretendedNCCL, devices=["cuda"])
    init_process_group, new_group = dist.init_process_group, dist.new_group

    def init(backend=None, *args, device_id=None, **settings):
        return init_process_group(renamed(backend), *args, **settings)

    def new(ranks=None, timeout=None, backend=None, *args, device_id=None, **settings):
        return new_group(ranks, timeout, renamed(backend), *args, **settings)

    distributed_c10d.init_process_group = dist.init_process_group = init
    distributed_c10d.new_group = dist.new_group = new
    # These know the devices of PyTorch's own groups only.
    distributed_c10d._get_object_coll_device = lambda group=None: "cuda"
    distributed_c10d._get_pg_default_device = lambda group=None: torch.device("cuda", 0)


def renamed(backend):
    return BACKEND if backend == "nccl" else backend
