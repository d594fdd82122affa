"""The training loop, the only one."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from evaclip import checkpoint
from evaclip.config import Evaluator, RunConfig, described, differences, load_config
from evaclip.data.pipeline import Cursor, LoaderTimes, Stream
from evaclip.data.shards import ShardSet, changed_shards
from evaclip.distributed import any_of, is_main, main_first, rank, total_of, world_size
from evaclip.engine import Engine, build_engine
from evaclip.errors import CheckpointError, DivergedError, InputError
from evaclip.guard.signals import StopRequest
from evaclip.log import RunLog, quiet, say
from evaclip.models.clip import Clip
from evaclip.optim import set_learning_rates, warmup_cosine
from evaclip.records import unstructured
from evaclip.report.run import write_run_report

# Consecutive steps without a finite gradient after which the run gives up.
MOST_SKIPPED = 20
# Share of a step spent waiting for data from which the user hears about it.
STARVED = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    stopped_by: str | None
    """The signal that stopped it before its last step, None if it is done."""


def train(config: RunConfig) -> Outcome:
    """Run, or continue, the training that `config` describes. Returns when it is done or was asked to stop."""
    with quiet(not is_main()):
        return _train(config)


def _train(config: RunConfig) -> Outcome:
    with main_first():
        if is_main():
            _claim(config.run_dir, config)
        shards = ShardSet(config.data)
    torch.manual_seed(config.seed)
    evaluators = [] if config.evals.beside else list(config.evals.build().values())
    with config.engine.construction():
        objective = config.objective.build(config.model, config.seed)
    before = _phase_before(config)
    with main_first():
        if before is not None and is_main():  # every engine begins with the first process's values
            objective.student.start_from(before.tensors["model"])
    engine = build_engine(config.engine, objective, config.optim)
    step, cursor = _resume(config, engine, shards, before)
    stream = Stream(
        shards,
        cursor,
        batch_size=config.batch_size,
        image_size=config.model.vision.image_size,
        context=config.model.text.context,
        rank=rank(),
        ranks=world_size(),
        pin_memory=engine.device.type == "cuda",
    )
    # Only now is everything known to fit: what fails above leaves no run behind.
    if is_main():
        (config.run_dir / "config.json").write_text(json.dumps(unstructured(config), indent=1) + "\n")
        (config.run_dir / "shards.json").write_text(json.dumps(shards.manifest()))
    _introduce(config, shards, objective.student, step)
    saved, batches = step, iter(stream)
    log = RunLog(config.run_dir, config.name, config.steps, step, config.log, written=is_main())
    with StopRequest() as stop, log:
        meter = Meter(config, stream.times, log)
        while step < config.steps and not any_of(bool(stop)):
            batch, cursor = next(batches)
            set_learning_rates(engine.optimizer, learning_rate_factor(config, step))
            metrics = engine.forward_backward(batch) | engine.step()
            step += 1
            meter.update(step, metrics)
            if due(step, config.evals.every, config.steps):
                for name, value in evaluate(evaluators, engine, config.run_dir, step):
                    log.scalars(step, {name: value})
                    meter.note(name, value)
            if due(step, config.checkpoint.every, config.steps):
                saved = _save(config, step, engine, cursor)
        if saved != step:
            _save(config, step, engine, cursor)
    if is_main():
        write_run_report(config.run_dir)
    return Outcome(step, (stop.name or "another process") if step < config.steps else None)


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """The schedule's factor at a step that counts from 0."""
    return warmup_cosine(step, warmup=config.optim.warmup, total=config.steps, floor=config.optim.floor)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one."""
    return step == last or (every > 0 and step % every == 0)


def evaluate(evaluators: list[Evaluator], engine: Engine, run_dir: Path, step: int) -> list[tuple[str, float]]:
    """Every benchmark's numbers at a step, on the first process; files go to `evals/step_N/` of the run."""
    student = engine.whole_student() if evaluators else None
    if student is None:
        return []
    assert isinstance(student, Clip)
    student.eval()
    folder = run_dir / "evals" / f"step_{step:08}"
    found = [pair for evaluator in evaluators for pair in evaluator(student, engine.device, folder)]
    student.train()
    return found


