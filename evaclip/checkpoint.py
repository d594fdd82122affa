"""Checkpoints that are whole or not there at all.

    checkpoints/step_00000300/{model,optimizer}.safetensors, state.json, manifest.json
    checkpoints/best.json, scoring.json       marks: checkpoints that pruning leaves, besides the newest

A checkpoint is written to a folder of another name, every file is flushed to the disk, the manifest with the SHA-256
of each file comes last, and then the folder gets its name. Loading hashes everything again, because neither torch.save
nor safetensors notices a flipped bit; a damaged checkpoint is named and the one before it is used. No pickle anywhere.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaclip.errors import CheckpointError, InputError
from evaclip.log import say

VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved."""

    every: int = 500
    """Steps between two checkpoints; there is always one at the end."""
    keep: int = 3
    """How many of the newest to keep, at least 2."""

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise InputError("--checkpoint.keep must be at least 2: the newest may be damaged")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and found whole."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """By kind, `model` and `optimizer`, then by name."""
    record: dict[str, Any]
    """Everything that is not a tensor."""


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step. Raises InputError when the disk will not take it; older ones stay as they are."""
    final = _path(folder, step)
    temporary = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for kind, named in tensors.items():
            save_file(
                {name: value.detach().contiguous().cpu() for name, value in named.items()}, _file(temporary, kind)
            )
        (temporary / STATE).write_text(json.dumps({"version": VERSION, "step": step} | dict(record)))
        files = {path.name: _described(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"version": VERSION, "step": step, "files": files}, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if final.exists():  # the same step again, after a restart from an older one
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"the checkpoint of step {step:,} cannot be written to {folder} ({reason}); older checkpoints are untouched"
        ) from None
    return final


def of_step(folder: Path, step: int, kinds: Sequence[str] | None = None) -> Checkpoint:
    """The checkpoint of a step that another process has just found whole. Raises CheckpointError."""
    path = _path(folder, step)
    try:
        return _read(path, [file.name for file in path.iterdir()], kinds)
    except OSError as error:
        raise CheckpointError(f"{path} can be read by the first process but not here: {error}") from None


def load(path: Path, kinds: Sequence[str] | None = None) -> Checkpoint:
    """Read one checkpoint, or only some kinds of its tensors.

    Raises CheckpointError, with the file's name, for anything that is not as it was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(files, pool.map(lambda name: _described(path / name), files), strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, described in files.items():
        if found[name] != described:
            raise CheckpointError(f"{path / name} is not the file that was written: its SHA-256 or size differs")
    if manifest["version"] != VERSION or manifest["step"] != step_of(path):
        raise CheckpointError(f"{path / MANIFEST} is of another step or version")
    return _read(path, files, kinds)


def _read(path: Path, files: Iterable[str], kinds: Sequence[str] | None) -> Checkpoint:
    stored = [Path(name).stem for name in files if name.endswith(".safetensors")]
    try:
        record = json.loads((path / STATE).read_text())
        tensors = {kind: load_file(_file(path, kind)) for kind in stored if kinds is None or kind in kinds}
    except (OSError, ValueError, SafetensorError) as error:  # pruned by the training while another process reads it
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(path, record["step"], tensors, record)


def newest(folder: Path, kinds: Sequence[str] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint, passing over damaged ones aloud; None if there has never been one.

    Raises CheckpointError when there are checkpoints and none is whole.
    """
    reasons = []
    for path in reversed(paths(folder)):
        try:
            return load(path, kinds)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"passing over a damaged checkpoint: {error}")
    if reasons:
        raise CheckpointError(f"none of the {len(reasons)} checkpoints in {folder} is whole; the newest: {reasons[0]}")
    return None


class Writer:
    """Writes checkpoints beside the training: it copies the tensors, and a thread of its own does the rest.

    One checkpoint is in flight at a time. What went wrong is raised by the next call, and shows in `failed`.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: see `CheckpointConfig`."""
        self.folder, self.keep = folder, keep
        self.failed: InputError | None = None
        self._thread: threading.Thread | None = None
        self._staged: dict[tuple[str, str], Tensor] = {}

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
        """Stage a checkpoint and return. Raises InputError when the one before it could not be written."""
        self.finish()
        copies = {kind: {n: self._stage(kind, n, t) for n, t in named.items()} for kind, named in tensors.items()}
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(record)), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint in flight. Raises InputError when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failed is not None:
            raise self.failed

    def _stage(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """A copy in main memory that stays for the next checkpoint; pinned, so that a GPU does not wait for it."""
        own = self._staged.get((kind, name))
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._staged[kind, name] = own
        return own.copy_(tensor.detach(), non_blocking=True)

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
        try:
            save(self.folder, step, tensors, record)
            prune(self.folder, self.keep)
        except InputError as error:
            self.failed = error


def forget_after(folder: Path, position: int) -> None:
    """Delete the checkpoints whose data lies beyond a position of the stream: a run that goes back leaves them."""
    for path in paths(folder):
        try:
            record = json.loads((path / STATE).read_text())
            beyond = record["cursor"]["position"] > position
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one is passed over by `newest`
        if beyond:
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the marked ones, and what interrupted saves left behind."""
    marked = {mark["step"] for mark in marks(folder).values()}
    old = [path for path in paths(folder)[:-keep] if step_of(path) not in marked]
    for path in [*old, *folder.glob("step_*.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def mark(folder: Path, reason: str, step: int, **details: Any) -> None:
    """Have `prune` leave the checkpoint of a step, until the mark of this reason goes to another or is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{reason}-{secrets.token_hex(4)}"
    temporary.write_text(json.dumps({"step": step} | details) + "\n")
    temporary.replace(folder / f"{reason}.json")


def mark_best(folder: Path, step: int, name: str, value: float) -> bool:
    """Give a step the mark `best` if no checkpoint has it with as high a value of that name; whether it got it.

    The mark of a checkpoint that is gone, or given for another number, counts for nothing.
    """
    before, there = marks(folder).get("best", {}), {step_of(path) for path in paths(folder)} - {step}
    if before.get("name") == name and before["step"] in there and value <= before.get("value", -math.inf):
        return False
    mark(folder, "best", step, name=name, value=value)
    return True


def unmark(folder: Path, reason: str) -> None:
    """Remove a mark; none is fine."""
    (folder / f"{reason}.json").unlink(missing_ok=True)


def marks(folder: Path) -> dict[str, dict[str, Any]]:
    """The marks by reason. One that cannot be read keeps nothing."""
    found = {}
    for path in folder.glob("*.json"):
        try:
            said = json.loads(path.read_text())
            if isinstance(said["step"], int):
                found[path.stem] = said
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, oldest first; not looked into."""
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit())


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def _file(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.safetensors"


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Ask the disk to have a file, or a folder's list of files, for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
