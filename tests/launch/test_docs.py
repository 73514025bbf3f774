"""What the README and docs/ say can be typed, exists, and is where they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_stores import write_store

from data_pipeline.cli import make_parser
from data_pipeline.tokenizer import ByteTokenizer
from data_pipeline.tokenizer_folder import Ends, tokenizer_files
from reformer import Reformer, ReformerConfig, save_model
from trainer.config import load

ROOT = Path(__file__).parents[2]
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)]
COMMANDS = [
    line.partition(" > ")[0]
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if re.match(r"(make|python|deepspeed|sbatch|tensorboard) ", line)
]


def test_nothing_was_left_to_be_filled_in() -> None:
    assert not any("@@" in text for text in PAGES.values())


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m data_pipeline ")])
def test_pipeline_commands_parse(command: str) -> None:
    make_parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/" in c])
def test_files_of_commands_exist_and_their_overrides_are_known(command: str) -> None:
    words = shlex.split(command)
    for word in words:
        if word.startswith(("launch/", "ds_config")):
            assert (ROOT / word).is_file()
    configs = [word for word in words if word.endswith(".toml")]
    for config in configs:
        of_user = config == "own.toml"  # which is as any other
        load(
            ROOT / ("launch/configs/books_cpu.toml" if of_user else config),
            [word.replace("%a", "1") for word in words if re.match(r"\w+\.\w+.*=", word)],  # of an array of jobs
        )


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert command.split()[1] in targets


def test_every_file_of_the_tree_exists_and_none_is_left_out() -> None:
    tree = next(block for language, block in BLOCKS if not language and block.startswith("launch/  "))
    folders, described = [Path()], set()
    for line in tree.splitlines():
        names = re.match(r"((?:  )*)((?:[\w./]+ ?)+)(?:  |$)", line)
        assert names, line
        depth = len(names[1]) // 2
        for name in names[2].split():
            path = folders[depth] / name
            assert (ROOT / path).exists(), path
            assert (ROOT / path).is_dir() == name.endswith("/"), path
            described.add(path.as_posix())
            folders[depth + 1 :] = [path]
    for package in ("reformer", "data_pipeline", "trainer", "launch"):
        for file in (ROOT / package).rglob("*.py"):
            if not file.name.startswith("__"):
                assert file.relative_to(ROOT).as_posix() in described, f"{file} is missing from docs/layout.md"


def test_the_library_example_runs() -> None:
    example = next(block for language, block in BLOCKS if language == "python")
    subprocess.run([sys.executable, "-c", example], check=True, cwd=ROOT)


def test_the_example_of_features_runs_and_both_ways_are_the_same() -> None:
    example = next(block for language, block in BLOCKS if language == "python" and "class Features" in block)
    check = """
assert features.shape == (1, 1000, 512)
x = model.embedding(tokens)
streams = reversible_stack(model.blocks, x, x, Call(seed=0, step=0, sample_ids=(0,)))
assert torch.equal(torch.cat(streams, dim=-1), features)
(y1.sum() + features.square().sum()).backward()
assert all(p.grad is not None for p in (*model.blocks.parameters(), *model.embedding.parameters()))
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", example + check], check=True, cwd=ROOT)


def test_the_example_of_a_classifier_runs_and_leaves_out_padding(tmp_path: Path) -> None:
    """With gradients in fp16 too, and with the weights of a causal model, tied or not."""
    features, example = (b for language, b in BLOCKS if language == "python" and "Features()" in b)
    check = """
from reformer import save_model
assert outputs.shape == (2, 3) and features.dtype == torch.float32 and kept.sum(dim=1).tolist() == [1000, 700]
assert all(torch.equal(of, model.state_dict()[name]) for name, of in same.state_dict().items())
assert read.load_state_dict(of_read) and same.config == model.config
torch.testing.assert_close(outputs[1].float(), read(features[1, :700].mean(dim=0)), atol=0.02, rtol=0.02)
everything = [*model.parameters(), *read.parameters()]
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # with 2**16 it leaves out the first step
with torch.autocast("cpu", torch.float16):
    loss = nn.functional.cross_entropy(read(model(tokens, step=0).mean(dim=1)), torch.tensor([1]))
scaler.scale(loss).backward()
scaler.unscale_(torch.optim.SGD(everything))
assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in everything)
for tied in (False, True):
    causal = Reformer(ReformerConfig(vocab_size=256, d_model=32, max_seq_len=256, tie_embeddings=tied))
    both = Reformer(causal.config.model_copy(update={"causal": False, "tie_embeddings": False}))
    both.head = Features()
    names = both.load_state_dict(causal.state_dict(), strict=False)
    assert not names.missing_keys and all(name.startswith("head.") for name in names.unexpected_keys)
    assert both(tokens[:, :200], step=0).shape == (1, 200, 64)
"""
    subprocess.run([sys.executable, "-c", features + example + check], check=True, cwd=tmp_path)


