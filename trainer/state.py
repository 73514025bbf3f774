"""What has been learnt, as slices: each rank's parts of the fp32 weights and of the optimizer's moments, by name.

A slice says of which parameter it is and where it begins in it, so files of slices are read by any number of ranks
under any ZeRO stage, each taking what it needs, and the numbers stay those that were written, to the bit. Nothing is
gathered to write, and any reader of safetensors reads it. How each of DeepSpeed's optimizers keeps its slices is known
to `partitions` alone.

In a file (safetensors), the tensor `blocks.0.norm.weight|exp_avg|4096` is that part of the parameter's first moment
which begins at element 4096, flat. `weight` is the parameter itself. A state that does not have the parameter's shape
(a count of steps, Adafactor's sums by row) is there whole, at 0.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from data_pipeline.errors import DataError

WEIGHT = "weight"
"""Kind of a parameter's own slices; the other kinds are the names of the optimizer's state."""


class Slice(NamedTuple):
    """A part of a parameter in a rank's flat partition of several."""

    name: str
    start: int
    """Where it begins in the flattened parameter."""
    offset: int
    """Where it begins in the partition."""
    size: int


@dataclass(frozen=True)
class Partition:
    """A tensor that an optimizer updates on this rank, and what of the parameters is in it."""

    tensor: Tensor
    """fp32, of a parameter's shape or flat; the key of the optimizer's state."""
    optimizer: Optimizer
    group: dict[str, Any]
    """The optimizer's settings for it."""
    slices: list[Slice]
    writes: bool = True
    """Whether this rank is the one that writes it to a checkpoint."""
    passes: bool = False
    """Whether it was swapped in from a drive, and is gone when the next one comes."""

    def state(self) -> dict[str, Any]:
        """The optimizer's state of it, empty before the first step."""
        own = self.optimizer.state.get(self.tensor, {})
        if not isinstance(self.optimizer, FusedAdam) or not own:
            return own
        # DeepSpeed's counts the steps of all tensors that it updates at once with the last of them.
        together = [self.optimizer.state[tensor]["step"] for tensor in self.group["params"]]
        return {**own, "step": max([own["step"], *together])}


def shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    """The shape of each parameter, by name."""
    return {name: list(_shape(parameter)) for name, parameter in engine.module.named_parameters()}


