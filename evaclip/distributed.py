"""Where this process stands among its peers, and the few things they tell each other. One process needs no group."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from evaclip.errors import AbsentError, InputError

Told = TypeVar("Told")

# Longest that a process waits for the others: one may have slower disks, or more left to evaluate.
PATIENCE = timedelta(minutes=60)
# Rows of a matrix that travel at a time.
PIECE = 16_384
# Under Slurm the group meets at a port in this range, below the one from which Linux gives out ports by itself.
PORTS = range(10_000, 30_000)
# What a launcher tells besides how many processes there are, and what of it a task of srun has instead.
TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process of several, and where they meet."""

    rank: int
    world: int
    local_rank: int
    """Number among the processes of this machine."""
    address: str
    """Machine of the first process."""
    port: int


def place(environment: Mapping[str, str]) -> Place | None:
    """What the launcher says of this process: torchrun, or srun with one task per GPU. None for a process alone.

    torchrun's word counts before srun's, which may have started torchrun. A batch script is a process alone, whatever
    is allocated to it: only srun sets SLURM_STEP_ID. Raises InputError when something is missing.
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        world, needed, remedy = "WORLD_SIZE", TORCHRUN, "start several processes with torchrun"
    elif "WORLD_SIZE" not in environment and "SLURM_STEP_ID" in environment:
        world, needed, remedy = "SLURM_NTASKS", SRUN, "start them with srun, one task per GPU"
    else:
        return None
    if int(environment.get(world, "1")) == 1:
        return None
    missing = [name for name in needed if name not in environment]
    if missing:
        raise InputError(f"{world} is set but not {', '.join(missing)}: {remedy}")
    count, (rank, local, hosts, number) = environment[world], (environment[name] for name in needed)
    if world == "WORLD_SIZE":
        address, port = hosts, int(number)
    else:
        # Sixteen ports for each job: one for each of its steps, as an earlier one's may not be free yet.
        steps_port = 16 * int(number) + int(environment["SLURM_STEP_ID"]) % 16
        address, port = first_host(hosts), PORTS[steps_port % len(PORTS)]
    return Place(rank=int(rank), world=int(count), local_rank=int(local), address=address, port=port)


def first_host(nodes: str) -> str:
    """The first name in a Slurm node list: `gpu[007-010,012],cpu1` gives `gpu007`."""
    depth, name = 0, ""
    for letter in nodes:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            break
        name += letter
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name)


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes logs, reports and checkpoints."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_gpu() -> int:
    """Which of the GPUs that this process sees is its own; where each task is shown one alone, that is the first."""
    seen = torch.cuda.device_count()
    return 0 if seen == 1 else local_rank()


def everyone() -> ProcessGroup | None:
    """The group of all processes, None where there is only one."""
    return dist.group.WORLD if world_size() > 1 else None


@contextmanager
def joined(patience: timedelta = PATIENCE) -> Iterator[None]:
    """Form the group that the launcher, torchrun or srun, started this process for.

    Raises AbsentError when the others do not come in time.
    """
    told = None if dist.is_initialized() else place(os.environ)
    if told is None:
        yield
        return
    # torch and DeepSpeed read these, which srun does not set.
    os.environ.update(
        RANK=str(told.rank),
        WORLD_SIZE=str(told.world),
        LOCAL_RANK=str(told.local_rank),
        MASTER_ADDR=told.address,
        MASTER_PORT=str(told.port),
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu())
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=patience)
    except dist.DistError as error:
        raise AbsentError(
            f"process {told.rank} of {told.world} cannot meet the others at {told.address}:{told.port}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def any_of(flag: bool) -> bool:
    """Whether it is true of any process; all get the same answer."""
    if world_size() == 1:
        return flag
    told = torch.tensor([float(flag)])
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def total_of(number: int) -> int:
    """The sum over all processes."""
    if world_size() == 1:
        return number
    told = torch.tensor([number])
    dist.all_reduce(told)
    return int(told)


def mean_over_processes(value: Tensor) -> Tensor:
    """A number that each process has of its own part of the batch, as that of the whole; without gradient."""
    if world_size() == 1:
        return value.detach()
    told = value.detach().clone()
    dist.all_reduce(told)
    return told / world_size()


def from_main(value: Told) -> Told:
    """What the first process has, in every process."""
    if world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]


def gathered(value: Told) -> list[Told]:
    """What each process has, by rank, in all of them; for small things."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows that each process has, any number of them, by rank, in all processes; on the CPU.

    They travel in pieces into their place, so nothing but the result is there twice.
    """
    if world_size() == 1:
        return rows
    shapes = gathered(tuple(rows.shape))
    width = next((shape[1:] for shape in shapes if shape[0]), tuple(rows.shape[1:]))  # a process may have no row
    found = rows.new_empty(sum(shape[0] for shape in shapes), *width)
    for source, part in enumerate(found.split([shape[0] for shape in shapes])):
        if source == rank():
            part.copy_(rows)
        for start in range(0, len(part), PIECE):
            dist.broadcast(part[start : start + PIECE], source)
    return found


@contextmanager
def main_first() -> Iterator[None]:
    """The first process does what is inside before the others begin; when it fails, so do they."""
    if not is_main() and any_of(False):
        raise InputError("the first process stopped; it says why")
    failed = True
    try:
        yield
        failed = False
    finally:
        if is_main():
            any_of(failed)
