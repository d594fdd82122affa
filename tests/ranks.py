"""Runs a function in several processes that form a gloo group, as ranks of a training job do.

The processes are forked from a server that has imported torch once, so that a test pays for the import only once.
"""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

# Longest that a group of ranks may take, in seconds.
LIMIT = 400


def in_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `world` processes at once; its results by rank, or the first traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "timm", "deepspeed", "evaclip.train"])
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(rank, world, Path(folder), queue, function, _packed(arguments)))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            found = dict(_answers(queue, ranks))
        finally:
            for process in ranks:
                process.kill()
    broken = [result for result in found.values() if isinstance(result, _Broken)]
    assert not broken, broken[0].text
    return [found[rank] for rank in range(world)]


def _answers(queue: Any, ranks: list[Any]) -> Iterator[tuple[int, Any]]:
    """An answer of each rank. Raises when one dies without any, or all is too slow."""
    deadline = time.monotonic() + LIMIT
    answered = 0
    while answered < len(ranks):
        try:
            rank, packed = queue.get(timeout=0.5)
            result = _unpacked(packed)
            answered += 1
            yield rank, result
            if isinstance(result, _Broken):
                return
        except Empty:
            dead = [number for number, process in enumerate(ranks) if process.exitcode not in (None, 0)]
            assert not dead, f"ranks {dead} died without a word"
            assert time.monotonic() < deadline, f"the ranks took more than {LIMIT} s"


class _Broken:
    """A rank's traceback."""

    def __init__(self, text: str) -> None:
        self.text = text


def _packed(value: Any) -> bytes:
    """As bytes: tensors would otherwise be shared, one file descriptor each, with a process that is about to end."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)


def _rank(rank: int, world: int, folder: Path, queue: Any, function: Callable[..., Any], arguments: bytes) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world, timeout=timedelta(seconds=180)
    )
    try:
        result = function(*_unpacked(arguments))
    except BaseException:
        result = _Broken(f"rank {rank}: {traceback.format_exc()}")
    queue.put((rank, _packed(result)))
    queue.close()
    queue.join_thread()
    os._exit(0)  # a rank that failed must not wait for the others in a collective