def local_slices(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """What this rank writes to a checkpoint, on the CPU: views of what is there already, copies of the rest."""
    found: dict[str, Tensor] = {}
    for partition in partitions(engine):
        if not partition.writes:
            continue
        tensors = {WEIGHT: partition.tensor, **partition.state()}
        for part in partition.slices:
            for kind, value in tensors.items():
                is_cut = torch.is_tensor(value) and value.shape == partition.tensor.shape
                begin = part.start if is_cut else 0
                held = value.detach().flatten()[part.offset : part.offset + part.size] if is_cut else value
                found[f"{part.name}|{kind}|{begin}"] = _on_cpu(held, copies=partition.passes or not is_cut)
    return found


def _on_cpu(value: Any, copies: bool) -> Tensor:
    """copies: clone it, since several parameters share it or it will soon be freed."""
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    if copies or tensor.dtype == torch.bfloat16:  # which numpy does not know
        return tensor.clone()
    # The same memory as a storage of its own: safetensors takes views of one storage for tied weights.
    return torch.from_numpy(tensor.numpy())


def n_parameters(engine: deepspeed.DeepSpeedEngine) -> int:
    """Elements of all parameters; under ZeRO-3 the tensors themselves are empty between uses."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())


def local_square_sum(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """Of this rank's weights, float64 []: their sum over all ranks is the squared norm of the parameters.

    Of the slices alone: what pads a partition is whatever was in that memory.
    """
    # One after the other, while each is there: from a drive, they come and go.
    norms = [
        torch.linalg.vector_norm(partition.tensor.detach().view(-1)[offset : offset + size], dtype=torch.float64)
        for partition in partitions(engine)
        if partition.writes
        for _, _, offset, size in partition.slices
    ]
    return sum((norm.cpu().square() for norm in norms), torch.zeros((), dtype=torch.float64))


@torch.no_grad()
def restore(engine: deepspeed.DeepSpeedEngine, saved: "SavedSlices") -> None:
    """Take weights and optimizer state from a checkpoint, whatever wrote it. All ranks call this."""
    counting: dict[Optimizer, list[Partition]] = {}
    with _masters_change(engine):
        for partition in partitions(engine, writing=True):
            if saved.has_optimizer_state:
                _make_state(partition)
            for part in partition.slices:
                _put(partition, part, saved)
            if isinstance(partition.optimizer, DeepSpeedCPUAdam | FusedAdam) and partition.tensor.device.type == "cpu":
                counting.setdefault(partition.optimizer, []).append(partition)
        for own in counting.values():
            _count_again(own)


@torch.no_grad()
def set_weights(engine: deepspeed.DeepSpeedEngine, weights: Mapping[str, Tensor]) -> None:
    """Take whole parameters, by name, into the fp32 weights; the optimizer is left alone. All ranks call this."""
    with _masters_change(engine):
        for partition in partitions(engine, writing=True):
            for part in partition.slices:
                values = weights[part.name].flatten()[part.start : part.start + part.size]
                _inside(partition.tensor, part).copy_(values)


@contextmanager
def _masters_change(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """While the fp32 weights are changed; after it those that the model computes with are the same again."""
    optimizer = engine.optimizer
    is_zero_3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    if is_zero_3:
        optimizer.checkpoint_event_prologue()
    yield
    if is_zero_3:
        optimizer.checkpoint_event_epilogue()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_Optimizer):
        for weights, masters in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            weights.copy_(masters)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for weights, masters in _pairs(optimizer):
            weights.copy_(masters)


def _inside(tensor: Tensor, part: Slice) -> Tensor:
    """A slice's elements of a partition or of a state of its shape, flat; a view."""
    return tensor.view(-1)[part.offset : part.offset + part.size]


def _make_state(partition: Partition) -> None:
    """Have the optimizer make its state, in its own way: by a step that changes nothing."""
    if not partition.optimizer.state.get(partition.tensor):
        _idle(partition, partition.tensor, 1)


def _count_again(parts: Sequence[Partition]) -> None:
    """Bring DeepSpeed's C++ to the step at which it was; the parts are all of one optimizer.

    On a CPU it keeps the powers of the betas as running products, in which every step has rounded, and no one can read
    or set them.
    """
    states = [partition.state() for partition in parts]
    steps = max(int(own.get("step", 0)) for own in states)
    for partition, own in zip(parts, states, strict=True):
        if own and not partition.slices:  # all of it is padding, of which nothing is saved
            partition.optimizer.state[partition.tensor]["step"] = steps
    number = torch.zeros(1)
    _idle(parts[0], number, steps)
    parts[0].optimizer.state.pop(number, None)


def _idle(partition: Partition, tensor: Tensor, steps: int) -> None:
    """Steps of a partition's optimizer on a tensor alone, which is not changed by them."""
    optimizer, gradient = partition.optimizer, tensor.grad
    groups = optimizer.param_groups
    optimizer.param_groups = [{**partition.group, "params": [tensor], "lr": 0.0, "weight_decay": 0.0}]
    tensor.grad = torch.zeros_like(tensor)
    try:
        for _ in range(steps):
            optimizer.step()
    finally:
        optimizer.param_groups, tensor.grad = groups, gradient


def _put(partition: Partition, part: Slice, saved: "SavedSlices") -> None:
    tensors = {WEIGHT: partition.tensor, **partition.optimizer.state.get(partition.tensor, {})}
    for kind, value in tensors.items():
        if torch.is_tensor(value) and value.shape == partition.tensor.shape:
            _inside(value, part).copy_(saved.read(part.name, kind, part.start, part.start + part.size))
        elif torch.is_tensor(value):
            value.copy_(saved.whole(part.name, kind).reshape(value.shape))
        else:
            partition.optimizer.state[partition.tensor][kind] = type(value)(saved.whole(part.name, kind).item())


def partitions(engine: deepspeed.DeepSpeedEngine, writing: bool = False) -> Iterator[Partition]:
    """What this rank's optimizers update; `writing` says that it will be changed, on a drive too."""
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _partitions_zero_3(optimizer, names, writing)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from _partitions_flat(optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    elif isinstance(optimizer, BF16_Optimizer):
        yield from _partitions_flat(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    elif isinstance(optimizer, FP16_Optimizer):
        yield from _partitions_whole(optimizer.optimizer, optimizer.fp32_groups_flat, optimizer.fp16_groups, names)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        masters, weights = zip(*((master, [weight]) for weight, master in _pairs(optimizer)), strict=True)
        yield from _partitions_whole(optimizer.optimizer, masters, weights, names)
    else:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        yield from _partitions_whole(optimizer, own, [[parameter] for parameter in own], names)


def _pairs(optimizer: FP16_UnfusedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight and its fp32 master."""
    for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(weights, masters, strict=True)


def _partitions_whole(
    optimizer: Optimizer, tensors: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]], names: Mapping[Tensor, str]
) -> Iterator[Partition]:
    """Without ZeRO: every rank has it all, and they share the writing. A tensor has parameters end to end in it."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for index, (tensor, inside) in enumerate(zip(tensors, parameters, strict=True)):
        (group,) = [each for each in optimizer.param_groups if any(tensor is other for other in each["params"])]
        ends = list(accumulate(parameter.numel() for parameter in inside))
        slices = [
            Slice(names[parameter], 0, end - parameter.numel(), parameter.numel())
            for parameter, end in zip(inside, ends, strict=True)
        ]
        yield Partition(tensor, optimizer, group, slices, writes=index % size == rank)


def _partitions_flat(
    optimizer: Any, groups: Sequence[Sequence[Any]], flat: Sequence[Tensor], names: Mapping[Tensor, str]
) -> Iterator[Partition]:
    """ZeRO-1 and 2: each group of parameters end to end, cut into equal parts."""
    for parameters, tensor, group in zip(groups, flat, optimizer.optimizer.param_groups, strict=True):
        mappings = [(names[parameter], parameter._hp_mapping) for parameter in parameters]
        slices = [
            Slice(
                name, found.lp_fragment_address.start, found.hp_fragment_address.start, found.lp_fragment_address.numel
            )
            for name, found in mappings
            if found is not None
        ]
        yield Partition(tensor, optimizer.optimizer, group, slices)


def _partitions_zero_3(optimizer: Any, names: Mapping[Tensor, str], writing: bool) -> Iterator[Partition]:
    """ZeRO-3: each parameter cut into equal parts, the last of which may be empty or partly padding."""
    rank = torch.distributed.get_rank()
    for number, parameters in enumerate(optimizer.fp16_groups):
        slices = []
        for parameter in parameters:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * size
            if (held := min(size, parameter.ds_numel - start)) > 0:
                slices.append(Slice(names[parameter], start, offset, held))
        on_drive = optimizer._swappable_optimizer_subgroup(number)
        if on_drive:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        tensor = optimizer.fp32_partitioned_groups_flat[number]
        on_gpu = optimizer.offload_optimizer and optimizer.subgroup_to_device[number] != "cpu"
        owner = optimizer.backup_optimizer if on_gpu else optimizer.optimizer
        group = owner.param_groups[optimizer.sub_group_to_group_id[number]]
        yield Partition(tensor, owner, group, slices, passes=on_drive)
        if writing:
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if on_drive and writing:
            optimizer._optimizer_states_and_gradient_swap_out(number)
        elif on_drive:
            optimizer._release_swap_buffers(number)


def _shape(parameter: Tensor) -> Sequence[int]:
    return getattr(parameter, "ds_shape", parameter.shape)


class SavedSlices:
    """The slices of a checkpoint, read as they are asked for.

    Raises DataError where a slice is missing; that files are what was written is checked by checksums, elsewhere.
    """

    def __init__(self, files: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = shapes
        self._found: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118  (not a dictionary)
                name, kind, start = key.rsplit("|", 2)
                self._found.setdefault((name, kind), []).append((int(start), file, key))
        for entries in self._found.values():
            entries.sort(key=lambda entry: entry[0])

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the optimizer had taken a step; it may not have, where no gradient was finite so far."""
        return any(kind != WEIGHT for _, kind in self._found)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        """Those of all `rank_*.safetensors` in a folder, with the shapes that its state.json tells."""
        with ExitStack() as stack:
            try:
                shapes = json.loads((folder / "state.json").read_text(encoding="utf-8"))["shapes"]
                paths = sorted(folder.glob("rank_*.safetensors"))
                files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
                saved = cls(files, shapes)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise DataError(f"cannot read the checkpoint {folder}: {error!r}: use another one") from None
            yield saved

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of a flattened parameter or of a state of its shape, [stop - start]."""
        parts, reached = [], start
        for begin, file, key in self._found.get((name, kind), []):
            view = file.get_slice(key)
            end = begin + view.get_shape()[0]
            if begin <= reached < end:
                parts.append(view[reached - begin : min(stop, end) - begin])
                reached = min(stop, end)
        if reached < stop:
            raise DataError(
                f"the checkpoint has no elements {reached} to {stop - 1} of {name}, {kind}: use another one"
            )
        if not parts:  # a parameter of no width, as positions of one axis may be
            return torch.zeros(0)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def whole(self, name: str, kind: str) -> Tensor:
        """A state that is not cut."""
        entries = self._found.get((name, kind))
        if not entries:
            raise DataError(
                f"the checkpoint has no {kind} of {name}, which this optimizer needs: use the one of before"
            )
        _, file, key = entries[0]
        return file.get_tensor(key)

    def weights(self) -> dict[str, Tensor]:
        """The parameters, fp32, by name."""
        sizes = {name: torch.Size(shape) for name, shape in self.shapes.items()}
        return {name: self.read(name, WEIGHT, 0, size.numel()).float().reshape(size) for name, size in sizes.items()}
