"""What a user is told when something is wrong: one sentence and an exit status, never a traceback."""

import difflib
from collections.abc import Iterable
from pathlib import Path

# Exit statuses that say what to do next; a batch script starts the run again after these two.
REQUEUE_STATUS = 85  # stopped by a signal, everything is saved
HANG_STATUS = 88  # no step ended for far too long


class InputError(Exception):
    """Bad input: the message says what is wrong, where, and what to do about it."""

    exit_status = 2


class DivergedError(InputError):
    """The optimisation left the finite numbers."""

    exit_status = 86


class DamagedDataError(InputError):
    """More damaged samples than the run allows."""

    exit_status = 87


class CheckpointError(InputError):
    """No checkpoint that can be trusted, or one that does not belong to this run."""

    exit_status = 89


class AbsentError(InputError):
    """The other processes of the run did not come: another attempt may find them."""

    exit_status = HANG_STATUS


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known names, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are: {', '.join(known)}" if known else "none are known"


def near_path(path: Path) -> str:
    """The end of an error sentence about a path that does not exist: what lies beside it under a similar name."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either."
    near = difflib.get_close_matches(path.name, [other.name for other in folder.iterdir()], n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(str(folder / name) for name in near)}?"
        if near
        else f"{folder} has nothing like it."
    )
