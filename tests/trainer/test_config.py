"""Where a value comes from, and what is said of one that cannot be."""

import json
from pathlib import Path

import pytest

from trainer.config import ConfigError, flatten, load, parse_override

TOML = """
[model]
vocab_size = 258
[data]
store = "data/store"
[run]
dir = "runs/x"
deepspeed_config = "sub/ds.json"
steps = 100
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path / "run.toml"


def test_defaults_then_file_then_command_line(config: Path) -> None:
    plain, _ = load(config)
    assert (plain.run.warmup_steps, plain.run.steps, plain.model.d_model) == (0, 100, 256)
    changed, _ = load(config, ["run.steps=7", "run.warmup_steps=3", "model.d_model=64"])
    assert (changed.run.warmup_steps, changed.run.steps, changed.model.d_model) == (3, 7, 64)


def test_a_home_is_one_in_paths_that_no_shell_has_seen(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    overrides = [
        "run.dir=~/runs/x",
        "data.store=~/store",
        "run.init_from=~",
        "data.mixture.web={store='~/w', weight=1}",
    ]
    found, _ = load(config, overrides)
    assert (found.run.dir, found.data.store) == (Path("/home/ada/runs/x"), Path("/home/ada/store"))
    assert (found.run.init_from, found.data.mixture["web"].store) == (Path("/home/ada"), Path("/home/ada/w"))
    for other in ("a/~/b", "x~", "~root/b"):
        assert load(config, [f"run.dir={other}"])[0].run.dir == Path(other)


def test_deepspeeds_file_may_be_given_on_the_command_line_alone(config: Path, tmp_path: Path) -> None:
    config.write_text(TOML.replace('deepspeed_config = "sub/ds.json"\n', ""))
    found, deepspeed = load(config, (), tmp_path / "sub" / "ds.json")
    assert (found.run.deepspeed_config, deepspeed["zero_optimization"]) == (tmp_path / "sub" / "ds.json", {"stage": 2})
    with pytest.raises(ConfigError, match="'deepspeed_config' is missing"):
        load(config)


def test_the_folder_of_a_run_has_both_sides(config: Path, tmp_path: Path) -> None:
    """As the run was last started, wherever it lies now; the command line changes them alike."""
    changes = ["model.attn_pattern=[lsh]", "deepspeed.zero_optimization.stage=3"]
    ran, deepspeed = load(config, [*changes, "run.dir=before"])
    moved = tmp_path / "moved"
    moved.mkdir()
    record = {"config": ran.model_dump(mode="json"), "deepspeed": deepspeed}
    (moved / "run.json").write_text(json.dumps(record))
    again, same = load(moved)
    assert same == deepspeed == {"zero_optimization": {"stage": 3}}
    assert again == ran.model_copy(update={"run": ran.run.model_copy(update={"dir": moved})})
    longer, other = load(moved, ["run.steps=200", "run.dir=elsewhere", "deepspeed.zero_optimization.stage=1"])
    assert (longer.run.steps, str(longer.run.dir), other) == (200, "elsewhere", {"zero_optimization": {"stage": 1}})
    (tmp_path / "other.json").write_text("{}")
    assert load(moved, (), tmp_path / "other.json")[1] == {}
    assert load(moved, [f"run.deepspeed_config={tmp_path / 'other.json'}"])[1] == {}
    (moved / "run.json").write_text(json.dumps({"config": record["config"]}))
    with pytest.raises(ConfigError, match=r"run.json has no settings of a run and of DeepSpeed: give the files"):
        load(moved)
    with pytest.raises(ConfigError, match=r"is not the folder of a run: cannot read"):
        load(tmp_path)


def test_deepspeed_is_read_beside_the_toml_file_and_can_be_replaced_and_changed(config: Path, tmp_path: Path) -> None:
    assert load(config)[1] == {"zero_optimization": {"stage": 2}}
    other = tmp_path / "other.json"
    other.write_text('{"gradient_clipping": 1.0}')
    changes = ["deepspeed.zero_optimization.stage=3", "deepspeed.bf16.enabled=true"]
    expected = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    assert load(config, changes, other)[1] == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b=3e-4", 3e-4),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b=[lsh]", ["lsh"]),
        ("a.b=[local, lsh ,x-y]", ["local", "lsh", "x-y"]),
        ("a.b=[local lsh]", "[local lsh]"),
        ("a.b=[local, lsh,]", ["local", "lsh"]),
        ("a.b=[16,x]", "[16,x]"),
        ("a.b=[]", []),
        ('a.b="3"', "3"),
        ("a.b=runs/x", "runs/x"),
        ("a.b=", ""),
        ("a.b=x=y", "x=y"),
        ("a.b=2026-11-29", "2026-11-29"),
        ("a.b=12:30:00", "12:30:00"),
    ],
)
def test_override_values(text: str, value: object) -> None:
    assert parse_override(text) == (["a", "b"], value)


def test_a_path_that_reads_like_a_number_is_what_was_typed(config: Path) -> None:
    for text in ("2024", "1e-3", "1_000", "0x10", "true", "inf"):
        changes = [f"run.dir={text}", f"data.store={text}", f"data.train_split={text}"]
        mixture = [f"data.mixture.7.store={text}", "data.mixture.7.weight=2", f"data.mixture.7.split={text}"]
        changed, _ = load(config, changes + mixture)
        assert {changed.run.dir, changed.data.store, changed.data.mixture["7"].store} == {Path(text)}
        assert parse_override(f"run.init_from={text}")[1] == text
        assert {changed.data.train_split, changed.data.mixture["7"].split} == {text}
    assert parse_override('run.dir="7"')[1] == "7" and parse_override("run.steps=7")[1] == 7


@pytest.mark.parametrize("text", ["stops=3", "steps", "run.steps", "run..steps=3", "=3", "run.=3"])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(ConfigError, match=r"an override looks like run.steps=100"):
        parse_override(text)


def test_an_override_without_its_section() -> None:
    with pytest.raises(ConfigError, match=r"cannot read 'steps=3': did you mean 'run.steps=3'\?"):
        parse_override("steps=3")
    with pytest.raises(ConfigError, match=r"cannot read 'seed=3': did you mean 'model.seed=3' or 'run.seed=3'\?"):
        parse_override("seed=3")
    with pytest.raises(ConfigError, match=r"on the command line: deepspeed.optimizer.params.lr="):
        parse_override("lr=3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.stesp=3"], r"\[run\] unknown key 'stesp': did you mean 'steps'"),
        (["modell.d_model=3"], "unknown key 'modell': did you mean 'model'"),
        (["model.n_hash=3"], r"\[model\] unknown key 'n_hash': did you mean 'n_hashes'"),
        (
            ["run.lr=1e-3"],
            r"\[run\] unknown key 'lr': .*JSON, as optimizer.params.lr \(.*deepspeed.optimizer.params.lr=\.\.\.\)",
        ),
        (["optimizer.params.lr=1e-3"], "unknown key 'optimizer': set it in DeepSpeed's JSON, as optimizer "),
        (["run.batch_size=8"], "unknown key 'batch_size': set it in DeepSpeed's JSON, as train_batch_size "),
        (["run.steps=true"], r"\[run\] 'steps': input should be a valid integer.*got True"),
        (["run.keep_best=True"], r"\[run\] 'keep_best': .*boolean \(got 'True'\): give true or false"),
        (["run.profile_steps=5"], r"run.profile_steps='5' must be a first and .*\(5\.\.5 for this step alone\)"),
        (["run.keep_best=1"], r"\[run\] 'keep_best': input should be a valid boolean.*got 1"),
        (["run.dir=[3]"], r"\[run\] 'dir': input should be a path \(got \[3\]\): put it in quotes"),
        (["run.steps=many"], r"\[run\] 'steps': input should be a valid integer.*got 'many'"),
        (["run.decay=cosinus"], r"\[run\] 'decay'.*got 'cosinus'"),
        (["run.watchdog_min_s=inf"], r"\[run\] 'watchdog_min_s'.*got inf"),
        (["run.watchdog_min_s=1e10"], r"\[run\] 'watchdog_min_s'.*got 10000000000"),
        (["run.steps.x=1"], "cannot set run.steps.x: 'steps' is a value, not a table"),
        (["model.d_model=30"], r"\[model\] d_model=30 is not divisible by n_heads=4"),
    ],
)
def test_errors_name_the_value_and_the_way_out(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(config, overrides)


MIXTURE = """
[data.mixture]
books = {store = "data/books", weight = 7}
web = {store = "data/web", weight = 2.5, split = "all", eval_split = "val"}
"""


def test_a_mixture_of_stores(config: Path) -> None:
    config.write_text(TOML + MIXTURE)
    data = load(config, ["data.mixture.web.weight=3"])[0].data
    assert data.store == Path("data/store")
    assert {name: source.model_dump() for name, source in data.mixture.items()} == {
        "books": {"store": Path("data/books"), "weight": 7.0, "split": None, "eval_split": None},
        "web": {"store": Path("data/web"), "weight": 3.0, "split": "all", "eval_split": "val"},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mixture.web.weight=0", r"\[data\] \[mixture.web\] 'weight': input should be greater than 0.*got 0"),
        (
            'data.mixture.a/b={store="x", weight=1, eval_split="val"}',
            r"\[data\] .*the name 'a/b' must be of letters, digits",
        ),
        ('data.mixture={"" = {store="x", weight=1}}', r"\[data\] .*a store needs a name: '' is that of data.store"),
        ("data.mixture.web.eval_split=", r"\[data\] \[mixture.web\] 'eval_split'.*at least 1 character"),
        ("data.mixture.web.weight=inf", r"\[data\] \[mixture.web\] 'weight': input should be a finite number"),
        ("data.mixture.web.wieght=1", r"\[data\] \[mixture.web\] unknown key 'wieght': did you mean 'weight'"),
        ("data.mixture.more.store=x", r"\[data\] \[mixture.more\] 'weight' is missing: give it a value"),
        ("data.on_damage=ignore", r"\[data\] 'on_damage'.*got 'ignore'"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_named(config: Path, override: str, message: str) -> None:
    config.write_text(TOML + MIXTURE)
    with pytest.raises(ConfigError, match=message):
        load(config, [override])


def test_unreadable_files_are_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: No such file"):
        load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"broken.toml: it is not TOML: .*line 1"):
        load(tmp_path / "broken.toml")
    (tmp_path / "sub" / "ds.json").write_text("{,}")
    with pytest.raises(ConfigError, match=r"ds.json: it is not JSON: .*line 1"):
        load(config)
    (tmp_path / "sub" / "ds.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"ds.json must hold one object"):
        load(config)


def test_a_byte_order_mark_is_no_part_of_a_file(config: Path, tmp_path: Path) -> None:
    expected = load(config)
    for path in (config, tmp_path / "sub" / "ds.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(config) == expected


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}
