"""Text from an exported model: what is printed, by which tokens, and what is refused before anything is."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import generate
import numpy as np
import pytest
import torch
from small_exports import NEVER, expected, tokenizer_record, write_export

from data_pipeline.tokenizer import IntegerTokenizer, load_tokenizer
from reformer import Reformer, ReformerConfig, load_model, save_model
from reformer.generation import continue_tokens
from reformer.hf import save_hf
from trainer import sampling
from trainer.exported import choose_device


def test_the_prompt_and_what_the_library_adds_are_all_that_is_printed(exported: Path, call) -> None:
    options = ("--tokens", "40", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3")
    added = expected(exported, [256, *b"my words"], 40, temperature=0.8, top_p=0.9, seed=3)
    assert call(exported, "my words", *options) == (0, f"my words{added.decode(errors='replace')}\n", "")
    assert "\ufffd" in added.decode(errors="replace")
    assert call(exported, "my words", *options[:-1], "4")[1] != call(exported, "my words", *options)[1]


def test_it_does_not_need_deepspeed(exported: Path) -> None:
    program = (
        "import runpy, sys\n"
        "sys.modules['deepspeed'] = None  # an import fails\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [generate.__file__, str(exported), "abc", "--tokens", "0", "--device", "cpu"]
    command = [sys.executable, "-c", f"import sys; sys.argv = {arguments}\n{program}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "abc\n"


@pytest.mark.parametrize("name", ["exported", "pieces"])
def test_the_defaults(name: str, request: pytest.FixtureRequest, call) -> None:
    folder = request.getfixturevalue(name)
    message = "add at most 61" if name == "exported" else "add at most"
    code, out, error = call(folder, "ab")
    assert code == 2 and out == "" and "and 200 more are beyond max_seq_len=64" in error and message in error


def test_a_model_that_sees_what_comes_after_continues_nothing(tmp_path: Path, call) -> None:
    """Also where it has no tokenizer, which would not help."""
    config = ReformerConfig(vocab_size=258, max_seq_len=64, d_model=16, n_layers=1, n_heads=2, causal=False)
    save_model(tmp_path / "model", config, Reformer(config).state_dict())
    code, _, error = call(tmp_path / "model", "ab")
    assert code == 2 and error.endswith("sees the tokens that it would have to add (causal=False)\n")


def test_sentencepiece(pieces: Path, call) -> None:
    tokenizer = load_tokenizer(str(pieces / "tokenizer.model"))
    ids = [tokenizer.bos_id, *tokenizer.encode("The 가 \u2581fox  ".encode()).tolist()]
    added = expected(pieces, ids, 20, top_p=0.95)
    code, out, _ = call(pieces, "The 가 \u2581fox  ", "--tokens", "20")
    assert code == 0 and out == f"The 가 \u2581fox  {added.decode(errors='replace')}\n"


def test_a_character_of_several_tokens_is_whole(exported: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is printed when it is drawn; a half character is replaced at the end of the text only."""
    said = iter([*"é가".encode(), 0xC3])
    monkeypatch.setattr(sampling, "continue_tokens", lambda *_, **__: torch.tensor([[next(said)]]))
    assert call(exported, "x", "--tokens", "6")[1] == "xé가\ufffd\n"


