"""TensorBoard on two short runs, and a browser to look at it: on the loopback alone, gone when the tests are."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.conftest import Run, Train, config, store, train  # noqa: F401  (the latter three are fixtures)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1600,1200"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
)
PATIENCE_S = 60.0


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own that resolves no name."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def runs(driver: Any, train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:  # noqa: F811
    """Two runs of four steps by name: `resumed` lost its last checkpoint and went on; `other` hashes once."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(1, folder / "resumed").code == 0
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step_00000004")
    found = {"resumed": train(1, folder / "resumed"), "other": train(1, folder / "other", "model.n_hashes=1")}
    for run in found.values():
        assert run.code == 0, run.errors
    assert "after step 2" in found["resumed"].output
    return found


@pytest.fixture(scope="session")
def url(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a TensorBoard answers that has read both runs."""
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    logdir = runs["other"].dir.parent
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--reload_interval", "1"], stdout=output, stderr=output)
    try:
        url = until(lambda: re.search(r"http://\S+:\d+/", log.read_text()), log)[0].replace("localhost", "127.0.0.1")
        for name, run in runs.items():
            # The newest file's: an older one may have a point at this step, and is read before it.
            begun = max(
                int(path.name.split(".")[3]) for path in (run.dir / "tensorboard").glob("events.out.tfevents.*")
            )
            query = urllib.parse.urlencode({"run": f"{name}/tensorboard", "tag": "eval/loss"})
            address = f"{url}data/plugin/scalars/scalars?{query}"
            until(lambda address=address, begun=begun: has_read(address, 4, begun), log)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


def until(attempt: Any, log: Path) -> Any:
    """What an attempt finds, as soon as it finds something."""
    begun = time.monotonic()
    while not (found := attempt()):
        assert time.monotonic() - begun < PATIENCE_S, log.read_text()
        time.sleep(0.2)
    return found


def has_read(address: str, step: int, since: float) -> bool:
    """Whether TensorBoard knows a curve up to a step, written at this Unix time or later."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=10) as answer:
            return any(wall >= since and at == step for wall, at, _ in json.load(answer))
    except (OSError, ValueError):
        return False  # Not before the files are read.
