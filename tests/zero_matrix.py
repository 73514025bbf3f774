"""The cases of the gradient parity matrix, their data, and the run that each of them must equal.

That run is plain: one process, ordinary autograd through the blocks called one after another, whole logits, the whole
global batch at once, torch's clipping and optimizer. In bf16 it does what the precision scheme says: the model's
weights are copies of fp32 masters, gradients come out in bf16, are clipped in fp32 and update the masters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity import relative_error
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.dataset import Sample
from reformer import Reformer
from reformer.call import Call
from trainer.config import RunConfig
from trainer.engine import parameter_groups

RANKS, BATCH, SEQ_LEN, VOCAB = 2, 4, 42, 31
N_LABELS = (41, 7, 0, 23)
"""Tokens to predict in each sample of a global batch: ranks and micro-batches differ, and one has none at all."""
LR_FACTORS = (0.5, 1.0, 1.0)
"""What two steps of warm-up make of the learning rate, one entry for each step."""
CLIP = 0.5
ADAMW = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}
"""eps is of the gradients' size, because Adam with a tiny one hides a wrong scale and magnifies rounding to a sign."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": ADAMW,
    "Adafactor": {"lr": 0.02, "eps": (1e-3, 1e-3), "weight_decay": 0.1},
}
"""Settings, by the names that torch.optim has for them. Under Adafactor's first eps the moments of all tensors count,
and a wrong scale of the gradient is still seen."""

BUCKETS = {"reduce_bucket_size": 5_000, "allgather_bucket_size": 5_000}
"""A third of the parameters: each backward fills several."""
ALL_GATHERED = {"stage3_param_persistence_threshold": 0}
"""By default ZeRO-3 keeps parameters as small as these on every rank."""


def variants(folder: Path) -> dict[str, dict[str, Any]]:
    """What a case changes in deepspeed.zero_optimization, by name; `folder` is where what goes to disk goes."""
    cpu, nvme = {"device": "cpu"}, {"device": "nvme", "nvme_path": str(folder)}
    prefetch = {
        "stage3_prefetch_bucket_size": 2_000,
        "stage3_max_live_parameters": 6_000,
        "stage3_max_reuse_distance": 0,
    }
    return {
        "": {},
        "overlap": {"overlap_comm": True},
        "no-overlap": {"overlap_comm": False},
        "prefetch": {"overlap_comm": True, **ALL_GATHERED, **prefetch},
        "cpu-optimizer": {"offload_optimizer": cpu},
        "cpu-parameters": {"offload_optimizer": cpu, "offload_param": cpu, **ALL_GATHERED},
        "nvme-optimizer": {"offload_optimizer": nvme, "sub_group_size": 3_000},
        "nvme-parameters": {
            "offload_optimizer": nvme,
            "offload_param": {**nvme, "buffer_size": 1_500_000},
            **ALL_GATHERED,
        },
    }


@dataclass(frozen=True)
class Case:
    """One run on two ranks."""

    stage: int
    accumulation: int = 1
    bf16: bool = False
    dropout: float = 0.0
    tied: bool = False
    variant: str = ""
    large: bool = False
    """Whether the vocabulary is one whose matrices DeepSpeed keeps on a drive: it does from 1 MiB a rank on."""
    optimizer: str = "AdamW"
    n_parts: int = 1
    """Of each sequence, with a rank for each."""

    def __str__(self) -> str:
        precision, tied = "bf16" if self.bf16 else "fp32", "tied" if self.tied else "untied"
        parts = (f"zero{self.stage}", f"acc{self.accumulation}", precision, f"dropout{self.dropout}", tied)
        shared = f"{self.n_parts}parts" if self.n_parts > 1 else ""
        return "-".join([*parts, *filter(None, [self.variant, self.optimizer.removeprefix("AdamW"), shared])])

    @property
    def plain(self) -> "Case":
        """What decides the plain run: neither ZeRO nor how the batch or its sequences are cut."""
        return Case(0, bf16=self.bf16, dropout=self.dropout, tied=self.tied, large=self.large, optimizer=self.optimizer)