def test_integers(tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a piece of music, say; what a byte of text would be is none of theirs."""
    tokenizer = IntegerTokenizer(300)
    facts = tokenizer_record(kind="integers", vocab_size=302, sha256=tokenizer.sha256)
    folder = write_export(tmp_path / "integers", 302, facts, ends=(tokenizer.bos_id, tokenizer.eos_id))
    model = load_model(folder)
    added = continue_tokens(model, model.config, torch.tensor([300, 67, 299, 0]), 20, temperature=0).tolist()
    values = [str(value) for value in (67, 299, 0, *added) if value < 300]
    code, out, error = call(folder, "67  299\n0", "--tokens", "20", "--temperature", "0")
    assert (code, out.split(), error) == (0, values, "")
    for prompt in ("67 300", "67 -1", "67 x", "6.5", f"67 {'9' * 20}"):
        code, out, error = call(folder, prompt, "--tokens", "20")
        assert code == 2 and out == ""
        assert (
            f"the prompt has {prompt.split()[-1]!r} in it: this model continues integers from 0 to 299, with" in error
        )
    assert "the prompt has '99999999999999999999' in it" in call(folder, "9" * 5000)[2]
    assert call(folder, "", "--tokens", "1")[0] == 0
    arrays = {"whole": np.array([[67], [299], [0]]), "above": np.array([67, 300]), "below": np.array([-1])}
    for name, array in {**arrays, "floats": np.ones(2), "objects": np.array([None])}.items():
        np.save(tmp_path / f"{name}.npy", array)
    whole = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "header.npy").write_bytes(whole.replace(b"(3, 1)", b"(3, 1("))

    def of_array(name: str) -> tuple[int, str, str]:
        with (tmp_path / f"{name}.npy").open("rb") as file:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
            return call(folder, "-", "--tokens", "20", "--temperature", "0")

    assert of_array("whole") == (0, " ".join(values) + " \n", "")
    for name, what in {
        "above": "has the value 300 at place 1: expected 0 to 299",
        "below": "has the value -1 at place 0: expected 0 to 299",
        "floats": "holds values of type float64, not integers",
        "objects": "holds Python objects, not integers",
        "cut": "ends early: 0 values are there instead of 1",
        "header": "holds no array that can be read",
    }.items():
        code, out, error = of_array(name)
        assert (code, out) == (2, "") and f"the prompt {what}" in error, error


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, call) -> None:
    folder = write_export(tmp_path / "ruined", 258, tokenizer_record(), biases=(NEVER, float("nan")))
    code, out, error = call(folder, "abc", "--tokens", "5")
    assert code == 2 and out == "" and "has weights that are not finite" in error


def test_ctrl_c_is_no_traceback(exported: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "continue_tokens", interrupt)
    assert call(exported, "abc", "--tokens", "5") == (130, "abc", "error: interrupted\n")


def test_weights_whose_logits_are_no_numbers_are_no_traceback(exported: Path, call, monkeypatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise FloatingPointError("not numbers")

    monkeypatch.setattr(sampling, "continue_tokens", diverge)
    assert call(exported, "abc", "--tokens", "5") == (2, "abc", "error: not numbers\n")


def test_text_is_utf_8_whatever_the_terminal_has(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["generate.py", str(exported), "é", "--tokens", "0", "--device", "cpu"])
    assert generate.main() == 0
    assert written.getvalue().decode() == "é\n"


def test_the_end_of_the_document_ends_the_text(tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_export(tmp_path / "ends", 258, tokenizer_record(), biases=(NEVER, 100.0))
    asked: list[int] = []

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        asked.append(1)
        return continue_tokens(*arguments, **options)

    monkeypatch.setattr(sampling, "continue_tokens", counted)
    note = "note: the model ended the document after 0 tokens\n"
    assert call(folder, "all", "--tokens", "9") == (0, "all\n", note)
    assert len(asked) == 1


def test_what_no_document_had_in_training_is_never_drawn(tmp_path: Path, call) -> None:
    """EOS where documents ended without it, and BOS, which follows nothing."""
    never = write_export(tmp_path / "never", 258, tokenizer_record())
    likely = write_export(tmp_path / "likely", 258, tokenizer_record(eos=False), biases=(100.0, 101.0))
    added = expected(never, [256, *b"all"], 30, temperature=0).decode(errors="replace")
    assert call(likely, "all", "--tokens", "30", "--temperature", "0") == (0, f"all{added}\n", "")


def test_bos_is_in_front_as_it_was_in_training(tmp_path: Path, call) -> None:
    without = write_export(tmp_path / "without", 258, tokenizer_record(bos=False))
    with_bos = write_export(tmp_path / "with", 258, tokenizer_record())
    for folder, ids in ((without, [*b"abc"]), (with_bos, [256, *b"abc"])):
        added = expected(folder, ids, 30, temperature=0).decode(errors="replace")
        assert call(folder, "abc", "--tokens", "30", "--temperature", "0")[1] == f"abc{added}\n"
    assert call(with_bos, "", "--tokens", "3")[0] == 0
    code, out, error = call(without, "", "--tokens", "3")
    assert code == 2 and out == "" and "the prompt is empty, and documents of this model begin without BOS" in error


def test_a_prompt_from_standard_input_is_taken_as_it_is(exported: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"two\r\nlines\n")))
    assert call(exported, "-", "--tokens", "0")[1] == "two\r\nlines\n\n"


def test_a_prompt_that_names_a_file_is_noted(
    exported: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").write_text("abc")
    monkeypatch.chdir(tmp_path)
    code, out, error = call(exported, "a b", "--tokens", "1")
    assert code == 0 and out.startswith("a b")
    assert error == "note: the prompt is the name of a file; to continue what is in it, give - and < FILE\n"
    code, _, error = call(exported, "a" * 5000, "--tokens", "1")
    assert code == 2 and "beyond max_seq_len" in error, "it is no name of a file"


def test_a_prompt_that_is_no_text(exported: Path, pieces: Path, call) -> None:
    broken = b"ab\xff".decode(errors="surrogateescape")  # as Python gives such an argument
    assert call(exported, broken, "--tokens", "0")[1] == "ab\ufffd\n"
    code, out, error = call(pieces, broken, "--tokens", "0")
    assert code == 2 and out == "" and "the prompt is not UTF-8 at byte 2" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "-1"), "n_tokens=-1 must be at least 0"),
        (("--seed", "-1"), "--seed -1 must be at least 0"),
        (("--tokens", "5", "--temperature", "-1"), "temperature=-1.0 must be at least 0"),
        (("--tokens", "5", "--top-p", "0"), "top_p=0.0 must be above 0 and at most 1"),
        (
            ("--tokens", "61"),
            "4 tokens and 61 more are beyond max_seq_len=64: add at most 60 (BOS, which the prompt begins with, is one "
            "of them), or take the end of the prompt with --last N\n",
        ),
        (("--tokens", "64", "--last", "1"), "1 tokens and 64 more are beyond max_seq_len=64: add at most 63\n"),
        (("--tokens", "63", "--last", "2"), "2 tokens and 63 more are beyond max_seq_len=64: add at most 62, or take"),
    ],
)
def test_what_is_asked_for_is_checked_before_anything_is_printed(
    exported: Path, call, arguments: tuple[str, ...], message: str
) -> None:
    code, out, error = call(exported, "abc", *arguments)
    assert code == 2 and out == "" and error.startswith("error: ") and message in error
    assert ("BOS" in error) == ("max_seq_len" in error and "--last" not in arguments)


def test_a_part_of_a_prompt(exported: Path, call) -> None:
    def continued(prompt: str, *part: str) -> str:
        code, out, error = call(exported, prompt, "--tokens", "9", *part)
        assert (code, error) == (0, "")
        return out

    whole = continued("abc")
    assert whole.startswith("abc") and len(whole) > 4
    assert continued("abcd" * 99, "--first", "3") == whole == continued("abc", "--last", "3")
    assert continued("x" * 99 + "abc", "--last", "3").startswith("abc"), "without BOS"


def test_folders_that_are_no_export(tmp_path: Path, call) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "SHA256SUMS").touch()
    model = Reformer(ReformerConfig(vocab_size=258, max_seq_len=64, d_model=16, n_heads=2, n_buckets=4))
    for name in ("hf", "theirs"):
        save_hf(model, tmp_path / name)
    (tmp_path / "theirs" / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": []}')
    messages = {
        "nowhere": "nowhere is not a folder: give one that launch/export.py or save_pretrained wrote",
        "empty": "empty/config.json is missing: give a folder that launch/export.py, save_model, save_hf or",
        "run": "export its model first, python launch/export.py",
        "checkpoint": "export its model first, python launch/export.py",
        "hf": "has no tokenizer (tokenizer.json is missing)",
        "theirs": "theirs/tokenizer.json is Hugging Face's, which is not read here: continue the model's tokens in",
    }
    for name, message in messages.items():
        code, out, error = call(tmp_path / name, "abc")
        assert code == 2 and out == "" and message in error


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({}, r"has no tokenizer (tokenizer.json is missing): export it again where the run's store is"),
        ({"tokenizer.json": b"{"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": b"[]"}, "tokenizer.json cannot be read"),
        (tokenizer_record(kind="integers"), "is not what"),
        (
            {"tokenizer.json": json.dumps({"kind": "bytes", "bos": True, "sha256": ""}).encode()},
            "does not name a tokenizer",
        ),
        (tokenizer_record(kind="integers", vocab_size=258.5), "does not name a tokenizer"),
        (tokenizer_record(sha256="0"), "is not what"),
        (tokenizer_record(kind="sentencepiece"), "cannot read tokenizer"),
    ],
)
def test_tokenizers_that_are_missing_or_damaged(tmp_path: Path, call, others: dict[str, bytes], message: str) -> None:
    code, out, error = call(write_export(tmp_path / "exported", 258, others), "abc", "--tokens", "5")
    assert code == 2 and out == "" and message in error


def test_a_tokenizer_of_another_model(tmp_path: Path, call) -> None:
    code, _, error = call(write_export(tmp_path / "exported", 300, tokenizer_record()), "abc", "--tokens", "5")
    assert code == 2 and "has 258 tokens, and its model 300" in error


def test_a_device_that_is_not_there(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(exported), "abc", "--device", "cuda"])
    assert generate.main() == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err
    assert choose_device(None) == torch.device("cpu")
