"""Where a process stands among its peers: what torchrun says, and what srun says."""

import pytest
import torch
import torch.distributed as dist

from evaclip import distributed
from evaclip.distributed import PORTS, Place, first_host, gathered, joined, own_gpu, place
from evaclip.errors import AbsentError, InputError
from tests.ranks import in_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29400"}
# As two tasks on each of two nodes found them under Slurm 22.05.
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_NODEID": "1",
}  # fmt: skip


def test_torchrun_says_everything():
    right = Place(rank=5, world=16, local_rank=1, address="head", port=29400)
    assert place(TORCHRUN) == right
    assert place(SRUN | TORCHRUN) == right  # a torchrun on each node, started by srun


def test_a_task_of_srun_is_one_process_and_meets_the_others_on_the_first_node():
    told = place(SRUN)
    assert told == Place(rank=3, world=4, local_rank=1, address="gpu007", port=PORTS[(16 * 4711 + 2) % len(PORTS)])


def test_jobs_and_their_steps_meet_at_ports_of_their_own():
    ports = [
        place(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(900_000, 901_250)
        for step in range(16)
    ]
    assert len(set(ports)) == len(ports) and all(port in PORTS for port in ports)
    assert place(SRUN).port == place(SRUN | {"SLURM_PROCID": "0"}).port


@pytest.mark.parametrize("alone", [
    {},
    {"WORLD_SIZE": "1"},
    SRUN | {"SLURM_NTASKS": "1"},
    SRUN | {"WORLD_SIZE": "1"},
    {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # the batch script itself
])  # fmt: skip
def test_one_process_needs_no_group(alone, monkeypatch):
    assert place(alone) is None
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    with joined():
        assert not dist.is_initialized()


@pytest.mark.parametrize(("variables", "name", "remedy"), [
    (TORCHRUN, "MASTER_PORT", "with torchrun"), (SRUN, "SLURM_STEP_NODELIST", "with srun"),
])  # fmt: skip
def test_what_is_missing_is_named(variables, name, remedy):
    with pytest.raises(InputError, match=rf"is set but not {name}: .*{remedy}"):
        place({key: value for key, value in variables.items() if key != name})


@pytest.mark.parametrize(("nodes", "first"), [
    ("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("gpu[007-010,012],cpu1", "gpu007"), ("a-b[3,5-6]", "a-b3"),
    ("rack[1-2]node[03-04]-ib,x", "rack1node03-ib"), ("127.0.0.[1-2]", "127.0.0.1"),
])  # fmt: skip
def test_first_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("seen", "own"), [(8, 5), (1, 0)])
def test_a_task_that_is_shown_one_gpu_takes_that(monkeypatch, seen, own):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert own_gpu() == own


def test_others_that_do_not_come_are_one_sentence(monkeypatch):
    from datetime import timedelta

    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # joining sets them; monkeypatch puts them back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(distributed, "first_host", lambda _: "127.0.0.1")
    with pytest.raises(AbsentError, match=r"process 0 of 4 cannot meet the others at 127\.0\.0\.1:"):
        with joined(timedelta(seconds=1)):
            raise AssertionError("nobody else is there")


def test_records_of_all_ranks_by_rank():
    assert gathered({"a": 1}) == [{"a": 1}]
    right = [{"rank": rank, "words": "é" * rank * 100} for rank in range(3)]
    assert in_ranks(3, own_record) == [right] * 3


def own_record() -> list:
    return gathered({"rank": dist.get_rank(), "words": "é" * dist.get_rank() * 100})
