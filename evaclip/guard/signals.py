"""Signals ask; the training loop answers between two steps."""

import os
import signal
from types import FrameType, TracebackType


class StopRequest:
    """While entered, SIGINT and SIGTERM set a flag; the second one of the same run ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        """The signal that asked, or None."""
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
