"""The same inputs make the same rows, and a seed the same order, as they always have.

Where a change of that is meant, stores that have been built cannot be appended to, and runs cannot go on: the file is
to be replaced by what the failure prints, the format's version to be raised, and users to be told.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build
from data_pipeline.config import PACKINGS, BuildSettings
from data_pipeline.dataset import RowDataset
from data_pipeline.mixture import Mixture
from data_pipeline.store import Store

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stores.json").read_bytes())


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 1 to 999 bytes, of which some come twice."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("documents")
    for number in range(40):
        text = "".join(rng.choices("abcdefgh \n", k=rng.randint(1, 999)))
        (folder / f"{number:02d}.txt").write_text(text)
        if number % 8 == 0:
            (folder / f"{number:02d}_again.txt").write_text(text)
    return folder


def facts(store: Store) -> dict[str, Any]:
    """What is in its rows, and in which order they are trained on."""
    train, other = RowDataset(store, "train", seed=3), RowDataset(store, "val", seed=3)
    mixture = Mixture({"one": train, "other": other}, {"one": 0.7, "other": 0.3}, seed=5)
    rows, drawn = hashlib.sha256(), hashlib.sha256()
    for split in ("train", "val", "test"):
        for sample in RowDataset(store, split):
            for tensor in sample:
                rows.update(tensor.numpy().astype("<i8").tobytes())
    for position in range(50):
        drawn.update(mixture.slice_of(position, 0, 1).tokens.numpy().astype("<i8").tobytes())
    order = [train._row_at(position) for position in (*range(8), 10**6, 10**12)]
    counts = {name: len(RowDataset(store, name)) for name in store.manifest.splits}
    return {"rows": counts, "content": rows.hexdigest(), "order": order, "mixture": drawn.hexdigest()}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_store_is_what_it_always_was(packing: str, documents: Path, tmp_path: Path) -> None:
    split = {"val": 0.2, "test": 0.1}
    settings = BuildSettings(
        (str(documents),), "bytes", tmp_path / "store", seq_len=256, packing=packing, split=split, duplicates="drop"
    )
    found = facts(build(settings).store)
    assert found == GOLDEN[packing], f"now: {json.dumps({packing: found})}"
