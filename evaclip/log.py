"""What a run says: a progress bar on a terminal and plain lines elsewhere, JSONL and TensorBoard always, W&B if asked.

Everything written passes through `redacted`, so that a signed address or a token in a path does not end up in a log.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

# What must not be written: passwords in addresses, signatures in queries, and the tokens of the usual services.
SECRETS = (
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), "***"),
    (re.compile(r"(?i)((?:sig|signature|token|key|secret|password|credential)[\w-]*=)[^&\s\"']+"), r"\1***"),
    (re.compile(r"\b(hf_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})\b"), "***"),
)
# Seconds between two plain lines of progress where there is no terminal.
LINE_EVERY = 10.0


def redacted(text: str) -> str:
    """The text without secrets."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Inside, `say` says nothing: for processes that leave the talking to the first."""
    before = _QUIET.set(on)
    try:
        yield
    finally:
        _QUIET.reset(before)


def say(text: str) -> None:
    """One line to the user, on standard error, where results on standard output stay clean."""
    if _QUIET.get():
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(redacted(text), markup=False)


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, with a bar that shows rate and time left; short work stays quiet where there is no terminal."""
    if sys.stderr.isatty():
        with Progress(*_columns(), console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            rate = done / (now - start)
            say(f"{what}: {done:,} of {total:,}, {rate:.3g}/s, {clock((total - done) / rate)} left")
            last = now


def clock(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged, and how often."""

    every: int = 10
    """Steps between two lines of metrics."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""


class RunLog:
    """The logs of one run: `log.jsonl` and TensorBoard files in its folder, a bar or lines for the user.

    A resumed run appends. Lines of steps after the one it resumes from are cut off first: they will come again.
    """

    def __init__(
        self, folder: Path, name: str, steps: int, first_step: int, config: LogConfig, *, written: bool = True
    ) -> None:
        """`written`: whether this process is the one that logs."""
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self.steps = steps
        self._written = written
        if not written:
            return
        self._wandb = _wandb_run(folder, name, config) if config.wandb_project else None
        self._lines = folder / "log.jsonl"
        _cut_after(self._lines, first_step)
        self._file = self._lines.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._bar = _Bar(name, steps, first_step) if sys.stderr.isatty() else None
        self._started, self._first_step, self._last_line = time.monotonic(), first_step, 0.0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, to every sink."""
        if not self._written:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | dict(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """A glance at the run: on the bar, or as a line at most every LINE_EVERY seconds."""
        if not self._written:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar:
            self._bar.update(step, shown)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY or step == self.steps:
            rate = (step - self._first_step) / max(now - self._started, 1e-9)
            left = clock((self.steps - step) / rate) if rate else "?"
            say(f"step {step:,}/{self.steps:,}  {shown}  left {left}")
            self._last_line = now

    def event(self, step: int, text: str, **details: Any) -> None:
        """Something worth a sentence: to the user and to the JSONL."""
        if not self._written:
            return
        say(text)
        self._file.write(redacted(json.dumps({"step": step, "event": text} | details)) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was logged of later steps, which will come again."""
        if not self._written:
            return
        self._file.close()
        _cut_after(self._lines, step)
        self._file = self._lines.open("a", buffering=1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        """Flush everything, whatever happened."""
        if not self._written:
            return
        if self._bar:
            self._bar.stop()
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl."""
    return read_lines(folder / "log.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, none if it does not exist; an unfinished last line is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class _Bar:
    """A progress bar with the latest numbers."""

    def __init__(self, name: str, steps: int, first_step: int) -> None:
        self._progress = Progress(*_columns(), TextColumn("{task.fields[shown]}"), console=Console(stderr=True))
        self._task = self._progress.add_task(name, total=steps, completed=first_step, shown="")
        self._progress.start()

    def update(self, step: int, shown: str) -> None:
        self._progress.update(self._task, completed=step, shown=shown)

    def stop(self) -> None:
        self._progress.stop()


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def _cut_after(lines: Path, step: int) -> None:
    """Drop the records of later steps; a damaged last line goes too."""
    if not lines.exists():
        return
    kept = [json.dumps(record) for record in read_log(lines.parent) if record.get("step", 0) <= step]
    lines.write_text("".join(line + "\n" for line in kept))


def _wandb_run(folder: Path, name: str, config: LogConfig) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        from evaclip.errors import InputError

        raise InputError("logging to Weights & Biases needs its package: pip install 'evaclip[wandb]'") from None
    return wandb.init(project=config.wandb_project, name=name, dir=str(folder), resume="allow", id=folder.name)
