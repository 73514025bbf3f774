"""Scores of an exported model: against sums by the plainest code, with every attention, and what is refused."""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from evaluation import CPU, PlainEngine, make_store
from evaluation import config as run_config
from on_disk import fill, flip
from small_stores import write_store
from torch import Tensor
from torch.nn import functional as F

import trainer.held_out_evaluation
from data_pipeline.dataset import RowDataset
from data_pipeline.store import Store
from data_pipeline.tokenizer import ByteTokenizer
from reformer import Reformer, ReformerConfig, load_model, save_model
from reformer.attention import LSHSelfAttention
from reformer.hf import save_hf
from reformer.lsh.reference import lsh_attention_reference
from trainer.attention_comparison import Scores, score_rows, standard_error
from trainer.batches import drawn
from trainer.distributed import Launch
from trainer.held_out_evaluation import Evaluator
from trainer.scoring import Score
from trainer.sequence_parallel import Place

BYTES = {"kind": "bytes", "vocab_size": 258, "sha256": ByteTokenizer.sha256, "bos": True, "eos": True}
Document = tuple[float, int, int]
"""Nats, tokens to predict, and bytes of these."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data"))


def write(folder: Path, sha256: str = ByteTokenizer.sha256, **changes: object) -> Path:
    """An export of a model that attends: random weights, with sharper queries than a new one has."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "max_seq_len": 256, "d_model": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.5}
    config = ReformerConfig(**{**sizes, "n_hashes": 2, "lsh_chunk_len": 8, "local_chunk_len": 8, **changes})
    model = Reformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.head.weight.mul_(0.01)  # no surer than a guess
    save_model(folder, config, model.state_dict(), {"tokenizer.json": json.dumps({**BYTES, "sha256": sha256}).encode()})
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "exported")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The command: its exit code, standard output and standard error."""

    def run(folder: Path, store: Path, *arguments: object) -> tuple[int, str, str]:
        words = ["evaluate.py", folder, store, *arguments, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        code = evaluate.main()
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def scores(call, tmp_path: Path):
    """What the command writes about each setting."""

    def run(folder: Path, store: Store, *arguments: object) -> list[dict]:
        code, _, errors = call(folder, store.path, *arguments, "--json", tmp_path / "scores.json")
        assert (code, errors) == (0, "")
        return json.loads((tmp_path / "scores.json").read_bytes())["settings"]

    return run


def plain(store: Store, logits: Callable[..., Tensor], rows: Sequence[int] = range(7)) -> dict[int, Document]:
    """Of each held-out document, in these rows, from whole logits: token by token."""
    found: dict[int, Document] = {}
    for row in rows:
        tokens, labels, segment_ids = (x[None] for x in RowDataset(store, "val")[row])
        with torch.no_grad():
            logits_TV = logits(tokens, segment_ids=segment_ids)[0].double()
        nats_T = F.cross_entropy(logits_TV, labels[0], reduction="none", ignore_index=-100).tolist()
        (first_row, _) = store.split_rows("val")[0]
        for start, length, document, _ in store.segments_of(first_row + row).tolist():
            for place in range(start, start + length):
                if (label := labels[0, place].item()) != -100:
                    nats, n_tokens, n_bytes = found.get(document, (0.0, 0, 0))
                    # BOS and EOS stand for no bytes.
                    found[document] = (nats + nats_T[place], n_tokens + 1, n_bytes + (label < 256))
    return found


def assert_equal(found: dict, expected: dict[int, Document]) -> None:
    """All that is said of a setting, by what is said of its documents."""
    documents = {one["document"]: (one["nats"], one["tokens"], one["bytes"]) for one in found["by_document"]}
    assert documents.keys() == expected.keys() and len(documents) > 1
    assert all(documents[number] == pytest.approx(expected[number], rel=1e-6) for number in expected)
    nats, n_tokens, n_bytes = map(sum, zip(*expected.values(), strict=True))
    assert found["nats_per_token"] == pytest.approx(nats / n_tokens, rel=1e-6)
    assert found["bits_per_token"] == pytest.approx(nats / n_tokens / math.log(2), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-5)


def test_as_the_model_was_trained_without_its_dropout(exported: Path, store: Store, scores) -> None:
    (found,) = scores(exported, store)
    assert found["name"] == "2 rounds" and found["more_than_first"] == 0
    assert_equal(found, plain(store, load_model(exported)))


def test_the_evaluation_of_a_run_says_the_same(
    exported: Path, store: Store, scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.held_out_evaluation, "together", lambda action, *_: action())
    monkeypatch.setattr(trainer.held_out_evaluation, "all_sum", lambda values, _: [float(value) for value in values])
    engine, token_bytes = PlainEngine(load_model(exported), 3), torch.from_numpy(store.token_bytes.astype("int64"))
    evaluator = Evaluator(engine, run_config(store), Launch("this test"), Place(), CPU, token_bytes)
    of_run = evaluator.score(RowDataset(store, "val"), n_rows=7, n_first=0)
    (found,) = scores(exported, store)
    assert found["nats_per_token"] == pytest.approx(of_run.all.loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(of_run.all.bits_per_byte, rel=1e-6)
    by_position = {str(end): score.loss for end, score in of_run.by_position.items() if score.n_tokens}
    assert found["by_position"] == pytest.approx(by_position, rel=1e-6) and len(by_position) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_another_attention_in_lsh_layers(tied: bool, store: Store, scores, tmp_path: Path) -> None:
    """Rounds, all tokens by the oracle in one bucket, and values that are zero."""
    folder = write(tmp_path / "own", tie_embeddings=tied)
    model, without = load_model(folder), load_model(folder)
    expected = {rounds: plain(store, partial(model, n_hashes=rounds)) for rounds in (1, 3)}
    for block in model.blocks:
        if isinstance(block.attention, LSHSelfAttention):
            block.attention.inner = all_tokens
    for block in without.blocks:
        if isinstance(block.attention, LSHSelfAttention):
            torch.nn.init.zeros_(block.attention.value_weight)
    found = scores(folder, store, "--attention", 3, 1, "dense", "none")
    assert [one["name"] for one in found] == ["3 rounds", "1 round", "dense", "none"]
    of_all = [expected[3], expected[1], plain(store, model), plain(store, without)]
    for one, rows in zip(found, of_all, strict=True):
        assert_equal(one, rows)
    losses = [one["nats_per_token"] for one in found]
    assert len({round(loss, 4) for loss in losses}) == 4, "they say nothing about each other"
    assert [one["more_than_first"] for one in found] == pytest.approx([loss - losses[0] for loss in losses])


def all_tokens(qk: Tensor, v: Tensor, buckets: None, *, segment_ids: Tensor, **options: object) -> tuple[Tensor, None]:
    """One round, one bucket, one chunk."""
    same = torch.zeros(*qk.shape[:2], 1, qk.shape[2], dtype=torch.int64)
    return lsh_attention_reference(qk, v, same, chunk_len=qk.shape[2], segment_ids_BT=segment_ids), None


def test_settings_are_compared_document_by_document(exported: Path, store: Store, scores) -> None:
    first, other = scores(exported, store, "--attention", 2, 3)
    ours, theirs = (
        [Score(row["nats"], row["tokens"], row["bytes"]) for row in one["by_document"]] for one in (other, first)
    )
    apart = [Score(own.nll - one.nll, own.n_tokens, 0) for own, one in zip(ours, theirs, strict=True)]
    assert other["more_standard_error"] == pytest.approx(standard_error(apart), rel=1e-9)
    assert other["standard_error"] == pytest.approx(standard_error(ours), rel=1e-9)
    assert other["more_standard_error"] < other["standard_error"] / 2, "nothing is gained by comparing documents"


def test_the_standard_error_of_a_ratio_of_sums() -> None:
    torch.manual_seed(0)
    equal = torch.randn(50, dtype=torch.float64)
    assert standard_error([Score(7 * x, 7, 0) for x in equal.tolist()]) == pytest.approx(float(equal.std()) / 50**0.5)
    n_tokens = torch.randint(100, 9000, (400,)).double()
    nll = n_tokens * (4 + torch.randn(400)) + 300
    means = [float(nll[drawn].sum() / n_tokens[drawn].sum()) for drawn in torch.randint(400, (4000, 400))]
    scores = [Score(*pair, 0) for pair in zip(nll.tolist(), n_tokens.tolist(), strict=True)]
    assert standard_error(scores) == pytest.approx(float(torch.tensor(means).std()), rel=0.05)  # the bootstrap's
    assert math.isnan(standard_error(scores[:1]))


def test_documents_with_other_ends_than_those_of_the_training_are_noted(exported: Path, call, tmp_path: Path) -> None:
    """The model was trained with BOS; whether with EOS, its folder does not say."""
    said = {}
    for bos in (True, False):
        write_store(tmp_path / f"{bos}", {"a": b"abcd" * 90, "b": b"dcba" * 90}, val=["b"], seq_len=256, bos=bos)
        code, _, said[bos] = call(exported, tmp_path / f"{bos}")
        assert code == 0
    assert "differ from those of the training in whether they have BOS: the model is scored on" in said[False]
    assert "differ from those" not in said[True]


def test_what_is_printed(exported: Path, store: Store, call) -> None:
    code, out, errors = call(exported, store.path, "--rows", 3, "--attention", 2, "dense")
    assert (code, errors) == (0, "")
    documents = plain(store, load_model(exported), sorted(drawn(7, 3))).values()
    head, empty, columns, as_trained, dense, *rest = out.splitlines()
    nats, n_tokens, n_bytes = map(sum, zip(*documents, strict=True))
    few = "(of so few, standard errors say little)"
    predicted = f"{n_tokens} tokens to predict in {len(documents)} documents {few}, {n_bytes} bytes"
    assert (head, empty) == (f"{exported} on 3 rows of val in {store.path}: {predicted}", "")
    assert columns.split("  ")[0] == "LSH layers" and f"{nats / n_tokens:.4f} ± " in as_trained
    assert as_trained.startswith("2 rounds ") and dense.startswith("dense ") and "+" not in as_trained
    assert rest[2].split() == ["LSH", "layers", "4", "16", "64", "256"] and len(rest) == 5


def test_tokens_that_are_those_of_another_model_are_noted(store: Store, call, tmp_path: Path) -> None:
    """A new model is as good as a guess; one that is sure of something else is worse."""
    sure = write(tmp_path / "sure", n_layers=1)
    model = load_model(sure)
    with torch.no_grad():
        model.head.bias[7] = 30.0
    save_model(tmp_path / "of_others", model.config, model.state_dict(), {})
    said = r"note: \d\d\.\d{4} nats are more than the 5\.5530 of a guess among 258 tokens: are the store's token ids"
    assert re.search(said, call(tmp_path / "of_others", store.path)[2])
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    save_model(tmp_path / "guess", model.config, model.state_dict(), {})
    assert "of a guess among" not in call(tmp_path / "guess", store.path)[2]


def test_of_one_document_nothing_is_said_about_others(exported: Path, call, tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a": b"abc", "b": b"some more text"}, val=["b"], seq_len=256)
    code, out, _ = call(exported, tmp_path / "store")
    assert (
        code == 0 and "in 1 documents (of a single one there is no standard error), 14 bytes" in out and "±" not in out
    )
    write_store(tmp_path / "empty", {"a": b"abc", "b": b""}, val=["b"], seq_len=256, bos=False)
    code, out, errors = call(exported, tmp_path / "empty")
    assert (code, out) == (2, "") and "the rows of val in" in errors and "have no token to predict" in errors


def test_what_was_scored_before_an_end_is_not_lost(
    exported: Path, store: Store, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second setting; one that comes before the first changes nothing."""
    path = tmp_path / "scores.json"

    def interrupted_at(number: int) -> tuple[int, str, str]:
        calls = iter(range(9))

        def score(*arguments: Any) -> Scores:
            if next(calls) == number:
                raise KeyboardInterrupt
            return score_rows(*arguments)

        monkeypatch.setattr(evaluate, "score_rows", score)
        return call(exported, store.path, "--attention", 2, "dense", "--json", path)

    path.write_text("of before")
    assert interrupted_at(0) == (130, "", "error: interrupted\n") and path.read_text() == "of before"
    code, out, errors = interrupted_at(1)
    assert (code, errors) == (130, "error: interrupted\n") and "2 rounds" in out and "dense" not in out
    record = json.loads(path.read_bytes())
    assert record["asked"] == ["2 rounds", "dense"] and [one["name"] for one in record["settings"]] == ["2 rounds"]


