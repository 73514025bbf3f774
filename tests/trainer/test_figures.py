"""Pictures, whatever the model says and wherever a run is started from."""

import math
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest

from trainer.figures import figure_by_position

PROGRAM = """
import sys
from pathlib import Path
from trainer.figures import figure_by_position
from trainer.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), 0)
metrics.figure(0, "eval/loss_by_position", figure_by_position({4: 2.0, 16: 1.0}))
metrics.close()
"""


def test_the_shell_of_a_notebook_names_a_backend_that_is_not_installed_here(tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "not_installed"}
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], env=environment, check=True)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300, None])
def test_a_model_that_diverged_or_has_nothing_to_predict_has_a_picture_too(loss: float | None) -> None:
    picture = BytesIO()
    figure_by_position({} if loss is None else {4: loss, 16: 2.0}).savefig(picture)
    assert picture.getvalue().startswith(b"\x89PNG")
