"""Ends a run that hangs, and says which rank it hangs on and where.

Every rank watches itself with a thread that talks to the others through files alone, so it works when collectives do
not. A rank whose thread is gone too (stopped, killed, its node lost) is noticed by the rank before it, since its file
does not change any more. Times are of each process's own clock, which stands still while the process does: a run that
is suspended as a whole has not hung.

RUN/ranks/rank_00003.json: where that rank is; see ranks.py.
RUN/ranks/hang.json: {rank, host, pid, time, verdict} of the rank that noticed a hang; gone when the run goes on.
RUN/stacks/rank_00003.txt: all threads of that rank at each hang. C code that does not give the interpreter back keeps
the thread from running; then that rank is silent, and it is left to the others to end the run. (Having C code write
its stacks by a timer crashed a process that had been suspended: it walks frames that change meanwhile.)
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, NoReturn, Self

from trainer import ranks
from trainer.checkpoint import way_on
from trainer.distributed import COLLECTIVE_TIMEOUT, Launch
from trainer.ranks import RankState
from trainer.run_files import LOCK, RANKS, STACKS, write_json

HUNG = 70
"""Exit code of a process that the watchdog ended: EX_SOFTWARE."""
BEAT_S = 5.0
"""From one look to the next; less where a hang is to be noticed sooner."""
_ENDED_BY_US = "failed: ended by the watchdog"


class Phase(NamedTuple):
    """Where the main thread is, and since when on the process's own clock."""

    step: int
    turn: int
    phase: str
    since_s: float