def test_scores_of_before_stay_where_there_is_no_room_for_more(
    exported: Path, store: Store, call, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_disk / "scores.json"

    def score(*arguments: Any) -> Scores:
        if path.exists():
            fill(small_disk)
        return score_rows(*arguments)

    monkeypatch.setattr(evaluate, "score_rows", score)
    code, out, errors = call(exported, store.path, "--attention", 2, "dense", "--json", path)
    assert (code, errors) == (2, f"error: [Errno 28] No space left on device: '{path}'\n") and "dense" in out
    assert [one["name"] for one in json.loads(path.read_bytes())["settings"]] == ["2 rounds"]
    assert len(list(small_disk.iterdir())) == 2


def test_scores_go_through_links_and_to_what_is_no_file(exported: Path, store: Store, call, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    (tmp_path / "target.json").write_text("of before")
    assert call(exported, store.path, "--json", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "target.json").read_bytes())["settings"]
    assert call(exported, store.path, "--json", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


def test_another_split(exported: Path, store: Store, call) -> None:
    assert "on 1 rows of train in" in call(exported, store.path, "--split", "train", "--rows", 99)[1]


def test_hugging_face_s_folder(store: Store, call, tmp_path: Path) -> None:
    save_hf(load_model(write(tmp_path / "own", axial_shape=(16, 16))).train(), tmp_path / "theirs")
    ours, theirs = (call(tmp_path / folder, store.path) for folder in ("own", "theirs"))
    assert "does not say which tokenizer" in theirs[2] and theirs[2].startswith("note: ") and ours[2] == ""
    assert theirs[0] == 0 and theirs[1].splitlines()[3][:40] == ours[1].splitlines()[3][:40]
    origin = tmp_path / "theirs/origin.json"  # which export.py --hf writes
    origin.write_text(json.dumps({"tokenizer_sha256": store.manifest.tokenizer_sha256}))
    assert call(tmp_path / "theirs", store.path)[2] == ""
    origin.write_text('{"tokenizer_sha256": "another"}')
    code, _, errors = call(tmp_path / "theirs", store.path)
    assert code == 2 and "was trained with another tokenizer than that of" in errors
    assert "Build the store with that of the run in its origin.json, or" in errors


def test_a_model_without_lsh_layers(store: Store, call, tmp_path: Path) -> None:
    folder = write(tmp_path / "local", n_layers=1)  # the pattern's second kind is never come to
    assert call(folder, store.path)[1].splitlines()[3].startswith("as trained ")
    code, out, errors = call(folder, store.path, "--attention", 4)
    assert (code, out) == (2, "") and "--attention is for LSH attention, which no layer of" in errors


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"vocab_size": 300}, (), "has 300 tokens, and the tokenizer of"),
        ({"max_seq_len": 128}, (), "takes 128 tokens at most, and the rows of"),
        ({"causal": False}, (), "(causal=False)"),
        ({"sha256": "0" * 64}, (), "was trained with another tokenizer than that of"),
        ({}, ("--split", "test"), "--split test has no rows in"),
        ({}, ("--rows", 0), "--rows 0 must be at least 1"),
        ({}, ("--json", "/nowhere/scores.json"), "--json /nowhere/scores.json cannot be written"),
        ({}, ("--json", "/tmp"), "--json /tmp cannot be written"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict, arguments: tuple, message: str, store: Store, call, tmp_path: Path
) -> None:
    code, out, errors = call(write(tmp_path / "own", **changes), store.path, *arguments)
    assert (code, out) == (2, "") and errors.startswith("error: ") and message in errors


