"""Many prompts of an exported model, as lines of JSON."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_exports import NEVER, expected, tokenizer_record, write_export
from small_stores import write_store

from data_pipeline.decode import decode_split
from data_pipeline.store import Store
from data_pipeline.tokenizer import IntegerTokenizer
from trainer.sampling import Continuations


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_each_prompt_and_seed_has_a_line_of_what_it_is_alone(exported: Path, tmp_path: Path, call) -> None:
    """Bytes that are not UTF-8 are replaced, what else a line says is kept, and an empty line is no prompt."""
    file = write_lines(
        tmp_path / "prompts.jsonl", {"text": "my words", "id": 7, "of": ["x"]}, {"text": "또"}, {"text": ""}
    )
    Path(file).write_text(Path(file).read_text().replace("\n", "\n\n", 1))
    code, out, error = call(exported, "--prompts", file, "--tokens", "30", "--samples", "2", "--seed", "5")
    assert (code, error) == (0, "")

    def line(text: str, seed: int, **others: object) -> dict[str, object]:
        added = expected(exported, [256, *text.encode()], 30, top_p=0.95, seed=seed).decode(errors="replace")
        return {**others, "prompt": text, "seed": seed, "continuation": added, "ended": False}

    assert [json.loads(said) for said in out.splitlines()] == [
        line("my words", 5, id=7, of=["x"]),
        line("my words", 6, id=7, of=["x"]),
        *(line(text, seed) for text in ("또", "") for seed in (5, 6)),
    ]
    assert "또" in out


def test_the_documents_of_a_split_are_prompts(
    exported: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each, its beginning: the first tokens, BOS aside."""
    documents = {f"book {number}": b"%d books, longer than any prompt may be. " % number * 3 for number in range(9)}
    write_store(tmp_path / "store", documents, val=["book 3", "book 7"])
    lines = io.BytesIO(b"".join(decode_split(Store.open(tmp_path / "store"), "val")))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines))
    code, out, error = call(exported, "--prompts", "-", "--first", "12", "--tokens", "9")
    assert code == 0, error
    found = [(said["name"], said["prompt"]) for said in map(json.loads, out.splitlines())]
    assert found == [("book 3", "3 books, lon"), ("book 7", "7 books, lon")]


def test_integers(tmp_path: Path, call) -> None:
    tokenizer = IntegerTokenizer(300)
    facts = tokenizer_record(kind="integers", vocab_size=302, sha256=tokenizer.sha256)
    folder = write_export(tmp_path / "integers", 302, facts, ends=(300, 301))
    file = write_lines(tmp_path / "prompts.jsonl", {"name": "one", "values": [299, 5, 7]}, {"values": []})
    code, out, error = call(folder, "--prompts", file, "--tokens", "6", "--first", "2")
    assert code == 0, error
    one, other = map(json.loads, out.splitlines())
    assert one["name"] == "one" and one["prompt"] == [299, 5] and other["prompt"] == []
    alone = call(folder, "299 5", "--tokens", "6")[1].split()
    assert one["prompt"] + one["continuation"] == [int(word) for word in alone]


def test_the_last_tokens_of_each_prompt_without_bos_if_its_beginning_is_left_out(
    exported: Path, tmp_path: Path, call
) -> None:
    file = write_lines(tmp_path / "prompts.jsonl", {"text": "x" * 99 + "my words"}, {"text": "my words"})
    code, out, error = call(exported, "--prompts", file, "--last", "8", "--tokens", "9")
    assert code == 0, error
    for said, before in zip(map(json.loads, out.splitlines()), ([], [256]), strict=True):
        added = expected(exported, [*before, *b"my words"], 9, top_p=0.95, seed=0).decode(errors="replace")
        assert (said["prompt"], said["continuation"]) == ("my words", added)


def test_a_line_says_whether_the_document_ended(tmp_path: Path, call) -> None:
    folder = write_export(tmp_path / "ends", 258, tokenizer_record(), biases=(NEVER, 100.0))
    code, out, _ = call(folder, "--prompts", write_lines(tmp_path / "prompts.jsonl", {"text": "all"}), "--tokens", "9")
    assert code == 0
    assert json.loads(out) == {"prompt": "all", "seed": 0, "continuation": "", "ended": True}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2 of FILE is not JSON"),
        (b'{"text": "a"}\n\n["b"]\n', "line 3 of FILE is no object with 'text', a string"),
        (b'{"prompt": "a"}\n', "line 1 of FILE is no object with 'text', a str"),
        (b'{"text": 5}\n', "line 1 of FILE is no object with 'text', a str"),
        (b'{"text": "\\ud800"}\n', "line 1 of FILE has a value that could not be given back"),
        (b'{"text": "\xff"}\n', "line 1 of FILE is not JSON"),
        (b'{"text": "a", "score": NaN}\n', "line 1 of FILE has a value that could not be given back"),
        (b'{"text": "a"}\n{"text": "%s"}\n' % (b"long" * 20), "line 2 of FILE: 81 tokens and 5 more are beyond"),
        (b"\n", "FILE has no prompts"),
    ],
)
def test_one_wrong_line_is_refused_before_any_is_continued(
    exported: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    monkeypatch.setattr(Continuations, "draw", None)
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    code, out, error = call(exported, "--prompts", str(file), "--tokens", "5")
    assert (code, out) == (2, "") and said.replace("FILE", str(file)) in error


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("[1, 300]", "line 1 of FILE: the prompt has '300' in it"),
        ("[-1]", "line 1 of FILE: the prompt has '-1' in it"),
        ("[true]", "line 1 of FILE is no object with 'values', an array of integers"),
        ('["1 2"]', "line 1 of FILE is no object with 'values', an array of integers"),
        ('"1 2"', "line 1 of FILE is no object with 'values', an array of integers"),
    ],
)
def test_values_that_are_none(tmp_path: Path, call, values: str, said: str) -> None:
    tokenizer = IntegerTokenizer(300)
    facts = tokenizer_record(kind="integers", vocab_size=302, sha256=tokenizer.sha256)
    folder = write_export(tmp_path / "integers", 302, facts, ends=(300, 301))
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"values": {values}}}\n')
    code, out, error = call(folder, "--prompts", str(file), "--tokens", "5")
    assert (code, out) == (2, "") and said.replace("FILE", str(file)) in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompts", "p.jsonl", "--output", "new"), "leave out --output"),
        (("--prompts", "missing.jsonl"), "cannot read --prompts missing.jsonl: No such file or directory: give a"),
    ],
)
def test_what_does_not_go_together(exported: Path, call, options: tuple[str, ...], said: str) -> None:
    code, out, error = call(exported, *options)
    assert (code, out) == (2, "") and said in error
