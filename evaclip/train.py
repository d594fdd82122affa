"""The training loop, the only one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaclip import checkpoint
from evaclip.bootstrap import as_begun, initial_weights
from evaclip.config import Evaluator, RunConfig, described
from evaclip.data.pipeline import Cursor, Stream
from evaclip.data.shards import ShardSet
from evaclip.distributed import any_of, from_main, is_main, main_first, rank, world_size
from evaclip.engine import Engine, build_engine
from evaclip.errors import DivergedError
from evaclip.guard.health import Health, write_dump
from evaclip.guard.heartbeat import Heartbeat
from evaclip.guard.signals import StopRequest
from evaclip.log import RunLog, quiet, say
from evaclip.meter import Meter, due, learning_rate_factor
from evaclip.models.clip import Clip
from evaclip.optim import set_learning_rates
from evaclip.records import unstructured
from evaclip.report.run import write_run_report
from evaclip.resume import claim, gone_back, newest_of_all, phase_before, resume, save, start_from


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
            claim(config.run_dir, config)
        shards = ShardSet(config.data)
    torch.manual_seed(config.seed)
    evaluators = [] if config.evals.beside else list(config.evals.build().values())
    found = newest_of_all(config.run_dir / "checkpoints") if config.resume == "auto" else None
    before = phase_before(config) if found is None else None
    initial = None
    with main_first():
        if is_main():
            config, initial = (as_begun(config), None) if found else initial_weights(config)
    config = from_main(config)
    with config.engine.construction():
        objective = config.objective.build(config.model, config.seed)
    with main_first():
        if is_main():  # every engine begins with the first process's values
            start_from(objective.student, before, initial)
    engine = build_engine(config.engine, objective, config.optim)
    step, cursor = resume(config, engine, shards, before, found)
    stream = _stream(config, engine, shards, cursor)
    # Only now is everything known to fit: what fails above leaves no run behind.
    if is_main():
        (config.run_dir / "config.json").write_text(json.dumps(unstructured(config), indent=1) + "\n")
        (config.run_dir / "shards.json").write_text(json.dumps(shards.manifest()))
    _introduce(config, shards, objective.student, step)
    outcome = _loop(config, engine, shards, evaluators, stream, step)
    if is_main():
        write_run_report(config.run_dir)
    return outcome


def _loop(
    config: RunConfig, engine: Engine, shards: ShardSet, evaluators: list[Evaluator], stream: Stream, step: int
) -> Outcome:
    """The steps. The state of the data travels with the batches, the state of everything else is the engine's."""
    guard, folder, saved, cursor = config.guard, config.run_dir, step, stream.cursor
    writer = checkpoint.Writer(folder / "checkpoints", config.checkpoint.keep)
    log = RunLog(folder, config.name, config.steps, step, config.log, written=is_main())
    batches, meter, health = iter(stream), Meter(config, stream.times, log), Health(guard)
    with StopRequest(guard.grace) as stop, log, Heartbeat(folder / "heartbeats", rank(), guard) as heart:
        log.event(
            step,
            f"data: {len(shards):,} pairs in {sum(map(len, shards.heads)):,} shards, "
            f"fingerprint {shards.fingerprint[:12]}",
            fingerprint=shards.fingerprint,
        )
        while step < config.steps and not any_of(bool(stop) or writer.failed is not None):
            stop.patient = False
            heart.beat(step)
            batch, cursor = next(batches)
            heart.phase("step")
            set_learning_rates(engine.optimizer, learning_rate_factor(config, step))
            metrics = engine.forward_backward(batch) | engine.step()
            step += 1
            meter.update(step, metrics)
            skipped = bool(metrics["skipped"]) and not engine.searching
            drawn = (cursor.position - config.batch_size, cursor.position)
            verdict = health.judge(step, float(metrics["loss"]), skipped, drawn)
            if verdict.spike:
                _report(config, shards, log, step, verdict.spike, drawn, metrics)
            if verdict.lost is not None:
                step, cursor = _go_back(config, engine, shards, log, writer, step, cursor, verdict.lost, metrics)
                stream, saved = _stream(config, engine, shards, cursor), step
                batches, meter, health = iter(stream), Meter(config, stream.times, log), Health(guard)
                continue
            scores: list[tuple[str, float]] = []
            if due(step, config.evals.every, config.steps):
                _take_long(stop, heart, "evaluate")
                scores = evaluate(evaluators, engine, folder, step)
                for name, value in scores:
                    log.scalars(step, {name: value})
                    meter.note(name, value)
            if due(step, config.checkpoint.every, config.steps):
                _take_long(stop, heart, "save")
                saved = save(config, step, engine, cursor, writer, scores)
        stop.answered()
        heart.phase("save")
        if not any_of(writer.failed is not None) and saved != step:
            save(config, step, engine, cursor, writer)
        with main_first():
            writer.finish()
    return Outcome(step, (stop.name or "another process") if step < config.steps else None)


