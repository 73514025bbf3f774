"""NCCL's place taken by gloo: collectives of tensors on the pretended GPU, which refuse those on the CPU, too."""

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

BACKEND = "nccl_by_gloo"


class Work(dist._Work):
    """What is over already."""

    def __init__(self, result):
        super().__init__()
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout=None):
        return True

    def is_completed(self):
        return True

    def get_future(self):
        return self.future


class PretendedNCCL(dist.ProcessGroup):
    """The collectives that the trainer and DeepSpeed make, under the names of PyTorch 2.11 and 2.13."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def getBackendName(self):
        return BACKEND

    def allreduce(self, tensors, opts):
        copies = [host(x) for x in tensors]
        for x, copy in zip(tensors, copies, strict=True):
            x.copy_(self.reduced(copy, opts.reduceOp))
        return Work(tensors)

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
        return Work(tensors)

    def reduce(self, tensors, opts):
        copies = [self.reduced(host(x), opts.reduceOp) for x in tensors]
        if opts.rootRank == self.rank():
            for x, copy in zip(tensors, copies, strict=True):
                x.copy_(copy)
        return Work(tensors)

    def allgather(self, outputs, inputs, opts=None):
        for parts, own in zip(outputs, inputs, strict=True):
            copies = [host(x) for x in parts]
            self.gloo.allgather([copies], [host(own)]).wait()
            for x, copy in zip(parts, copies, strict=True):
                x.copy_(copy)
        return Work(outputs)

    def all_gather_single(self, output, own, opts=None):
        self.allgather([list(output.view(-1).chunk(self.size()))], [own.view(-1)])
        return Work(output)

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own)
        return Work(outputs)

    def reduce_scatter_single(self, output, whole, opts):
        parts = self.reduced(host(whole), opts.reduceOp).view(-1).chunk(self.size())
        output.view(-1).copy_(parts[self.rank()])
        return Work(output)

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts):
        for output, whole in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, whole, opts)
        return Work(outputs)

    def all_to_all_single(self, output, own, output_sizes, input_sizes, opts=None):
        copy = host(output)
        self.gloo.alltoall_base(copy, host(own), output_sizes, input_sizes).wait()
        output.copy_(copy)
        return Work(output)

    def barrier(self, opts=None):
        self.gloo.barrier().wait()
        return Work(None)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def host(x):
    """A copy on the CPU."""
    if x.device.type != "cuda":
        raise RuntimeError("NCCL has no collectives of tensors on the CPU")
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
