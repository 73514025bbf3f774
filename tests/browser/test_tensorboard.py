"""What TensorBoard shows of runs, as a browser renders it: curves, the table of runs, texts and pictures.

What is special: TensorBoard's pages are made of nested shadow trees, so what is looked for is found by scripts in the
page. Each test opens one page anew and waits until it shows what it should.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE_S = 60.0
DEEP = """
const all = (root, selector) => [
    ...root.querySelectorAll(selector),
    ...[...root.querySelectorAll('*')].filter(e => e.shadowRoot).flatMap(e => all(e.shadowRoot, selector)),
];
const show = names => all(document, 'paper-checkbox')
    .filter(box => names.includes(box.innerText.trim()) && !box.checked).forEach(box => box.click());
"""
"""All elements of a kind, in shadow trees too; the boxes of these names ticked."""
CURVES = """
return all(document, 'tf-scalar-card').map(card => [
    card.tag, all(card.shadowRoot || card, 'path.line').map(path => path.getAttribute('d') || ''),
]);
"""
TABLE = """
const text = cell => (cell.querySelector('slot')?.assignedNodes()[0]?.innerText || '').trim();
return all(document, 'vaadin-grid').flatMap(grid =>
    all(grid.shadowRoot, 'tr').map(row => [...row.querySelectorAll('th, td')].map(text)));
"""
TEXTS = """
return all(document, 'tf-text-loader').map(loader => [
    loader.run, loader.tag, all(loader.shadowRoot || loader, '#markdown').map(text => text.innerText),
]);
"""
PICTURES = """
return all(document, 'tf-image-loader').map(loader => [
    loader.run, loader.tag, all(loader.shadowRoot || loader, 'img').map(img => [img.naturalWidth, img.naturalHeight]),
]);
"""

Seen = Callable[[str, str, Callable[[Any], bool]], Any]


@pytest.fixture
def seen(driver: Any, url: str) -> Seen:
    """seen(page, script, is_there): what a script finds in a page as soon as it is there; no error in the console."""

    def look(page: str, script: str, is_there: Callable[[Any], bool]) -> Any:
        driver.get_log("browser")  # of pages before
        driver.get("about:blank")
        driver.get(f"{url}{page}")
        begun = time.monotonic()
        while not is_there(found := driver.execute_script(DEEP + script)):
            assert time.monotonic() - begun < PATIENCE_S, found
            time.sleep(0.2)
        errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, errors
        return found

    return look


def points(path: str) -> int:
    return path.count("M") + path.count("L")


@pytest.mark.parametrize(
    ("tag", "n_points"),
    [("train/loss", 4), ("train/lr", 4), ("train/bits_per_token", 4), ("eval/loss", 2), ("eval/bits_per_byte", 2)],
)
def test_a_curve_has_every_step_once_in_both_runs(seen: Seen, tag: str, n_points: int) -> None:
    def is_drawn(cards: Any) -> bool:
        # Of each run the smoothed curve, and the curve itself. (Speeds will not do: outliers are not drawn.)
        return [points(path) for path in dict(cards).get(tag, [])] == [n_points] * 4

    seen(f"#scalars&tagFilter=^{tag}$", CURVES, is_drawn)


def test_every_scalar_of_a_run_has_a_card(seen: Seen, runs: Any) -> None:
    """Groups say how many they have, unless it is one."""
    script = "return all(document, 'metrics-card-groups').map(groups => groups.innerText).join('')"
    sizes = Counter(
        tag.partition("/")[0] for tag in {tag for line in runs["resumed"].metrics for tag in line} - {"step"}
    )
    sizes["eval"] += 2  # the picture of the loss by position, of each run
    headings = [f"{group}{n} cards" if n > 1 else group for group, n in sizes.items()]
    seen("#timeseries", script, lambda text: all(heading in text for heading in headings))


def test_the_table_compares_the_runs_by_their_last_values(seen: Seen, runs: Any) -> None:
    columns = ("model.n_hashes", "eval/loss", "eval/bits_per_byte", "train/loss")

    def rows_of(table: Any) -> dict[str, dict[str, str]]:
        header = next((row for row in table if "Trial ID" in row), [])
        rows = [dict(zip(header, row, strict=False)) for row in table]
        return {
            row["Trial ID"].removesuffix("/tensorboard"): row for row in rows if row.keys() >= {"Trial ID", *columns}
        }

    def is_complete(table: Any) -> bool:
        return rows_of(table).keys() >= runs.keys()

    rows = rows_of(seen("#hparams", f"show({json.dumps(columns)}); {TABLE}", is_complete))
    for name, run in runs.items():
        assert float(rows[name]["model.n_hashes"]) == {"resumed": 2, "other": 1}[name]
        for tag in columns[1:]:
            assert float(rows[name][tag]) == pytest.approx(run.column(tag)[-1], rel=1e-4), tag


def test_the_texts_are_the_configuration_and_a_continuation(seen: Seen, runs: Any) -> None:
    def texts_of(loaders: Any) -> dict[tuple[str, str], str]:
        """The newest ones."""
        found = [(run, tag, next(filter(str.strip, texts), "")) for run, tag, texts in loaders]
        return {(run.removesuffix("/tensorboard"), tag.removesuffix("/text_summary")): text for run, tag, text in found}

    expected = {(run, tag) for run in runs for tag in ("run/config", "run/deepspeed", "run/environment", "sample")}
    texts = texts_of(
        seen("#text", TEXTS, lambda loaders: all(texts_of(loaders).get(key, "").strip() for key in expected))
    )
    for name, n_hashes in (("resumed", 2), ("other", 1)):
        assert json.loads(texts[name, "run/config"])["model"]["n_hashes"] == n_hashes
        assert json.loads(texts[name, "run/deepspeed"])["optimizer"]["type"] == "AdamW"


def test_the_picture_is_the_loss_by_position(seen: Seen, runs: Any) -> None:
    def is_loaded(loaders: Any) -> bool:
        loaded = {run: pictures for run, tag, pictures in loaders if tag == "eval/loss_by_position"}
        return len(loaded) == len(runs) and all(sizes and min(sizes[0]) > 300 for sizes in loaded.values())

    seen("#images", PICTURES, is_loaded)
