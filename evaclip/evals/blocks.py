"""Work cut into blocks of fixed size: what several processes share, what an interruption keeps, what is reused.

Block b is numbers b * size to (b + 1) * size - 1, and whole blocks go to processes in turn. A block is the same
computation wherever it runs, so one, two or four processes find the same bits. Blocks of features lie in a cache, each
in a file of its own, from which an interrupted evaluation goes on and a later one starts.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evaclip.distributed import gathered, rows_of_all
from evaclip.encoder import Encoder

# This process's number, and how many share the work.
Share = tuple[int, int]
ALONE: Share = (0, 1)


@dataclass(frozen=True)
class Cache:
    """A folder of features of a model, which is known by its `Encoder.towers_id`."""

    folder: Path
    towers: str


def cache_of(encoder: Encoder, folder: Path) -> Cache:
    """The cache in a folder for a model; reads all weights once."""
    return Cache(folder, encoder.towers_id)


@dataclass(frozen=True)
class Block:
    """The features of some images or captions."""

    numbers: np.ndarray
    """int64: those that have a feature."""
    features: Float[Tensor, "rows dim"]
    """Unit rows, float32, on the CPU."""
    bad: dict[int, str]
    """Those that have none, with the reason."""


def blocks_of(count: int, size: int, share: Share) -> list[range]:
    """The blocks of this process."""
    rank, ranks = share
    return [range(at, min(at + size, count)) for at in range(rank * size, count, ranks * size)]


def kept_blocks(
    blocks: Sequence[range], folder: Path | None, computed: Callable[[list[range]], Iterable[Block]]
) -> Iterator[tuple[Block, bool]]:
    """Each block, and whether it was in the folder: first those that are there, then the others as they are computed.

    `folder`: None keeps nothing.
    """
    missing = []
    for numbers in blocks:
        found = _load(folder, numbers)
        if found is None:
            missing.append(numbers)
        else:
            yield found, True
    for block in computed(missing) if missing else ():
        if folder is not None:
            _save(folder, block)
        yield block, False


def whole(blocks: Iterable[Block], share: Share) -> Block:
    """The blocks of all processes as one, ordered by number; every process gets it."""
    found = [block for block in blocks]
    good = [block for block in found if len(block.numbers)]
    numbers = np.concatenate([block.numbers for block in good]) if good else np.zeros(0, np.int64)
    features = torch.cat([block.features for block in good]) if good else torch.zeros(0, 1)
    bad = {number: reason for block in found for number, reason in block.bad.items()}
    if share[1] > 1:
        told = gathered((numbers, bad))
        numbers = np.concatenate([part for part, _ in told])
        bad = {number: reason for _, part in told for number, reason in part.items()}
        features = rows_of_all(features)
    order = numbers.argsort(kind="stable")
    return Block(numbers[order], features[torch.from_numpy(order)], dict(sorted(bad.items())))


def in_blocks(
    part: Callable[[range], Shaped[Tensor, "..."]], count: int, size: int, share: Share
) -> Shaped[Tensor, "..."]:
    """What `part` finds for the numbers of each block, one after the other, on the CPU; every process gets all of it.

    For small things such as ranks: one number, or a few, of each row.
    """
    own = {numbers.start: part(numbers).cpu() for numbers in blocks_of(count, size, share)}
    told = gathered(own) if share[1] > 1 else [own]
    found = {start: rows for one in told for start, rows in one.items()}
    return torch.cat([found[start] for start in sorted(found)])


def _path(folder: Path, first: int) -> Path:
    return folder / f"{first:09}.safetensors"


def _save(folder: Path, block: Block) -> None:
    first = int(min([*block.numbers.tolist(), *block.bad]))
    folder.mkdir(parents=True, exist_ok=True)
    about = {"bad": json.dumps(block.bad), "sha256": _hash(block.features)}
    beside = _path(folder, first).with_suffix(
        f".new-{secrets.token_hex(4)}"
    )  # another command may write the same block
    save_file({"numbers": torch.from_numpy(block.numbers), "features": block.features.contiguous()}, beside, about)
    beside.replace(_path(folder, first))


def _load(folder: Path | None, numbers: range) -> Block | None:
    """A block from the cache, None when it is not there, not whole, or not the same bits that were written."""
    if folder is None or not _path(folder, numbers[0]).is_file():
        return None
    try:
        with safe_open(_path(folder, numbers[0]), "pt") as stored:
            about = stored.metadata() or {}
            found = Block(
                stored.get_tensor("numbers").numpy(),
                stored.get_tensor("features"),
                {int(number): reason for number, reason in json.loads(about["bad"]).items()},
            )
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    complete = len(found.numbers) + len(found.bad) == len(numbers) and _hash(found.features) == about.get("sha256")
    return found if complete else None


def _hash(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
