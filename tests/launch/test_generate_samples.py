"""Samples of an exported model as files: side by side, and each as if it were alone."""

from pathlib import Path

import generate
import numpy as np
import pytest
from small_exports import NEVER, expected, tokenizer_record, write_export

from data_pipeline.tokenizer import IntegerTokenizer
from reformer import ReformerConfig
from reformer.decoding import Decoder
from reformer.decoding_caches import memory_per_token
from trainer import sampling


def test_samples_are_files_of_what_each_seed_gives(exported: Path, tmp_path: Path, call) -> None:
    """Of the bytes as they are, which text on standard output need not be; files of other seeds stay."""
    options = ("my words", "--tokens", "40", "--output", str(tmp_path / "new" / "samples"))
    code, out, error = call(exported, *options, "--seed", "3", "--samples", "2")
    assert (code, out) == (0, ""), error
    assert call(exported, *options, "--seed", "12345")[0] == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "new" / "samples").iterdir()}
    assert written == {
        f"seed{seed:04d}.txt": b"my words" + expected(exported, [256, *b"my words"], 40, top_p=0.95, seed=seed)
        for seed in (3, 4, 12345)
    }
    code, out, error = call(exported, *options, "--seed", "2", "--samples", "2")
    assert code == 2 and "seed0003.txt exists: give another --output; or --seed 4" in error
    code, out, error = call(exported, *options, "--seed", "2", "--samples", "9")
    assert code == 2 and "seed0003.txt exists: give another --output; or --seed 5 --samples 6 goes on behind" in error
    assert len(list((tmp_path / "new" / "samples").iterdir())) == 3


def test_a_link_to_nowhere_is_not_replaced(exported: Path, tmp_path: Path, call) -> None:
    (tmp_path / "seed0000.txt").symlink_to("nowhere")
    code, _, error = call(exported, "abc", "--tokens", "5", "--output", str(tmp_path))
    assert code == 2 and "seed0000.txt exists: give another --output; or --seed 1" in error


def test_a_prompt_is_read_once_for_all_samples(exported: Path, tmp_path: Path, call, monkeypatch) -> None:
    read: list[int] = []
    added = Decoder._added
    monkeypatch.setattr(Decoder, "_added", lambda *of: (read.append(of[1].shape[1]), added(*of))[1])
    options = ("--tokens", "4", "--samples", "3", "--output", str(tmp_path / "new"))
    assert call(exported, "prompt", *options)[0] == 0
    assert read == [1 + len("prompt"), 1, 1, 1]


def test_neither_a_group_nor_the_last_one_keeps_more_than_it_needs(
    exported: Path, tmp_path: Path, call, monkeypatch
) -> None:
    lengths: list[int] = []
    selected: list[int] = []
    select = Decoder.select
    monkeypatch.setattr(generate, "at_once", lambda _, n_tokens: lengths.append(n_tokens) or 2)
    monkeypatch.setattr(Decoder, "select", lambda self, rows: selected.append(len(rows)) or select(self, rows))
    options = ("prompt", "--tokens", "4", "--output", str(tmp_path / "new"))
    assert call(exported, *options, "--samples", "3")[0] == 0
    assert lengths == [len("prompt") + 1 + 4] and selected == [2], "the last one goes on with the prompt's decoder"


def test_samples_of_integers_are_arrays(tmp_path: Path, call) -> None:
    tokenizer = IntegerTokenizer(300)
    facts = tokenizer_record(kind="integers", vocab_size=302, sha256=tokenizer.sha256)
    folder = write_export(tmp_path / "integers", 302, facts, ends=(300, 301))
    assert call(folder, "299 5", "--tokens", "20", "--output", str(tmp_path / "new"))[0] == 0
    values = np.load(tmp_path / "new" / "seed0000.npy", allow_pickle=False)
    assert values.dtype == np.uint16
    assert " ".join(map(str, values)) == call(folder, "299 5", "--tokens", "20")[1].strip()


def test_a_sample_ends_where_the_document_does(tmp_path: Path, call) -> None:
    folder = write_export(tmp_path / "ends", 258, tokenizer_record(), biases=(NEVER, 100.0))
    assert call(folder, "all", "--tokens", "9", "--output", str(tmp_path / "new"))[0] == 0
    assert (tmp_path / "new" / "seed0000.txt").read_bytes() == b"all"


