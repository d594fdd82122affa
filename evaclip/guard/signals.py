"""Signals ask; the training loop answers between two steps."""

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import NoReturn

from evaclip.errors import REQUEUE_STATUS

# Ctrl-C, the end of a job, and the warning before it that `sbatch --signal=USR1@120` asks for.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set a flag; a second SIGINT ends the process at once.

    Another of the others is the same request again: Slurm tells every process, and torchrun once more its own.

    A loop that does not answer within `grace` seconds is stuck, in its data or because another process is: the process
    then ends without saving, and the last checkpoint is what a restart goes on from. While `patient` is set, during an
    evaluation or a save, these seconds do not pass.
    """

    def __init__(self, grace: float = 120.0) -> None:
        self.name: str | None = None
        """The signal that asked, or None."""
        self._before: dict[int, object] = {}
        self.patient = False
        self._grace = grace
        self._answered = threading.Event()

    def __bool__(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        for number in ASKING:
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.answered()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def answered(self) -> None:
        """The loop has stopped and will save."""
        self._answered.set()

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            os._exit(128 + number)
        if self.name is not None:
            return
        self.name = signal.Signals(number).name
        threading.Thread(target=self._wait, daemon=True, name="grace").start()

    def _wait(self) -> None:
        left = self._grace
        while not self._answered.wait(0.25):
            left -= 0.0 if self.patient else 0.25
            if left <= 0:
                self._give_up()

    def _give_up(self) -> None:
        print(
            f"evaclip: {self.name} came {self._grace:,.0f} s ago and the step under way has not ended (blocked data, "
            "or another process); ending without saving; --resume auto goes on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        leave(REQUEUE_STATUS)


def leave(status: int) -> NoReturn:
    """End this process at once, and its data workers with it: blocked ones would outlive it."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
