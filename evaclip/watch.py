"""Scores a run's checkpoints from a process of its own, while the run goes on: what `evaclip watch` does.

The training never waits for it, and it may run on another machine: the two meet in the run's folder alone. Scores go
where those of an evaluation inside the training go (`evals/step_N/`, the report), and to `evals/scores.jsonl` and
`tensorboard/evals`. While a checkpoint is read and scored it carries the mark `scoring`, and the best one so far the
mark `best`; pruning leaves both (evaclip/checkpoint.py). Started again, it goes on where it stopped.
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from evaclip import checkpoint
from evaclip.config import EvalConfig, Evaluator, load_config
from evaclip.encoder import clip_of_checkpoint
from evaclip.engine import EngineConfig
from evaclip.errors import CheckpointError, InputError, did_you_mean
from evaclip.log import read_lines, say
from evaclip.report.run import SCORES, write_run_report


@dataclass(frozen=True, kw_only=True)
class WatchCommand:
    """Score a run's checkpoints as they appear, beside the training; ends when the run is done and all are scored."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    datasets: tuple[str, ...] = ()
    """Benchmarks by name or card, flickr30k and coco too; by default all of the run's configuration."""
    probes: tuple[str, ...] = ()
    """Benchmarks to fit a linear probe on."""
    data_root: Path = Path("data")
    """Folder that has a folder for each of `datasets` and `probes`."""
    best: str | None = None
    """The number that decides which checkpoint is best, such as zero_shot/imagenet/top1; by default the first."""
    poll: float = 20.0
    """Seconds between two looks at the run."""
    idle_minutes: float | None = None
    """End after so long without a new checkpoint; by default wait until the run is done."""
    batch: int = 256
    """Images of them that pass through the tower at a time."""
    workers: int = 2
    """Processes that decode their images."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""


def run_watch(command: WatchCommand) -> None:
    """Watch until the run is done."""
    config = load_config(command.run)
    asked = EvalConfig(
        datasets=command.datasets,
        probes=command.probes,
        data_root=command.data_root,
        batch=command.batch,
        workers=command.workers,
    )
    evaluators = (asked if asked.benchmarks else config.evals).build()
    if not evaluators:
        raise InputError(
            f"{command.run} has no benchmarks in its configuration; name some: --datasets cifar10 imagenet"
        )
    device = EngineConfig(device=command.device).resolved_device()
    folder = command.run / "checkpoints"
    checkpoint.unmark(folder, "scoring")  # left by a watch that was killed
    say(f"watching {command.run}: {', '.join(evaluators)} of each checkpoint, on {device}")
    for path in waiting(command, set(evaluators)):
        checkpoint.mark(folder, "scoring", checkpoint.step_of(path))
        try:
            score(path, evaluators, device)
            mark_best(command.run, command.best)
        except CheckpointError as error:
            say(f"{path.name} cannot be scored: {error}")
        finally:
            checkpoint.unmark(folder, "scoring")
        write_run_report(command.run)


def waiting(command: WatchCommand, benchmarks: set[str]) -> Iterator[Path]:
    """Each checkpoint that has no score yet, oldest first, as they appear; none twice. Ends when the run has."""
    offered: set[tuple[Path, str]] = set()
    heard = time.monotonic()
    while True:
        done = finished(command.run)  # looked at first: what is saved after this line must not be missed
        found = [(path, print_of(path)) for path in checkpoint.paths(command.run / "checkpoints")]
        scored = scores_by_print(command.run)
        fresh = [
            (path, model)
            for path, model in found
            if model and (path, model) not in offered and not benchmarks <= scored.get(model, set())
        ]
        if fresh:
            offered.add(fresh[0])
            yield fresh[0][0]
            heard = time.monotonic()
            continue
        if done:
            return
        if command.idle_minutes is not None and time.monotonic() - heard > 60 * command.idle_minutes:
            say(f"no new checkpoint for {command.idle_minutes:g} minutes; the run is not done, but the watch ends")
            return
        time.sleep(command.poll)


def score(path: Path, evaluators: Mapping[str, Evaluator], device: torch.device) -> None:
    """Every benchmark that a checkpoint has no score of. Raises CheckpointError when it is damaged or gone."""
    from torch.utils.tensorboard import SummaryWriter

    run = path.parents[1]
    model_print = print_of(path) or ""
    found = checkpoint.load(path, kinds=("model",))
    model, _ = clip_of_checkpoint(found)
    model = model.to(device)
    folder = run / "evals" / path.name
    scored = scores_by_print(run).get(model_print, set())
    for name, evaluator in evaluators.items():
        if name in scored:
            continue
        values = {key: float(value) for key, value in evaluator(model, device, folder)}
        record = {"step": found.step, "benchmark": name, "model_sha256": model_print, "time": round(time.time(), 3)}
        _append(run / SCORES, record | values)
        with SummaryWriter(str(run / "tensorboard" / "evals")) as board:
            for key, value in values.items():
                board.add_scalar(key, value, found.step)
        say(f"step {found.step:,}: " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))


def mark_best(run: Path, name: str | None) -> None:
    """Give the mark `best` to the checkpoint, of those that are there, with the highest `name`; earlier wins a tie.

    `name` None takes the first number of the first score. Raises InputError when nothing of that name was scored.
    """
    folder = run / "checkpoints"
    records = read_lines(run / SCORES)
    names = [key for record in records for key in record if "/" in key]
    name = name or next(iter(names), None)
    if name not in names:
        raise InputError(f"--best {name}: no score has that name; {did_you_mean(str(name), set(names))}")
    there = {print_of(path) for path in checkpoint.paths(folder)}
    candidates = [record for record in records if name in record and record["model_sha256"] in there]
    if candidates:
        best = max(candidates, key=lambda record: (record[name], -record["step"]))
        before = checkpoint.marks(folder).get("best", {}).get("step")
        checkpoint.mark(folder, "best", best["step"], name=name, value=best[name])
        if best["step"] != before:
            say(f"best so far: step {best['step']:,}, {name} {best[name]:.4g}")


def finished(run: Path) -> bool:
    """Whether the run's last checkpoint has been saved."""
    found = checkpoint.paths(run / "checkpoints")
    return bool(found) and checkpoint.step_of(found[-1]) >= load_config(run).steps


def print_of(path: Path) -> str | None:
    """The SHA-256 of a checkpoint's weights, as its manifest has it; None when it has just been pruned."""
    try:
        return json.loads((path / checkpoint.MANIFEST).read_text())["files"]["model.safetensors"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def scores_by_print(run: Path) -> dict[str, set[str]]:
    """The benchmarks that have been scored, by the SHA-256 of the weights: a step that is trained anew is another."""
    found: dict[str, set[str]] = {}
    for record in read_lines(run / SCORES):
        found.setdefault(record["model_sha256"], set()).add(record["benchmark"])
    return found


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line; the file is whole at every moment, whoever reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: Iterable[Mapping[str, Any]] = [*read_lines(path), record]
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)