def _stream(config: RunConfig, engine: Engine, shards: ShardSet, cursor: Cursor) -> Stream:
    """This process's part of the batches from a state of the data on."""
    return Stream(
        shards,
        cursor,
        batch_size=config.batch_size,
        image_size=config.model.vision.image_size,
        context=config.model.text.context if config.objective.captioned else 0,
        rank=rank(),
        ranks=world_size(),
        pin_memory=engine.device.type == "cuda",
    )


def _take_long(stop: StopRequest, heart: Heartbeat, phase: str) -> None:
    """Until the next step begins, this process or the one that it waits for may take long."""
    heart.phase(phase)
    stop.patient = True


def _report(
    config: RunConfig, shards: ShardSet, log: RunLog, step: int, why: str, stretch: tuple[int, int], metrics: Any
) -> Path:
    """An event in the log, and the samples in a file that it names."""
    path = config.run_dir / "dumps" / f"step_{step:08}.json"
    if is_main():
        samples = shards.names(range(*stretch), config.seed, config.batch_size)
        write_dump(path, step, why, samples, {name: float(value) for name, value in metrics.items()})
        log.event(step, f"step {step:,}: {why}; its samples are in {path}", positions=list(stretch))
    return path


def _go_back(
    config: RunConfig, engine: Engine, shards: ShardSet, log: RunLog, writer: checkpoint.Writer,
    step: int, cursor: Cursor, lost: tuple[int, int], metrics: Any,
) -> tuple[int, Cursor]:  # fmt: skip
    """To a checkpoint from before the stretch of data that is lost. Raises DivergedError when that is no help."""
    guard = config.guard
    why = f"{guard.most_skipped} of the last {guard.window} steps had no finite gradient"
    dump = _report(config, shards, log, step, why, lost, metrics)
    with main_first():
        writer.finish()
    advice = f"lower the learning rate, or look at the samples in {dump}"
    if len(cursor.passed_over) >= guard.most_rollbacks:
        raise DivergedError(f"step {step:,}: {why}, after going back {guard.most_rollbacks} times; {advice}")
    found = gone_back(config, engine, cursor, lost)
    if found is None:
        raise DivergedError(f"step {step:,}: {why}, and there is no checkpoint from before them; {advice}")
    log.rewind(found[0])
    log.event(found[0], f"gone back from step {step:,} to {found[0]:,}; pairs {lost[0]:,} to {lost[1]:,} are left out")
    return found


def evaluate(evaluators: list[Evaluator], engine: Engine, run_dir: Path, step: int) -> list[tuple[str, float]]:
    """Every benchmark's numbers at a step; files go to `evals/step_N/` of the run. All processes share the work."""
    if not evaluators:
        return []
    student = engine.whole_student()
    assert isinstance(student, Clip)
    student.eval()
    folder = run_dir / "evals" / f"step_{step:08}"
    share = (rank(), world_size())
    found = [pair for evaluator in evaluators for pair in evaluator(student, engine.device, folder, share)]
    student.train()
    return found


def _introduce(config: RunConfig, shards: ShardSet, model: nn.Module, step: int) -> None:
    """Say what will run, with the numbers that follow from the configuration."""
    vision = config.model.vision
    towers = {"visual": "image tower", "text": "text tower"}
    counts = [
        f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M {towers[part]}"
        for part, module in model.named_children()
        if part in towers
    ]
    seen = config.steps * config.batch_size
    for line in (
        *described(config),
        f"model: {' + '.join(counts)}, {config.objective.seen(vision.patches)}",
        f"run: {config.steps:,} steps x {config.batch_size:,} = {seen:,} pairs, {seen / len(shards):.3g} epochs; "
        f"warm-up {config.optim.warmup:,} steps; from step {step:,} on "
        f"{world_size()} x {config.engine.resolved_device()} ({config.engine.kind})",
    ):
        say(line)
