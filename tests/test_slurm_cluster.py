"""Training under a real Slurm of two nodes: it finishes, and whatever is done to it, the curve is the same.

These need the packages slurm-wlm and munge, and no rights: without them they are skipped.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaclip.cli import main
from evaclip.log import read_log
from evaclip.meter import Meter
from tests.cluster import NODES, Cluster, missing_programs
from tests.conftest import made_pairs
from tests.test_train import final, losses, same_state

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"Slurm is not installed: {', '.join(missing_programs())}"
)
ROOT = Path(__file__).parents[1]
STEPS, EVERY = 24, 8
# Two functions in a file, as a user's own recipes are: one as fast as it goes, one slow enough to be interrupted.
RECIPES = f"""
import os, time
from pathlib import Path
from evaclip.checkpoint import CheckpointConfig
from evaclip.train import Meter
from tests.test_train import tiny_run

def fast():
    "As fast as it goes."
    return tiny_run(Path("fast"), Path("shards"), steps={STEPS}, checkpoint=CheckpointConfig(every={EVERY}))

def slow():
    "A fifth of a second for a step."
    update = Meter.update
    Meter.update = lambda *arguments: (time.sleep(0.2), update(*arguments))[1]
    return fast()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
        for number in running.run("squeue", "--noheader", "--format=%A").split():
            running.run("scancel", "--signal=KILL", number)


@pytest.fixture(scope="module")
def place(cluster) -> Path:
    """A folder with shards and recipes."""
    from evaclip.data.write import write_shards

    folder = cluster.folder / "work"
    folder.mkdir()
    write_shards(made_pairs(64), folder / "shards", "train", 16)
    (folder / "recipes.py").write_text(RECIPES)
    return folder


class Job:
    """A job of evaclip, submitted as a user does it."""

    def __init__(self, cluster: Cluster, place: Path, recipe: str, run: str, *options: str) -> None:
        self.cluster, self.folder = cluster, place / run
        before, folder, update = dict(os.environ), os.getcwd(), Meter.update
        os.chdir(place)
        os.environ.update(cluster.environment, PYTHONPATH=str(ROOT))
        try:
            words = [
                "slurm",
                "submit",
                f"recipes.py:{recipe}",
                "--nodes",
                "2",
                "--gpus-per-node",
                "1",
                "--run-dir",
                run,
            ]
            assert main([*words, *options]) == 0
        finally:
            Meter.update = update  # submitting calls the recipe here too, and the slow one slows down its process
            os.environ.clear()
            os.environ.update(before)
            os.chdir(folder)
        self.number = cluster.run("squeue", "--noheader", "--format=%A", f"--name={run}").strip()
        self.output = place / f"{run}-{self.number}.out"

    def rank(self, number: int) -> str:
        """What a process said."""
        path = self.folder / "slurm" / f"{self.number}.rank-{number}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.state()["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), self.said()
            return any(record["step"] >= step for record in read_log(self.folder))

        self.cluster.wait(reached, f"step {step}", self.said)

    def wait_for_state(self, *states: str) -> dict[str, str]:
        self.cluster.wait(lambda: self.state()["JobState"] in states, " or ".join(states), self.said)
        return self.state()

    def finish(self, restarts: int) -> None:
        """Wait for its end, which must be a good one."""
        found = self.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", str(restarts)), self.said()

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def said(self) -> str:
        texts = [self.output.read_text() if self.output.exists() else "", self.rank(0), self.rank(1)]
        return "\n".join(f"== {name}\n{text}" for name, text in zip(("job", "rank 0", "rank 1"), texts, strict=True))


@pytest.fixture(scope="module")
def undisturbed(cluster, place) -> Job:
    """A job that nobody disturbs."""
    job = Job(cluster, place, "fast", "undisturbed")
    job.finish(restarts=0)
    return job


def same_curve(job: Job, undisturbed: Job) -> None:
    assert losses(job.folder) == losses(undisturbed.folder) and len(losses(job.folder)) == STEPS
    assert same_state(job.folder, undisturbed.folder)


def test_two_nodes_train_and_finish(undisturbed):
    said = undisturbed.output.read_text()
    assert "preflight: every node is fit (2)" in said and all(f" {node} " in said for node in NODES)
    assert "exit status 0" in said
    assert "on 2 x cpu (ddp)" in undisturbed.rank(0) and "done: 24 steps" in undisturbed.rank(0)
    assert undisturbed.rank(1) == ""  # one of them talks
    assert sorted(losses(undisturbed.folder)) == list(range(1, STEPS + 1))
    assert final(undisturbed.folder).step == STEPS


def test_before_the_time_is_up_it_saves_and_goes_on_from_there(cluster, place, undisturbed):
    job = Job(cluster, place, "slow", "signalled", "--no-preflight")
    job.wait_for_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@300 does
    job.finish(restarts=1)
    said = job.output.read_text()
    assert "exit status 85, requeued" in said
    assert said.count("exit status 0") == 1 and "requeued 1 times" in said
    step = int(job.rank(0).split("continuing from step ")[1].split(" ")[0])
    assert 3 <= step < STEPS and step % EVERY  # not a checkpoint that was due anyway
    assert f"stopped by SIGTERM at step {step}, everything is saved" in job.rank(0)
    same_curve(job, undisturbed)


def test_a_killed_process_ends_the_others_and_the_job_comes_back(cluster, place, undisturbed):
    job = Job(cluster, place, "slow", "killed", "--no-preflight")
    job.wait_for_step(EVERY + 2)
    victims = [
        pid for pid in cluster.processes(SLURM_JOB_ID=job.number, SLURM_PROCID="1")
        if b"evaclip\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    job.finish(restarts=1)
    assert "exit status 137, requeued" in job.output.read_text()
    assert f"continuing from step {EVERY} " in job.rank(0)
    same_curve(job, undisturbed)


def test_a_lost_node_is_waited_for(cluster, place, undisturbed):
    job = Job(cluster, place, "slow", "bereft", "--no-preflight")
    job.wait_for_step(EVERY + 2)
    cluster.lose_node(NODES[1])
    cluster.wait(lambda: job.state()["Restarts"] == "1", "requeue", job.said)
    cluster.start_node(NODES[1])
    job.finish(restarts=1)
    assert f"continuing from step {EVERY} " in job.rank(0)
    same_curve(job, undisturbed)


def test_scancel_leaves_a_good_checkpoint_and_does_not_come_back(cluster, place, undisturbed):
    job = Job(cluster, place, "slow", "cancelled", "--no-preflight", "--steps", "100000")
    job.wait_for_step(3)
    cluster.run("scancel", job.number)
    job.wait_for_state("CANCELLED")
    cluster.wait(lambda: not cluster.processes(SLURM_JOB_ID=job.number), "end of its processes", job.said)
    last = max(losses(job.folder))
    assert final(job.folder).step == last >= 3
    assert all(losses(job.folder)[step] == losses(undisturbed.folder)[step] for step in range(1, 4))
    assert "ended by Slurm" in job.output.read_text() and "requeued 1 times" not in job.output.read_text()
    time.sleep(3)
    assert job.state()["JobState"] == "CANCELLED" and job.state()["Restarts"] == "0"
