"""Work on many shards in many processes, that goes on where it was interrupted.

Each finished item leaves a file in a folder; the same command, given again, takes what is there and does the rest.
When the whole is written the folder is removed, so the next command begins anew and looks at every byte again.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evaclip.errors import InputError
from evaclip.log import progress, say

Item = TypeVar("Item")
Result = dict[str, Any]
"""JSON values and numpy arrays; arrays come back mapped from disk, not in memory."""


class Journal:
    """Results of one command, in a folder of its own."""

    def __init__(self, folder: Path, settings: dict[str, Any], processes: int) -> None:
        """`settings`: all that the results depend on beside the items; others leave no trace in this command."""
        self.folder, self.processes = folder, processes
        self._settings = json.dumps(settings, sort_keys=True, default=str)

    def each(
        self, what: str, work: Callable[[Item], Result], items: Sequence[Item], identity: Callable[[Item], str] = str
    ) -> Iterator[tuple[Item, Result]]:
        """Items with their results, in order. `work` runs in other processes; `identity` names an item and its state.

        Raises InputError when a process is killed; what was finished before is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [self._name(what, identity(item)) for item in items]
        todo = deque([place for place, name in enumerate(names) if not (self.folder / f"{name}.json").exists()])
        if todo and len(todo) < len(items):
            say(f"{what}: {len(items) - len(todo):,} of {len(items):,} were done before")
        task = partial(_recorded, work, self.folder)
        with _pool(min(self.processes, len(todo))) as run:
            done = progress(run(task, [(items[n], names[n]) for n in todo]), len(todo), what)
            for place, (item, name) in enumerate(zip(items, names, strict=True)):
                if todo and todo[0] == place:
                    todo.popleft()
                    next(done)
                yield item, self._load(name)
            for _ in done:  # lets the bar end
                pass

    def result(self, what: str, identity: str) -> Result:
        """A result of before, for work that builds on it."""
        return self._load(self._name(what, identity))

    def finished(self) -> None:
        """The whole is written: forget the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, what: str, identity: str) -> str:
        return hashlib.sha256(f"{what}\n{self._settings}\n{identity}".encode()).hexdigest()[:32]

    def _load(self, name: str) -> Result:
        record = json.loads((self.folder / f"{name}.json").read_text())
        arrays = record.pop("arrays")
        return record | {key: _mapped(self.folder / f"{name}.{key}.npy") for key in arrays}


def shard_state(path: Path) -> str:
    """A shard's name and what changes when its bytes do."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _mapped(path: Path) -> np.ndarray:
    """An empty array cannot be mapped."""
    return np.load(path, mmap_mode="r" if path.stat().st_size > 256 else None, allow_pickle=False)


def _recorded(work: Callable[[Item], Result], folder: Path, named: tuple[Item, str]) -> None:
    """Do the work and write its result; the JSON file comes last and says that all is there."""
    item, name = named
    result = work(item)
    arrays = {key: value for key, value in result.items() if isinstance(value, np.ndarray)}
    for key, array in arrays.items():
        np.save(folder / f"{name}.{key}.npy", array, allow_pickle=False)
    record = {key: value for key, value in result.items() if key not in arrays} | {"arrays": list(arrays)}
    temporary = folder / f"{name}.part"
    temporary.write_text(json.dumps(record))
    temporary.replace(folder / f"{name}.json")


@contextmanager
def _pool(processes: int) -> Iterator[Callable[..., Iterator[None]]]:
    """`map`, in this process or in others; an interruption waits for the items under way and starts no more."""
    if processes <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(processes, get_context("fork"), _prepare, (os.getpid(),))
    before = _terminate_as_interrupt()
    try:
        yield pool.map
    except BrokenProcessPool:
        raise InputError(
            "a process was killed, perhaps for lack of memory; give the command again to go on, with fewer --processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate_as_interrupt() -> Any:
    """SIGTERM unwinds the stack as Ctrl-C does, so that no process is left behind."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _prepare(parent: int) -> None:
    """Ctrl-C and SIGTERM are for the parent; when it is gone, so is this process. One thread each."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
