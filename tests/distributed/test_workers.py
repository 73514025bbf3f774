"""That a worker which fails or does not end is never taken for one that has ended well."""

from pathlib import Path

import pytest
from workers import run_workers


@pytest.mark.parametrize(
    ("program", "codes"), [("raise SystemExit(3)", "[3]"), ("import time; time.sleep(60)", "[None]")]
)
def test_a_worker_that_does_not_end_well(tmp_path: Path, program: str, codes: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(program)
    with pytest.raises(AssertionError, match="exit codes") as error:
        run_workers(script, tmp_path, [()], timeout_s=0.5 if "sleep" in program else 60)
    assert f"exit codes {codes}" in str(error.value)
