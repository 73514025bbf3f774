"""A text as it is shown: where it begins and ends, what bytes and numbers look like, and what Markdown makes of it."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import CPU, PlainEngine, config, make_store
from small_stores import write_store
from tensorboard.plugin_util import markdown_to_safe_html
from torch import Tensor

import trainer.text_sample
from data_pipeline.dataset import RowDataset
from data_pipeline.store import Store
from data_pipeline.tokenizer import ByteTokenizer, IntegerTokenizer
from reformer import Reformer
from trainer.config import RunConfig
from trainer.distributed import Launch
from trainer.text_sample import as_markdown, as_text, beginning, literal, sample_continuation

EOS = ByteTokenizer.eos_id
NASTY = (
    "# no *heading*\n\n<script>alert(1)</script> & <b>bold</b> &amp; `code`\n```\nfenced\n~~~\n"
    "1. list\n- item\n> quote\n\n[a]: http://b.c\n| a | b |\n|---|---|\n\n    indented\n\\*back\\_slash ![x](y)  \nlast"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.text_sample, "together", lambda action, *_: action())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data"))


class _Says(PlainEngine):
    """A model that goes on with what it is told, whatever it reads."""

    def __init__(self, says: list[int]) -> None:
        super().__init__(Reformer(config().model), 1)
        self.says, self.read = says, []

    def __call__(self, tokens: Tensor, **options: object) -> Tensor:
        self.read.append(tokens)
        logits = torch.full((1, tokens.shape[1], ByteTokenizer.vocab_size), -100.0)
        logits[0, -1, self.says[(len(self.read) - 1) % len(self.says)]] = 100.0
        return logits


def sampled(engine: PlainEngine, store: Store, plan: RunConfig | None = None) -> str | None:
    return sample_continuation(engine, RowDataset(store, "val"), plan or config(store), Launch("this test"), CPU)


def shown(markdown: str) -> list[str]:
    """The texts that TensorBoard shows as they are."""
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", markdown_to_safe_html(markdown), flags=re.DOTALL)
    return [html.unescape(block) for block in blocks]


def test_the_first_half_of_the_first_document_is_continued(store: Store) -> None:
    engine, row = _Says([*b"my words"]), RowDataset(store, "val")[0]
    text = sampled(engine, store)
    n_first = int((row.segment_ids == 1).sum())
    given = engine.read[0][0]
    assert torch.equal(given, row.tokens[: -(-n_first // 2)])
    assert [tokens.shape[1] - len(given) for tokens in engine.read] == list(range(8))
    text_given = bytes(given[given < 256].tolist()).decode()
    assert shown(text) == [f"{text_given.rstrip()}\n", "my words\n"]
    assert f"{len(given)} tokens of a held-out text" in text and "the model's next 8:" in text


def test_a_prompt_is_no_longer_than_256_tokens_and_leaves_room() -> None:
    long = torch.arange(1000)
    assert torch.equal(beginning(long, torch.ones(1000)), long[:256])
    assert torch.equal(beginning(long[:7], torch.tensor([1, 1, 1, 1, 1, 2, 2])), long[:3])
    assert torch.equal(beginning(long[:2], torch.tensor([1, 2])), long[:1])
    assert len(beginning(long[:2], torch.tensor([0, 0]))) == 0


def test_the_end_of_a_document_ends_the_text_but_not_the_passes(store: Store) -> None:
    """Under ZeRO-3 other ranks take part in as many."""
    engine = _Says([*b"abc", EOS, *b"defg"])
    text = sampled(engine, store)
    assert shown(text)[1] == "abc\n" and "the model's next 3, where the text ends:" in text
    assert len(engine.read) == 8
    assert "the model's next 0, where the text ends:" in sampled(_Says([EOS]), store)


def test_what_no_document_had_in_training_is_not_drawn(store: Store, tmp_path: Path) -> None:
    """BOS, and EOS where documents ended without it: the likeliest of what is left comes in their place."""

    class Odd(_Says):
        def __call__(self, tokens: Tensor, **options: object) -> Tensor:
            logits = super().__call__(tokens, **options)
            logits[..., [ByteTokenizer.bos_id, EOS]] = 200.0
            return logits

    write_store(tmp_path / "store", {"a": b"a text that has no end"}, val=["a"], seq_len=64, eos=False)
    text = sampled(Odd([*b"goes on."]), Store.open(tmp_path / "store"))
    assert shown(text)[1] == "goes on.\n"
    assert "the model's next 0, where the text ends:" in sampled(Odd([*b"goes on."]), store)


def test_samples_follow_from_the_weights(store: Store) -> None:
    torch.manual_seed(0)
    plan = config(store)
    models = [Reformer(plan.model).eval() for _ in range(2)]
    first, second = (sampled(PlainEngine(model, 1), store) for model in models)
    assert first == sampled(PlainEngine(models[0], 1), store) != second
    rounds = config(store, run={"eval_n_hashes": 1})
    assert sampled(PlainEngine(models[0], 1), store, rounds) != first  # as many as evaluations use


def test_no_sample(store: Store) -> None:
    engine = _Says([1])
    assert sampled(engine, store, config(store, run={"sample_tokens": 0})) is None and not engine.read


def test_a_model_that_has_diverged_gives_no_sample(store: Store) -> None:
    class Diverged(_Says):
        def __call__(self, tokens: Tensor, **options: object) -> Tensor:
            return super().__call__(tokens, **options) * torch.nan

    assert sampled(Diverged([1]), store) is None


def test_a_sample_ends_with_the_model_s_positions(store: Store) -> None:
    engine = _Says([*b"x"])
    sampled(engine, store, config(store, run={"sample_tokens": 10**6}))
    assert engine.read[-1].shape[1] == store.seq_len - 1


@pytest.mark.parametrize("text", [NASTY, "", "\n\n  two lines before", "тест 漢字 🙂", "tab\tand    spaces"])
def test_tensorboard_shows_the_text_as_it_is(text: str) -> None:
    page = markdown_to_safe_html(f"**title**\n\n{literal(text)}\n\n**next**\n\n{literal(text)}")
    assert page.count("<strong>") == 2
    assert not re.search(r"<(script|b|h1|li|blockquote|a|img|table|em)\b", page)
    # Markdown drops blank lines around a block, and makes tabs of spaces.
    kept = text.strip("\n").expandtabs(4)
    assert shown(f"**title**\n\n{literal(text)}") == ([f"{kept}\n"] if kept else [])


def test_bytes_that_are_no_text() -> None:
    assert as_text(ByteTokenizer(), torch.tensor([*"né".encode()[:-1], 255, 65, 256])) == "n\ufffd\ufffdA"
    assert literal("a\0b\x02c\x1b[0m\rd\r\ne\tf\x7f") == "    a\ufffdb\ufffdc\ufffd[0m\ufffdd\n    e\tf\ufffd"


def test_integers_are_shown_as_numbers(tmp_path: Path) -> None:
    assert as_text(IntegerTokenizer(1000), torch.tensor([1000, 7, 999, 1001])) == "7 999"
    document = np.arange(40, dtype="<u2").tobytes()
    write_store(tmp_path / "store", {"a": document}, IntegerTokenizer(1000), val=["a"], seq_len=64)
    store = Store.open(tmp_path / "store")
    markdown = as_markdown(torch.tensor([1000, 3, 500]), torch.tensor([12, 1001, 5]), store.tokenizer)
    assert shown(markdown) == ["3 500\n", "12\n"]
