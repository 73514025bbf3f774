"""An evaluation on one process, with the model in the engine's place: other rounds than in training."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainer.evaluate
from data_pipeline.dataset import Sample
from reformer import Reformer, ReformerConfig
from trainer.config import ConfigError, load
from trainer.distributed import Launch
from trainer.evaluate import evaluate

CONFIG = ReformerConfig(vocab_size=20, max_seq_len=64, d_model=16, n_layers=2, n_heads=2, lsh_chunk_len=8, n_hashes=1)


class _Engine:
    """What `evaluate` uses of DeepSpeed's engine."""

    def __init__(self, model: Reformer) -> None:
        self.model = model

    def __call__(self, *inputs: Tensor, **options: object) -> Tensor:
        return self.model(*inputs, **options)

    def train_micro_batch_size_per_gpu(self) -> int:
        return 2

    def eval(self) -> None:
        self.model.eval()

    def train(self) -> None:
        self.model.train()


@pytest.mark.parametrize("n_hashes", [None, 4])
def test_rounds_of_an_evaluation(n_hashes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.evaluate, "together", lambda action, *_: action())
    monkeypatch.setattr(trainer.evaluate, "all_sum", lambda values, _: [float(value) for value in values])
    torch.manual_seed(0)
    model = Reformer(CONFIG)
    tokens, labels = torch.randint(0, 20, (2, 3, 64))
    labels[1, 10:] = -100
    rows = [Sample(*row, torch.ones(64, dtype=torch.int32)) for row in zip(tokens, labels, strict=True)]
    launch = Launch("this test")
    score = evaluate(_Engine(model), rows, 3, torch.ones(20), launch, torch.device("cpu"), n_hashes)
    assert model.training and score.n_tokens == 64 + 10 + 64
    model.eval()
    by_rounds = {1: 0.0, 4: 0.0}
    for rounds in by_rounds:
        for t, y in zip(tokens, labels, strict=True):
            by_rounds[rounds] += model(t[None], y[None], n_hashes=rounds).item() * (y >= 0).sum().item()
    assert score.nll == pytest.approx(by_rounds[n_hashes or 1], rel=1e-6)
    assert by_rounds[1] != pytest.approx(by_rounds[4], rel=1e-5)


def test_rounds_need_an_lsh_layer(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nvocab_size = 20\n[data]\nstore = "s"\n[run]\ndir = "r"\ndeepspeed_config = "ds.json"\nsteps = 1\n'
    )
    (tmp_path / "ds.json").write_text(json.dumps({}))
    config, _ = load(path, ["run.eval_n_hashes=8"])
    assert config.run.eval_n_hashes == 8
    with pytest.raises(ConfigError, match=r"run.eval_n_hashes=8 .*attn_pattern=\('local',\).*: leave it out"):
        load(path, ["run.eval_n_hashes=8", 'model.attn_pattern=["local"]'])
    with pytest.raises(ConfigError, match="the model has no LSH layer"):
        load(path, ["run.eval_n_hashes=8", 'model.attn_pattern=["local", "lsh"]', "model.n_layers=1"])
    with pytest.raises(ConfigError, match="'eval_n_hashes'"):
        load(path, ["run.eval_n_hashes=0"])
