"""Knows when a run hangs, says who is behind, and ends it so that a scheduler can start it again.

Every process writes a small file with its step and what it is doing. A thread of each watches its own process: when no
step has ended for much longer than steps take, it writes down the stacks of all threads, names the processes that are
behind the others, and ends the process with exit status 88. A second watch, torch-free and without the interpreter's
lock (faulthandler's), does the same, with exit status 1, should the first be stuck as well.
"""

import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TextIO

from evaclip.errors import HANG_STATUS
from evaclip.guard.health import GuardConfig
from evaclip.guard.signals import leave

# Seconds between two looks at the clock, and between two writes of the file.
LOOK, WRITE = 0.5, 5.0
# What may take long without being a hang.
PATIENT = ("start", "evaluate", "save")


class Heartbeat:
    """While entered, watches this process. `folder`: the run's `heartbeats/`, shared by all processes."""

    def __init__(self, folder: Path, rank: int, config: GuardConfig) -> None:
        self.folder, self.rank, self.config = folder, rank, config
        self._step, self._phase, self._since = 0, "start", time.monotonic()
        self._seconds: deque[float] = deque(maxlen=50)
        self._last_step: float | None = None
        self._done = threading.Event()
        self._stacks: TextIO | None = None

    def beat(self, step: int) -> None:
        """A step begins: the one before it, if there was one, is done."""
        now = time.monotonic()
        if self._last_step is not None and self._phase not in PATIENT:
            self._seconds.append(now - self._last_step)
        self._last_step, self._step = now, step
        self.phase("data")

    def phase(self, name: str) -> None:
        """What the process does from now on: `data`, `step`, `evaluate` or `save`."""
        self._phase, self._since = name, time.monotonic()
        if self._stacks is not None:
            faulthandler.dump_traceback_later(2 * self.limit() + 60, exit=True, file=self._stacks)

    def limit(self) -> float:
        """Seconds that the present phase may take."""
        if self._phase in PATIENT or not self._seconds:
            return self.config.patience
        return max(5 * statistics.median(self._seconds), self.config.hang_floor)

    def __enter__(self) -> "Heartbeat":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self.folder / f"stacks_{self.rank:05}.txt").open("w")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            (self.folder / f"stacks_{self.rank:05}.txt").unlink(missing_ok=True)  # only a hang leaves stacks
        self._write("ended")

    def _watch(self) -> None:
        written = 0.0
        while not self._done.wait(LOOK):
            now = time.monotonic()
            if now - written >= WRITE:
                self._write(self._phase)
                written = now
            if now - self._since > self.limit():
                self._give_up(now - self._since)

    def _give_up(self, seconds: float) -> None:
        self._write(self._phase)
        assert self._stacks is not None
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        time.sleep(LOOK)  # for the others' files
        late = "; ".join(behind(self.folder))
        print(
            f"evaclip: process {self.rank} has been in phase {self._phase!r} of step {self._step:,} for {seconds:,.0f} "
            f"s{f'; behind: {late}' if late else ''}; stacks are in {self._stacks.name}; run again with --resume auto",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        leave(HANG_STATUS)

    def _write(self, phase: str) -> None:
        record = {
            "rank": self.rank, "step": self._step, "phase": phase, "time": round(time.time(), 1),
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        path = self.folder / f"rank_{self.rank:05}.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(record))
            temporary.replace(path)
        except OSError:
            return  # a full disk is for the checkpoint to report


def behind(folder: Path) -> list[str]:
    """The processes at an earlier step than the others, or still waiting for data where others compute."""
    found = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    ahead = max(((beat["step"], beat["phase"] != "data") for beat in found), default=(0, False))
    return [
        f"process {beat['rank']} on {beat['host']} (step {beat['step']:,}, {beat['phase']})"
        for beat in found
        if (beat["step"], beat["phase"] != "data") < ahead
    ]
