"""The file to begin with: what it says is what the configuration does."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from reformer import Reformer, ReformerConfig, save_model
from reformer.hf import save_hf
from trainer.config import RunConfig, load
from trainer.template import TABLES, template

ROOT = Path(__file__).parents[2]
NEEDED: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": 9},
    "data": {"store": "s"},
    "run": {"dir": "r", "deepspeed_config": "d", "steps": 3},
}


def uncommented(text: str) -> dict[str, dict[str, Any]]:
    """What the file holds when each key that has a default is given it."""
    return tomllib.loads(re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE))


def test_every_key_is_there_once_with_what_it_means() -> None:
    sections = re.split(r"^(?:# )?\[([\w.]+)\]$", template(), flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert found.keys() == TABLES.keys()
    for name, model in TABLES.items():
        keys = re.findall(r"^## .*\n# (\w+) =", found[name], flags=re.MULTILINE)
        assert keys == [key for key in model.model_fields if key != "mixture"], name
        needed = [key for key, field in model.model_fields.items() if field.is_required()]
        assert found[name].replace("\n## ", " ").count("; needed)") == len(needed)


def test_its_defaults_are_those_of_a_run() -> None:
    tables = uncommented(template())
    assert tables["data"].pop("mixture") == {"NAME": {}}
    given = {name: values | NEEDED[name] for name, values in tables.items()}
    assert RunConfig(**given) == RunConfig(**NEEDED)


def test_what_is_said_of_values() -> None:
    text = " ".join(template().replace("\n## ", " ").split())
    for said in (
        "(whole number, at least 2; needed) # vocab_size =",
        '(list of "local" or "lsh" or "dense") # attn_pattern = ["local", "lsh"]',
        "(list of 2: whole number) # axial_shape =",
        "(number, at least 0, less than 1) # dropout = 0.0",
        "(whole number or list of whole number) # n_buckets =",
        "(whole number, at least 0, less than 9,223,372,036,854,775,808) # seed = 0",
        "(number, at least 0, at most 1) # final_lr_ratio =",
        '("stop" or "continue") # on_full_disk = "stop"',
        "(path; needed) # dir =",
    ):
        assert said in text


def test_with_a_folder_it_is_of_the_model_there(tmp_path: Path) -> None:
    config = ReformerConfig(vocab_size=300, max_seq_len=96, d_model=16, n_heads=2, n_buckets=(4, 2), activation="gelu")
    save_model(tmp_path / "own", config, Reformer(config).state_dict(), {})
    save_hf(Reformer(config), tmp_path / "theirs")
    (tmp_path / "theirs").rename(tmp_path / '"\N{SLIGHTLY SMILING FACE}"')
    for name in ("own", '"\N{SLIGHTLY SMILING FACE}"'):
        printed = template(tmp_path / name)
        tables = tomllib.loads(printed)
        assert ReformerConfig(**tables["model"]) == config and "attn_pattern" not in tables["model"]
        assert tables["run"] == {"init_from": str(tmp_path / name)} and tables["data"] == {}
        assert uncommented(printed).keys() == uncommented(template()).keys()


def test_a_folder_without_a_model_has_no_template(tmp_path: Path) -> None:
    command = [sys.executable, "launch/train.py", "--template", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "config.json is missing: give a folder that" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_beside_it_is_refused() -> None:
    for words in (["--config", "own.toml", "--template"], ["--template", "model", "--config=own.toml"]):
        command = [sys.executable, "launch/train.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and "and reads none: leave out --config" in done.stderr


def test_the_command_prints_a_file_that_only_lacks_what_is_needed(tmp_path: Path) -> None:
    command = [sys.executable, "launch/train.py", "--template"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed == template()
    (tmp_path / "own.toml").write_text(printed)
    (tmp_path / "d").write_text("{}")
    overrides = [f"{table}.{key}={value}" for table, values in NEEDED.items() for key, value in values.items()]
    config, _ = load(tmp_path / "own.toml", overrides)
    assert config == RunConfig(**NEEDED)
