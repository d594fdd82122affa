"""What a long run meets: killed processes, gradients that are not finite, data that hangs. Nothing is lost.

Processes are killed as a machine kills them (SIGKILL), at moments drawn from a seed, and the run goes on from what lies
on the disk. Whatever happened, every loss and every bit of the end is that of the undisturbed run.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from evaclip.checkpoint import CheckpointConfig
from evaclip.config import RunConfig
from evaclip.data.pipeline import Cursor
from evaclip.data.shards import ShardSet
from evaclip.errors import DivergedError
from evaclip.guard import health
from evaclip.guard.health import GuardConfig, Health
from evaclip.log import read_log
from evaclip.objectives.clip import ClipObjective
from evaclip.train import train
from tests.test_train import final, losses, same_state, stopping_after, tiny_run


def train_as(rank: int, world: int, store: Path, config: RunConfig) -> None:
    """A rank of a job, in a process of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    train(config)
    os._exit(0)


def started(config: RunConfig, store: Path, world: int = 2) -> list:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "timm", "evaclip.train"])
    ranks = [context.Process(target=train_as, args=(rank, world, store, config)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def ended(ranks: list) -> list[int]:
    for process in ranks:
        process.join(180)
    return [process.exitcode for process in ranks]


def kill_at(config: RunConfig, store: Path, step: int, victims: list[int], delay: float) -> bool:
    """Runs until a step is logged, kills, and clears away the rest as a launcher does. Whether it was in time."""
    ranks = started(config, store)
    while max(losses(config.run_dir), default=0) < step and all(process.is_alive() for process in ranks):
        time.sleep(0.005)
    time.sleep(delay)
    for number in victims:
        ranks[number].kill()
    in_time = [ranks[number].join(30) or ranks[number].exitcode for number in victims] == [-signal.SIGKILL] * len(
        victims
    )
    time.sleep(0.2)
    for process in ranks:
        process.kill()
        process.join(30)
    return in_time


def crash_curve(folder: Path, shards: Path, steps: int, kills: int, seed: int) -> int:
    """How many kills hit the run. Raises AssertionError when anything is not that of the undisturbed run."""
    straight = tiny_run(folder / "straight", shards, steps=steps, checkpoint=CheckpointConfig(every=7), resume="auto")
    assert ended(started(straight, folder / "store")) == [0, 0]
    broken, random = replace(straight, run_dir=folder / "broken"), np.random.default_rng(seed)
    hits = 0
    for number, step in enumerate(sorted(random.choice(np.arange(1, steps - 5), kills, replace=False).tolist())):
        victims = [[0], [1], [0, 1]][int(random.integers(3))]
        hits += kill_at(broken, folder / f"store{number}", step, victims, float(random.uniform(0, 0.05)))
    assert ended(started(broken, folder / "last")) == [0, 0]
    assert losses(broken.run_dir) == losses(straight.run_dir) and len(losses(straight.run_dir)) == steps
    assert same_state(straight.run_dir, broken.run_dir)
    return hits


def test_killed_at_random_steps_the_curve_is_the_same_bits(tmp_path, shards):
    assert crash_curve(tmp_path, shards(), steps=60, kills=3, seed=0) == 3


@pytest.mark.soak
def test_killed_at_twenty_random_steps_of_two_hundred(tmp_path, shards):
    assert crash_curve(tmp_path, shards(), steps=200, kills=20, seed=1) == 20


@pytest.mark.soak
def test_a_killed_launcher_and_what_it_leaves(tmp_path, shards):
    """torchrun itself is killed; its ranks are cleared away, as the end of a job's step does, and the run goes on."""
    folder = shards()
    straight = tiny_run(tmp_path / "straight", folder, steps=200, resume="auto")
    assert ended(started(straight, tmp_path / "store")) == [0, 0]
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom tests.test_train import tiny_run\n"
        f"def mine(): return tiny_run(Path({str(tmp_path / 'run')!r}), Path({str(folder)!r}), steps=200)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "evaclip", "train"]
    command += [f"{tmp_path / 'mine.py'}:mine", "--resume", "auto"]
    where = {"cwd": Path(__file__).parents[1], "start_new_session": True}
    launcher = subprocess.Popen(command, **where)
    while max(losses(tmp_path / "run"), default=0) < 20:
        time.sleep(0.05)
    launcher.kill()
    time.sleep(0.2)
    os.killpg(launcher.pid, signal.SIGKILL)
    assert subprocess.run(command, **where, check=False).returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same_state(tmp_path / "run", tmp_path / "straight")


def poisoned(positions: range, only_rank: int | None = None):
    """A forward pass whose features are not finite for some samples."""
    forward = ClipObjective.forward

    def broken(self, batch, whole=False):
        found = forward(self, batch, whole)
        rank = dist.get_rank() if dist.is_initialized() else None
        if any(int(p) in positions for p in batch.positions) and only_rank == (rank if only_rank is not None else None):
            return (found[0] * float("nan"), *found[1:])
        return found

    return broken


def test_after_too_many_skipped_steps_it_goes_back_and_passes_over_their_data(tmp_path, shards, monkeypatch):
    folder = shards()
    guard = GuardConfig(most_skipped=2, window=10)
    monkeypatch.setattr(ClipObjective, "forward", poisoned(range(144, 176)))  # the batches of steps 10 and 11
    rolled = tiny_run(tmp_path / "rolled", folder, steps=16, guard=guard)
    train(rolled)
    record = final(tmp_path / "rolled").record
    assert record["cursor"]["passed_over"] == [[144, 176]] and record["cursor"]["position"] == 16 * 16 + 32
    assert record["engine"]["optimizer_step"] == 16
    events = [entry["event"] for entry in read_log(tmp_path / "rolled") if "event" in entry]
    assert any("gone back from step 11 to 8; pairs 144 to 176 are left out" in event for event in events)
    dump = json.loads((tmp_path / "rolled" / "dumps" / "step_00000011.json").read_text())
    assert (
        dump["samples"] == ShardSet(rolled.data).names(range(144, 176), rolled.seed, 16) and len(dump["samples"]) == 32
    )
    assert dump["metrics"]["loss"] == "nan" and "logit_scale" in dump["metrics"]
    monkeypatch.undo()
    # The same as if the stretch had never been there.
    with stopping_after(8, monkeypatch):
        train(tiny_run(tmp_path / "without", folder, steps=16))
    read = Cursor.from_record
    monkeypatch.setattr(Cursor, "from_record", lambda record: replace(read(record), passed_over=((144, 176),)))
    train(tiny_run(tmp_path / "without", folder, steps=16, resume="auto"))
    monkeypatch.undo()
    assert same_state(tmp_path / "rolled", tmp_path / "without")
    assert losses(tmp_path / "rolled") == losses(tmp_path / "without")


def test_going_back_too_often_ends_the_run_with_a_dump(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(ClipObjective, "forward", poisoned(range(144, 100_000)))
    config = tiny_run(tmp_path / "run", shards(), steps=60, guard=GuardConfig(most_skipped=2, window=10))
    with pytest.raises(DivergedError, match=r"after going back 3 times; lower the learning rate, or look at .*dumps"):
        train(config)
    assert final(tmp_path / "run").step == 8 and DivergedError.exit_status == 86


def test_a_spike_is_reported_with_its_samples(tmp_path, shards, monkeypatch):
    judge = Health.judge
    monkeypatch.setattr(health, "RECENT", 16)
    monkeypatch.setattr(
        Health, "judge", lambda self, step, loss, *how: judge(self, step, loss + 50.0 * (step == 18), *how)
    )
    config = tiny_run(tmp_path / "run", shards(), steps=20, checkpoint=CheckpointConfig(every=0))
    train(config)
    events = [entry for entry in read_log(tmp_path / "run") if "standard" in entry.get("event", "")]
    assert len(events) == 1 and "standard deviations above the mean" in events[0]["event"]
    assert events[0]["positions"] == [17 * 16, 18 * 16]
    dump = json.loads((tmp_path / "run" / "dumps" / "step_00000018.json").read_text())
    assert dump["samples"] == ShardSet(config.data).names(range(17 * 16, 18 * 16), config.seed, 16)


def test_a_signal_while_the_data_is_blocked_ends_with_85(tmp_path, shards):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dataclasses import replace\n"
        "from evaclip.data import samples\nfrom evaclip.guard.health import GuardConfig\n"
        "from evaclip.recipes import RECIPES\n"
        "from evaclip.cli import main\nfrom tests.test_train import tiny_run\n"
        "real, calls = samples.training_pixels, []\n"
        "def blocked(*arguments):\n    calls.append(1)\n    time.sleep(600 if len(calls) > 96 else 0)\n"
        "    return real(*arguments)\n"
        "samples.training_pixels = blocked\n"
        f"config = tiny_run(Path({str(tmp_path / 'run')!r}), Path({str(shards())!r}), guard=GuardConfig(grace=1.0))\n"
        "RECIPES['tiny'] = lambda: replace(config, data=replace(config.data, workers=1))\n"
        "sys.exit(main(['train', 'tiny']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while max(losses(tmp_path / "run"), default=0) < 6 and process.poll() is None:  # all that the worker will give
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)  # would wait for ever for a worker that is left behind
    assert process.returncode == 85 and "the step under way has not ended (blocked data, " in said
    assert final(tmp_path / "run").step == 4
