"""What an evaluation reports, with the model in the engine's place, and under ZeRO on two ranks."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation import CPU, PlainEngine, config, make_store, report
from workers import run_workers

import trainer.held_out_evaluation
import trainer.text_sample
from data_pipeline.dataset import IGNORED_LABEL, RowDataset, Sample
from data_pipeline.errors import DataError
from data_pipeline.store import Store
from reformer import Reformer
from trainer.config import ConfigError, RunConfig, load
from trainer.distributed import Launch
from trainer.figures import figure_by_position
from trainer.held_out_evaluation import Evaluator, Totals, position_tag
from trainer.scoring import Score, positions, range_ends, range_masks
from trainer.sequence_parallel import Place

ALONE = Launch("this test")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other processes."""
    for module in (trainer.held_out_evaluation, trainer.text_sample, trainer.diagnostics):
        monkeypatch.setattr(module, "together", lambda action, *_: action())
    monkeypatch.setattr(trainer.held_out_evaluation, "all_sum", lambda values, _: [float(value) for value in values])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data"))


class _Rows(list):
    """Rows of 64 tokens, where a split of a store is expected."""

    store = SimpleNamespace(seq_len=64)


def three_rows() -> _Rows:
    """Of unequal numbers of tokens to predict, and of segments of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 20, (2, 3, 64), generator=generator)
    labels[1, 10:] = -100
    segment_ids = torch.tensor([[1] * 64, [1] * 10 + [0] * 54, [1] * 3 + [2] * 40 + [3] * 21], dtype=torch.int32)
    return _Rows(Sample(*row) for row in zip(tokens, labels, segment_ids, strict=True))


def scores(model: Reformer, plan: RunConfig, n_rows: int = 3, n_first: int = 0) -> Totals:
    engine = PlainEngine(model.eval(), micro_batch_size=2)
    return Evaluator(engine, plan, ALONE, Place(), CPU, torch.ones(20)).score(three_rows(), n_rows, n_first)


def row_sums(model: Reformer, **options: object) -> list[tuple[float, int]]:
    """The sum and the number of each row's losses, from the model's logits."""
    sums = []
    with torch.no_grad():
        for tokens, labels, segment_ids in three_rows():
            log_p = model.eval()(tokens[None], segment_ids=segment_ids[None], **options)[0].double().log_softmax(-1)
            chosen = log_p[labels >= 0].gather(1, labels[labels >= 0][:, None])
            sums.append((-chosen.sum().item(), len(chosen)))
    return sums


@pytest.mark.parametrize("n_hashes", [None, 4])
def test_rounds_of_an_evaluation(n_hashes: int | None) -> None:
    plan = config(n_hashes=1, run={"eval_n_hashes": n_hashes})
    model = Reformer(plan.model)
    by_rounds = {rounds: sum(nll for nll, _ in row_sums(model, n_hashes=rounds)) for rounds in (1, 4)}
    score = scores(model, plan).all
    assert score.n_tokens == score.n_bytes == 64 + 10 + 64
    assert score.nll == pytest.approx(by_rounds[n_hashes or 1], rel=1e-6)
    assert by_rounds[1] != pytest.approx(by_rounds[4], rel=1e-5)


def test_the_loss_is_the_model_s_to_the_bit() -> None:
    """That of each micro-batch in fp32, weighted by its tokens: what evaluations have always reported."""
    plan = config(loss_chunk_tokens=50)
    model, rows = Reformer(plan.model), three_rows()
    total = 0.0
    for batch in (rows[:2], [rows[2], rows[0]._replace(labels=torch.full((64,), -100))]):
        tokens, labels, segment_ids = (torch.stack(column) for column in zip(*batch, strict=True))
        with torch.no_grad():
            mean = model.eval()(tokens, labels, segment_ids=segment_ids)
        total += mean.item() * int((labels >= 0).sum())
    assert scores(model, plan).all.nll == total


def test_the_first_rows_and_the_ranges_are_parts_of_the_whole() -> None:
    plan = config()
    model = Reformer(plan.model)
    found, by_row = scores(model, plan, n_first=2), row_sums(model)
    assert (found.first.nll, found.first.n_tokens) == pytest.approx(tuple(map(sum, zip(*by_row[:2], strict=True))))
    assert list(found.by_position) == [4, 16, 64]
    # Row 0 has positions 0..63, row 1 0..9, row 2 0..2, 0..39 and 0..20.
    assert [score.n_tokens for score in found.by_position.values()] == [
        4 + 4 + 3 + 4 + 4,
        12 + 6 + 12 + 12,
        48 + 24 + 5,
    ]
    assert sum(score.nll for score in found.by_position.values()) == pytest.approx(found.all.nll, rel=1e-6)
    with torch.no_grad():
        tokens, labels, segment_ids = three_rows()[2]
        log_p = model(tokens[None], segment_ids=segment_ids[None])[0].double().log_softmax(-1)
    late = [*range(3 + 16, 3 + 40), *range(43 + 16, 64)]
    only_last = _Rows([three_rows()[2]])
    engine = PlainEngine(model, micro_batch_size=1)
    found = Evaluator(engine, plan, ALONE, Place(), CPU, torch.ones(20)).score(only_last, n_rows=1, n_first=1)
    assert found.by_position[64].loss == pytest.approx(-log_p[late, labels[late]].mean().item(), rel=1e-6)


def test_positions_count_what_a_token_s_own_document_has_before_it() -> None:
    segment_ids = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [4, 1, 1, 2, 2, 2, 2, 1]])
    assert positions(segment_ids).tolist() == [
        [0, 1, 2, 0, 0, 1, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 0, 1, 0, 1, 2, 3, 0],
    ]


@pytest.mark.parametrize(
    ("seq_len", "ends", "tags"),
    [
        (3, [4], ["00004"]),
        (256, [4, 16, 64, 256], ["00004", "00016", "00064", "00256"]),
        (1024, [4, 16, 64, 256, 1024], ["00004", "00016", "00064", "00256", "01024"]),
        (1025, [1024, 4096], ["00001K", "00004K"]),
        (65_536, [1024, 4096, 16_384, 65_536], ["00001K", "00004K", "00016K", "00064K"]),
        (2**22, [1024 * 4**i for i in range(7)], [f"{4**i:05d}K" for i in range(7)]),
    ],
)
def test_ranges_reach_to_the_end_of_a_row(seq_len: int, ends: list[int], tags: list[str]) -> None:
    assert range_ends(seq_len) == ends
    assert (
        [position_tag(end, seq_len) for end in ends]
        == [f"eval/loss_at/{tag}" for tag in tags]
        == sorted(position_tag(end, seq_len) for end in ends)
    )
    masks = torch.stack(list(range_masks(torch.tensor([0, seq_len - 1, min(ends[0], seq_len - 1)]), ends)))
    assert masks.sum(dim=0).tolist() == [1, 1, 1] and masks[0, 0] and masks[-1, 1]


@pytest.mark.parametrize("n_ablated", [1, 3, 9])
def test_ablation_is_the_model_without_the_output_of_its_lsh_layers(n_ablated: int, store: Store) -> None:
    plan = config(store, run={"ablation_rows": n_ablated})
    few = config(store, run={"ablation_rows": n_ablated, "eval_rows": n_ablated})
    model = Reformer(plan.model)
    values = report(PlainEngine(model, micro_batch_size=2), plan, store, ALONE).values
    with_lsh = report(PlainEngine(model, micro_batch_size=1), few, store, ALONE).values
    with torch.no_grad():
        for block in model.blocks[1::2]:
            block.attention.out_weight.zero_()
    without = report(PlainEngine(model, micro_batch_size=1), few, store, ALONE).values
    assert values["eval/loss_without_lsh"] == pytest.approx(without["eval/loss"], rel=1e-6)
    assert values["eval/lsh_gain"] == pytest.approx(without["eval/loss"] - with_lsh["eval/loss"], abs=2e-6)
    assert abs(values["eval/lsh_gain"]) > 1e-3 and without["eval/lsh_gain"] == 0


def test_everything_that_is_reported(store: Store) -> None:
    engine = PlainEngine(Reformer(config(store).model), micro_batch_size=2)
    found = report(engine, config(store), store, ALONE)
    values = found.values
    assert engine.module.training
    (row,) = RowDataset(store, "train")
    with torch.no_grad():
        tokens, labels, segment_ids = (x[None] for x in row)
        nll = engine.module.eval()(tokens, labels, segment_ids=segment_ids, per_token=True).sum().item()
    assert values["eval/source/same/loss"] == values["eval/loss"]
    n_tokens = int((row.labels != IGNORED_LABEL).sum())
    assert values["eval/source/other/loss"] * n_tokens == pytest.approx(nll)
    assert values["eval/source/other/bits_per_byte"] * (n_tokens - 1) * math.log(2) == pytest.approx(nll), "of bytes"
    assert values["eval/bits_per_token"] == pytest.approx(values["eval/loss"] / math.log(2))
    assert values["eval/perplexity"] == pytest.approx(math.exp(values["eval/loss"]))
    assert {position_tag(end, 256): loss for end, loss in found.by_position.items()} == {
        tag: value for tag, value in values.items() if tag.startswith("eval/loss_at/")
    }
    assert {tag.split("/")[0] for tag in values} == {"eval", "lsh", "reversible"}
    assert found.sample is not None
    assert len(figure_by_position(found.by_position).axes[0].lines[0].get_xdata()) == 4
    figure_by_position({}).canvas.draw()  # of a split without anything to predict


def test_a_damaged_row_of_a_source_says_how_to_go_on_without(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = RowDataset.__getitem__

    def damaged(rows: RowDataset, index: int) -> Sample:
        if rows.split == "train":
            raise DataError("row 0 is damaged")
        return read(rows, index)

    monkeypatch.setattr(RowDataset, "__getitem__", damaged)
    engine = PlainEngine(Reformer(config(store).model), micro_batch_size=2)
    with pytest.raises(DataError, match=r"row 0 is damaged. .* without, leave out data.mixture.other.eval_split"):
        report(engine, config(store), store, ALONE)


def test_what_is_not_asked_for_is_left_out(store: Store) -> None:
    plan = config(store, run={"ablation_rows": 0, "sample_tokens": 0, "diagnostics": False})
    engine = PlainEngine(Reformer(plan.model), micro_batch_size=2)
    found = report(engine, plan, store, ALONE)
    assert found.sample is None
    assert not any(word in tag for tag in found.values for word in ("lsh", "reversible"))
    n_passes = engine.n_passes
    assert n_passes == 4 + 1  # for 7 rows, and one of another source
    report(engine, config(store), store, ALONE)
    assert engine.n_passes - n_passes == 4 + 1 + 1 + 8


def test_a_model_without_lsh_attention_has_nothing_to_leave_out(store: Store) -> None:
    plan = config(store, attn_pattern=("local", "dense", "lsh"))  # of two layers
    values = report(PlainEngine(Reformer(plan.model), micro_batch_size=2), plan, store, ALONE).values
    assert not any("lsh" in tag for tag in values)


def test_scores_of_nothing_and_of_much() -> None:
    assert math.isnan(Score(0.0, 0, 0).perplexity) and math.isnan(Score(0.0, 0, 0).bits_per_byte)
    assert Score(1e6, 1, 1).perplexity == math.inf
    assert Score(8 * math.log(2), 4, 2).bits_per_token == 2 and Score(8 * math.log(2), 4, 2).bits_per_byte == 4


def test_two_ranks_report_the_same_under_every_zero_stage(store: Store, tmp_path: Path) -> None:
    """As one process with the model alone: all numbers, and the text."""
    torch.manual_seed(config(store).run.seed)
    alone = report(PlainEngine(Reformer(config(store).model), micro_batch_size=1), config(store), store, ALONE)
    run_workers(HERE / "held_out_evaluation_worker.py", tmp_path, [(store.path, tmp_path, rank) for rank in (0, 1)])
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert list(first) == ["0", "1", "2", "3"]
    for stage, found in first.items():
        assert found["values"] == pytest.approx(alone.values, rel=1e-5, abs=1e-5), stage
        assert found["sample"] == second[stage]["sample"] == alone.sample
        assert found["by_position"] == {
            str(end): pytest.approx(loss, rel=1e-6) for end, loss in alone.by_position.items()
        }
        for tag, value in second[stage]["values"].items():
            if tag.startswith("eval/"):
                assert value == found["values"][tag]


def test_rounds_need_an_lsh_layer(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nvocab_size = 20\n[data]\nstore = "s"\n[run]\ndir = "r"\ndeepspeed_config = "ds.json"\nsteps = 1\n'
    )
    (tmp_path / "ds.json").write_text(json.dumps({}))
    loaded, _ = load(path, ["run.eval_n_hashes=8"])
    assert loaded.run.eval_n_hashes == 8
    with pytest.raises(ConfigError, match=r"run.eval_n_hashes=8 .*attn_pattern=\('local',\).*: leave it out"):
        load(path, ["run.eval_n_hashes=8", 'model.attn_pattern=["local"]'])
    with pytest.raises(ConfigError, match="the model has no LSH layer"):
        load(path, ["run.eval_n_hashes=8", 'model.attn_pattern=["local", "lsh"]', "model.n_layers=1"])
    with pytest.raises(ConfigError, match="'eval_n_hashes'"):
        load(path, ["run.eval_n_hashes=0"])
