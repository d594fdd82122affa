"""Where this process stands among its peers, and the few things they tell each other. One process needs no group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from evaclip.errors import InputError

# Longest that a process waits for the others; an evaluation on the first one takes minutes.
PATIENCE = timedelta(minutes=60)


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
    """This process's number on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def everyone() -> ProcessGroup | None:
    """The group of all processes, None where there is only one."""
    return dist.group.WORLD if world_size() > 1 else None


@contextmanager
def joined() -> Iterator[None]:
    """Form the group that the launcher, torchrun or one that sets the same variables, started this process for."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set but not {', '.join(missing)}: start several processes with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
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


def gathered(value: Any) -> list[Any]:
    """What each process has, by rank, on all of them; small things, on the CPU."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def from_main(value: Any) -> Any:
    """What the first process has, on all of them; a small thing, on the CPU."""
    if world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


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