def test_folders_of_something_else(exported: Path, store: Store, call, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name, message in (
        ("run", "is a run or a checkpoint of one: export its model first"),
        ("none", "is not a folder"),
    ):
        code, out, errors = call(tmp_path / name, store.path)
        assert (code, out) == (2, "") and errors.startswith(f"error: {tmp_path / name} {message}")
    code, out, errors = call(exported, tmp_path / "run")
    assert (code, out) == (2, "") and str(tmp_path / "run") in errors


@pytest.mark.parametrize("word", ["0", "1.5", "four", "²", "1025"])
def test_settings_that_there_are_not(word: str, exported: Path, store: Store, call, capfd) -> None:
    with pytest.raises(SystemExit):
        call(exported, store.path, "--attention", "2", word)
    assert f"{word!r} is no setting: give a number of rounds from 1 to 1024, dense or none" in capfd.readouterr().err


def test_weights_that_are_not_finite_and_a_record_that_cannot_be_read(store: Store, call, tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "own"))
    with torch.no_grad():
        next(model.parameters())[0] = math.nan
    save_model(tmp_path / "nan", model.config, model.state_dict())
    code, out, errors = call(tmp_path / "nan", store.path)
    assert (code, out) == (2, "") and f"{tmp_path / 'nan'} has weights that are not finite" in errors
    (tmp_path / "own/tokenizer.json").write_text('{"kind"')
    code, out, errors = call(tmp_path / "own", store.path)
    assert (code, out) == (2, "") and f"{tmp_path / 'own/tokenizer.json'} cannot be read" in errors


def test_a_loss_that_is_not_finite_is_told(store: Store, call, tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "huge"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3e38)
    save_model(tmp_path / "huge/model", model.config, model.state_dict())
    code, out, errors = call(tmp_path / "huge/model", store.path, "--json", tmp_path / "scores.json")
    assert code == 0 and "note: the loss is no finite number: the weights have diverged\n" in errors
    assert "–" in out and "nan" not in out
    scores = json.loads((tmp_path / "scores.json").read_bytes())["settings"][0]
    assert scores["nats_per_token"] is None and {*scores["by_position"].values()} == {None}
    assert {document["nats"] for document in scores["by_document"]} == {None}


def test_a_damaged_row_is_named(exported: Path, call, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shards = sorted((store.path / "tokens/c").rglob("*"))
    shard = [path for path in shards if path.is_file()][-1]
    flip(shard, 20)
    code, out, errors = call(exported, store.path)
    assert (code, out) == (2, "") and errors.startswith("error: ") and shard.name in errors
