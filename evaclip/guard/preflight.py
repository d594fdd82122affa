"""A look at every node before a run starts on it, in half a minute, instead of a slow or broken run after an hour.

Each process times a matrix product on its GPU; all of them time an all-reduce and compare clocks. The first process
of each node reads from the shards, and tries in the run's folder what checkpoints rely on: that the nodes see each
other's files, and that a renamed file is the old or the new one to whoever reads it meanwhile. What is found travels to
the first process, which prints one row for each node and one sentence for each fault, with the node's name.
"""

import os
import re
import secrets
import shutil
import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from evaclip.data.shards import DataConfig
from evaclip.distributed import gathered, is_main, local_rank, rank, world_size
from evaclip.engine import EngineConfig
from evaclip.errors import InputError
from evaclip.guard.probes import (
    all_reduce_gbs,
    clock_skew,
    gpu_name,
    listing,
    matmul_tflops,
    reading_mbs,
    watch_renames,
    write_trial,
)

Value = TypeVar("Value")

# Longest that the processes wait for one of them.
PATIENCE = timedelta(minutes=5)
# A GPU below this share of the middle one's speed holds all of them back.
SLOW = 0.85
# Seconds between clocks from which the times in logs of several nodes contradict each other.
SKEW = 1.0


@dataclass(kw_only=True)
class Found:
    """What one process found; numbers are None where a fault came before them."""

    rank: int
    node: str
    leads: bool
    """Whether it is the first process of its node, which looks at the files."""
    device: str = "none"
    """`cuda`, `cpu`, or `none` where the one asked for is missing."""
    name: str = "none"
    """The GPU's name and its identity, which two processes must not share."""
    tflops: float | None = None
    reduced_gbs: float | None = None
    """Gigabytes a second through each process's link: 2 (n - 1) / n of the bytes over the time, as nccl-tests count."""
    shards_mbs: float | None = None
    """Megabytes a second, with whatever the operating system had at hand."""
    listing: str = ""
    """A hash of the shards' names and sizes."""
    skew: float = 0.0
    """Seconds ahead of the middle clock."""
    faults: list[str] = field(default_factory=list)

    def attempt(self, what: str, measure: Callable[[], Value]) -> Value | None:
        """The result; a failure becomes a fault, so that the other processes are not left waiting."""
        try:
            return measure()
        except (OSError, InputError, RuntimeError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            self.faults.append(f"{what}: {reason.splitlines()[0] if reason else type(error).__name__}")
            return None


def preflight(engine: EngineConfig, data: DataConfig, run_dir: Path) -> int:
    """Look, print what was found, and return the exit status: 0, or 2 when a node is not fit. All processes call it."""
    found = examined(engine, data, run_dir)
    faults = {one.rank: faults for one in found if (faults := [*one.faults, *compared(one, found)])}
    if is_main():
        Console(highlight=False, width=120).print(_table(found, faults))
        for one in found:
            for fault in faults.get(one.rank, ()):
                print(f"preflight: {one.node} (process {one.rank}): {fault}", flush=True)
        nodes = list(dict.fromkeys(one.node for one in found))
        unfit = [node for node in nodes if any(one.node == node and one.rank in faults for one in found)]
        print(
            f"preflight: not fit: {', '.join(unfit)}" if unfit else f"preflight: every node is fit ({len(nodes)})",
            flush=True,
        )
    return 2 if faults else 0


def examined(engine: EngineConfig, data: DataConfig, run_dir: Path) -> list[Found]:
    """What each process found, by rank. Raises InputError that names the nodes that do not answer."""
    own = Found(rank=rank(), node=os.environ.get("SLURMD_NODENAME", socket.gethostname()), leads=local_rank() == 0)
    everyone = gathered({"node": own.node, "trial": f".preflight-{secrets.token_hex(4)}"})
    trial = run_dir / everyone[0]["trial"]
    meet = Meeting([record["node"] for record in everyone])

    device = own.attempt("GPU", engine.resolved_device)
    if device is not None:
        own.device, own.name = device.type, gpu_name(device)
        own.tflops = own.attempt("matrix product", lambda: matmul_tflops(device))
    wrote = own.leads and own.attempt("run folder", lambda: write_trial(trial, own.rank)) is not None
    if own.leads and (shards := own.attempt("shards", lambda: listing(data))) is not None:
        places, own.listing = shards
        own.shards_mbs = own.attempt("shards", lambda: reading_mbs(places, own.rank))
    meet("reading the shards and writing to the run's folder")
    everyone = gathered({"device": own.device, "wrote": wrote})
    writers = [number for number, record in enumerate(everyone) if record["wrote"]]
    if wrote:
        own.attempt("run folder", lambda: watch_renames(trial, own.rank, writers[0]))
    meet("renaming files in the run's folder")
    on_gpus = device if device and all(record["device"] == "cuda" for record in everyone) else torch.device("cpu")
    own.reduced_gbs = own.attempt("all-reduce", lambda: all_reduce_gbs(on_gpus))
    meet("the all-reduce")
    own.skew = clock_skew()
    found = [Found(**record) for record in gathered(vars(own))]
    if is_main():
        shutil.rmtree(trial, ignore_errors=True)
    return found


def compared(one: Found, everyone: Sequence[Found]) -> list[str]:
    """The faults of a process that show only beside the others."""
    faults = []
    speeds = [other.tflops for other in everyone if other.device == "cuda" and other.tflops is not None]
    if one.device == "cpu" and speeds:
        faults.append("sees no GPU, others do")
    if one.device == "cuda" and one.tflops is not None and one.tflops < SLOW * statistics.median(speeds):
        faults.append(f"its GPU reaches {one.tflops:.3g} TFLOP/s, the middle one {statistics.median(speeds):.3g}")
    for other in everyone:
        if other.rank < one.rank and (other.node, other.name) == (one.node, one.name) and one.device == "cuda":
            faults.append(f"uses the same GPU as process {other.rank}")
    leaders = [other for other in everyone if other.leads and other.listing]
    usual = statistics.mode(other.listing for other in leaders) if leaders else ""
    if one.leads and one.listing and one.listing != usual:
        faults.append("sees other shards than most nodes: names or sizes differ")
    if abs(one.skew) > SKEW:
        faults.append(f"its clock is {abs(one.skew):.1f} s {'ahead' if one.skew > 0 else 'behind'}")
    return faults


class Meeting:
    """A point that all processes pass together, and that tells the nodes of those that do not come."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """`nodes`: the node of each process, by rank."""
        self.nodes = nodes
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def __call__(self, what: str) -> None:
        """Wait for all, PATIENCE at most. Raises InputError with the names of the nodes that did not finish `what`."""
        if not isinstance(self._group, dist.ProcessGroup):
            return
        try:
            dist.monitored_barrier(self._group, PATIENCE, wait_all_ranks=True)
        except RuntimeError as error:
            late = re.search(r"[Rr]anks? ([\d, ]+?) failed to pass", str(error))
            numbers = [int(number) for number in re.findall(r"\d+", late[1])] if late else []
            who = ", ".join(f"{self.nodes[number]} (process {number})" for number in numbers) or "a process"
            raise InputError(f"preflight: {who} did not finish {what} in {PATIENCE.total_seconds():.0f} s") from None


def _table(found: Sequence[Found], faults: dict[int, list[str]]) -> Table:
    """One row for each node, with the worst of its processes."""

    def least(ours: Sequence[Found], name: str) -> str:
        values = [value for one in ours if (value := getattr(one, name)) is not None]
        return f"{min(values):.3g}" if values else "-"

    table = Table("", "node", "processes", "device", title="preflight: the slowest of each node")
    for column in ("matmul TFLOP/s", "all-reduce GB/s", "shards MB/s", "clock ms"):
        table.add_column(column, justify="right")
    for node in dict.fromkeys(one.node for one in found):
        ours = [one for one in found if one.node == node]
        names = {one.name.rsplit(" ", 1)[0] for one in ours}
        table.add_row(
            "FAIL" if any(one.rank in faults for one in ours) else "ok",
            node,
            str(len(ours)),
            ", ".join(sorted(names)),
            least(ours, "tflops"),
            least(ours, "reduced_gbs"),
            least(ours, "shards_mbs"),
            f"{1000 * max((one.skew for one in ours), key=abs):+.1f}",
        )
    return table