class Watchdog:
    """Watches the process that it is made in, and the next rank; a context manager."""

    outcome = "finished"
    """What became of the run if the block ends without an error: set it to "preempted" where that is why."""

    def __init__(self, run_dir: Path, launch: Launch, factor: float, min_s: float) -> None:
        """factor: a phase may last so many times longer than the longest of its kind; 0: nothing is ended, the files
        are written all the same. min_s: what lasts less than this many seconds is no hang."""
        self._run_dir, self._launch = run_dir, launch
        self._factor, self._min_s = factor, min_s
        self._beat_s = min(BEAT_S, min_s / 5)
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._alarm_path = run_dir / RANKS / "hang.json"
        self._old_alarm = b""
        self._paused_s = 0.0
        self._longest_s: dict[str, float] = {}
        self._phase = Phase(0, 0, "start", self._clock())
        self._look_again_s = 0.0
        self._stacks: IO[str] | None = None
        self._last_words: RankState | None = None
        self._cannot_write = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._main = threading.get_ident()
        with self._tolerance():
            for name in (RANKS, STACKS):
                (self._run_dir / name).mkdir(parents=True, exist_ok=True)
            # Kept open, and opened to add: of a hang in the night the run has gone on by the morning.
            self._stacks = (self._run_dir / STACKS / f"rank_{self._launch.rank:05d}.txt").open("a", encoding="utf-8")
            if self._launch.rank == 0:
                self._clear()
        self._old_alarm = ranks.read_bytes(self._alarm_path)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._alarmed():
            # An error that others are gone is no news. The thread says what is, and ends the process.
            self._thread.join(self._last_moment_s())
            self._end()
        self._closed.set()
        self._thread.join()
        self._write(ranks.ending(error) if error is not None else self.outcome, traceback)
        if self._stacks is not None:
            self._stacks.close()

    def mark(self, step: int, phase: str) -> None:
        """Say that a phase begins here, in step number `step`, which never falls. All ranks must say the same, in the
        same order: it is how the one is found that is furthest back. Takes about a microsecond."""
        now, (former_step, turn, former, since_s) = self._clock(), self._phase
        if now - since_s > self._longest_s.get(former, 0.0):
            self._longest_s[former] = now - since_s
        self._phase = Phase(step, turn + 1 if step == former_step else 0, phase, now)

    def _clock(self) -> float:
        """Seconds during which this process ran."""
        return time.monotonic() - self._paused_s

    def _limit_s(self, phase: str) -> float | None:
        if self._factor == 0:
            return None
        if phase not in self._longest_s:
            return max(self._min_s, COLLECTIVE_TIMEOUT.total_seconds())
        return max(self._min_s, self._factor * self._longest_s[phase])

    def _state(self, ended: str | None = None, traceback: TracebackType | None = None) -> RankState:
        """What to say; `traceback`: of the error that ended it, where there is one."""
        if self._last_words:  # where it hung, not where the error comes that others are gone
            return replace(self._last_words, ended=ended)
        place, frames = self._phase, sys._current_frames()
        main = frames.get(self._main)
        here = ranks.line_of_code(main) if main else "?"
        return RankState(
            rank=self._launch.rank,
            world_size=self._launch.world_size,
            host=self._host,
            pid=self._pid,
            step=place.step,
            turn=place.turn,
            phase=place.phase,
            # Not below 0 where what was taken out of the clock meanwhile is of the phase before, too.
            in_phase_s=max(0.0, round(self._clock() - place.since_s, 3)),
            limit_s=self._limit_s(place.phase),
            at=here if traceback is None else ranks.line_of_error(traceback),
            # Of any thread: on GPUs, autograd runs DeepSpeed's hooks in one of its own.
            waiting=any(ranks.is_waiting(frame) for frame in frames.values()),
            time=time.time(),
            ended=ended,
        )

    # What the thread does.

    def _watch(self) -> None:
        neighbour = _Listener(self._run_dir, (self._launch.rank + 1) % self._launch.world_size)
        before = time.monotonic()
        while not self._closed.wait(self._beat_s):
            now = time.monotonic()
            # It was not for this thread to see what happened then: the process was stopped, or a file system was slow.
            if now - before > 2 * self._beat_s:
                self._paused_s += now - before - self._beat_s
            before = now
            self._write()
            if self._factor == 0:
                continue
            # Who cannot write must not hold it against another that it does not either.
            begun = self._phase.phase != "start"
            silent_s = neighbour.silent_s(self._clock(), excused=self._cannot_write, begun=begun)
            overdue = self._state().overdue
            if self._alarmed():
                self._answer()
            elif time.monotonic() - now > 2 * self._beat_s:
                continue  # stopped just now: the next beat takes that time out
            elif silent_s > self._min_s:
                self._alarm()
            elif overdue and self._clock() >= self._look_again_s:
                # Not at every beat: in a large run, all ranks read the files of all.
                self._look_again_s = self._clock() + 6 * self._beat_s
                # It is no hang to wait for a rank that is within its own limit, in an evaluation say.
                if any(state.overdue for state in ranks.holding_up(self._read_all(), ())):
                    self._alarm()

    def _alarm(self) -> NoReturn:
        """Have all ranks write their stacks, say what is wrong, and end; answer instead if another was first."""
        about = {"rank": self._launch.rank, "host": self._host, "pid": self._pid, "time": time.time(), "verdict": None}
        try:
            with self._alarm_path.open("x", encoding="utf-8") as file:
                json.dump(about, file)
        except FileExistsError:
            self._answer()
        except OSError as error:
            self._say(f"rank {self._launch.rank} cannot tell the others of a hang: {error}")
        self._write_stacks()
        before = {state.rank: state for state in self._read_all()}
        self._wait_for(lambda: all(state.stacks_written or state.ended for state in self._read_all()))
        states = self._read_all()
        unheard = [state for state in states if not state.ended and not state.stacks_written]
        silent = {state.rank for state in unheard if state == before.get(state.rank)}
        verdict = ranks.judge(states, set() if self._cannot_write else silent)
        self._say(f"error: {verdict}\nstacks of all threads: {self._run_dir / 'stacks'}")
        with contextlib.suppress(OSError):
            self._say(way_on(self._run_dir))
        with self._tolerance():
            write_json(self._alarm_path, {**about, "verdict": verdict})
        self._end()

    def _answer(self) -> NoReturn:
        """Another rank has noticed a hang: write our stacks, let it speak, and end."""
        self._write_stacks()
        self._wait_for(lambda: b'"verdict": null' not in ranks.read_bytes(self._alarm_path))
        self._end()

    def _write_stacks(self) -> None:
        # Whatever hangs from here on (a file system, a full pipe), this process ends.
        last_resort = threading.Timer(self._last_moment_s(), os._exit, [HUNG])
        last_resort.daemon = True
        last_resort.start()
        state = self._state()
        with self._tolerance():
            file = self._stacks or sys.stderr
            print(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {state.name}: {state.place}", file=file, flush=True)
            faulthandler.dump_traceback(file)
        self._last_words = replace(state, stacks_written=True)
        self._write()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Until all ranks had the time to notice and to write."""
        deadline = time.monotonic() + 4 * self._beat_s + 1
        while not condition() and time.monotonic() < deadline:
            time.sleep(min(0.2, self._beat_s))

    def _last_moment_s(self) -> float:
        return 12 * self._beat_s + 10

    def _end(self) -> NoReturn:
        self._write(_ENDED_BY_US)
        os._exit(HUNG)

    # Files, of which none may take the run down.

    def _alarmed(self) -> bool:
        # Rank 0 may remove that of an earlier hang after we saw it.
        return self._factor > 0 and ranks.read_bytes(self._alarm_path) not in (b"", self._old_alarm)

    def _read_all(self) -> list[RankState]:
        """The states of all ranks that can be read, and our own."""
        states = {state.rank: state for state in ranks.read_states(self._run_dir, self._launch.world_size)}
        return list((states | {self._launch.rank: self._state()}).values())

    def _write(self, ended: str | None = None, traceback: TracebackType | None = None) -> None:
        with self._tolerance():
            ranks.write_state(self._run_dir, self._state(ended, traceback))
            self._cannot_write = False

    def _clear(self) -> None:
        """Remove what an earlier run of this folder said: of a hang, and of ranks that there are no more."""
        self._alarm_path.unlink(missing_ok=True)
        for path in self._alarm_path.parent.glob("rank_*.json"):
            if path.stem[5:].isdigit() and int(path.stem[5:]) >= self._launch.world_size:
                path.unlink()

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        """A disk that is full, or a folder that is gone, is said once, and is no reason to stop."""
        try:
            yield
        except OSError as error:
            if not self._cannot_write:
                self._say(f"note: rank {self._launch.rank} cannot say how it is: {error}")
            self._cannot_write = True

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class _Listener:
    """Whether another rank's file still changes. Its times are compared with each other, never with our clock."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path, self._hold = ranks.state_path(run_dir, rank), run_dir / LOCK
        self._last = ranks.read_bytes(self._path)
        self._heard_s: float | None = None

    def silent_s(self, now_s: float, excused: bool, begun: bool) -> float:
        """Seconds since the file last changed, by our clock; 0 if the rank has ended, or is `excused` or unreadable.

        Until it changes for the first time, it may be that of an earlier run: 0 then too, unless it is younger than the
        hold on the folder, which this run took before any rank wrote. Then it must change once the run has `begun`,
        which all ranks do together.
        """
        news = ranks.read_bytes(self._path)
        state = ranks.parse_state(news)
        waived = excused or state is None or state.ended is not None
        known = self._heard_s is not None
        if news != self._last or (known and waived) or (not known and begun and self._is_of_this_run()):
            self._heard_s = now_s
        self._last = news
        return 0.0 if self._heard_s is None else now_s - self._heard_s

    def _is_of_this_run(self) -> bool:
        """By the file system's clock, whatever that of a node says."""
        with contextlib.suppress(OSError):
            return self._path.stat().st_mtime_ns >= self._hold.stat().st_mtime_ns
        return False