class Meter:
    """Turns what happens in a step into numbers for the log, and into warnings."""

    def __init__(self, config: RunConfig, times: LoaderTimes, log: RunLog) -> None:
        self.config, self.times, self.log = config, times, log
        self.noted: dict[str, float] = {}
        self._since, self._waited, self._count = time.perf_counter(), times.wait, 0
        self._skipped, self._losses, self._warned = 0, [], set()

    def note(self, name: str, value: float) -> None:
        """A number that stays in view until the next of its name."""
        self.noted[name.removeprefix("zero_shot/")] = value

    def update(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Count a step; on every `log.every`-th, fetch its metrics from the device and log them."""
        self._count += 1
        self._skipped = self._skipped + 1 if float(metrics["skipped"]) else 0
        if self._skipped >= MOST_SKIPPED:
            raise DivergedError(
                f"{MOST_SKIPPED} steps in a row up to step {step:,} had no finite gradient; "
                "lower the learning rate, or resume from the last checkpoint with another seed"
            )
        if not due(step, self.config.log.every, self.config.steps):
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds = now - self._since
        values["learning_rate_factor"] = learning_rate_factor(self.config, step - 1)
        values["images_per_second"] = self._count * self.config.batch_size / seconds
        values["data_wait_share"] = (self.times.wait - self._waited) / seconds
        self._since, self._waited, self._count = now, self.times.wait, 0
        self.log.scalars(step, values)
        shown = {
            "loss": values["loss"],
            "i2t": values["accuracy/image_to_text"],
            "scale": values["logit_scale"],
            "images/s": values["images_per_second"],
        }
        self.log.line(step, shown | self.noted)
        self._warn(step, values)

    def _warn(self, step: int, values: Mapping[str, float]) -> None:
        if values["data_wait_share"] > STARVED and step > 2 * self.config.log.every and "starved" not in self._warned:
            self._warned.add("starved")
            stage, share = self.times.slowest()
            self.log.event(
                step,
                f"starved for data: {values['data_wait_share']:.0%} of the time is waiting; {share:.0%} of the "
                f"workers' time is {stage}. More of them help, --data.workers (now {self.config.data.workers})",
            )
        self._losses = [*self._losses[-9:], values["loss"]]
        chance = math.log(self.config.batch_size)
        stuck = len(self._losses) == 10 and all(abs(loss - chance) < 0.02 for loss in self._losses)
        if stuck and step > self.config.optim.warmup and "collapsed" not in self._warned:
            self._warned.add("collapsed")
            self.log.event(
                step,
                f"the loss sits at log(batch) = {chance:.3f}: every feature is the same. "
                "A lower learning rate or a longer warm-up avoids this collapse; the run is not recovering by itself",
            )


def _claim(run_dir: Path, config: RunConfig) -> None:
    """Make the run's folder, or refuse one that is taken or cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"the run folder {run_dir} cannot be written: {error.strerror}") from None
    if config.resume == "never" and (run_dir / "config.json").exists():
        raise InputError(
            f"{run_dir} already holds a run: continue it with --resume auto, or name another folder with --run-dir"
        )


def _phase_before(config: RunConfig) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of the run that this one starts from."""
    if config.start_from is None:
        return None
    load_config(config.start_from)  # or a sentence that says what is wrong with the folder
    found = checkpoint.newest(config.start_from / "checkpoints", kinds=("model",))
    if found is None:
        raise CheckpointError(f"the run in {config.start_from}, to start from, has no checkpoint yet")
    return found


def _resume(
    config: RunConfig, engine: Engine, shards: ShardSet, before: checkpoint.Checkpoint | None
) -> tuple[int, Cursor]:
    """Step and data state to start from, and the engine in the state that belongs to them."""
    folder = config.run_dir
    found = checkpoint.newest(folder / "checkpoints") if config.resume == "auto" else None
    step, cursor = 0, Cursor(shards.fingerprint, config.seed, 0)
    if before is not None:
        seen = Cursor.from_record(before.record["cursor"])
        if (seen.fingerprint, seen.seed) == (cursor.fingerprint, cursor.seed):
            cursor = replace(cursor, position=seen.position)
        say(f"starting from step {before.step:,} of {config.start_from}, at pair {cursor.position:,} of the data")
    if found is not None:
        cursor = Cursor.from_record(found.record["cursor"])
        if cursor.fingerprint != shards.fingerprint:
            changes = changed_shards(json.loads((folder / "shards.json").read_text()), shards.manifest())
            shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
            if not config.allow_data_change:
                raise InputError(
                    f"the data is not that of the checkpoint: {shown}. "
                    "Put it back, or go on with --allow-data-change; the order of the samples then changes here"
                )
            say(f"going on with changed data: {shown}")
            cursor = replace(cursor, fingerprint=shards.fingerprint)
        for change in differences(load_config(folder), replace(config, resume=load_config(folder).resume)):
            say(f"changed since the run began: {change}")
        if not is_main():  # the record holds the damage of all processes
            cursor = replace(cursor, damaged=0)
        engine.load_state_dict(found.tensors, found.record["engine"])
        step = found.step
        say(f"continuing from step {step:,} ({found.path})")
    return step, cursor


def _save(config: RunConfig, step: int, engine: Engine, cursor: Cursor) -> int:
    """Whole tensors and the sum of the damage, gathered from all processes and written by the first."""
    folder = config.run_dir / "checkpoints"
    cursor = replace(cursor, damaged=total_of(cursor.damaged))
    state, record = engine.state_dict(), {"engine": engine.scalars(), "config": unstructured(config)}
    with main_first():
        if is_main():
            checkpoint.save(folder, step, state, record | {"cursor": cursor.record()})
            checkpoint.prune(folder, config.checkpoint.keep)
    return step


def _introduce(config: RunConfig, shards: ShardSet, model: Clip, step: int) -> None:
    """Say what will run, with the numbers that follow from the configuration."""
    vision = config.model.vision
    kept = max(1, int(vision.patches * (1 - config.objective.mask_ratio)))
    counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) / 1e6 for part in ("visual", "text")}
    seen = config.steps * config.batch_size
    for line in (
        *described(config),
        f"model: {counts['visual']:.2f}M image tower + {counts['text']:.2f}M text tower, {kept} of {vision.patches} "
        "patches seen in training",
        f"data: {len(shards):,} pairs in {sum(map(len, shards.heads)):,} shards, fingerprint {shards.fingerprint[:12]}",
        f"run: {config.steps:,} steps x {config.batch_size:,} = {seen:,} pairs, {seen / len(shards):.3g} epochs; "
        f"warm-up {config.optim.warmup:,} steps; from step {step:,} on "
        f"{world_size()} x {config.engine.resolved_device()} ({config.engine.kind})",
    ):
        say(line)