def test_the_example_of_a_deeper_model_runs_and_a_run_may_begin_with_it(tmp_path: Path) -> None:
    export(tmp_path)
    write_store(tmp_path / "store", {"a": b"text"}, val=["a"], seq_len=64)
    (example,) = (block for language, block in BLOCKS if language == "python" and "deeper" in block)
    check = """
from pathlib import Path
from data_pipeline.store import Store
from trainer.initial import check_initial, read_initial
config = exported.config.model_copy(update={"n_layers": 12})
(note,) = check_initial(Path("deeper"), config, Path("store"), Store.open("store").tokenizer.sha256)
assert "does not say which tokenizer" in note
weights = read_initial(Path("deeper"), config, seed=0).parameters
assert all(torch.equal(weights[name], tensor) for name, tensor in exported.state_dict().items())
assert sum("blocks.11." in name for name in weights) > 5
"""
    subprocess.run([sys.executable, "-c", f"import torch\n{example}{check}"], check=True, cwd=tmp_path)


def test_the_example_of_scores_runs_and_dense_scores_look_at_nothing_later(tmp_path: Path) -> None:
    """On what it names: an exported model of bytes, and a store."""
    write_store(tmp_path / "data" / "books_64k", {"a": b"text"}, val=["a"], seq_len=64)
    export(tmp_path)
    first, second = (block for language, block in BLOCKS if language == "python" and "score(" in block)
    check = """
text = bytes(range(97, 123)) * 10
assert len(nats) == 31 and labels.shape == tokens.shape == segment_ids.shape == row_nats.shape == (1, 64)
assert row_nats[0, :5].min() > 0 and not row_nats[0, 5:].any()
with torch.no_grad():
    whole = torch.tensor([[256, *text, 257]])
    mean = model(whole, torch.cat([whole[:, 1:], torch.tensor([[-100]])], dim=1)).item()
assert abs(score(model, text).mean().item() - mean) < 1e-5
torch.testing.assert_close(score(exact, text)[:200], score(exact, text[:200] + b"another end")[:200])
"""
    subprocess.run([sys.executable, "-c", first + second + check], check=True, cwd=tmp_path)


def test_the_examples_of_generating_run(tmp_path: Path) -> None:
    export(tmp_path)
    first, second = (block for language, block in BLOCKS if language == "python" and "Decoder(model)" in block)
    check = """
from trainer.sampling import within_documents
assert added.shape == (200,) and samples.shape == (16, 100) and len(samples.unique(dim=0)) == 16
alone = within_documents(Decoder(model), tokenizer, ends.eos)
assert torch.equal(samples[3], continue_tokens(alone, model.config, prompt, 100, seed=3))
"""
    subprocess.run([sys.executable, "-c", first + second + check], check=True, cwd=tmp_path)


def export(folder: Path) -> None:
    """A model of bytes that draws neither BOS nor EOS, of which an example would end elsewhere."""
    torch.manual_seed(0)
    config = ReformerConfig(vocab_size=258, max_seq_len=512, d_model=16, n_layers=2, n_heads=2, lsh_chunk_len=8)
    model = Reformer(config)
    with torch.no_grad():
        model.head.bias[256:] = -100
    save_model(folder / "exported", config, model.state_dict(), tokenizer_files(ByteTokenizer(), Ends(True, True)))


def test_the_example_of_a_training_loop_runs(tmp_path: Path) -> None:
    write_store(tmp_path / "data" / "books_64k", {f"{i}": b"%d" % i * 20 for i in range(5)}, val=["1"], seq_len=64)
    (example,) = (block for language, block in BLOCKS if language == "python" and "DataLoader(" in block)
    check = """
from reformer import load_model
trained = load_model("trained")
assert torch.equal(trained.head.weight, model.head.weight)
from pathlib import Path
from trainer.exported import read_generator
assert read_generator(Path("trained"))[1].sha256 == store.tokenizer.sha256
assert ids == range(2, 4) and loss.isfinite()
"""
    subprocess.run([sys.executable, "-c", example + check], check=True, cwd=tmp_path)


def test_the_example_of_a_store_from_python_runs(tmp_path: Path) -> None:
    (example,) = (block for language, block in BLOCKS if language == "python" and "BuildSettings(" in block)
    check = """
assert sum(split.documents for split in result.store.manifest.splits.values()) == 100
assert {each.name for each in result.store.documents} >= {"own.jsonl/0", "own.jsonl/99"}
"""
    subprocess.run([sys.executable, "-c", example + check], check=True, cwd=tmp_path)


def test_the_example_of_an_attention_runs_and_is_used() -> None:
    (example,) = (block for language, block in BLOCKS if language == "python" and "def rotary(" in block)
    check = """
with torch.no_grad():
    turned = model(tokens, step=0)
    for block in model.blocks:
        vars(block.attention).pop("inner", None)
    assert not torch.allclose(model(tokens, step=0), turned)
"""
    subprocess.run([sys.executable, "-c", example + check], check=True, cwd=ROOT)


def test_linked_files_exist() -> None:
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", text):
            linked = page.parent / target
            assert linked.exists(), f"{page}: {target}"
            headings = (
                re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
            )
            assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor
