"""Results as files: a JSON record of the numbers and, beside it, `.npz` with what they were counted from.

Every evaluator writes its result so, whatever it measures; comparisons and reports read nothing else.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from evaclip.errors import InputError, near_path

# What a JSON file must hold to be a result.
FIELDS = ("dataset", "title", "model", "images", "headline", "metrics")


@dataclass(frozen=True)
class Result:
    """One model on one benchmark."""

    path: Path
    record: dict[str, Any]
    arrays: dict[str, np.ndarray]
    """Empty where there is no `.npz`."""

    @property
    def step(self) -> int | None:
        """The step of a run that was scored: as the record says, or the folder `evals/step_N` of the run."""
        said, parent = self.record["model"], self.path.parent
        inside = parent.name.removeprefix("step_")
        if parent.parent.name == "evals" and inside.isdigit():
            return int(inside)
        return int(said["step"]) if "step" in said else None

    @property
    def model(self) -> str:
        """What the model is called, with its step where it is a run's."""
        said = self.record["model"]
        if "averaged" in said:
            return f"{said['name']}, mean of steps {said['averaged']}"
        return str(said["name"]) if self.step is None else f"{said['name']}, step {self.step:,}"

    @property
    def headline(self) -> float:
        """The number that the benchmark is known by, as a share."""
        return float(self.record["metrics"][self.record["headline"]])


def read_result(path: Path) -> Result:
    """A result from its JSON file and the arrays beside it. Raises InputError."""
    if not path.is_file():
        raise InputError(f"the result {path} does not exist; {near_path(path)}")
    try:
        record = json.loads(path.read_text())
        missing = [name for name in FIELDS if name not in record]
        if missing or record["headline"] not in record["metrics"]:
            raise ValueError(f"it has no {(missing or [record['headline']])[0]!r}")
        beside = path.with_suffix(".npz")
        arrays: dict[str, np.ndarray] = {}
        if beside.is_file():
            with np.load(beside, allow_pickle=False) as stored:
                arrays = dict(stored)
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise InputError(f"{path} is not the result of an evaluation: {error}") from None
    return Result(path, record, arrays)


def write_result(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    ledger: Sequence[Mapping[str, str]] = (),
) -> Path:
    """`<name>.json` and `<name>.npz`, each whole or not there; the JSON comes last. Returns its path.

    `ledger`: the files that could not be read, to `<name>.bad.jsonl`; none leave none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    ending = f"tmp-{secrets.token_hex(4)}"
    told = path.with_suffix(".bad.jsonl")
    if ledger:
        told.write_text("".join(json.dumps(line) + "\n" for line in ledger))
    else:
        told.unlink(missing_ok=True)
    for target, write in (
        (path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **arrays)),  # type: ignore[arg-type]
        (path, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode())),
    ):
        temporary = target.with_name(f"{target.name}.{ending}")
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(target)
    return path


def ledger(keys: Sequence[str], bad: Mapping[int, str]) -> list[dict[str, str]]:
    """The files that could not be read, with the reasons."""
    return [{"key": keys[number], "reason": reason} for number, reason in sorted(bad.items())]


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    found = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
