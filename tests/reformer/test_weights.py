"""A model out and in again: the same logits, and what is refused, by the name of the file and of the tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reformer import ConfigError, Reformer, ReformerConfig, load_model, save_model
from reformer.hf import load_hf, save_hf
from reformer.weights import assemble

CONFIG = ReformerConfig(
    vocab_size=23, max_seq_len=64, d_model=12, n_layers=2, n_heads=2, lsh_chunk_len=8, n_buckets=(2, 4), seed=5
)
TIED = CONFIG.model_copy(update={"tie_embeddings": True})


def parameters(config: ReformerConfig) -> dict[str, Tensor]:
    """As a checkpoint gives them: all are views of one flat tensor."""
    torch.manual_seed(1)
    own = dict(Reformer(config).named_parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in own.values()])
    parts = flat.split([parameter.numel() for parameter in own.values()])
    return {name: part.view(own[name].shape) for name, part in zip(own, parts, strict=True)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", CONFIG, parameters(CONFIG))
    return tmp_path / "model"


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("of_state_dict", [False, True])
def test_a_model_comes_back_as_it_was(config: ReformerConfig, of_state_dict: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Reformer(config)
    weights = model.state_dict() if of_state_dict else parameters(config)
    save_model(tmp_path / "model", config, weights)
    again = load_model(str(tmp_path / "model"))
    assert again.config == config
    assert {name: p.requires_grad for name, p in again.named_parameters()} == dict.fromkeys(parameters(config), True)
    assert (again.head.weight is again.embedding.tokens.weight) == config.tie_embeddings
    assert len(load_file(tmp_path / "model" / "model.safetensors")) == len(parameters(config))
    tokens, labels = torch.randint(0, 23, (2, 2, 64))
    assert torch.equal(model(tokens), again(tokens))
    again(tokens, labels).backward()
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["config.json", "model", "model.safetensors"]


def test_a_model_comes_back_without_dropout(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dropout": 0.5, "attn_dropout": 0.5})
    save_model(tmp_path / "model", config, parameters(config))
    model, tokens = load_model(tmp_path / "model"), torch.arange(20)[None]
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(tokens), assemble(config, parameters(config)).eval()(tokens))


def test_other_files_lie_beside_the_model(tmp_path: Path) -> None:
    """They appear with it, or not at all."""
    save_model(tmp_path / "model", CONFIG, parameters(CONFIG), {"tokenizer.model": b"a\0b"})
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"a\0b"
    assert load_model(tmp_path / "model").config == CONFIG
    with pytest.raises(OSError):
        save_model(tmp_path / "other", CONFIG, parameters(CONFIG), {"no/such/folder": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("folder", ["new/deeper/model", ".", "../link"])
def test_any_folder_that_is_not_there_or_empty_will_do(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other")
    monkeypatch.chdir(tmp_path / "empty")
    save_model(folder, CONFIG, parameters(CONFIG))
    assert load_model(tmp_path / "empty" / folder).config == CONFIG


def test_weights_in_another_order_of_memory_are_saved_as_they_are(tmp_path: Path) -> None:
    weights = {name: x.T.contiguous().T if x.ndim == 2 else x for name, x in parameters(CONFIG).items()}
    assert not all(x.is_contiguous() for x in weights.values())
    save_model(tmp_path / "model", CONFIG, weights)
    loaded = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(loaded[name], x) for name, x in weights.items())


def test_the_file_says_that_it_is_of_torch(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_others_may_read_the_weights_as_they_may_any_file(saved: Path) -> None:
    (saved.parent / "any").touch()
    assert {file.stat().st_mode for file in saved.iterdir()} == {(saved.parent / "any").stat().st_mode}


def test_what_is_loaded_is_not_the_file(saved: Path) -> None:
    model = load_model(saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(bytes((saved / "model.safetensors").stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_files_that_are_missing_or_damaged(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"elsewhere/config.json is missing: give a folder that launch/export.py"):
        load_model(tmp_path / "elsewhere")
    whole = (saved / "model.safetensors").read_bytes()
    for content in (whole[:-1], b"", whole[100:]):
        (saved / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"model/model.safetensors is damaged"):
            load_model(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model/model.safetensors is missing"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model/config.json cannot be read as JSON"):
        load_model(saved)


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_the_folder(saved: Path) -> None:
    message = r"model/model.safetensors is not a folder: give the folder that config.json and model.safetensors are in"
    for load in (load_model, load_hf):
        with pytest.raises(ConfigError, match=message):
            load(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"model/model.safetensors is damaged"):
        load_model(saved)


@pytest.mark.parametrize("name", ["checkpoints", "run.json", "SHA256SUMS"])
def test_a_run_and_a_checkpoint_have_to_be_exported(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    for load in (load_model, load_hf):
        with pytest.raises(ConfigError, match=rf"export its model first, python launch/export.py {tmp_path} --output"):
            load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '"reformer"', "7"])
def test_a_configuration_that_is_no_table(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model/config.json must hold an object"):
        load_model(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "does not say {'format': 'longhand-reformer', 'version': 1}"),
        ({"format": None}, "does not say {'format': 'longhand-reformer', 'version': 1}"),
        ({"model_type": "reformer"}, "is of Hugging Face's Reformer: read the folder with reformer.hf.load_hf"),
        ({"model": {"vocab_size": 23, "d_modle": 12}}, "no configuration of this version: .*did you mean 'd_model'?"),
        ({"model": None}, "no configuration of this version"),
    ],
)
def test_configurations_of_something_else(saved: Path, values: dict[str, object], message: str) -> None:
    change(saved, **values)
    with pytest.raises(ConfigError, match=f"model/config.json .*{message}"):
        load_model(saved)


def test_a_folder_of_hugging_face_is_told_apart(tmp_path: Path) -> None:
    save_hf(assemble(CONFIG, parameters(CONFIG)), tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"read the folder with reformer.hf.load_hf"):
        load_model(tmp_path / "hf")


def test_weights_of_another_model(saved: Path) -> None:
    """All differences at once, by name."""
    weights = load_file(saved / "model.safetensors")
    del weights["head.bias"]
    weights["blocks.1.attention.qk_weight"] = weights["blocks.1.attention.qk_weight"][:, :-1].contiguous()
    weights["blocks.0.feed_forward.in_bias"] = weights["blocks.0.feed_forward.in_bias"].long()
    weights["blocks.2.attention.out_weight"] = torch.zeros(12, 12)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load_model(saved)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{saved}/model.safetensors does not fit config.json: ")
    assert lines == [
        "  blocks.0.feed_forward.in_bias is torch.int64, expected floating-point numbers",
        "  blocks.1.attention.qk_weight is [12, 11], expected [12, 12]",
        "  blocks.2.attention.out_weight is not part of such a model",
        "  head.bias is missing",
    ]


def test_what_is_not_saved(tmp_path: Path) -> None:
    partitioned = {name: torch.zeros(0) for name in parameters(CONFIG)}
    with pytest.raises(ConfigError, match=r"head.bias is \[0\], expected \[23\]"):
        save_model(tmp_path / "model", CONFIG, partitioned)
    untied = {**parameters(TIED), "head.weight": torch.zeros(23, 12)}
    with pytest.raises(ConfigError, match=r"tie_embeddings=True, but head.weight is not embedding.tokens.weight"):
        save_model(tmp_path / "model", TIED, untied)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()  # empty: it takes its place
    save_model(tmp_path / "model", CONFIG, parameters(CONFIG))
    with pytest.raises(FileExistsError, match="model exists and is not an empty folder: remove it"):
        save_model(tmp_path / "model", CONFIG, parameters(CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_refused_before_anything_is_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reformer.weights.save_file", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(FileExistsError):
        save_model(saved, CONFIG, parameters(CONFIG))


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_folder_appears_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fails(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error("No space left on device")

    monkeypatch.setattr("reformer.weights.save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path / "model", CONFIG, parameters(CONFIG))
    assert not list(tmp_path.iterdir())


def test_of_two_that_write_one_folder_the_first_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_meanwhile(*arguments: object, **options: object) -> None:
        monkeypatch.undo()
        save_model(tmp_path / "model", CONFIG, parameters(CONFIG))
        save_file(*arguments, **options)

    monkeypatch.setattr("reformer.weights.save_file", write_meanwhile)
    with pytest.raises(FileExistsError, match="model exists and is not an empty folder"):
        save_model(tmp_path / "model", CONFIG, parameters(CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    load_model(tmp_path / "model")
