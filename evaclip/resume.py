"""Where a run starts: its folder, the phase before it, its newest checkpoint, or an older one that it goes back to."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaclip import checkpoint
from evaclip.bootstrap import InitialWeights
from evaclip.config import RunConfig, differences, load_config
from evaclip.data.pipeline import Cursor
from evaclip.data.shards import ShardSet, changed_shards
from evaclip.distributed import from_main, is_main, main_first, total_of
from evaclip.engine import Engine
from evaclip.errors import CheckpointError, InputError
from evaclip.log import say
from evaclip.records import unstructured


def claim(run_dir: Path, config: RunConfig) -> None:
    """Make the run's folder. Raises InputError for one that is taken or cannot be written."""
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


def phase_before(config: RunConfig) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of the run that this one starts from."""
    if config.start_from is None:
        return None
    load_config(config.start_from)  # or a sentence that says what is wrong with the folder
    found = checkpoint.newest(config.start_from / "checkpoints", kinds=("model",))
    if found is None:
        raise CheckpointError(f"the run in {config.start_from}, to start from, has no checkpoint yet")
    return found


def start_from(student: Any, before: checkpoint.Checkpoint | None, initial: InitialWeights | None) -> None:
    """Give a fresh model the weights of the phase before, or those that its towers are to begin with."""
    if before is not None:
        student.start_from(before.tensors["model"])
    if initial is not None:
        initial.load(student)


def resume(
    config: RunConfig,
    engine: Engine,
    shards: ShardSet,
    before: checkpoint.Checkpoint | None,
    found: checkpoint.Checkpoint | None,
) -> tuple[int, Cursor]:
    """Step and data state to start from, and the engine in the state that belongs to them.

    `before`: the end of the phase before. `found`: the newest checkpoint of the run itself.
    """
    folder = config.run_dir
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
        step, cursor = taken_up(engine, found, cursor)
        say(f"continuing from step {step:,} ({found.path})")
    return step, cursor


def newest_of_all(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint; the first process verifies it, all others read the same."""
    found = None
    with main_first():
        if is_main():
            found = checkpoint.newest(folder)
    step = from_main(None if found is None else found.step)
    return found if is_main() or step is None else checkpoint.of_step(folder, step)


def taken_up(engine: Engine, found: checkpoint.Checkpoint, cursor: Cursor) -> tuple[int, Cursor]:
    """Put the engine into a checkpoint's state. Returns its step, and the data state as this process counts on."""
    engine.load_state_dict(found.tensors, found.record["engine"])
    return found.step, cursor if is_main() else replace(cursor, damaged=0)  # the record holds everybody's damage


def gone_back(config: RunConfig, engine: Engine, cursor: Cursor, lost: tuple[int, int]) -> tuple[int, Cursor] | None:
    """Step and data state of the newest checkpoint from before a stretch of positions, which is to be passed over.

    Later checkpoints are deleted. None where there is no such checkpoint.
    """
    folder = config.run_dir / "checkpoints"
    with main_first():
        if is_main():
            checkpoint.forget_after(folder, lost[0])
    found = newest_of_all(folder)
    if found is None:
        return None
    back = replace(Cursor.from_record(found.record["cursor"]), passed_over=(*cursor.passed_over, lost))
    return taken_up(engine, found, back)


def save(
    config: RunConfig,
    step: int,
    engine: Engine,
    cursor: Cursor,
    writer: checkpoint.Writer,
    scores: Sequence[tuple[str, float]] = (),
) -> int:
    """Whole tensors and the sum of the damage, gathered from all processes and written by the first.

    `scores`: what an evaluation at this step found; the first number decides whether it is the best checkpoint so far.
    """
    cursor = replace(cursor, damaged=total_of(cursor.damaged))
    state, record = engine.state_dict(), {"engine": engine.scalars(), "config": unstructured(config)}
    with main_first():
        if is_main():
            writer.write(step, state, record | {"cursor": cursor.record()})
            for name, value in scores[:1]:
                if checkpoint.mark_best(config.run_dir / "checkpoints", step, name, value):
                    say(f"best so far: step {step:,}, {name} {value:.4g}")
    return step