def test_samples_that_end_at_other_places_are_as_each_alone(tmp_path: Path, call, monkeypatch) -> None:
    """Side by side in twos: each that ends leaves the other alone."""
    folder = write_export(tmp_path / "ends", 258, tokenizer_record(), biases=(NEVER, 4.0))
    options = ("all", "--tokens", "20")
    monkeypatch.setattr(generate, "at_once", lambda *_: 2)
    assert call(folder, *options, "--samples", "9", "--output", str(tmp_path / "new"))[0] == 0
    lengths = []
    for seed in range(9):
        text = call(folder, *options, "--seed", str(seed))[1].encode()[:-1]
        sample = (tmp_path / "new" / f"seed{seed:04d}.txt").read_bytes()
        assert sample.decode(errors="replace").encode() == text
        lengths.append(len(sample))
    assert min(lengths) < 10 < 20 < max(lengths) and len({*lengths}) > 4, lengths


def test_of_samples_one_at_a_time_all_but_the_last_copy_the_prompt(
    exported: Path, tmp_path: Path, call, monkeypatch
) -> None:
    selected: list[list[int]] = []
    select = Decoder.select
    monkeypatch.setattr(Decoder, "select", lambda *of: (selected.append(of[1]), select(*of))[1])
    monkeypatch.setattr(generate, "at_once", lambda _, n_tokens: {1 + 8 + 9: 1}[n_tokens])
    options = ("my words", "--tokens", "9", "--samples", "3", "--output", str(tmp_path / "new"))
    assert call(exported, *options)[0] == 0
    assert selected == [[0], [0]]
    for seed in range(3):
        added = expected(exported, [256, *b"my words"], 9, top_p=0.95, seed=seed)
        assert (tmp_path / "new" / f"seed{seed:04d}.txt").read_bytes() == b"my words" + added


@pytest.mark.parametrize(
    ("n_tokens", "memory", "expected"), [(100, 2**40, 16), (100, 10**6, 4), (1000, 10**6, 1), (300, 10**6, 1)]
)
def test_as_many_are_drawn_side_by_side_as_fit(n_tokens: int, memory: int, expected: int, monkeypatch) -> None:
    config = ReformerConfig(vocab_size=258, max_seq_len=1024, d_model=64, n_layers=2, n_heads=2, attn_pattern=["lsh"])
    monkeypatch.setattr(sampling, "MEMORY", memory)
    assert memory_per_token(config) == 2 * (64 * 2 * 4 * 1.5 + 2 * 4 * (4 + 2 + 3))
    assert sampling.at_once(config, n_tokens) == expected
    assert sampling.at_once(config.model_copy(update={"attn_pattern": ("local",)}), n_tokens) == 16


@pytest.mark.parametrize("samples", ["0", "2"])
def test_several_samples_need_a_folder(exported: Path, call, samples: str) -> None:
    code, out, error = call(exported, "abc", "--tokens", "5", "--samples", samples)
    assert (
        code == 2 and out == "" and f"--samples {samples}: give at least 1, and --output FOLDER or --prompts" in error
    )


def test_too_many_samples_are_refused(exported: Path, tmp_path: Path, call, monkeypatch) -> None:
    monkeypatch.setattr(generate, "MOST_SAMPLES", 2)
    options = ("abc", "--tokens", "0", "--output", str(tmp_path / "new"))
    code, _, error = call(exported, *options, "--samples", "3")
    assert code == 2 and "--samples 3 is more than 2: give fewer" in error and not (tmp_path / "new").exists()
    assert call(exported, *options, "--samples", "2")[0] == 0


def test_samples_that_would_all_be_the_same_are_refused(exported: Path, tmp_path: Path, call) -> None:
    options = ("--tokens", "5", "--samples", "2", "--output", str(tmp_path / "new"), "--temperature", "0")
    code, _, error = call(exported, "abc", *options)
    assert code == 2 and "--samples 2 with --temperature 0 would all be the same" in error


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_drawn(exported: Path, tmp_path: Path, call) -> None:
    (tmp_path / "file").touch()
    code, out, error = call(exported, "abc", "--tokens", "5", "--output", str(tmp_path / "file" / "new"))
    assert code == 2 and out == "" and "cannot write to --output" in error
