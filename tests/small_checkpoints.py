"""Small checkpoints for tests: as much of an engine as one needs, and what it says about its run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import save
from trainer.config import RunConfig
from trainer.distributed import detect
from trainer.resume import identity

CPU = torch.device("cpu")
DEEPSPEED: dict[str, Any] = {"train_batch_size": 4, "zero_optimization": {"stage": 2, "overlap_comm": False}}


def config(run_dir: Path, **run: Any) -> RunConfig:
    return RunConfig(
        model={"vocab_size": 9, "n_layers": 2},
        data={"store": "s"},
        run={"dir": run_dir, "deepspeed_config": "x.json", "steps": 9, **run},
    )


IDENTITY = identity(config(Path("r")), DEEPSPEED, "abc", 2)


def engine(seed: int = 0) -> Any:
    """As much of one as a checkpoint needs, after a step of AdamW."""
    torch.manual_seed(seed)
    model = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    return SimpleNamespace(module=model, optimizer=optimizer)


def publish(run_dir: Path, step: int, run: dict[str, Any] = IDENTITY, **plan: Any) -> Path:
    """Save one of this step, which the process group of this process holds; `plan` is of the table [run]."""
    settings = config(run_dir, **{"keep_last": 9, **plan}).run
    return save(engine(step), settings, step, run, {}, detect({}), CPU).path