MATRIX = [
    Case(stage, accumulation, bf16, dropout, tied)
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
    for bf16 in (False, True)
    for dropout in (0.0, 0.1)
    for tied in (False, True)
] + [
    Case(stage, accumulation, bf16, 0.1, tied, n_parts=RANKS)
    for stage in (0, 1, 2, 3)
    for accumulation, tied in ((1, False), (2, True))
    for bf16 in (False, True)
]

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What is compared, one entry for each step."""

    losses: list[float]
    """Over the global batch, before the update."""
    norms: list[float]
    """Of the gradient, before clipping."""
    starts: list[Parameters]
    """The fp32 parameters before the update."""
    updates: list[Parameters]
    """What was added to them."""


def ratios(actual: Outcome, expected: Outcome) -> tuple[float, float, float, float]:
    """The largest relative differences of losses, norms, updates and the updates' scale in any step.

    An update's is relative to the tensor's own largest element, but no smaller than 1e-3 of the largest of all. The
    scale is that of all tensors together: rounding goes either way and cancels in it, and a wrong factor does not.
    """
    pairs = list(zip(actual.updates, expected.updates, strict=True))
    return (
        _largest(actual.losses, expected.losses),
        _largest(actual.norms, expected.norms),
        max(_farthest(ours, theirs) for ours, theirs in pairs),
        max(abs(_scale(ours, theirs) - 1) for ours, theirs in pairs),
    )


def _farthest(actual: Parameters, expected: Parameters) -> float:
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(tensor.abs().max().item() for tensor in expected.values())
    return max(relative_error(actual[name], tensor, floor) for name, tensor in expected.items())


def _scale(actual: Parameters, expected: Parameters) -> float:
    """How much of what is expected there is in the actual: <actual, expected> / <expected, expected>."""
    ours, theirs = (torch.cat([update[name].flatten().double() for name in expected]) for update in (actual, expected))
    return (ours @ theirs / (theirs @ theirs)).item()


def _largest(actual: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(actual, expected, strict=True))


def run_config(case: Case) -> RunConfig:
    """The TOML side of a case: layers of local and LSH attention in turn; awkward lengths and chunks."""
    model = {
        "vocab_size": 70_000 if case.large else VOCAB,
        "max_seq_len": 48,
        "d_model": 16,
        "n_layers": 4,
        "n_heads": 2,
        "n_hashes": 2,
        "lsh_chunk_len": 8,
        "local_chunk_len": 8,
        "ff_chunk_tokens": 13,
        "loss_chunk_tokens": 17,
        "dropout": case.dropout,
        "tie_embeddings": case.tied,
    }
    run = {"dir": "runs/matrix", "deepspeed_config": "matrix.json", "steps": len(LR_FACTORS)}
    schedule = {"warmup_steps": 2, "decay": "constant", "sequence_parallel": case.n_parts}
    return RunConfig(model=model, data={"store": "data/matrix"}, run={**run, **schedule})


def deepspeed_config(case: Case, folder: Path) -> dict[str, Any]:
    """The DeepSpeed side of a case."""
    own_adam = {"torch_adam": True, "fused": True} if case.optimizer == "AdamW" else {}
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": CLIP,
        "optimizer": {"type": case.optimizer, "params": {**OPTIMIZERS[case.optimizer], **own_adam}},
        "zero_optimization": {"stage": case.stage, **BUCKETS, **variants(folder)[case.variant]},
    }
    if case.bf16:
        config["bf16"] = {"enabled": True}
        if case.stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "offload_optimizer" in config["zero_optimization"]:
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def samples(step: int) -> list[Sample]:
    """A step's global batch: two documents in each row, the last tokens of each row to be predicted."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1), generator=generator)
    batch = []
    for row, n_labels in zip(rows, N_LABELS, strict=True):
        labels = row[1:].clone()
        labels[: SEQ_LEN - n_labels] = -100
        batch.append(Sample(row[:-1], labels, torch.arange(SEQ_LEN).ge(n_labels // 2).int() + 1))
    return batch


def plain_nll(model: Reformer, step: int, rows: slice) -> Tensor:
    """The sum of the loss over some rows of a step's global batch, by plain autograd."""
    tokens, labels, segments = (torch.stack(parts) for parts in zip(*samples(step)[rows], strict=True))
    call = Call(model.config.seed, step, tuple(range(BATCH)[rows]), model.config.dropout, segments)
    y1 = y2 = model.embedding(tokens).float()
    for block in model.blocks:
        y1, y2, _ = block(y1, y2, call)
    logits = model.head(y1, y2).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


def whole_batch(model: Reformer, step: int) -> Iterator[Tensor]:
    """The mean loss over all tokens of the global batch, in one part."""
    yield plain_nll(model, step, slice(None)) / sum(N_LABELS)


def sample_by_sample(model: Reformer, step: int) -> Iterator[Tensor]:
    """The same in parts: what it differs by is the order of additions."""
    for i in range(BATCH):
        yield plain_nll(model, step, slice(i, i + 1)) / sum(N_LABELS)


def mean_of_means(model: Reformer, step: int) -> Iterator[Tensor]:
    """A wrong loss, the mean over ranks of each one's mean over its tokens; DeepSpeed's own is this."""
    for rows in (slice(0, 2), slice(2, 4)):
        yield plain_nll(model, step, rows) / sum(N_LABELS[rows]) / RANKS


def plain_run(
    case: Case,
    starts: Sequence[Parameters] | None = None,
    loss=whole_batch,
    clip: float = CLIP,
    make_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> Outcome:
    """The run in one process.

    starts: what each step starts from, in place of what the step before ended with.
    loss: parts that add up to it.
    clip: the norm that gradients are clipped to.
    make_optimizer: of groups of parameters, in place of the case's own.
    """
    torch.manual_seed(run_config(case).run.seed)
    model = Reformer(run_config(case).model).to(torch.bfloat16 if case.bf16 else torch.float32)
    masters = deepcopy(model).float()
    for master in masters.parameters():
        master.grad = torch.zeros_like(master)
    make = make_optimizer or partial(getattr(torch.optim, case.optimizer), **OPTIMIZERS[case.optimizer])
    optimizer = make(parameter_groups(masters))
    outcome = Outcome([], [], [], [])
    for step, factor in enumerate(LR_FACTORS):
        with torch.no_grad():
            for name, master in masters.named_parameters():
                master.copy_(starts[step][name] if starts else master)
        start = snapshot(masters)
        model.load_state_dict(masters.state_dict())
        optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for part in loss(model, step):
            gradients = torch.autograd.grad(part, list(model.parameters()))
            for master, gradient in zip(masters.parameters(), gradients, strict=True):
                master.grad += gradient.float()
            total += part.item()
        # In float64, as DeepSpeed: over a million numbers torch's own sum of fp32 squares is off by 1e-5.
        norm = torch.nn.utils.get_total_norm([master.grad.double() for master in masters.parameters()])
        torch.nn.utils.clip_grads_with_norm_(masters.parameters(), clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step()
        outcome.losses.append(total)
        outcome.norms.append(norm.item())
        outcome.starts.append(start)
        outcome.updates.append({name: after - start[name] for name, after in snapshot(masters).items()})
    return outcome


def snapshot(module: torch.nn.Module) -> Parameters:
    """A copy of the parameters as they are."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
