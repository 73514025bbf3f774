"""Plain lines in a pipe; on a terminal (a real one) the same lines, and below them a bar that is gone at the end."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from trainer.terminal import Reported, Summary, Terminal, duration, eval_lines, train_line

VALUES = {
    "train/loss": 2.5,
    "train/bits_per_byte": 3.25,
    "train/lr": 3e-4,
    "train/grad_norm": 1.25,
    "speed/tokens_per_s": 26_000.0,
    "speed/step_s": 10.0,
    "memory/peak_gib": 1.5,
}
LINE = "step  3/10  loss 2.5000  bits/byte 3.2500  lr 3.00e-04  grad 1.25  26,000 tokens/s  1.50 GiB  0:01:10 left"
RUN = f"""
from trainer.terminal import Terminal
with Terminal(steps=10, done=2) as terminal:
    terminal.step(3, {VALUES})
    terminal.line("saved it")
    for done in range(4, 11):
        terminal.step(done)
    terminal.close("all done")
"""


def test_the_line_of_a_step() -> None:
    assert train_line(3, 10, VALUES) == LINE
    more = train_line(3, 10, {**VALUES, "speed/mfu": 0.4567, "train/skipped_steps": 2.0})
    assert "  45.7% MFU  " in more and "  2 skipped  " in more
    assert "skipped" not in train_line(3, 10, {**VALUES, "train/skipped_steps": 0.0})


def test_the_line_of_an_evaluation() -> None:
    values = {"eval/loss": 2.0, "eval/bits_per_byte": 3.0}
    line = "eval  3/10  loss 2.0000  bits/byte 3.0000  on 7 held-out rows"
    assert eval_lines(3, 10, values, {"": range(7)}) == [line]
    (line_with_gain,) = eval_lines(3, 10, {**values, "eval/lsh_gain": 0.125}, {"": range(7)})
    assert "  without LSH +0.1250  on" in line_with_gain
    values |= {"eval/source/web/loss": 2.5, "eval/source/web/bits_per_byte": 3.25}
    web = "eval  3/10  loss 2.5000  bits/byte 3.2500  on 2 held-out rows of web"
    assert eval_lines(3, 10, values, {"": range(7), "web": range(2)}) == [line, web]


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3600 * 30 + 59.6)] == ["0:00:00", "0:01:01", "30:01:00"]


def test_plain_lines_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [LINE, "saved it", "all done"]
    assert done.stderr == ""


@pytest.mark.parametrize("output", ["a full disk", "a pipe that nobody reads"])
def test_output_that_goes_nowhere_ends_no_run(output: str) -> None:
    program = f"import sys\n{RUN}\nprint('done', file=sys.stderr)\nsys.exit(75)"
    if output == "a full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=target, stderr=subprocess.PIPE, text=True)
    os.close(target)
    assert (done.returncode, done.stderr) == (75, "done\n")


def test_an_error_that_cannot_be_said_is_the_same_error() -> None:
    program = "import sys; from trainer.terminal import show; show('error: it failed', error=True); sys.exit(2)"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", program], stderr=full).returncode == 2


def test_a_disk_that_has_room_again_gets_the_lines_that_follow(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = """
import os, resource, signal
from trainer.terminal import show
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
show("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (6, resource.RLIM_INFINITY))
show("lost")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
show("last")
"""
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert log.read_text() == "first\nlast\n"


def on_a_terminal(program: str) -> str:
    """What a program writes to a terminal of its own."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 120))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave)
    os.close(slave)
    written = bytearray()
    while True:
        try:
            written += os.read(master, 65_536)
        except OSError:  # the program has closed its side
            break
    os.close(master)
    assert process.wait() == 0
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left on the screen: a carriage return starts over what is written there."""
    lines = []
    for written_line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in written_line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_bar_on_a_terminal() -> None:
    written = on_a_terminal(RUN)
    assert re.search(r"20% \|#* *[█▏▎▍▌▋▊▉]* *\| step 2/10, ", written), written
    assert "step 3/10, " in written  # it moves, whether or not a line is printed
    assert [line for line in screen(written) if line] == [LINE, "saved it", "all done"]  # and is gone at the end


def test_an_error_finds_the_bar_gone_and_no_thread_looks_after_it() -> None:
    program = """
import threading
from trainer.terminal import Terminal
try:
    with Terminal(steps=10, done=2) as terminal:
        terminal.step(3)
        assert threading.active_count() == 1, threading.enumerate()
        raise ValueError
except ValueError:
    print("error: it failed")
"""
    assert [line for line in screen(on_a_terminal(program)) if line] == ["error: it failed"]


def test_closing_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(steps=1, done=0)
    terminal.close("the end")
    terminal.close()
    assert capsys.readouterr().out == "the end\n"


def test_the_summary() -> None:
    scores = {"held out": Reported(8, 2.75, 3.5), "last batch": Reported(10, 2.5, 3.25)}
    counts = {"n_tokens": 6e6, "seconds": 100.0, "save_s": 2.5, "skipped_steps": 1, "spikes": 2}
    summary = Summary(Path("runs/x"), steps=10, first_step=4, done=10, scores=scores, **counts)
    first, scored, checkpoints, run, curves = summary.text().splitlines()
    assert (
        first == "finished: 10 of 10 steps (4 of them before this start), 6,000,000 tokens in 0:01:40, 60,000 tokens/s "
        "with evaluations and checkpoints"
    )
    assert scored == (
        "last batch, step 10: 2.5000 nats per token, 3.2500 bits per byte   "
        "held out, step 8: 2.7500 nats per token, 3.5000 bits per byte"
    )
    assert checkpoints == "checkpoints took 2.5% of the time; 1 step skipped, 2 spikes of the loss"
    assert run.endswith("python launch/report.py runs/x")
    assert curves.endswith("tensorboard --logdir runs/x/tensorboard")


def test_the_summary_of_a_run_that_was_stopped_before_it_did_anything() -> None:
    counts = {"n_tokens": 0, "seconds": 0.0, "save_s": 0.0, "skipped_steps": 0, "spikes": 0}
    summary = Summary(Path("x"), steps=10, first_step=0, done=0, scores={}, **counts)
    assert summary.text().startswith(
        "stopped: 0 of 10 steps, 0 tokens in 0:00:00, 0 tokens/s with evaluations and checkpoints\ncheckpoints took 0.0"
    )
